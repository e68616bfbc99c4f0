"""The candidate search (candidates.py) of an SAE whose latents are in shards: each shard has its own search.

A shard looks for its own top k, and widens its margin if it misses too many of them. The trial covers all shards, and
the times of the slowest rank count. Figures are sums of integers, so they do not depend on the number of ranks.
"""

from collections.abc import Sequence

import torch

from olmoscope.distributed.ranks import Ranks
from olmoscope.train.candidate_trial import Verdict
from olmoscope.train.candidates import EXACT, JUDGE_STEPS, CandidateSearch


class ShardedCandidates:
    """The searches of all shards. All ranks must call each method.

    Args:
        searches: the searches of this rank, in the order of its shards.
    """

    def __init__(self, searches: Sequence[CandidateSearch], ranks: Ranks) -> None:
        self.searches, self.ranks = searches, ranks

    def begin_trial(self) -> None:
        """As `CandidateSearch.begin_trial`."""
        for search in self.searches:
            search.begin_trial()

    @property
    def on_trial(self) -> bool:
        """As `CandidateSearch.on_trial`."""
        return self.searches[0].on_trial

    def verdict(self) -> Verdict:
        """The result of the trial: a rank's time is the sum over its shards."""
        verdicts = [search.verdict() for search in self.searches]
        times = [sum(verdict.exact_ms for verdict in verdicts), sum(verdict.candidates_ms for verdict in verdicts)]
        exact, candidates = self.ranks.gather(torch.tensor(times, dtype=torch.float64)).amax(dim=0).tolist()
        return Verdict(exact, candidates)

    def settle(self, verdict: Verdict) -> None:
        """As `CandidateSearch.settle`."""
        for search in self.searches:
            search.settle(verdict)

    def judge(self, steps: int) -> str | None:
        """As `CandidateSearch.judge`, for each shard."""
        if steps % JUDGE_STEPS:
            return None
        before = self._margins()
        for search in self.searches:
            search.judge(steps)
        changed: dict[int, list[str]] = {}
        for number, (margin, wider) in enumerate(zip(before, self._margins(), strict=True)):
            if margin != wider:
                changed.setdefault(wider, []).append(str(number))
        if not changed:
            return None
        now = [f"{'the exact product is used' if wider == EXACT else f'k + {wider} candidates are used'} in shards "
               + ", ".join(numbers) for wider, numbers in sorted(changed.items())]
        return (f"warning: at step {steps} the 8-bit candidates of some shards had missed too much of the top k; from "
                f"here on, {'; '.join(now)}")

    def take_found(self) -> float | None:
        """As `CandidateSearch.take_found`, over the top k of all shards."""
        counts = torch.stack([search.take_counts() for search in self.searches])
        checked, missed = self.ranks.gather(counts.sum(dim=0)).sum(dim=0).tolist()
        return 1 - missed / checked if checked else None

    @property
    def margin(self) -> int:
        """The largest margin of any shard; `EXACT` if no shard uses candidates any more."""
        return max(self._margins())

    def _margins(self) -> list[int]:
        """The margin of each shard of all ranks."""
        own = torch.cat([search.margin_1 for search in self.searches])
        return [int(margin) for margin in self.ranks.gather(own).flatten()]
