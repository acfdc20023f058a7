"""mkdocs hooks that add pages from outside docs/ to the site and convert links between pages.

In the source, links are relative to the file, so that they work in the repository. These hooks convert them to links on the site. A link to
a missing file, or a missing file named in backquotes, causes a warning, which `mkdocs build --strict` turns into an error.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md", "benchmarks/TRIALS.md")
HISTORY = ("CHANGELOG.md", "benchmarks/RESULTS.md", "benchmarks/TRIALS.md")
"""Pages that may name files that no longer exist."""

log = logging.getLogger("mkdocs.hooks.cfvlm_ds")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\(|src=\")([^)\s\"#]+)(#[^)\s\"]*)?")
_PATH = re.compile(r"`((?:cfvlm_ds|tests|slurm|examples|docs|benchmarks|ds_configs)/[\w./-]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ROOT_PAGES to the pages of docs/."""
    for page in ROOT_PAGES:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert links between files in the repository into links between pages, and warn about files that do not exist."""
    uri = page.file.src_uri
    if uri not in HISTORY:
        for named in _PATH.findall(markdown):
            if not (ROOT / named).exists():
                log.warning("%s names `%s`, which is not there", uri, named)
    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(lambda link: _relinked(link, uri), part) for part in parts)


def _relinked(link: re.Match[str], uri: str) -> str:
    """Convert one link between files in the repository into a link between pages of the site."""
    before, target, anchor = link[1], link[2], link[3] or ""
    if "://" in target or target.startswith("mailto:"):
        return link[0]
    source = uri if uri in ROOT_PAGES else f"docs/{uri}"
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (ROOT / found).is_file():
        log.warning("%s links to %s, which is not there", source, target)
    elif found in ROOT_PAGES or found.startswith("docs/"):
        there = found if found in ROOT_PAGES else found.removeprefix("docs/")
        return f"{before}{os.path.relpath(there, posixpath.dirname(uri) or '.')}{anchor}"
    else:
        log.warning("%s links to %s, which is no page; name it in backquotes", source, target)
    return link[0]
