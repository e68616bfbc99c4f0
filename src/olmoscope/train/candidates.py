"""The encoder's top k from an 8-bit product in training, with a check of how many of the exact top k it finds.

Every CHECK_STEPS steps, some rows of the batch are also encoded exactly, and the missed latents are counted on the
device. Every JUDGE_STEPS steps, the counts are read. If more latents were missed than MISSED_AT_MOST allows, the margin
is widened; if it becomes too wide, the exact product takes over. When this happens depends only on the step, and
checkpoints contain the counts and the margin. So a run that was killed continues as if it had never stopped.
"""

import torch
from torch import Tensor

from olmoscope.kernels import reference
from olmoscope.kernels.interface import Kernels, Quantized
from olmoscope.recipe.schema import MOST_MARGIN, Candidates
from olmoscope.sae.topk import TopK
from olmoscope.train.candidate_trial import Trial, Verdict

CHECK_STEPS = 16
CHECKED_ROWS = 16
JUDGE_STEPS = 64
MISSED_AT_MOST = 1e-4
"""The largest tolerated share of missed latents among the active latents of the exact top k."""
JUDGED_AS = 20_000
"""If fewer latents were checked, they count as this many, so that a single miss in the first check is tolerated."""
ROUNDING = 1e-5
"""A value this close to the smallest one kept, relative to it, does not count as missed: the order of a float32 sum
changes its value."""
EXACT = -1
"""The value of the margin that stands for the exact product."""


class CandidateSearch:
    """The encoder that replaces the exact product.

    Args:
        sae: the SAE, or a shard of it.
    """

    def __init__(self, settings: Candidates, sae: TopK, kernels: Kernels) -> None:
        self.sae, self.kernels = sae, kernels
        device = sae.W_enc.device
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        """Latents checked and missed since the last line of metrics, then the same since the margin was set."""
        self.margin_1 = torch.tensor([settings.margin])
        """On the CPU; `EXACT` once candidates are no longer used."""
        self._quantized: Quantized | None = None
        self._k = sae.k
        """The k of the last batch."""
        self.trial: Trial | None = None
        """The trial, while both ways of encoding are timed."""

    @property
    def margin(self) -> int:
        """How many candidates there are beyond k; `EXACT` once candidates are no longer used."""
        return int(self.margin_1)

    def encode(self, u_BD: Tensor, b_latent_F: Tensor, k: int, step: int) -> tuple[Tensor, Tensor]:
        """Like `Kernels.encode_topk`, for the batch of a step (counted from 0)."""
        self._k = k
        if self.margin == EXACT:
            return self._exact(u_BD, b_latent_F, k)
        if self.trial is not None:
            codes, rough = self.trial.encode(lambda: self._exact(u_BD, b_latent_F, k),
                                             lambda: self._rough(u_BD, b_latent_F, k))
        else:
            codes = rough = self._rough(u_BD, b_latent_F, k)
        if step % CHECK_STEPS == 0:
            apart = max(1, len(u_BD) // CHECKED_ROWS)
            some = slice(0, CHECKED_ROWS * apart, apart)
            self._check(u_BD[some], b_latent_F, rough[0][some], rough[1][some])
        return codes

    def begin_trial(self) -> None:
        """From here on, encode both ways and time them."""
        self.trial = Trial(self.sae.W_enc.device)

    @property
    def on_trial(self) -> bool:
        """Whether both ways are timed."""
        return self.trial is not None

    def verdict(self) -> Verdict:
        """The result of the trial so far."""
        assert self.trial is not None, "no trial was begun"
        return self.trial.verdict()

    def settle(self, verdict: Verdict) -> None:
        """End the trial: from here on, use the faster way."""
        self.trial = None
        if not verdict.candidates_win:
            self.margin_1.fill_(EXACT)

    def judge(self, steps: int) -> str | None:
        """Widen the margin if that is due after `steps` steps; waits for the device every JUDGE_STEPS steps.

        Returns:
            A warning for the user if it was widened, else None.
        """
        if steps % JUDGE_STEPS or self.margin == EXACT:
            return None
        checked, missed = self.counts[2:].tolist()
        if missed <= MISSED_AT_MOST * max(checked, JUDGED_AS):
            return None
        before = self.margin
        wider = min(max(2 * before, before + 8), self.sae.d_sae - self._k)
        self.margin_1.fill_(wider if wider <= MOST_MARGIN else EXACT)
        self.counts[2:].zero_()
        return (f"warning: at step {steps} the 8-bit candidates (k + {before}) missed "
                f"{missed:,} of {checked:,} latents of the top k; from here on, "
                + ("the exact product is used (leave out train.candidates)" if self.margin == EXACT
                   else f"k + {wider} candidates are used"))

    def take_found(self) -> float | None:
        """Share of the top k that was found since the last call; None if nothing was checked."""
        checked, missed = self.take_counts().tolist()
        return 1 - missed / checked if checked else None

    def take_counts(self) -> Tensor:
        """Latents checked and missed since the last call, `[2]`."""
        counts = self.counts[:2].clone()
        self.counts[:2].zero_()
        return counts

    def tensors(self) -> dict[str, Tensor]:
        """All state, by name."""
        return {"candidates.counts": self.counts, "candidates.margin": self.margin_1}

    def _exact(self, u_BD: Tensor, b_latent_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self.kernels.encode_topk(u_BD, self.sae.W_enc, b_latent_F, k)

    def _rough(self, u_BD: Tensor, b_latent_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        W_enc_FD = self.sae.W_enc
        self._quantized = self.kernels.quantize(W_enc_FD, self._quantized)
        return self.kernels.encode_candidates(u_BD, W_enc_FD, b_latent_F, self._quantized, k, self.margin)

    def _check(self, u_RD: Tensor, b_latent_F: Tensor, values_RK: Tensor, indices_RK: Tensor) -> None:
        want_RK, wanted_RK = reference.encode_topk(u_RD, self.sae.W_enc, b_latent_F, self._k)
        found_RK = (wanted_RK.unsqueeze(2) == indices_RK.unsqueeze(1)).any(dim=2)
        found_RK |= want_RK <= values_RK[:, -1:] * (1 + ROUNDING)
        active_RK = want_RK > 0
        checked, missed = active_RK.sum(), (active_RK & ~found_RK).sum()
        self.counts += torch.stack([checked, missed, checked, missed])
