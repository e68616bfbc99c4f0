"""Questions to an OpenAI-compatible endpoint, many at once: cached, paced, retried and counted.

    with ChatClient(endpoint, cache, budget, Limits(concurrency=8)) as client:
        answers = client.ask(questions)        # in their order, each an Answer or a Failure

After a temporary failure (429, 5xx, a dropped connection, silence), the client asks again after a wait that doubles, or
after the wait that the server names. A permanent one (a wrong key, an unknown model) ends the run with one line.
Everything runs on one event loop, in a thread of its own, so that an interrupt ends it at once. Any number of threads
may call `ask`.
"""

import asyncio
import email.utils
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from olmoscope.errors import UserError
from olmoscope.labelling.budget import Budget
from olmoscope.labelling.cache import AnswerCache, canonical, key_of
from olmoscope.labelling.endpoint import (
    KEY_VARIABLE,
    A,
    Answer,
    Dialect,
    Endpoint,
    Failure,
    Form,
    Question,
    completion_text,
    read_answer,
    server_message,
    usage_of,
)
from olmoscope.units import format_seconds

ATTEMPTS = 8
"""How often a question is asked, if its failures are temporary."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second attempt, and at most before a later one."""
MOST_PATIENCE = 3600.0
"""The total seconds for which a server may make a question wait, by `Retry-After`."""
LONG_PAUSE = 30.0
"""Pauses of at least this many seconds are reported to the user."""
LOST_IN_A_ROW = 10
"""After this many questions in a row without an answer, the endpoint counts as gone."""
LARGEST_ANSWER = 2_000_000
"""Bytes."""
CLAIM_POLL = 0.2
"""Seconds between two checks whether another run has its answer."""
_CAN_PASS = {408, 409, 425, 429}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much to ask of an endpoint at a time."""

    concurrency: int = 8
    """Requests in flight."""
    per_minute: float | None = None
    """The most requests per minute; None for no limit."""
    timeout: float = 120.0
    """A request fails after this many seconds without a byte."""


class _PassingError(Exception):
    """A temporary failure; its text says which."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class ChatClient:
    """Asks an endpoint questions. A context manager; leaving it drops the requests in flight.

    Attributes:
        asked: answers that the endpoint gave.
        cached: answers that were in the cache.
        retries: attempts that failed temporarily, by reason.
        failures: questions without a usable answer, by reason.
    """

    def __init__(self, endpoint: Endpoint, cache: AnswerCache, budget: Budget, limits: Limits = Limits(),
                 form: Form | None = None) -> None:
        """
        Args:
            form: how to ask for answers. None: by a JSON schema or, if the server refuses that, in a simpler form; a
                warning says so.
        """
        self.endpoint, self.budget = endpoint, budget
        self.asked = self.cached = 0
        self.retries: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self._cache, self._limits, self._may_change_form = cache, limits, form is None
        self._dialect = Dialect(form or "schema")
        self._in_flight: dict[str, asyncio.Future[str | Failure]] = {}
        self._next_start = 0.0
        self._lost = 0
        self._stopped: UserError | None = None
        self._gate = asyncio.Semaphore(limits.concurrency)
        if endpoint.sends_key_in_clear:
            log.warning("%s is sent to %s without encryption; use https", KEY_VARIABLE, endpoint.url)
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        self._http = httpx2.AsyncClient(
            headers=headers, timeout=limits.timeout, follow_redirects=False,
            limits=httpx2.Limits(max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the requests in flight and end the thread; threads that wait in `ask` get a `CancelledError`."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._wind_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _wind_up(self) -> None:
        mine = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not mine]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    def ask(self, questions: Sequence[Question[A]]) -> list[Answer[A] | Failure]:
        """Answers to questions, in their order.

        Raises:
            UserError: the endpoint refuses what it is asked, or does not answer any more.
            BudgetSpentError: the next question might exceed the budget; answers so far are kept.
            concurrent.futures.CancelledError: the client was closed.
        """
        future = asyncio.run_coroutine_threadsafe(self._ask_all(questions), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _ask_all(self, questions: Sequence[Question[A]]) -> list[Answer[A] | Failure]:
        # Requests in flight are paid for, so an error waits until the other questions have their answers.
        answers = await asyncio.gather(*map(self._ask, questions), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _ask(self, question: Question[A]) -> Answer[A] | Failure:
        text = canonical({"endpoint": self.endpoint.url, "model": self.endpoint.model, "prompt": question.prompt,
                          "answer": question.answer.__name__, "longest": question.longest})
        key = key_of(text)
        while (flying := self._in_flight.get(key)) is not None:  # the same question from another thread
            await asyncio.wait([flying])
        flying = self._in_flight[key] = self._loop.create_future()
        try:
            found = await self._found(key, text, question)
        finally:
            del self._in_flight[key]
            flying.cancel()
        answer = found if isinstance(found, Failure) else read_answer(found, question)
        if isinstance(answer, Failure):
            self.failures[answer.reason] += 1
        return answer

    async def _found(self, key: str, text: str, question: Question[Any]) -> str | Failure:
        """The completion of a question: from the cache, else from the endpoint, else from another run that asked it."""
        while (kept := self._cache.get(key)) is None and not self._cache.claim(key):
            await asyncio.sleep(CLAIM_POLL)
        if kept is not None:
            self.cached += 1
            return kept
        try:
            kept = self._cache.get(key)  # another run may have answered between the look and the claim
            if kept is not None:
                self.cached += 1
                return kept
            completion = await self._insist(question)
            if isinstance(completion, str):
                self._cache.put(text, completion)
                self.asked += 1
            return completion
        finally:
            self._cache.release(key)

    async def _insist(self, question: Question[Any]) -> str | Failure:
        """Ask until there is an answer or a refusal, or no attempt is left."""
        reserved = self.budget.estimate(question.prompt, question.longest)
        self.budget.reserve(reserved)
        settled = False
        try:
            attempt, patience, reason = 0, MOST_PATIENCE, ""
            while attempt < ATTEMPTS:
                try:
                    completion = await self._attempt(question)
                except _PassingError as trouble:
                    reason = str(trouble)
                    self.retries[reason] += 1
                    if trouble.wait and trouble.wait <= patience:  # it is up, and says when: this is not an attempt
                        patience -= trouble.wait
                        self._pause(trouble.wait)
                        continue
                    attempt += 1
                    if attempt < ATTEMPTS:  # so that not all questions come at the same moment
                        await asyncio.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**(attempt - 1)) * random.uniform(0.5, 1))
                    continue
                if isinstance(completion, str):
                    self._lost = 0
                    self.budget.settle(reserved, question.prompt, usage_of(completion))
                    settled = True
                return completion
            self._lost += 1
            if self._lost >= LOST_IN_A_ROW:
                self._stopped = UserError(
                    f"{self.endpoint.url} has not answered {self._lost} questions in a row, each asked {ATTEMPTS} "
                    f"times (the last failure: {reason}); check that it is up, and run the same command again: answers "
                    "so far are kept")
                raise self._stopped
            return Failure(f"no answer: {reason}", may_pass=True)
        finally:
            if not settled:
                self.budget.free(reserved)

    def _pause(self, seconds: float) -> None:
        """Start no request for this long."""
        until = time.monotonic() + seconds
        if seconds >= LONG_PAUSE and until > self._next_start + LONG_PAUSE:
            log.warning("%s asks us to wait %s", self.endpoint.url, format_seconds(seconds))
        self._next_start = max(self._next_start, until)

    async def _turn(self) -> None:
        """Wait until a request may start: because of the rate limit, or of a pause that the server asked for."""
        while (now := time.monotonic()) < self._next_start:
            await asyncio.sleep(self._next_start - now)
        if self._limits.per_minute is not None:
            self._next_start = time.monotonic() + 60 / self._limits.per_minute

    async def _attempt(self, question: Question[Any]) -> str | Failure:
        """One request, or as many as are needed to learn the server's dialect."""
        while True:
            dialect = self._dialect
            async with self._gate:
                if self._stopped:
                    raise self._stopped
                await self._turn()
                status, headers, text = await self._post(dialect.body(self.endpoint.model, question))
            if status == 200:
                completion = completion_text(text)
                if completion is None:
                    raise _PassingError("the answer is no chat completion")
                return completion
            message, code = server_message(text)
            if (status in _CAN_PASS or status >= 500) and code != "insufficient_quota":
                raise _PassingError(f"status {status}", _named_wait(headers))
            if status in (400, 422):
                changed = dialect.after_refusal(message, self._may_change_form)
                if changed is not None:
                    if self._dialect == dialect:  # else another question has learned it meanwhile
                        self._dialect = changed[0]
                        log.warning("%s refuses this way of asking (%s); from now on: %s", self.endpoint.url,
                                    message, changed[1])
                    continue
                if self.asked:  # it accepts questions, but not this one: too long, or its text is not allowed
                    return Failure(f"the endpoint refused the question (status {status})", may_pass=True)
            self._stopped = UserError(self._refusal(status, message))
            raise self._stopped

    async def _post(self, body: dict[str, Any]) -> tuple[int, httpx2.Headers, str]:
        received = bytearray()
        try:
            async with self._http.stream("POST", self.endpoint.chat, json=body) as response:
                async for chunk in response.aiter_bytes():
                    received += chunk
                    if len(received) > LARGEST_ANSWER:
                        raise _PassingError("the answer is larger than any answer may be")
        except httpx2.TimeoutException as error:
            raise _PassingError("no answer in time") from error
        except httpx2.TransportError as error:
            raise _PassingError(f"the connection failed ({type(error).__name__})") from error
        except httpx2.DecodingError as error:
            raise _PassingError("the answer cannot be decoded") from error
        return response.status_code, response.headers, self.endpoint.hide_key(received.decode("utf-8", "replace"))

    def _refusal(self, status: int, message: str) -> str:
        where = self.endpoint.chat
        if status in (401, 403):
            advice = (f"check the key in {KEY_VARIABLE}" if self.endpoint.key
                      else f"put its key into the environment variable {KEY_VARIABLE}")
        elif status == 404:
            advice = f"check the address (it usually ends in /v1) and the model's name, {self.endpoint.model}"
        elif 300 <= status < 400:
            advice = "it sends us elsewhere, and the key is not sent on: give the final address"
        elif status == 429:
            advice = "the account has no quota left: pay, or raise its limit"
        else:
            advice = f"see whether the model {self.endpoint.model} takes chat completions"
        return f"{where} refuses (status {status}: {message}); {advice}"


def _named_wait(headers: httpx2.Headers) -> float | None:
    """The seconds of `Retry-After`: a number, or a date. Source: RFC 9110, section 10.2.3."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return seconds if 0 <= seconds < float("inf") else None

