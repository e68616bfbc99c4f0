"""Where a thing came from: written into everything that is made."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from olmoscope import __version__

LIBRARIES = ("torch", "triton", "transformers", "peft", "tokenizers", "safetensors", "numpy", "numba")


def provenance(dated: bool = True) -> dict[str, Any]:
    """Versions (null where not installed), commit (of a source checkout, else null), platform and, unless not
    wanted, date, as JSON values."""
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
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file is in, with `+changes` if it differs from it."""
    here = Path(__file__).parent
    if not (here.parents[1] / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno").strip() else "")
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or a checkout without a commit
        return None
