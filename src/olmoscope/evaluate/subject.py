"""An SAE to be evaluated, indexed or shown, wherever it is: a run of ours, a folder in SAELens' format, or the hub.

What names an SAE:

    OUT/runs/SAE_ID                a finished run
    FOLDER                         cfg.json and sae_weights.safetensors
    OWNER/NAME:PATH/IN/REPO        such a folder of a hub repository; `OWNER/NAME` where it is the repository itself,
                                   `OWNER/NAME@REVISION:PATH` for a branch, tag or commit
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from olmoscope.errors import UserError
from olmoscope.files import read_json, sha256
from olmoscope.recipe import Bos
from olmoscope.recipe_file import load_recipe
from olmoscope.sae.interface import SparseAutoencoder
from olmoscope.sae.saelens_folder import CONFIG, WEIGHTS, read_saelens_folder
from olmoscope.sae.threshold import JumpReLU
from olmoscope.train.checkpoint import load_sae

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<path>.*))?")
_HOOKS = (re.compile(r"blocks\.(\d+)\.hook_(?:resid_post|out)"), re.compile(r"blocks\.(\d+)\.hook_resid_pre"))


@dataclass(frozen=True)
class Subject:
    """An SAE and where it belongs.

    Attributes:
        sae: float32, on the CPU.
        name: what tables call it: a run's SAE id, a folder's name, a hub id.
        layer: the decoder layer whose output it reads, from 0.
        model_name: the language model, as its folder names it; None if that does not say.
        model_revision: of that model, where known.
        architecture: as SAELens calls it: `topk`, `jumprelu`, `standard`, `gated`, ...
        folder: where its files are (for the hub: in the cache).
        kind: what sort of place it came from.
        identity: the run's hash, or `sha256:` and a hash of weights and settings.
        bos: whether it was trained on sequences that begin with BOS; `auto` where its folder does not say (then as the
            tokenizer does by itself).
        context_size: the length of those sequences, where known.
    """

    sae: SparseAutoencoder
    name: str
    layer: int
    model_name: str | None
    model_revision: str | None
    architecture: str
    folder: Path
    kind: Literal["run", "folder", "hub"]
    identity: str
    bos: Bos
    context_size: int | None


def open_sae(where: str | Path, layer: int | None = None) -> Subject:
    """Open an SAE.

    Args:
        where: see the head of this file.
        layer: the decoder layer, for a SAELens folder that does not say which.

    Raises:
        UserError: nothing there, unfinished, damaged, of a kind that is not read, or not of the residual stream.
    """
    folder = Path(where)
    if folder.is_dir():
        if (folder / "done.json").is_file():
            return _open_run(folder)
        if (folder / CONFIG).is_file():
            return _open_folder(folder, folder.resolve().name, layer, "folder")
        raise UserError(f"{folder} is neither a finished run (done.json) nor an SAE in SAELens' format ({CONFIG})")
    if (match := _HUB.fullmatch(str(where))) and not folder.exists():
        return _open_folder(_fetch(match["repo"], match["path"] or "", match["revision"]), str(where), layer, "hub")
    raise UserError(f"{where} is no folder, and no hub id (OWNER/NAME:PATH/IN/REPO)")


def find_saes(where: str) -> list[str]:
    """What a command's argument stands for: the runs of an output folder, the SAEs of a release, or the one named.

    Raises:
        UserError: an output folder or release without SAEs.
    """
    folder = Path(where)
    if (folder / "done.json").is_file() or (folder / CONFIG).is_file() or not folder.is_dir():
        return [where]
    for place, name in ((folder / "runs", "done.json"), (folder, CONFIG)):
        if found := sorted(path.parent for path in place.rglob(name)):
            return [str(path) for path in found]
    raise UserError(f"{folder} holds no finished run (runs/SAE_ID/done.json) and no SAE in SAELens' format ({CONFIG})")


def _open_run(folder: Path) -> Subject:
    done = read_json(folder / "done.json")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    config = next((sae for sae in recipe.saes if sae.id == done["sae"]), None)
    if config is None:
        raise UserError(f"{folder}: done.json is of {done['sae']}, which recipe.yaml does not hold")
    model = done["store"]["model"]
    sae: SparseAutoencoder = load_sae(folder / done["checkpoint"])
    return Subject(sae, config.id, config.layer, model["name"], model["revision"],
                   "jumprelu" if isinstance(sae, JumpReLU) else config.activation, folder, "run", done["run_hash"],
                   bos="yes" if recipe.tokens.bos == "yes" else "no",
                   context_size=max(high for _, high in recipe.tokens.chunk_lengths))


def _open_folder(folder: Path, name: str, layer: int | None, kind: Literal["folder", "hub"]) -> Subject:
    read = read_saelens_folder(folder)
    metadata = read.metadata
    context = metadata.get("context_size")
    return Subject(read.sae, name, _layer(metadata, layer, folder), metadata.get("model_name"),
                   metadata.get("model_revision"), read.architecture, folder, kind,
                   f"sha256:{sha256(folder / WEIGHTS)[:32]}-{sha256(folder / CONFIG)[:8]}",
                   bos=_bos(metadata, folder),
                   context_size=context if isinstance(context, int) else None)


def _bos(metadata: dict[str, Any], folder: Path) -> Bos:
    """What the metadata says of BOS."""
    said = metadata.get("prepend_bos")
    if said is not None and not isinstance(said, bool):
        raise UserError(f"{folder / CONFIG}: prepend_bos must be true or false, not {said!r}")
    return "auto" if said is None else "yes" if said else "no"


def _layer(metadata: dict[str, Any], layer: int | None, folder: Path) -> int:
    """The layer whose output an SAE reads. TransformerLens' `resid_pre` of a layer is the output of the one before."""
    if layer is not None:
        return layer
    hook = metadata.get("hook_name")
    if hook is None:
        raise UserError(f"{folder / CONFIG} does not say which layer the SAE reads (metadata.hook_name); give --layer")
    for pattern, before in zip(_HOOKS, (0, 1), strict=True):
        if (match := pattern.fullmatch(str(hook))) and int(match[1]) >= before:
            return int(match[1]) - before
    raise UserError(f"{folder / CONFIG}: hook_name {hook!r} is not the output of a decoder layer "
                    "(blocks.L.hook_resid_post)")


def _fetch(repo: str, path: str, revision: str | None) -> Path:
    """Download an SAE folder into the hub's cache; what is there already is not fetched again."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    prefix = path.strip("/") + "/" if path.strip("/") else ""
    try:
        config = hf_hub_download(repo, prefix + CONFIG, revision=revision)
        hf_hub_download(repo, prefix + WEIGHTS, revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"cannot have {prefix or 'the SAE'} of hub repository {repo}: {first_line}") from error
    return Path(config).parent
