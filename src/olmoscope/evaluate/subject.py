"""An SAE to be evaluated, indexed or shown, wherever it is: a run of ours, a folder in SAELens' format, or the hub.

What names an SAE:

    OUT/runs/SAE_ID                a finished run
    FOLDER                         cfg.json and sae_weights.safetensors
    OWNER/NAME:PATH/IN/REPO        such a folder of a hub repository; `OWNER/NAME` where it is the repository itself,
                                   `OWNER/NAME@REVISION:PATH` for a branch, tag or commit
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from olmoscope.errors import UserError
from olmoscope.files import read_json, sha256
from olmoscope.hub_errors import hub_exceptions, hub_reason
from olmoscope.model_errors import first_line
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import Bos
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.saelens_folder import CONFIG, WEIGHTS, read_saelens_folder
from olmoscope.sae.threshold import JumpReLU
from olmoscope.train.checkpoint import load_sae

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<path>.*))?")
_BLOCK = re.compile(r"blocks\.(\d+)\.hook_(resid_post|out|resid_pre)")
"""How TransformerLens calls the residual stream after or before a layer."""
_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)")
"""How transformers' models call their layers; a hook there is one on what the layer puts out."""


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
        model_architecture: of the language model, e.g. `Olmo3ForCausalLM`, where its folder says it.
        model_layers: of the whole model, likewise.
        unread: which tokens it was trained without, in words; None where all were read, or its folder does not say.
    """

    sae: SparseCoder
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
    model_architecture: str | None = None
    model_layers: int | None = None
    unread: str | None = None

    def unread_note(self) -> str | None:
        """What to tell who measures it on all tokens."""
        return self.unread and f"note: {self.name} was trained without {self.unread}; here they are read too"


def open_sae(where: str | Path, layer: int | None = None) -> Subject:
    """Open an SAE.

    Args:
        where: see the head of this file.
        layer: the decoder layer, for a SAELens folder that does not say which.

    Raises:
        UserError: nothing there, unfinished, damaged, of a kind that is not read, not of the residual stream, or of
            another layer than `layer`.
    """
    folder = Path(where)
    if folder.is_dir():
        if (folder / "done.json").is_file():
            return _open_run(folder, layer)
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


def _open_run(folder: Path, layer: int | None) -> Subject:
    done = read_json(folder / "done.json")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    config = next((sae for sae in recipe.saes if sae.id == done["sae"]), None)
    if config is None:
        raise UserError(f"{folder}: done.json is of {done['sae']}, which recipe.yaml does not hold")
    _refuse_other_layer(folder, layer, config.layer)
    model = done["store"]["model"]
    sae: SparseCoder = load_sae(folder / done["checkpoint"])
    return Subject(sae, config.id, config.layer, model["name"], model["revision"],
                   "jumprelu" if isinstance(sae, JumpReLU) else config.activation, folder, "run", done["run_hash"],
                   bos="yes" if recipe.tokens.bos == "yes" else "no",
                   context_size=max(high for _, high in recipe.tokens.chunk_lengths),
                   model_architecture=model["architecture"], model_layers=model["num_layers"])


def _open_folder(folder: Path, name: str, layer: int | None, kind: Literal["folder", "hub"]) -> Subject:
    read = read_saelens_folder(folder)
    metadata = read.metadata
    context = metadata.get("context_size")
    return Subject(read.sae, name, _layer(metadata, layer, folder), metadata.get("model_name"),
                   metadata.get("model_revision"), read.architecture, folder, kind,
                   f"sha256:{sha256(folder / WEIGHTS)[:32]}-{sha256(folder / CONFIG)[:8]}",
                   bos=_bos(metadata, folder), context_size=context if isinstance(context, int) else None,
                   unread=_unread(metadata))


def _unread(metadata: dict[str, Any]) -> str | None:
    """What SAELens' training left out: special tokens, and positions outside a Python slice."""
    left_out = ["special tokens"] if metadata.get("exclude_special_tokens") else []
    positions = metadata.get("seqpos_slice")
    if isinstance(positions, list) and any(value not in (None, usual) for value, usual in zip(
            [None, *positions] if len(positions) == 1 else positions, (0, None, 1), strict=False)):
        left_out.append(f"positions outside {positions}")
    return " and ".join(left_out) or None


def _bos(metadata: dict[str, Any], folder: Path) -> Bos:
    """What the metadata says of BOS."""
    said = metadata.get("prepend_bos")
    if said is not None and not isinstance(said, bool):
        raise UserError(f"{folder / CONFIG}: prepend_bos must be true or false, not {said!r}")
    return "auto" if said is None else "yes" if said else "no"


def _layer(metadata: dict[str, Any], layer: int | None, folder: Path) -> int:
    """The layer whose output an SAE reads."""
    names = [str(metadata[key]) for key in ("hook_name", "hf_hook_name") if metadata.get(key) is not None]
    if not names:
        if layer is None:
            raise UserError(f"{folder / CONFIG} does not say which layer the SAE reads (metadata.hook_name); give "
                            "--layer")
        return layer
    said = _layer_of_hook(names[0], folder)
    other = _MODULE.fullmatch(names[-1])
    if other is not None and int(other[1]) != said:
        raise UserError(f"{folder / CONFIG}: hook_name {names[0]!r} and hf_hook_name {names[-1]!r} are different "
                        "places: which one is right?")
    _refuse_other_layer(folder / CONFIG, layer, said)
    return said


def _layer_of_hook(hook: str, folder: Path) -> int:
    """TransformerLens' `resid_pre` of a layer is the output of the one before."""
    if module := _MODULE.fullmatch(hook):
        return int(module[1])
    block = _BLOCK.fullmatch(hook)
    before = int(block is not None and block[2] == "resid_pre")
    if block is None or int(block[1]) < before:
        raise UserError(f"{folder / CONFIG}: hook_name {hook!r} is not the output of a decoder layer "
                        "(blocks.L.hook_resid_post)")
    return int(block[1]) - before


def _refuse_other_layer(where: Path, layer: int | None, said: int) -> None:
    """`--layer` stands in for what an SAE does not say, and does not overrule what it says."""
    if layer not in (None, said):
        raise UserError(f"--layer {layer}: {where} says that this SAE reads layer {said}; leave --layer out")


def _fetch(repo: str, path: str, revision: str | None) -> Path:
    """Download an SAE folder into the hub's cache; what is there already is not fetched again."""
    from huggingface_hub import hf_hub_download

    prefix = path.strip("/") + "/" if path.strip("/") else ""
    try:
        folder = Path(hf_hub_download(repo, prefix + CONFIG, revision=revision)).parent
        commit = folder.parents[len(PurePosixPath(prefix).parts) - 1].name if prefix else folder.name
        hf_hub_download(repo, prefix + WEIGHTS, revision=commit)
    except hub_exceptions() as error:
        reason = hub_reason(error, repo, revision=revision) or first_line(error)
        raise UserError(f"cannot have {prefix or 'the SAE'} of hub repository {repo}: {reason}") from error
    return folder
