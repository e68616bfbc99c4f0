"""The folder where olmoscope keeps its own downloads."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$OLMOSCOPE_CACHE`, else `olmoscope` in `$XDG_CACHE_HOME`, else `~/.cache/olmoscope`."""
    if named := os.environ.get("OLMOSCOPE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "olmoscope"
