"""A finished Olmoscope run: its recipe, what done.json says about the SAE, and its final checkpoint.

    recipe.yaml                     the recipe, resolved
    done.json                       which SAE of the recipe this is, and where its activations came from
    checkpoints/step-N.safetensors  the weights (checkpoint.py); the trainer writes all of these

The models name only the keys that are used, and each of these must be there.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from olmoscope.errors import UserError
from olmoscope.files import read_json
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import CoderConfig, Recipe, SiteName
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.sae.io.checkpoint_file import missing
from olmoscope.sae.io.headers import read_header
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Here, Place
from olmoscope.sae.io.reading import Reading, Rule, refuse_other_site
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.site import Site, SiteModule, module_by_layer

NAME = "a finished run"
MARK = "done.json"
SEARCH: str | None = f"runs/**/{MARK}"

_RULES: dict[str, Rule] = {"topk": "topk", "groupmax": "groupmax"}
"""The rules that do not become thresholds when training ends."""


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ModelRead(_Read):
    """The language model, as recorded in the store."""

    name: str
    revision: str | None
    architecture: str
    d_model: int
    num_layers: int
    layers_path: str
    base: str | None = None
    """The base model, if it is an adapter."""

    @property
    def shown(self) -> str:
        """Its public name: for a folder only the folder's name, since its path means nothing elsewhere."""
        return Path(self.name).name if Path(self.name).is_absolute() else self.name

    @property
    def on_hub(self) -> bool:
        """Whether `name` is a hub repository: only there the revision is a commit of 40 hex digits."""
        return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) and re.fullmatch(r"[0-9a-f]{40}", self.revision or ""))


class StoreRead(_Read):
    """Where the activations came from."""

    model: ModelRead
    sites: list[SiteName] | None = None
    widths: list[int] | None = None
    """D of each; None, like `sites`, in files of versions that had only residual streams."""
    modules: list[SiteModule] | None = None
    """The module at which each site is; None in files written before this was recorded."""

    def width(self, site: Site) -> int:
        """D of a site."""
        if self.sites is None or self.widths is None:
            return self.model.d_model
        return self.widths[self.sites.index(site)]

    def module(self, site: Site) -> SiteModule | None:
        """The module at which a site is; None if it is not recorded."""
        if self.sites is None or self.modules is None:
            return module_by_layer(self.model.layers_path, site)
        return self.modules[self.sites.index(site)]


class DoneRead(_Read):
    """What done.json says about the SAE."""

    sae: str
    run_hash: str
    checkpoint: str
    store: StoreRead


