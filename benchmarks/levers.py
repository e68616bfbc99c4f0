"""Levers that are no settings of the product: a run of ours trained again with one of them, by the same evaluation.

    python benchmarks/levers.py OUT RUN [RUN ...] [--levers NAME ...]

OUT is an output folder with its stores, RUN a finished run in it: an SAE of one site. It is trained again on the same
rows, from the same start, by the package's own step, losses and kernels, with one lever on top: what wins would cost
the same in the product. Results are OUT/levers/RUN/NAME.json, made once; the table has the run itself first. Settings
of the product are varied by a study (recipes/quality.yaml, form `settings`). Shapes as in olmoscope.train.step.
"""

import argparse
import contextlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from olmoscope.activations.stream.batches import Stream
from olmoscope.evaluate.results import write_evaluation
from olmoscope.kernels.interface import SortedPairs
from olmoscope.model.load import pick_device
from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.topk import TopK
from olmoscope.train.adam import Adam, update_parameter
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.derived import settled
from olmoscope.train.gradients import Gradients, sorted_together
from olmoscope.train.run import Run
from olmoscope.train.step import Step
from runs_of import evaluate, recipe_and_coder, rounds_of, table


@dataclass(frozen=True)
class Levers:
    """What training does besides; by default nothing."""

    data_rows: bool = False
    """Both matrices start as training rows (centred, unit norm)."""
    encoder_scale: float = 1.0
    """Rows of the encoder start as this times those of the decoder."""
    warmup: float = 0.0
    """Share of the steps over which the rate rises."""
    resample: int = 0
    """Tokens between revivals: latents dead for as long become residuals of badly reconstructed rows of the batch."""
    anneal: int = 0
    """k falls linearly from here to k over the first half of the steps."""
    multi: int = 0
    """Multi-TopK: a second loss, an eighth of the first, with this many times k."""
    clip: float = 0.0
    """Largest norm of the gradient of the matrices together."""
    ema: float = 0.0
    """Decay of the running mean of the weights; the mean is evaluated."""


LEVERS = {
    "data rows": Levers(data_rows=True),
    "data rows, encoder 0.1": Levers(data_rows=True, encoder_scale=0.1),
    "encoder 0.5": Levers(encoder_scale=0.5),
    "encoder 0.3": Levers(encoder_scale=0.3),
    "warmup 0.05": Levers(warmup=0.05),
    "resampling": Levers(resample=100_000),
    "k from 128": Levers(anneal=128),
    "Multi-TopK": Levers(multi=4),
    "clipped to 0.03": Levers(clip=0.03),
    "EMA 0.999": Levers(ema=0.999),
}


