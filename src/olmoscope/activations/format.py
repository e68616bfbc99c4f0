"""The activation store on disk, whole: what another reader needs to know stands here and in docs/formats.md.

    manifest.json                             what the store is (Manifest); rewritten once, when it is finished
    tokens/segment-000042.safetensors         the sequences of a segment and how they are batched (TokenSegment)
    tokens/index.json                         rows of every segment, tokens per source; exists when all are packed
    layer_07/segment-000042.safetensors       `activations [rows, d_model]`
    rows/segment-000042.safetensors           `token_id`, `sequence`, `position`, `source`, each `[rows]`
    checksums/tokens-000042.json              SHA-256 of the segment's tokens, written after them
    checksums/segment-000042.json             SHA-256 of the segment's files; written last: the segment exists

Row i of every layer's file and of the rows file is the same token. The rows of a segment are permuted, the same way
for all layers, so that any slice of it is a random sample of it. All files appear by rename: what exists is complete.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.files import atomic_path, read_json, sha256, write_json
from olmoscope.seeds import generator
from olmoscope.tokens.segments import damaged, read_tensors, segment_name

VERSION = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelIdentity(_Frozen):
    """The model that the activations are of."""

    name: str
    revision: str
    """The hub's commit, or a hash of local weights."""
    architecture: str
    """e.g. `Olmo3ForCausalLM`."""
    d_model: int
    num_layers: int
    layers_path: str
    """Where the decoder layers stand in the causal LM, e.g. `model.layers`."""


class SourceCount(_Frozen):
    """What one text source contributed."""

    documents: int
    tokens: int


class Manifest(_Frozen):
    """What a store is."""

    format: Literal["olmoscope activation store"] = "olmoscope activation store"
    version: Annotated[int, Field(ge=1)] = VERSION
    model: ModelIdentity
    tokenizer_hash: str
    recipe_hash: str
    split: Literal["train", "held_out"]
    layers: list[int]
    dtype: Literal["bfloat16", "float32"]
    segments: int
    rows: int
    sources: dict[str, SourceCount]
    finished: bool
    provenance: dict[str, Any]


def layer_folder(layer: int) -> str:
    """`layer_07`."""
    return f"layer_{layer:02d}"


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Write manifest.json, atomically."""
    write_json(store / "manifest.json", manifest.model_dump(mode="json"))


def read_manifest(store: Path) -> Manifest:
    """Read manifest.json.

    Raises:
        UserError: missing, damaged, not a store's, or of a newer format.
    """
    path = store / "manifest.json"
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != "olmoscope activation store":
        raise UserError(f"{path} is not the manifest of an activation store")
    if isinstance(value.get("version"), int) and value["version"] > VERSION:
        raise UserError(f"{store} has store format {value['version']}, this version of olmoscope reads {VERSION}: "
                        "upgrade olmoscope")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def has_segment(store: Path, segment: int) -> bool:
    """Whether a segment's activations are all written."""
    return segment_checksum(store, segment).exists()


def write_segment(store: Path, segment: int, seed: int, activations: dict[int, Tensor],
                  rows: dict[str, Tensor]) -> None:
    """Write a segment's activations and rows, permuted; its checksums last.

    Args:
        activations: for each layer `[rows, d_model]`, in the order of the token segment.
        rows: `token_id`, `sequence`, `position`, `source`, each `[rows]`, in the same order.
    """
    count = len(rows["token_id"])
    order = torch.from_numpy(generator(seed, "rows of a segment", segment).permutation(count))
    name = segment_name(segment)
    sums = {}
    contents = {f"{layer_folder(layer)}/{name}": {"activations": tensor} for layer, tensor in activations.items()}
    contents[f"rows/{name}"] = rows
    for relative, tensors in contents.items():
        with atomic_path(store / relative) as path:
            save_file({key: tensor[order] for key, tensor in tensors.items()}, path)
            sums[relative] = sha256(path)
    write_json(segment_checksum(store, segment), {"rows": count, "sha256": sums})


def read_rows(store: Path, segment: int) -> dict[str, Tensor]:
    """`token_id`, `sequence`, `position`, `source` of a segment, each `[rows]`.

    Raises:
        UserError: missing or damaged.
    """
    return read_tensors(store / "rows" / segment_name(segment), "pt")[0]


def read_activations(store: Path, layer: int, segment: int, part: slice) -> Tensor:
    """Some rows of a segment at a layer, `[part, d_model]`; only they are read from the disk.

    Raises:
        UserError: missing or damaged.
    """
    path = store / layer_folder(layer) / segment_name(segment)
    try:
        with safe_open(path, "pt") as file:
            rows_RD: Tensor = file.get_slice("activations")[part.start : part.stop]
            return rows_RD
    except (FileNotFoundError, SafetensorError) as error:
        raise damaged(path, error) from error


def verify_segment(store: Path, segment: int) -> None:
    """Compare a segment's files with their checksums.

    Raises:
        UserError: one is missing or differs.
    """
    for relative, expected in read_json(segment_checksum(store, segment))["sha256"].items():
        path = store / relative
        if not path.exists():
            raise damaged(path, "it is missing")
        if sha256(path) != expected:
            raise damaged(path, "its checksum differs")


def segment_checksum(store: Path, segment: int) -> Path:
    """Where the checksums of a segment stand."""
    return store / "checksums" / f"segment-{segment:06d}.json"
