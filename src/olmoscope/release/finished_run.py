"""What the release stage reads of a finished run: its recipe, done.json, evaluation.json and final checkpoint.

Only the keys that are used are named, and each of them must be there: a figure that is absent is an error, never a
blank in a table.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from olmoscope.errors import UserError
from olmoscope.evaluate.results import EVALUATION, Evaluation, read_evaluation
from olmoscope.files import read_json
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import SAE, Recipe
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.train.checkpoint import load_sae


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ModelRead(_Read):
    """The language model, as the store knows it."""

    name: str
    revision: str | None
    architecture: str
    d_model: int
    num_layers: int
    layers_path: str
    base: str | None = None
    """What it is an adapter of."""

    @property
    def on_hub(self) -> bool:
        """Whether `name` is a hub repository: only there is a revision a commit, of 40 hex digits."""
        return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) and re.fullmatch(r"[0-9a-f]{40}", self.revision or ""))


class SourceRead(_Read):
    """What one text source contributed to training."""

    documents: int
    tokens: int


class StoreRead(_Read):
    """Where the activations came from."""

    model: ModelRead
    sources: dict[str, SourceRead]


class Done(_Read):
    """done.json: what training says of itself."""

    sae: str
    run_hash: str
    checkpoint: str
    steps: int
    tokens: int
    nmse: FiniteFloat
    l0: FiniteFloat
    dead_share: FiniteFloat | None
    """None: fewer tokens than `dead_window` were seen."""
    dead_window: int
    store: StoreRead
    provenance: dict[str, Any]


@dataclass(frozen=True)
class FinishedRun:
    """A run folder whose training is over."""

    folder: Path
    recipe: Recipe
    sae: SAE
    done: Done

    @property
    def checkpoint(self) -> Path:
        """The file with the final weights."""
        return self.folder / self.done.checkpoint

    def load(self) -> TopK | JumpReLU:
        """The trained SAE, on the CPU.

        Raises:
            UserError: missing or damaged checkpoint, or one of another kind, shape, k or normalisation than the
                recipe's.
        """
        sae, wanted = load_sae(self.checkpoint), self.sae
        kind = {"topk": TopK, "groupmax": GroupMax}.get(wanted.activation, JumpReLU)
        k = sae.k if isinstance(sae, TopK) else wanted.k  # which leaves no trace in a JumpReLU
        found = (type(sae), sae.d_sae, sae.d_model, k, sae.normalize)
        if found != (kind, wanted.d_sae, self.done.store.model.d_model, wanted.k, wanted.normalize):
            raise UserError(f"{self.checkpoint} holds another SAE ({type(sae).__name__}, {sae.d_sae} latents, d_model "
                            f"{sae.d_model}, k {k}, normalize {sae.normalize}) than {wanted.id}: train it again in an "
                            "empty folder")
        return sae

    def evaluation(self) -> Evaluation:
        """The figures on held-out rows.

        Raises:
            UserError: not evaluated, damaged, or a figure absent.
        """
        return read_evaluation(self.folder / EVALUATION)


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        UserError: not a run, not finished, damaged, or its parts are of different runs.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml")
    if not (folder / "done.json").is_file():
        raise UserError(f"{folder} is not finished (no done.json): train it to its end first")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    done = _read_done(folder / "done.json")
    for sae in recipe.saes:
        if sae.id == done.sae:
            break
    else:
        raise UserError(f"{folder}: done.json is of {done.sae}, which recipe.yaml does not hold: the folder "
                        "mixes two runs")
    if recipe.run_hash(sae) != done.run_hash:
        raise UserError(f"{folder}: done.json is of another recipe than recipe.yaml (run {done.run_hash}, not "
                        f"{recipe.run_hash(sae)}): the folder mixes two runs")
    return FinishedRun(folder, recipe, sae, done)


def _read_done(path: Path) -> Done:
    try:
        return Done.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}; make it again with this version of olmoscope") from error
