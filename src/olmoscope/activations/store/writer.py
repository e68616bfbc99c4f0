"""Writing in the background: a bounded queue that blocks, never drops, and never hides an error.

There are as many buffers as the queue has places. A caller takes a free buffer to fill it, and waits while all buffers
are being written. So memory is bounded, and a disk slower than the model slows the model down.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

GRACE = 3.0
"""Seconds that a write in progress may still take when the run stops early."""

Buffer = TypeVar("Buffer")


class Stopped(Exception):
    """The run stopped during a write; this exception never leaves this file."""


class Writer(Generic[Buffer]):
    """One thread that writes filled buffers in the order in which they come. Use it as a context manager.

    At the end of its block, it waits for all writes. If the block ends by an exception (such as Ctrl-C), the write in
    progress gets `GRACE` seconds and is then abandoned. What was not written by then is missing, not damaged.
    """

    def __init__(self, buffers: list[Buffer]) -> None:
        self._free = deque(buffers)
        self._writing: deque[tuple[Future[None], Buffer]] = deque()
        self._thread = ThreadPoolExecutor(1, "writer")
        self._stop = threading.Event()

    def buffer(self) -> Buffer:
        """A free buffer; waits for the oldest write if there is none.

        Raises:
            Exception: what that write raised.
        """
        if not self._free:
            self._finish_oldest()
        return self._free.popleft()

    def write(self, buffer: Buffer, job: Callable[[Callable[[], None]], None]) -> None:
        """Queue a job that writes a buffer, which is free again afterwards.

        Args:
            job: takes a function to call now and then, which ends the job if the run has stopped.
        """
        self._writing.append((self._thread.submit(job, self._go_on), buffer))

    def check(self) -> None:
        """Raise what a finished write raised, without waiting for any."""
        while self._writing and self._writing[0][0].done():
            self._finish_oldest()

    def __enter__(self) -> "Writer[Buffer]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                while self._writing:
                    self._finish_oldest()
            else:
                wait([future for future, _ in self._writing], GRACE)
        finally:
            self._stop.set()
            self._thread.shutdown(cancel_futures=True)

    def _finish_oldest(self) -> None:
        future, buffer = self._writing[0]
        future.result()
        self._writing.popleft()
        self._free.append(buffer)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise Stopped
