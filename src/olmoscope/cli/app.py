"""The command line: each command parses its arguments, calls one function, and prints. Heavy imports wait until it
runs.

The commands are in one file per group: models.py, recipes.py, saes.py, labels.py, releases.py, stores.py.
"""

import errno
import logging
import os
import sys
from typing import Annotated

import typer

from olmoscope import __version__
from olmoscope.cli import labels, models, recipes, releases, saes, stores
from olmoscope.cli.interrupts import keep_interrupts
from olmoscope.errors import AnotherRankFailedError, UserError
from olmoscope.terminal import end_quietly_if_nobody_reads, prepare_streams, say

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="Train, evaluate, inspect and share sparse autoencoders (SAEs) of language models.")
for command in (recipes.demo, recipes.plan, models.model, models.fetch_model, recipes.collect, recipes.train,
                saes.evaluate, saes.inspect, saes.audit, saes.study, saes.index, labels.label, saes.browse,
                releases.export, releases.release, releases.pull, releases.validate, releases.import_checkpoint):
    app.command()(command)

store = typer.Typer(no_args_is_help=True, help="Inspect, check and repair activation stores.")
for store_command in (stores.info, stores.verify, stores.repair):
    store.command()(store_command)
app.add_typer(store, name="store")


def _show_version(asked: bool) -> None:
    if asked:
        say(f"olmoscope {__version__}")
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False) -> None:
    """Options that come before a command."""


def main() -> None:
    """Entry point of `olmoscope`: a user's mistake gives one line of text and exit status 1."""
    keep_interrupts()
    prepare_streams()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else it repeats each failed request; hub_reach.py says it once
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app(prog_name="olmoscope")  # also for `python -m olmoscope`
    except AnotherRankFailedError:
        sys.exit(1)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail("no space left on the disk; make room and run the same command again: finished work is kept")
    finally:
        end_quietly_if_nobody_reads()


def _fail(message: str) -> None:
    from olmoscope.progress import console

    console.quiet = False  # of several processes, only the first one prints until then
    console.print("error: ", style="bold red", end="")
    console.print(message, soft_wrap=True, highlight=False, markup=False, emoji=False)
    sys.exit(1)


if __name__ == "__main__":
    main()