class LeverStep(Step):
    """An SAE in training under `Levers`."""

    def __init__(self, recipe: Recipe, spec: CoderConfig, sae: TopK, levers: Levers, steps: int, x_BD: Tensor) -> None:
        """
        Args:
            x_BD: some training rows, at least `d_sae` where latents start from them.
        """
        settings = settled(recipe, spec)
        super().__init__(sae, Adam.of(settings), settings.auxiliary)
        self.levers, self.steps = levers, steps
        self.rng = torch.Generator().manual_seed(settings.seed + 1)
        if levers.data_rows:
            order = torch.randperm(len(x_BD), generator=self.rng)[:sae.d_sae]
            rows_FD = sae.center(x_BD[order].float())[0]
            for matrix_FD in (sae.W_enc, sae.W_dec):
                matrix_FD.copy_(rows_FD / rows_FD.norm(dim=1, keepdim=True))
        if not sae.tied:
            sae.W_enc.mul_(levers.encoder_scale)
        self.last_used_F = torch.zeros_like(self.last_fired_F)
        """As `last_fired_F`, but a revival counts: nobody is revived twice within the window."""
        self.mean = {name: value.clone() for name, value in sae.state_dict().items()} if levers.ema else {}

    @torch.no_grad()
    def __call__(self, x_BD: Tensor, lr: float, target_BD: Tensor | None = None) -> None:
        sae, levers, kernels, moments = self.sae, self.levers, self.kernels, self.moments
        x_BD = x_BD.to(sae.W_dec.dtype).contiguous()
        u_BD, statistics = sae.center(x_BD)
        if self.count == 0:
            self._start(u_BD)
        if levers.warmup:
            lr *= min(1.0, (self.count + 1) / (levers.warmup * self.steps))
        mean_B1, std_B1 = (None, None) if statistics is None else (statistics.mean_B1, statistics.std_B1)
        k = self._k()
        wide_BK, places_BK = kernels.encode_topk(u_BD, sae.W_enc, sae.b_latent, k * max(1, levers.multi))
        values_BK, indices_BK = wide_BK[:, :k].contiguous(), places_BK[:, :k].contiguous()
        residual = kernels.residual(x_BD, values_BK, indices_BK, sae.W_dec, sae.b_out, mean_B1, std_B1)
        losses = [Gradients(values_BK, residual.dz_BK, indices_BK, residual.e_BD, u_BD)]
        e_sum_D = residual.e_BD.sum(dim=0)
        if levers.multi:
            more = kernels.residual(x_BD, wide_BK, places_BK, sae.W_dec, sae.b_out, mean_B1, std_B1)
            losses.append(Gradients(wide_BK, more.dz_BK / 8, places_BK, more.e_BD / 8, u_BD))
            e_sum_D += more.e_BD.sum(dim=0) / 8
        losses += self._auxiliary(x_BD, u_BD, statistics, residual)
        self._count(residual, values_BK, indices_BK)
        adam = self.adam.at(self.count, lr)
        pairs, e_RD, u_RD = sorted_together(kernels, losses, sae.d_sae)
        if levers.clip:
            factor = min(1.0, levers.clip / self._norm(pairs, e_RD, u_RD))
            e_RD = e_RD * factor
            pairs = SortedPairs(pairs.offsets, pairs.rows, pairs.values, pairs.gradients * factor)
        db_latent_F, b_pull_D = self._update_matrices(pairs, e_RD, u_RD, adam)
        biases = self.adam.at(self.count, lr * float(self.unit))
        update_parameter(sae.b_latent, db_latent_F, moments["b_latent"], biases)
        update_parameter(sae.b_in, e_sum_D - b_pull_D, moments["b_pre"], biases)
        if self.auxiliary is not None:
            self.auxiliary.lift(values_BK)
        if levers.resample and self.tokens % levers.resample < len(x_BD) and self.count < 0.6 * self.steps:
            self._resample(residual.loss_B, residual.e_BD)
        self._average()

    def _k(self) -> int:
        share = min(1.0, 2 * self.count / self.steps)
        return round(self.levers.anneal * (1 - share) + self.sae.k * share) if self.levers.anneal else self.sae.k

    def _average(self) -> None:
        """The running mean of the weights; it takes their place after the last step."""
        now = self.sae.state_dict()
        for name, value in self.mean.items():
            value.lerp_(now[name], 1 - min(self.levers.ema, self.count / (self.count + 10)))
            if self.count == self.steps:
                now[name].copy_(value)
        if self.mean and self.count == self.steps:
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))

    def _norm(self, pairs: SortedPairs, e_RD: Tensor, u_RD: Tensor) -> float:
        """Of the gradient of the matrices."""
        count = int(pairs.offsets[-1])
        rows_P, latents_P = pairs.rows[:count].long(), torch.arange(self.sae.d_sae).repeat_interleave(
            pairs.offsets.diff())
        decoder_FD = torch.zeros_like(self.sae.W_dec)
        decoder_FD.index_add_(0, latents_P, pairs.values[:count, None] * e_RD[rows_P])
        encoder_FD = decoder_FD if self.sae.tied else torch.zeros_like(decoder_FD)
        encoder_FD.index_add_(0, latents_P, pairs.gradients[:count, None] * u_RD[rows_P])
        return float(decoder_FD.norm() if self.sae.tied else torch.hypot(decoder_FD.norm(), encoder_FD.norm()))

    def _resample(self, loss_B: Tensor, e_BD: Tensor) -> None:
        sae = self.sae
        torch.maximum(self.last_used_F, self.last_fired_F, out=self.last_used_F)
        dead_M = (self.tokens - self.last_used_F >= self.levers.resample).nonzero()[:, 0][:len(loss_B) // 4]
        if not len(dead_M):
            return
        chosen_M = torch.multinomial(loss_B.float().square(), len(dead_M), generator=self.rng)
        rows_MD = -e_BD[chosen_M] / e_BD[chosen_M].norm(dim=1, keepdim=True)
        sae.W_enc[dead_M] = rows_MD * sae.W_enc.norm(dim=1).mean()
        sae.W_dec[dead_M] = rows_MD
        sae.b_latent[dead_M] = 0.0
        for name, moments in self.moments.items():
            if name != "b_pre":
                moments.first[dead_M] = 0.0
                moments.second[dead_M] = moments.second.mean(dim=0)
        self.last_used_F[dead_M] = self.tokens


def main() -> None:
    """Read the arguments, train and measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", help="ids of SAEs")
    parser.add_argument("--levers", nargs="*", default=list(LEVERS), choices=list(LEVERS), metavar="NAME",
                        help=f"of: {', '.join(LEVERS)}")
    arguments = parser.parse_args()
    for run in arguments.runs:
        folder = arguments.out / "levers" / run
        ours = open_sae(arguments.out / "runs" / run)
        for name in arguments.levers:
            if (folder / f"{name}.json").exists():
                continue
            sae = train(arguments.out, run, LEVERS[name]).at(ours.reads)
            evaluation = evaluate(arguments.out, replace(ours, sae=sae, name=name, identity=name))
            write_evaluation(folder / f"{name}.json", evaluation)
        print(table(arguments.out, run, folder))


def train(out: Path, run: str, levers: Levers) -> TopK:
    """A run again, with levers."""
    recipe, spec = recipe_and_coder(out, run)
    rounds, settings, device = rounds_of(out, run), settled(recipe, spec), pick_device("cpu")
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Stream(rounds, settings.batch)) as stream:
        training = Run(recipe, spec, rounds, Path(folder), device)
        x_ND = rounds.sample(spec.site, spec.d_sae)
        if training.ends.sinks is not None:
            x_ND = training.ends.sinks.split(x_ND)[1]
        training.step = LeverStep(recipe, spec, training.step.sae, levers, training.steps, x_ND)
        for _ in range(training.steps):
            training.train_on(stream.next_batch(), stream.state())
        return read_checkpoint(checkpoints(Path(folder))[-1])


if __name__ == "__main__":
    main()
