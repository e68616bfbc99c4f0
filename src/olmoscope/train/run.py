"""A training run: one SAE, from a store, in a folder of its own; killed at any moment, it goes on where it was.

The run folder: `recipe.yaml` (resolved), `metrics.jsonl`, `training.log` (for people), `checkpoints/`, and at the end
`done.json`. `metrics.jsonl` and the weights of a resumed run equal those of one that was never stopped, bit for bit on
a CPU.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmoscope.activations.store import Store
from olmoscope.activations.stream import Stream
from olmoscope.errors import UserError
from olmoscope.files import clean_temporary, locked, read_json, write_json, write_text
from olmoscope.model.load import pick_device
from olmoscope.progress import bar
from olmoscope.provenance import provenance
from olmoscope.recipe import SAE, Recipe, Train, load_recipe
from olmoscope.sae.tied_topk import initialize
from olmoscope.train.adam import Adam
from olmoscope.train.checkpoint import checkpoint_path, checkpoints, load_checkpoint, save_checkpoint
from olmoscope.train.interrupt import deferred_interrupts
from olmoscope.train.step import Step


def learning_rate(train: Train, step: int, steps: int) -> float:
    """The rate of a step (counted from 0): constant, then linear to 0 over the last `decay` of all steps."""
    if train.decay == 0:
        return train.lr
    return train.lr * min(1.0, (steps - step) / (train.decay * steps))


def run_folder(out: Path, sae: SAE) -> Path:
    """Where an SAE's run lives."""
    return out / "runs" / sae.id


def train(recipe: Recipe, sae: SAE, store: Store, run: Path) -> bool:
    """Train one SAE of the recipe.

    Returns:
        False if the run was finished already, and nothing was done.

    Raises:
        UserError: the store is not the recipe's, the folder holds another run, another process trains in it, or the
            loss is not finite.
        KeyboardInterrupt: stopped by a signal, after saving a checkpoint.
    """
    _refuse_another(recipe, sae, store, run)
    if (run / "done.json").exists():
        return False
    with locked(run, "training"):
        clean_temporary(run)
        write_text(run / "recipe.yaml", recipe.to_yaml())
        _Run(recipe, sae, store, run).finish()
    return True


@dataclass
class _Counts:
    """Sums over rows, kept across restarts."""

    loss: float = 0.0
    l0: float = 0.0
    tokens: int = 0


