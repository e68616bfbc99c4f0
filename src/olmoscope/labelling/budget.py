"""Tokens: what a run will take, what it has taken, and where it stops.

Only the server can count a model's tokens. Before it has answered, a prompt's tokens are estimated as its UTF-8 bytes
/ 3, which is more than English text has; later, by the bytes per token that the server's own counts give. The tokens
used are those in the answers' `usage`; if an answer has none, the estimate counts, and is reported separately.
"""

import math
import threading
from dataclasses import dataclass

BYTES_PER_TOKEN = 3.0
"""Used until the server's own counts are known."""
KNOWN_AFTER = 2000
"""Prompt tokens that the server must have counted before its bytes per token are used."""


class BudgetSpentError(Exception):
    """The next question might exceed the budget: the run stops here, and another run can continue."""


@dataclass(frozen=True)
class Tokens:
    """How many tokens, by kind."""

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def __sub__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)

    def __mul__(self, times: int) -> "Tokens":
        return Tokens(self.prompt * times, self.completion * times)

    def cost(self, per_million: tuple[float, float]) -> float:
        """In the currency of the prices of a million prompt tokens and a million completion tokens."""
        return (self.prompt * per_million[0] + self.completion * per_million[1]) / 1e6


class Budget:
    """Counts tokens for any number of threads.

    Attributes:
        limit: the most tokens of prompts and completions together; None for no limit.
        used: the tokens that the answers reported, and estimates for answers that reported none.
        unreported: answers without a usable report.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = Tokens()
        self.unreported = 0
        self._reserved = Tokens()
        self._counted_bytes = 0
        self._counted_tokens = 0
        self._lock = threading.Lock()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of prompts, as the server counts them once it has counted enough."""
        if self._counted_tokens < KNOWN_AFTER:
            return BYTES_PER_TOKEN
        return self._counted_bytes / self._counted_tokens

    def estimate(self, prompt: str, longest: int) -> Tokens:
        """Tokens of a question whose answer may have at most `longest`."""
        return Tokens(math.ceil(len(prompt.encode()) / self.bytes_per_token), longest)

    def has_room(self, wanted: Tokens) -> bool:
        """Whether this many more tokens are within the limit, counting those of questions in flight."""
        with self._lock:
            return self._fits(wanted)

    def reserve(self, wanted: Tokens) -> None:
        """Reserve tokens for a question.

        Raises:
            BudgetSpentError: the budget has too few left.
        """
        with self._lock:
            if not self._fits(wanted):
                raise BudgetSpentError
            self._reserved += wanted

    def settle(self, reserved: Tokens, prompt: str, reported: Tokens | None) -> None:
        """Replace the tokens reserved for a question by those of its answer.

        Args:
            reported: by the server; None: it did not say.
        """
        with self._lock:
            self._reserved -= reserved
            if reported is None:
                self.unreported += 1
                self.used += reserved
                return
            self.used += reported
            self._counted_bytes += len(prompt.encode())
            self._counted_tokens += reported.prompt

    def free(self, reserved: Tokens) -> None:
        """Give back the tokens reserved for a question that got no answer."""
        with self._lock:
            self._reserved -= reserved

    def _fits(self, wanted: Tokens) -> bool:
        return self.limit is None or (self.used + self._reserved + wanted).total <= self.limit
