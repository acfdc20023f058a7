"""The DeepSpeed versions that this folder was tested with."""

from __future__ import annotations

KNOWN = ">=0.19.8,<0.20"
"""The range of supported DeepSpeed versions, as in pyproject.toml."""


def unknown_version(installed: str) -> str | None:
    """Return a one-sentence warning if this package was not tested with the ``installed`` version of DeepSpeed, otherwise None."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        known = SpecifierSet(KNOWN).contains(Version(installed), prereleases=True)
    except InvalidVersion:  # a DeepSpeed source tree has no version
        known = False
    if known:
        return None
    return (
        f"DeepSpeed {installed} is installed, but the private interfaces in use were checked only in {KNOWN}; install "
        f"'deepspeed{KNOWN}', or compare cfvlm_ds/deepspeed_compat with its sources and run the tests"
    )