@dataclass
class _Run:
    recipe: Recipe
    spec: SAE
    store: Store
    folder: Path
    counts: _Counts = field(default_factory=_Counts)
    """Up to the last line of metrics.jsonl."""

    def __post_init__(self) -> None:
        device = pick_device(self.recipe.device)
        self.settings = self.recipe.train
        self.stream = Stream(self.store, self.spec.layer, self.settings.batch, self.settings.order, self.recipe.seed)
        mean_D = self.store.sample_mean(self.spec.layer, self.spec.normalize).to(device)
        sae = initialize(len(mean_D), self.spec.d_sae, self.spec.k, self.spec.normalize, mean_D, self.recipe.seed)
        self.step = Step(sae, Adam.of(self.settings))
        self.steps = self.stream.batches * self.settings.epochs
        self.device = device

    def finish(self) -> None:
        """Train from the last checkpoint (or the start) to the end, and write done.json."""
        self._resume()
        self._log(f"training {self.spec.id}: {self.steps} steps on {self.device}"
                  if not self.step.count else f"resumed after step {self.step.count} of {self.steps}")
        started, tokens_before = time.monotonic(), self.step.tokens
        total = self.store.rows * self.settings.epochs
        with deferred_interrupts() as interrupted, \
                bar(self.spec.id, total, "tokens", done=self.step.tokens) as advance, \
                (self.folder / "metrics.jsonl").open("a") as metrics:
            while self.step.count < self.steps:
                x_BD = self.stream.next_batch().to(self.device)
                self.step(x_BD, learning_rate(self.settings, self.step.count, self.steps))
                note = None
                last = self.step.count == self.steps
                if self.step.count % self.settings.log_every == 0 or last:
                    line = self._measure()
                    metrics.write(json.dumps(line) + "\n")
                    metrics.flush()
                    rate = (self.step.tokens - tokens_before) / (time.monotonic() - started)
                    note = f"loss {line['loss']:.4f}  L0 {line['l0']:.1f}  dead {line['dead_share']:.1%}"
                    self._log(f"step {self.step.count}/{self.steps}  {note}  {rate:,.0f} tokens/s")
                advance(len(x_BD), note)
                if self.step.count % self.settings.checkpoint_every == 0 or last or interrupted():
                    self._save()
                if interrupted():
                    self._log(f"stopped by a signal after step {self.step.count}")
                    raise KeyboardInterrupt
        self._done(time.monotonic() - started)

    def _resume(self) -> None:
        found = checkpoints(self.folder)
        if found:
            state = load_checkpoint(found[-1], self.step)
            self.stream.restore(state["stream"])
            self.counts = _Counts(**state["counts"])
        path = self.folder / "metrics.jsonl"
        if path.exists():  # lines after the checkpoint will be written again
            lines = path.read_text().splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if line.endswith("\n")
                                     and json.loads(line)["step"] <= self.step.count))

    def _measure(self) -> dict[str, Any]:
        """A line of metrics.jsonl: means over the rows since the last one."""
        loss, l0 = self.step.take_sums()
        rows = self.step.tokens - self.counts.tokens
        if not math.isfinite(loss):
            raise UserError(f"{self.spec.id}: the loss is not finite at step {self.step.count}; lower train.lr")
        self.counts = _Counts(self.counts.loss + loss, self.counts.l0 + l0, self.step.tokens)
        return {"step": self.step.count, "tokens": self.step.tokens, "loss": loss / rows, "l0": l0 / rows,
                "dead_share": self.step.dead_share(self.settings.dead_window),
                "lr": learning_rate(self.settings, self.step.count - 1, self.steps)}

    def _save(self) -> None:
        older = checkpoints(self.folder)
        save_checkpoint(checkpoint_path(self.folder, self.step.count), self.step,
                        {"stream": self.stream.state(), "counts": vars(self.counts)})
        for path in older:
            path.unlink()

    def _done(self, seconds: float) -> None:
        manifest = self.store.manifest
        counts = self.counts
        self._log(f"finished: mean training NMSE {counts.loss / counts.tokens:.6f} over {counts.tokens} tokens")
        write_json(self.folder / "done.json", {
            "sae": self.spec.id,
            "run_hash": self.recipe.run_hash(self.spec),
            "checkpoint": str(checkpoint_path(self.folder, self.step.count).relative_to(self.folder)),
            "steps": self.step.count,
            "tokens": counts.tokens,
            "nmse": counts.loss / counts.tokens,
            "l0": counts.l0 / counts.tokens,
            "dead_share": self.step.dead_share(self.settings.dead_window),
            "dead_window": self.settings.dead_window,
            "seconds": round(seconds, 1),
            "store": manifest.model_dump(mode="json", include={"model", "sources"}),
            "provenance": provenance()})

    def _log(self, message: str) -> None:
        with (self.folder / "training.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")


def _refuse_another(recipe: Recipe, sae: SAE, store: Store, run: Path) -> None:
    found, wanted = store.manifest, recipe.model
    if (wanted.name, wanted.d_model or found.model.d_model) != (found.model.name, found.model.d_model):
        raise UserError(f"{store.path} holds activations of {found.model.name} (d_model {found.model.d_model}), the "
                        f"recipe wants {wanted.name} (d_model {wanted.d_model}); collect again into another --out")
    if sae.layer not in found.layers:
        raise UserError(f"{store.path} has layers {found.layers}, not layer {sae.layer}; collect it into another --out")
    if found.recipe_hash != recipe.store_hash():
        raise UserError(f"{store.path} was collected with another recipe (hash {found.recipe_hash}, this one's is "
                        f"{recipe.store_hash()}): its text, tokens, model revision, layers or seed differ; collect "
                        "again into another --out")
    if (run / "recipe.yaml").exists():
        before = load_recipe(str(run / "recipe.yaml"))
        if before.run_hash(sae) != recipe.run_hash(sae):
            raise UserError(f"{run} holds a different run of {sae.id} (see its recipe.yaml); choose another --out or "
                            "delete the folder")
    if (run / "done.json").exists() and read_json(run / "done.json")["run_hash"] != recipe.run_hash(sae):
        raise UserError(f"{run} holds a different finished run of {sae.id}; choose another --out or delete the folder")
