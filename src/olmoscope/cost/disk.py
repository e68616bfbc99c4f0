"""A disk: how much of an output folder is on it already, and its read rate, measured in the way in which training reads
a store: blocks in random order, several at a time."""

import contextlib
import os
import random
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from olmoscope.activations.stream.rounds import READERS
from olmoscope.files import files_below

BLOCK = 2**21
"""Bytes of a block: 256 rows of width 4096 in bfloat16."""
BLOCKS = 128
ROOM = 2 * BLOCK * BLOCKS
"""The free space below which nothing is measured, in bytes."""


def read_rate(folder: Path) -> float | None:
    """Measure how fast the disk of a folder reads what is not cached in memory. This writes a temporary file of 268 MB.

    Returns:
        Bytes per second. None if the system cannot drop its cache (`posix_fadvise` is missing, as on macOS), if the
        disk lacks room, or if the folder is not writable.
    """
    writable = os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= ROOM
    if not writable or not hasattr(os, "posix_fadvise"):
        return None
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(BLOCKS):
            file.write(os.urandom(BLOCK))
        os.fsync(file.fileno())  # only what is on the disk can leave memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        order = random.Random(0).sample(range(BLOCKS), BLOCKS)
        began = time.perf_counter()
        with ThreadPoolExecutor(READERS) as readers:
            read = list(readers.map(lambda block: len(os.pread(file.fileno(), BLOCK, block * BLOCK)), order))
        took = time.perf_counter() - began
    return sum(read) / took


def present_bytes(out: Path) -> int:
    """Bytes of an output folder's stores, runs and release; a file with two names counts once."""
    files = {}
    for part in ("store", "runs", "release"):
        for path in files_below(out / part):
            with contextlib.suppress(FileNotFoundError):  # a process at work may have renamed it since
                status = path.stat()
                files[status.st_dev, status.st_ino] = status.st_size
    return sum(files.values())
