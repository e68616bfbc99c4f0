"""What made a result; this is written into every result."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from olmoscope import __version__

LIBRARIES = ("torch", "triton", "transformers", "peft", "tokenizers", "safetensors", "numpy", "numba")


def provenance(dated: bool = True) -> dict[str, Any]:
    """Versions (null if not installed), commit (null if not a source checkout), platform and, if `dated`, the date,
    as JSON values."""
    date = {"date": datetime.now(UTC).isoformat(timespec="seconds")} if dated else {}
    return {
        "olmoscope": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        **date,
    }


def _version(name: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file is in, with `+changes` if the checkout has uncommitted changes."""
    here = Path(__file__).parent
    if not (here.parents[1] / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno").strip() else "")
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or a checkout without a commit
        return None
