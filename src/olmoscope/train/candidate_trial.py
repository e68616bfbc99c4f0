"""Whether candidates are faster than the exact product on this machine: the first steps of a run time both.

On a processor without a fast 8-bit product, candidates cost more than they save. The trial trains on the exact codes,
so no weight depends on the clock before the verdict. The verdict is written into the run folder before the next step,
so a run that is killed and resumed keeps it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TRIAL_STEPS = 4

Codes = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Verdict:
    """The result of a trial.

    Attributes:
        exact_ms, candidates_ms: milliseconds to encode a batch, the minimum over the trial's steps.
    """

    exact_ms: float
    candidates_ms: float

    @property
    def candidates_win(self) -> bool:
        """Whether the candidates were faster."""
        return self.candidates_ms < self.exact_ms

    def __str__(self) -> str:
        times = (f"encoding takes {self.candidates_ms:.1f} ms a batch with 8-bit candidates, {self.exact_ms:.1f} ms by "
                 "the exact product")
        if self.candidates_win:
            return f"{times}: candidates are used"
        return f"warning: {times}: candidates lose here, so the exact product is used (leave out train.candidates)"


class Trial:
    """Times both ways on the same batches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: list[tuple[float, float]] = []

    def encode(self, exact: Callable[[], Codes], candidates: Callable[[], Codes]) -> tuple[Codes, Codes]:
        """Encode a batch both ways; return the exact codes and those of the candidates."""
        codes, exact_seconds = self._timed(exact)
        rough, candidate_seconds = self._timed(candidates)
        self._seconds.append((exact_seconds, candidate_seconds))
        return codes, rough

    def verdict(self) -> Verdict:
        """The verdict of the steps so far. The minimum time of each way counts: the first call compiles, and other
        processes can only add time."""
        exact, candidates = (1e3 * min(times) for times in zip(*self._seconds, strict=True))
        return Verdict(exact, candidates)

    def _timed(self, encode: Callable[[], Codes]) -> tuple[Codes, float]:
        self._wait()
        started = time.perf_counter()
        codes = encode()
        self._wait()
        return codes, time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
