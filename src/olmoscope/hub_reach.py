"""A hub that does not answer is asked once per process, and for a bounded time.

huggingface_hub tries each request up to six times with growing pauses, and transformers requests several files that a
model need not have; together, a network that is down would cost minutes, and some requests have no time limit at all.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

from olmoscope.progress import console

LISTING = 3
"""How many times longer than a file's header the description of a repository, which lists its files, may take."""

TRIED_AGAIN = (408, 429, 500, 502, 503, 504)
"""Statuses after which huggingface_hub tries most requests again, with growing pauses."""


def no_answer() -> type[Exception]:
    """The base class of errors without an answer: from httpx or httpx2, depending on huggingface_hub's version."""
    from huggingface_hub import errors

    return cast(type[Exception], errors.HfHubHTTPError.__bases__[0])


@contextlib.contextmanager
def asking_hub() -> Iterator[None]:
    """In the block, huggingface_hub and transformers work from their cache once the hub has failed to answer.

    That holds for all such blocks of the process: after the first request without an answer, they start in the
    offline mode of these libraries. The time limit for a first answer is `HF_HUB_ETAG_TIMEOUT` seconds (10 by default),
    and `LISTING` times as long for a description of a repository. A hub that has answered before is given the
    libraries' own retries. Outside the blocks, the libraries are as their user has set them.
    """
    from huggingface_hub import get_session

    _REACH.enter()
    try:
        client = get_session()
        if not isinstance(client.send, _Watched):
            client.send = _Watched(client.send)  # type: ignore[method-assign]
        yield
    finally:
        _REACH.leave()


def unanswered() -> str | None:
    """Why the hub's only request of this process got no answer; None if it was answered, or not asked."""
    return _REACH.reason


class _Reach:
    """What this process knows about the hub, and how many blocks of `asking_hub` are open."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.answered = False
        self._blocks = 0
        self._offline = False
        self._told = False
        self._lock = threading.Lock()

    @property
    def inside(self) -> bool:
        """Whether a block is open."""
        return self._blocks > 0

    def enter(self) -> None:
        from huggingface_hub import constants

        with self._lock:
            if self._blocks == 0:
                self._offline = constants.HF_HUB_OFFLINE
            self._blocks += 1
            constants.HF_HUB_OFFLINE = self._offline or self.reason is not None

    def leave(self) -> None:
        from huggingface_hub import constants

        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                constants.HF_HUB_OFFLINE = self._offline

    def fail(self, reason: str) -> None:
        from huggingface_hub import constants

        with self._lock:
            if self._blocks and not self.answered:
                self.reason = reason
                constants.HF_HUB_OFFLINE = True

    def succeed(self) -> None:
        self.answered, self.reason = True, None

    def tell(self, status: int) -> None:
        """Say once per process why a request takes long."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            console.print(f"note: the hub answers with an error (status {status}); some requests are tried again for "
                          "half a minute", soft_wrap=True, highlight=False, markup=False)


_REACH = _Reach()


class _Watched:
    """`send` of huggingface_hub's client. After a failure it makes another client, which need not be watched."""

    def __init__(self, send: Callable[..., Any]) -> None:
        self._send = send

    def __call__(self, request: Any, **settings: Any) -> Any:
        from huggingface_hub import constants

        if not _REACH.inside or not str(request.url).startswith(constants.ENDPOINT):
            return self._send(request, **settings)
        if not _REACH.answered:
            longest = constants.HF_HUB_ETAG_TIMEOUT
            given = request.extensions.get("timeout", {})
            limits = {"connect": longest, "read": LISTING * longest, "write": LISTING * longest, "pool": longest}
            request.extensions = dict(request.extensions) | {"timeout": {
                what: limit if given.get(what) is None else min(limit, given[what]) for what, limit in limits.items()}}
        try:
            answer = self._send(request, **settings)
        except no_answer() as error:
            _REACH.fail(str(error).strip().split("\n")[0] or type(error).__name__)
            raise
        _REACH.succeed()
        if answer.status_code in TRIED_AGAIN:
            _REACH.tell(answer.status_code)
        return answer
