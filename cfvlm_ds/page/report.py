"""HTML page of a Markdown report: one file without scripts, stored beside the pictures that it shows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from jinja2 import Environment
from markdown_it import MarkdownIt
from markupsafe import Markup

from cfvlm_ds.core.files import replace

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid #d9dee4; padding-top: 1rem; }
nav a { display: inline-block; margin-right: 1.5rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #d9dee4; text-align: left; overflow-wrap: anywhere; }
th, td:first-child { overflow-wrap: normal; }
img { max-width: 100%; } code { background: #f5f7f9; padding: 0 .2rem; } a { color: #1f5799; }
</style>
</head>
<body>
{% if headings|length > 2 %}<nav>{% for part, name in headings.items() %}<a href="#{{ part }}">{{ name }}</a> {% endfor %}</nav>{% endif %}
{{ body }}
</body>
</html>
"""


def write_report_page(path: Path, title: str, markdown: str) -> None:
    """Write Markdown as an HTML page, with links to the headings if there are more than two. HTML in the Markdown is shown as text.

    Raises OSError if the page cannot be written.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens, headings = parser.parse(markdown), dict[str, str]()
    for token, content in pairwise(tokens):
        if token.type == "heading_open" and token.tag in ("h1", "h2"):
            token.attrSet("id", f"part-{len(headings)}")
            headings[f"part-{len(headings)}"] = "".join(child.content for child in content.children or ())
    body = parser.renderer.render(tokens, parser.options, {})
    page = Environment(autoescape=True).from_string(_PAGE).render(title=title, headings=headings, body=Markup(body))
    replace(path, page.encode())
