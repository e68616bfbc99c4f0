"""`--ranks N`: this same command in several processes of this machine."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from olmoscope.errors import AnotherRankFailedError, UserError

if TYPE_CHECKING:
    from olmoscope.distributed.launch import World

SHARED_WORK = "what is finished is kept, and the same command goes on from there"
"""What a killed process of `evaluate` or `index` leaves."""


def refuse_started(count: int) -> None:
    """Processes that a launcher started are not started again.

    Raises:
        UserError: torchrun or srun started this process.
    """
    from olmoscope.distributed.place import place_from_environment

    if told_by := place_from_environment(os.environ).told_by:
        raise UserError(f"--ranks {count}: {told_by} started this process as one of several already; leave out one of "
                        "the two")


def join_quietly() -> "World":
    """Join the other processes that a launcher started; the first alone speaks.

    Raises:
        UserError: the others do not come.
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
    """The first process to fail says why, among those that `start_here` started and that wait for no other.

    Raises:
        AnotherRankFailedError: another one has said it.
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
    """Give this command, without `--ranks`, to so many processes, and wait for them.

    Args:
        device: the recipe's.
        kept: what a killed one leaves, and what to do, for the message.

    Raises:
        UserError: a launcher started this process, the machine has fewer GPUs, or a process was killed.
        SystemExit: one ended with an error, which it has told.
        KeyboardInterrupt: this process was told to stop, and the others were.
    """
    import torch

    from olmoscope.distributed.launch import start
    from olmoscope.model.load import pick_device

    refuse_started(count)
    if pick_device(device).type == "cuda" and count > torch.cuda.device_count():
        raise UserError(f"--ranks {count}: this machine has {torch.cuda.device_count()} GPUs, one for each process; "
                        "start no more than that, or set device=cpu")
    arguments = sys.argv[1:]
    place = next(number for number, argument in enumerate(arguments) if argument.partition("=")[0] == "--ranks")
    del arguments[place : place + (1 if "=" in arguments[place] else 2)]
    start(count, arguments, kept)