Done = TypeVar("Done", bound=DoneRead)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a finished run."""

    folder: Path
    recipe: Recipe
    sae: CoderConfig
    done: DoneRead

    @property
    def checkpoint(self) -> Path:
        """The file with the final weights."""
        return self.folder / self.done.checkpoint

    def load(self, checkpoint: Path | None = None) -> TopK | JumpReLU:
        """The trained SAE, on the CPU.

        Args:
            checkpoint: a checkpoint of an earlier step; None: the last one.

        Raises:
            UserError: the checkpoint is missing, damaged or not finite, or its kind, shape, k or normalisation is not
                the recipe's.
        """
        path = checkpoint or self.checkpoint
        sae, wanted = read_checkpoint(path), self.sae
        kind = {"topk": TopK, "groupmax": GroupMax}.get(wanted.activation, JumpReLU)
        k = sae.k if isinstance(sae, TopK) else wanted.k  # a JumpReLU does not record its k
        width = sum(self.done.store.width(site) for site in wanted.reads)
        found = (type(sae), sae.d_sae, sae.d_in, k, sae.normalize)
        if found != (kind, wanted.d_sae, width, wanted.k, wanted.normalize):
            raise UserError(f"{path} holds another SAE ({type(sae).__name__}, {sae.d_sae} latents, d_model "
                            f"{sae.d_model}, k {k}, normalize {sae.normalize}) than {wanted.id}: train it again in an "
                            "empty folder")
        for name, tensor in sae.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{path}: {name} holds NaN or inf, so the SAE cannot be used; train it again with a "
                                "lower learning rate (train.lr), or give a checkpoint of an earlier step")
        return sae.at(wanted.reads, wanted.writes)


def detect(place: Place) -> bool:
    """Whether there is a local folder with a done.json, which training writes last."""
    return isinstance(place, Here) and place.file is None and place.has(MARK)


def look(place: Place, site: Site | None = None) -> Reading:
    """How the SAE of a run folder is read.

    Raises:
        UserError: see `read`.
    """
    assert isinstance(place, Here)
    return reading(read_run_folder(place.path), site)


def read(place: Place, site: Site | None = None) -> Opened:
    """Read the SAE of a run folder.

    Args:
        site: refused if it is not the run's.

    Raises:
        UserError: see `read_run_folder` and `RunFolder.load`; another site.
    """
    assert isinstance(place, Here)
    return opened(read_run_folder(place.path), site)


def reading(run: RunFolder, site: Site | None, checkpoint: Path | None = None) -> Reading:
    """How the SAE of a run is read, at the end of training or at an earlier checkpoint.

    Raises:
        UserError: damaged checkpoint; another site than `site`.
    """
    refuse_other_site(run.folder, site, run.sae.site)
    sae, store, path = run.sae, run.done.store, checkpoint or run.checkpoint
    weights = sorted(path.iterdir()) if path.is_dir() else [path]  # the shards, then their shared file
    try:
        with weights[-1].open("rb") as file:
            header = read_header(file, str(weights[-1]))
    except FileNotFoundError as error:
        raise UserError(missing(path)) from error
    sinks = header.shapes.get("sinks.gain_S", (0,))[0]
    writes, names = sae.writes or sae.reads, [str(file.relative_to(run.folder)) for file in weights]
    return Reading(
        NAME, _RULES.get(sae.activation, "jumprelu"), sum(map(store.width, sae.reads)), sum(map(store.width, writes)),
        sae.d_sae + sinks, (*names, MARK, "recipe.yaml"), tuple(sae.reads), tuple(writes),
        store.model.name, store.model.revision, sae.k if sae.activation in _RULES else None,
        transcoder=sae.writes is not None, own_b_in=sae.writes is not None, normalize=sae.normalize, skip=sae.skip,
        bos="yes" if run.recipe.tokens.bos == "yes" else "no", context_size=_longest(run.recipe),
        notes=(f"its first {sinks} latents are for attention sinks, and were not trained",) if sinks else ())


def opened(run: RunFolder, site: Site | None, checkpoint: Path | None = None) -> Opened:
    """The SAE of a run at the end of training, or at an earlier checkpoint.

    Raises:
        UserError: see `RunFolder.load`; another site than `site`.
    """
    path = run.folder
    refuse_other_site(path, site, run.sae.site)
    sae, model, tokens = run.load(checkpoint), run.done.store.model, run.recipe.tokens
    return Opened(sae, run.sae.id, model.name, model.revision,
                  "jumprelu" if isinstance(sae, JumpReLU) else run.sae.activation, path, "run", run.done.run_hash,
                  bos="yes" if tokens.bos == "yes" else "no",
                  context_size=_longest(run.recipe), dtype=sae.W_dec.dtype, metadata={},
                  model_architecture=model.architecture, model_layers=model.num_layers)


def _longest(recipe: Recipe) -> int:
    """The length of the longest sequences."""
    return max(high for _, high in recipe.tokens.chunk_lengths)


def read_run_folder(folder: Path) -> RunFolder:
    """Read what a run folder says about its SAE.

    Raises:
        UserError: not a run, not finished, damaged, or its parts are of different runs.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml; give a folder of OUT/runs, or run "
                        "`olmoscope train` first")
    if not (folder / MARK).is_file():
        raise UserError(unfinished(folder))
    recipe, done = load_recipe(str(folder / "recipe.yaml")), read_done(folder, DoneRead)
    for sae in recipe.saes:
        if sae.id == done.sae:
            break
    else:
        raise UserError(f"{folder}: done.json belongs to {done.sae}, which recipe.yaml does not hold: the folder "
                        "mixes two runs")
    if recipe.run_hash(sae) != done.run_hash:
        raise UserError(f"{folder}: done.json belongs to another recipe than recipe.yaml (run {done.run_hash}, not "
                        f"{recipe.run_hash(sae)}): the folder mixes two runs")
    return RunFolder(folder, recipe, sae, done)


def unfinished(folder: Path) -> str:
    """The message about a run that is still to be trained."""
    return f"{folder} is not finished (no {MARK}): train it to its end first, with `olmoscope train`"


def refuse_unfinished(place: Place) -> None:
    """Refuse a run that is still to be trained, and an output folder with none but such runs.

    Args:
        place: a folder in which no SAE was found.

    Raises:
        UserError: it is one of these.
    """
    if not isinstance(place, Here) or place.file is not None or not place.has("recipe.yaml"):
        return
    if (place.path / "checkpoints").is_dir():
        raise UserError(unfinished(place.path))
    raise UserError(f"{place.path} holds no finished run yet; run `olmoscope train {place.path}` first")


def read_done(folder: Path, keys: type[Done]) -> Done:
    """Read the wanted keys of done.json.

    Raises:
        UserError: the file is damaged, or a key is absent.
    """
    path = folder / MARK
    try:
        return keys.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}; make it again with this version of olmoscope") from error
