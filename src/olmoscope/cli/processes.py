"""`--ranks N`: run the same command in several processes of this machine."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from olmoscope.errors import AnotherRankFailedError, UserError

if TYPE_CHECKING:
    from olmoscope.distributed.launch import World

SHARED_WORK = "finished work is kept; run the same command again to do the rest"
"""What a killed process of `evaluate` or `index` leaves, for a message."""


def refuse_started(count: int) -> None:
    """Refuse `--ranks` in a process that a launcher started.

    Raises:
        UserError: torchrun or srun started this process.
    """
    from olmoscope.distributed.place import place_from_environment

    if told_by := place_from_environment(os.environ).told_by:
        raise UserError(f"--ranks {count}: {told_by} already started this process as one of several; use only one of "
                        "the two")


def join_quietly() -> "World":
    """Join the other processes that a launcher started; only the first one prints.

    Raises:
        UserError: the others do not join in time.
    """
    from olmoscope.distributed.launch import join
    from olmoscope.progress import console

    world = join()
    console.quiet = not world.ranks.leads
    return world


def by_us() -> bool:
    """Whether `start_here` started this process."""
    from olmoscope.distributed.launch import BY_US
    from olmoscope.distributed.place import place_from_environment

    return BY_US in os.environ and bool(place_from_environment(os.environ).launcher)


@contextlib.contextmanager
def one_tells() -> Iterator[None]:
    """Let only the first process that fails say why, among processes that `start_here` started and that do not wait for
    each other.

    Raises:
        AnotherRankFailedError: another process has said why it failed.
    """
    from olmoscope.distributed.launch import BY_US

    try:
        yield
    except UserError as error:
        try:
            (Path(os.environ[BY_US]) / "told").touch(exist_ok=False)
        except FileExistsError:
            raise AnotherRankFailedError("another process failed") from error
        raise


def start_here(count: int, device: str, kept: str) -> None:
    """Run this command, without `--ranks`, in `count` processes, and wait for them.

    Args:
        device: the recipe's device.
        kept: for the message: what a killed process leaves, and what to do.

    Raises:
        UserError: a launcher started this process, the machine has fewer GPUs, or a process was killed.
        SystemExit: a process ended with an error, which it has printed.
        KeyboardInterrupt: this process received a signal, and has stopped the others.
    """
    import torch

    from olmoscope.distributed.launch import start
    from olmoscope.model.load import pick_device

    refuse_started(count)
    if pick_device(device).type == "cuda" and count > torch.cuda.device_count():
        raise UserError(f"--ranks {count}: this machine has {torch.cuda.device_count()} GPUs, and each process needs "
                        "one; start no more processes than that, or set device=cpu")
    arguments = sys.argv[1:]
    place = next(number for number, argument in enumerate(arguments) if argument.partition("=")[0] == "--ranks")
    del arguments[place : place + (1 if "=" in arguments[place] else 2)]
    start(count, arguments, kept)
