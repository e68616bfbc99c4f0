"""What one training step of an SAE in shards costs a rank: the bytes that it sends in train/sharded_step.py.

P ranks, B rows of a batch, b rows that a rank owns, D d_model, K places of a shard's codes, S shards of a rank, N
groups of latents that a rank has (1 without Matryoshka prefixes; train/nested.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from olmoscope.distributed.ranks import Ranks
from olmoscope.train.nested import prefix_ends
from olmoscope.train.sharded_loss import groups_of_ranks


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that a rank sends to others in one step, without those of the auxiliary loss and of `train.finish`."""

    selection: int
    """Candidates to the owners of rows, and counts back: `4 (B - b) S K + 4 (P - 1) b S`."""
    parts: int
    """Parts of the reconstruction, to the owners: `4 (B - b) N D`."""
    errors: int
    """Losses and e of all rows: `(P - 1) (8 + 4 D) ceil(B / P)`; of Matryoshka prefixes e of each group but the last to
    the ranks that have it: `4 b D` each."""
    bias: int
    """Parts of the gradient of b_pre: `4 (P - 1) D`, and twice that with Matryoshka prefixes."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.selection + self.parts + self.errors + self.bias


def step_traffic(rows: int, d_model: int, d_sae: int, k: int, shards: int, ranks: Ranks,
                 matryoshka: Sequence[float] = ()) -> StepTraffic:
    """The traffic of a TopK SAE. (For the threshold of a batch, BatchTopK sends 48 kB more to each other rank.)

    Args:
        rows: B.
        k: the k of the whole SAE.
        shards: the number of shards of the whole SAE.
        ranks: which rank it is, and how many share the SAE.
        matryoshka: shares of the latents that are SAEs of their own.
    """
    own, others, each = ranks.sizes(rows)[ranks.index], ranks.count - 1, shards // ranks.count
    places = min(k, -(-d_sae // shards))
    groups = groups_of_ranks(prefix_ends(matryoshka, d_sae), shards, ranks.count)
    coarse = sum(group < len(matryoshka) for rank, has in enumerate(groups) if rank != ranks.index for group in has)
    return StepTraffic(selection=4 * each * ((rows - own) * places + others * own),
                       parts=4 * (rows - own) * len(groups[ranks.index]) * d_model,
                       errors=others * (8 + 4 * d_model) * -(-rows // ranks.count) + 4 * own * coarse * d_model,
                       bias=4 * others * d_model * (2 if matryoshka else 1))
