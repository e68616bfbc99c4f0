"""The command line. `main` is its entry point; app.py lists the commands."""

from olmoscope.cli.app import main

__all__ = ["main"]
