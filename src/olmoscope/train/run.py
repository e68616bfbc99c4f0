"""The training of one SAE: its run folder and its bookkeeping. A run that was killed resumes from its last checkpoint.

The run folder holds `recipe.yaml` (resolved), `metrics.jsonl`, `training.log` (for people), `checkpoints/`, and at the
end `done.json`. `metrics.jsonl` and the weights of a resumed run equal those of one that was never stopped, bit for bit
on a CPU. The batches come from the loop (group.py), which may feed several runs at once.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmoscope.activations.store.statistics import OUTLIER
from olmoscope.activations.stream.batches import START
from olmoscope.activations.stream.rounds import Rounds
from olmoscope.distributed.ranks import Ranks
from olmoscope.errors import UserError
from olmoscope.files import read_json, write_json, write_text
from olmoscope.progress import console
from olmoscope.provenance import provenance
from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.sae.io.checkpoint import step_of
from olmoscope.sae.io.checkpoint_file import remove_checkpoint
from olmoscope.sae.topk import TopK
from olmoscope.site import Site
from olmoscope.train.adam import Adam
from olmoscope.train.axes import axes_at
from olmoscope.train.candidate_trial import TRIAL_STEPS, Verdict
from olmoscope.train.candidates import CandidateSearch
from olmoscope.train.checkpoint import (
    axes_of,
    checkpoint_path,
    checkpoints,
    is_kept,
    load_checkpoint,
    load_sharded,
    save_checkpoint,
    save_sharded,
    scales_of,
    sinks_of,
)
from olmoscope.train.derived import rate_of, settled
from olmoscope.train.ends import Ends, ends_of, scales_for
from olmoscope.train.find_sinks import SAMPLE, has_outliers, sinks_at
from olmoscope.train.finish import ModelLoss, Piece, SequenceReader, draw_steps
from olmoscope.train.initialize import initialize, initialize_shard, initialize_transcoder
from olmoscope.train.sharded_candidates import ShardedCandidates
from olmoscope.train.sharded_step import ShardedStep
from olmoscope.train.shards import Shard, own_shards, shard_bounds
from olmoscope.train.step import Step
from olmoscope.train.trackers import Tracker

TRIAL = "candidates.json"
"""The file in the run folder that keeps the verdict of the trial of candidates."""


def learning_rate(lr: float, decay: float, step: int, steps: int) -> float:
    """The learning rate of a step (counted from 0): `lr`, falling linearly to 0 over the last share `decay` of the
    steps."""
    return lr * min(1.0, (steps - step) / (decay * steps)) if decay else lr


def run_folder(out: Path, sae: CoderConfig) -> Path:
    """The run folder of an SAE."""
    return out / "runs" / sae.id


@dataclass
class _Counts:
    """Sums over rows, which checkpoints keep."""

    loss: float = 0.0
    l0: float = 0.0
    tokens: int = 0


class Notice(NamedTuple):
    """What a user should know about a run before its first step."""

    text: str
    warning: bool


class Run:
    """An SAE in training, from its last checkpoint (or the start)."""

    def __init__(self, recipe: Recipe, spec: CoderConfig, rounds: Rounds, folder: Path, device: torch.device,
                 reader: SequenceReader | None = None, tracker: Tracker | None = None,
                 ranks: Ranks | None = None) -> None:
        """
        Args:
            folder: its run folder, which this process, or the first of its ranks, has locked.
            reader: runs the language model on sequences, for `train.finish`; it must have the sites of this coder.
            tracker: where metrics go besides the folder.
            ranks: the ranks that train it, each with its own `Run`. Only the first rank writes in the folder, except
                for the shards of checkpoints. None if this process trains alone.

        Raises:
            UserError: a checkpoint is damaged, or was made on other activations.
        """
        self.recipe, self.spec, self.rounds, self.folder = recipe, spec, rounds, folder
        self.ranks = ranks or Ranks.alone()
        self.settings = settled(recipe, spec)
        self.lr = rate_of(recipe, spec, sum(rounds.manifest.width(site) for site in spec.reads))
        self.steps = -(-rounds.kept.rows // self.settings.batch) * self.settings.epochs
        self.finish_steps: list[tuple[Piece, ...]] = []
        """The sequences that the last steps read (finish.py)."""
        if finish := self.settings.finish:
            self.finish_steps = draw_steps(rounds.tokens, max(1, round(finish.share * self.steps)),
                                           self.settings.batch, recipe.seed, self.settings.shards)
        self.counts = _Counts()
        """Sums up to the last line of metrics.jsonl."""
        self.position = START
        """The stream's position after the last step."""
        self._seconds_before: float | None = 0.0
        """The seconds that earlier steps took; None if the checkpoint does not say."""
        found = self._newest_checkpoint()
        self.ends = self._ends(found)
        if self.ranks.leads:
            write_text(folder / "recipe.yaml", recipe.to_yaml())
        self.step = self._fresh_step(device, bool(found))
        self.ends = self.ends.to(device)
        self.model_loss = (ModelLoss(reader, self.ends.writes[0], self.settings.finish.kl, self.ends.axes_DD)
                           if reader and self.settings.finish else None)
        if found:
            self._load(found)
        self._begin_trial()
        self.saved = self.step.count
        """The step of the last checkpoint."""
        self._cut_metrics()
        self._tracker = tracker
        if tracker:
            tracker.catch_up(folder / "metrics.jsonl")
        self._started, self._tokens_before = time.monotonic(), self.step.tokens
        self.log(f"resumed after step {self.step.count} of {self.steps}" if found else
                 f"training {spec.id}: {self.steps} steps of {self.settings.batch} rows, rate {self.lr:g}, on "
                 f"{device}; {rounds.kept}")
        self.notices = [] if found else list(self._notices())
        for notice in self.notices:
            self.log(notice.text)

    def _notices(self) -> Iterator[Notice]:
        """What to say about rows of outlier norm, and about a finish."""
        if (sinks := self.ends.sinks) is not None:
            many = f"{sinks.count} latents are" if sinks.count > 1 else "1 latent is"
            yield Notice(f"{many} for attention sinks, rows of over {OUTLIER:g} times the median norm along one "
                         "direction; they are found before training and fixed (train.sinks)", warning=False)
        elif self.settings.filter.max_norm is not None and self.rounds.kept.dropped_share:
            yield Notice("train.filter.max_norm leaves out rows that the SAE will still get when it is spliced into "
                         "the model; evaluation shows what that costs (ΔCE, and ΔCE with outliers kept)", warning=True)
        elif self.settings.sinks == "auto" and has_outliers(self.rounds, self.spec):
            yield Notice(f"some rows have over {OUTLIER:g} times the median norm, but they do not lie along "
                         "directions of their own, so they get no latents of their own; evaluation shows what they "
                         "cost (ΔCE, and ΔCE with outliers kept)", warning=True)
        if last := len(self.finish_steps):
            yield Notice(f"the last {last:,} of {self.steps:,} steps also run the language model (train.finish); they "
                         "are slower than the time left suggests", warning=False)

    def train_on(self, batch: Mapping[Site, Tensor], position: dict[str, int]) -> dict[str, Any] | None:
        """Make one step, and write a line of metrics and a checkpoint if they are due.

        Args:
            batch: the rows of each site, on the run's device.
            position: the position of the stream after this batch.

        Returns:
            The line of metrics, if one was due.

        Raises:
            UserError: the loss is not finite, or a file cannot be written.
        """
        pull = None
        if (left := self.steps - self.step.count) <= len(self.finish_steps):
            assert self.model_loss is not None, "a run with train.finish needs a reader"
            read = self.model_loss.reader.read(self.finish_steps[-left])
            batch = {site: torch.cat([batch[site], read.rows[site]]) for site in self.spec.sites}
            pull = partial(self.model_loss.pull, read)
        x_BD, target_BD = self.ends.rows(batch)
        self.step(x_BD, learning_rate(self.lr, self.settings.decay, self.step.count, self.steps), target_BD, pull)
        self.position = position
        if self.step.candidates and self.step.candidates.on_trial and self.step.count >= TRIAL_STEPS:
            self._end_trial(self.step.candidates)
        if self.step.candidates and (warning := self.step.candidates.judge(self.step.count)):
            self._warn(warning)
        line = None
        last = self.step.count == self.steps
        if self.step.count % self.settings.log_every == 0 or last:
            line = self._measure()
        if self.step.count % self.settings.checkpoint_every == 0 or last or is_kept(self.settings, self.step.count):
            self.save()
        return line

    def save(self) -> None:
        """Write a checkpoint if there was a step since the last one, and delete older ones that the recipe does not
        keep. All ranks must call this.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        if self.saved == self.step.count:
            return
        older = [path for path in checkpoints(self.folder) if not is_kept(self.settings, step_of(path))]
        state = {"stream": self.position, "counts": vars(self.counts), "activations": self._activations(),
                 "seconds": self._seconds()}
        if isinstance(self.step, Step):
            save_checkpoint(self._checkpoint(), self.step, state, self.ends)
        else:
            save_sharded(self._checkpoint(), self.step, state, self.ends)
        self.saved = self.step.count
        for path in older if self.ranks.leads else ():
            remove_checkpoint(path)

    def finish(self) -> None:
        """Write done.json after the last step."""
        counts, kept = self.counts, self.rounds.kept
        dead_share = self.step.dead_share(self.settings.dead_window)
        if not self.ranks.leads:
            return
        self.log(f"finished: mean training NMSE {counts.loss / counts.tokens:.6f} over {counts.tokens} tokens")
        write_json(self.folder / "done.json", {
            "sae": self.spec.id,
            "run_hash": self.recipe.run_hash(self.spec),
            "train": self.settings.model_dump(mode="json", include={"batch", "decoder_rate", "auxiliary"})
            | {"lr": self.lr},
            "checkpoint": str(self._checkpoint().relative_to(self.folder)),
            "steps": self.step.count,
            "tokens": counts.tokens,
            "nmse": counts.loss / counts.tokens,
            "l0": counts.l0 / counts.tokens,
            "dead_share": dead_share,
            "dead_window": self.settings.dead_window,
            "sinks": 0 if self.ends.sinks is None else self.ends.sinks.count,
            "rows": {"kept": kept.rows, "of": kept.of, "dropped_share": kept.dropped_share, "reasons": kept.dropped},
            "seconds": self._seconds(),
            "store": self.rounds.manifest.model_dump(mode="json", include={"model", "sources", "sites", "widths",
                                                                          "modules"}),
            "provenance": provenance()})

    def log(self, message: str) -> None:
        """Add a line to training.log."""
        if not self.ranks.leads:
            return
        with (self.folder / "training.log").open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def _warn(self, message: str) -> None:
        self.log(message)
        console.print(f"{self.spec.id}: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _checkpoint(self) -> Path:
        """The path of the checkpoint after the latest step."""
        return checkpoint_path(self.folder, self.step.count, self.settings.shards)

    def _newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that the first rank sees: on a network file system, other ranks may not see it yet."""
        found = checkpoints(self.folder)
        step = self.ranks.ask(step_of(found[-1]) if found else 0)[0]
        return checkpoint_path(self.folder, step, self.settings.shards) if step else None

    def _ends(self, found: Path | None) -> Ends:
        """The ends of the coder, with the scales, sinks and axes of the last checkpoint or with new ones."""
        widths = {site: self.rounds.manifest.width(site) for site in self.spec.sites}
        if found:
            return ends_of(self.spec, widths, scales_of(found), sinks_of(found), axes_of(found))
        sinks = sinks_at(self.rounds, self.spec) if self.settings.sinks == "auto" else None
        return ends_of(self.spec, widths, scales_for(self.spec, widths, self.rounds.median_norm), sinks,
                       axes_at(self.rounds, self.spec.site, sinks) if self.settings.axes == "principal" else None)

    def _fresh_step(self, device: torch.device, replaced: bool) -> Step | ShardedStep:
        """The step with which training begins.

        Args:
            replaced: whether a checkpoint will replace its parameters. If so, means are not computed, as they cost a
                read or a forward pass.
        """
        spec, settings, adam = self.spec, self.settings, Adam.of(self.settings)
        latents = spec.d_sae - (0 if self.ends.sinks is None else self.ends.sinks.count)
        if settings.shards == 1:
            return Step(self._fresh(device, replaced, latents), adam, settings.auxiliary,
                        candidates=settings.candidates, activation=spec.activation, matryoshka=spec.matryoshka,
                        orthogonal=settings.orthogonal)
        if latents < settings.shards:
            raise UserError(f"{spec.id}: {latents} latents are left beside those for attention sinks, fewer than "
                            f"train.shards ({settings.shards}); lower train.shards or raise saes.d_sae")
        bounds, shared = shard_bounds(latents, settings.shards), self._fresh(device, replaced, 0)
        saes = {number: initialize_shard(bounds[number + 1] - bounds[number], number, shared, settings.seed,
                                         spec.default_id)
                for number in own_shards(settings.shards, self.ranks)}
        shards = [Shard(number, settings.shards, sae, adam, latents, spec.activation, candidates=settings.candidates)
                  for number, sae in saes.items()]
        return ShardedStep(shards, adam, settings.auxiliary, self.ranks, spec.matryoshka, settings.orthogonal)

    def _mean(self, site: Site, replaced: bool) -> Tensor:
        """The mean of a site's rows, as the coder sees them, `[D]`; see `_fresh_step`."""
        if replaced:
            return torch.zeros(self.rounds.manifest.width(site))
        if self.ends.sinks is not None:
            return self.ends.sinks.split(self.rounds.sample(site, SAMPLE))[1].mean(dim=0)
        return self.rounds.sample_mean(site, self.spec.normalize)

    def _fresh(self, device: torch.device, replaced: bool, latents: int) -> TopK:
        """The coder with which training begins, with `latents` latents; see `_fresh_step`."""
        spec, ends = self.spec, self.ends
        means = [self._mean(site, replaced) for site in ends.reads]
        mean_D = (ends.turned(means[0]) if ends.is_plain else ends.joined(means)).to(device)
        if ends.is_transcoder:
            return initialize_transcoder(latents, spec.k, mean_D, self._mean(ends.writes[0], replaced).to(device),
                                         self.settings.seed, spec.default_id, skip=spec.skip)
        return initialize(len(mean_D), latents, spec.k, spec.normalize, mean_D, self.settings.seed,
                          spec.default_id, tied=spec.weights == "tied")

    def _load(self, path: Path) -> None:
        state = load_checkpoint(path, self.step) if isinstance(self.step, Step) else load_sharded(path, self.step)
        for what, before in state["activations"].items():
            if (now := self._activations()[what]) != before:
                raise UserError(f"{self.folder} was trained on activations with {what} {before}, but now they have "
                                f"{now}; choose another --out, or delete the folder to train again")
        self.position = state["stream"]
        self.counts = _Counts(**state["counts"])
        self._seconds_before = state.get("seconds")

    def _begin_trial(self) -> None:
        """Begin the trial of candidates in the first steps. Checkpoints of later steps hold its result."""
        if self.step.candidates is not None and self.step.count < TRIAL_STEPS:
            self.step.candidates.begin_trial()

    def _end_trial(self, search: CandidateSearch | ShardedCandidates) -> None:
        """Choose the faster way by the first rank's verdict. A run that was killed before its first checkpoint keeps
        the verdict that it had."""
        path, verdict = self.folder / TRIAL, search.verdict()
        with self.ranks.agreed():
            if self.ranks.leads and path.exists():
                verdict = Verdict(**read_json(path))
            elif self.ranks.leads:
                write_json(path, vars(verdict))  # before the next step, the first that depends on it
                self.log(str(verdict))
                console.print(f"{self.spec.id}: {verdict}", markup=False, highlight=False,
                              style=None if verdict.candidates_win else "yellow")
        times = torch.tensor([verdict.exact_ms, verdict.candidates_ms], dtype=torch.float64)
        search.settle(Verdict(*self.ranks.gather(times)[0].tolist()))

    def _activations(self) -> dict[str, Any]:
        """The properties of the activations that must not change when a run is resumed."""
        manifest = self.rounds.manifest
        return {"model revision": manifest.model.revision, "tokenizer": manifest.tokenizer_hash,
                "rows": self.rounds.kept.rows}

    def _seconds(self) -> float | None:
        """The seconds that all steps up to now took, over restarts; None if unknown."""
        if self._seconds_before is None:
            return None
        return round(self._seconds_before + time.monotonic() - self._started, 1)

    def _cut_metrics(self) -> None:
        """Remove the lines after the checkpoint: they will be written again."""
        path = self.folder / "metrics.jsonl"
        if self.ranks.leads and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if line.endswith("\n")
                                     and json.loads(line)["step"] <= self.step.count))

    def _measure(self) -> dict[str, Any]:
        """Write and return a line of metrics.jsonl: means over the rows since the last line."""
        sums = self.step.take_sums()
        rows = self.step.tokens - self.counts.tokens
        if not math.isfinite(sums.loss):
            raise UserError(f"{self.spec.id}: the loss is not finite at step {self.step.count}; lower train.lr")
        self.counts = _Counts(self.counts.loss + sums.loss, self.counts.l0 + sums.l0, self.step.tokens)
        line: dict[str, Any] = {
            "step": self.step.count, "tokens": self.step.tokens, "loss": sums.loss / rows, "l0": sums.l0 / rows,
            "dead_share": self.step.dead_share(self.settings.dead_window),
            "lr": learning_rate(self.lr, self.settings.decay, self.step.count - 1, self.steps)}
        if self.spec.activation in ("batchtopk", "jumprelu"):
            line["capped_share"] = sums.capped / rows
        if self.settings.auxiliary:
            line["auxiliary_loss"] = sums.auxiliary / sums.auxiliary_rows if sums.auxiliary_rows else None
        if self.step.candidates:
            line |= {"candidates_found": self.step.candidates.take_found(), "margin": self.step.candidates.margin}
        if not self.ranks.leads:
            return line
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(line) + "\n")
        if self._tracker:
            self._tracker.send(line)
        rate = (self.step.tokens - self._tokens_before) / (time.monotonic() - self._started)
        dead = "not known yet" if line["dead_share"] is None else f"{line['dead_share']:.1%}"
        self.log(f"step {self.step.count}/{self.steps}  loss {line['loss']:.4f}  L0 {line['l0']:.1f}  dead {dead}  "
                 f"{rate:,.0f} tokens/s")
        return line
