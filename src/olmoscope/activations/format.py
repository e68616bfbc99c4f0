"""The activation store on disk, whole: what another reader needs to know stands here and in docs/formats.md.

    manifest.json                             what the store is (Manifest); rewritten once, when it is finished
    tokens/segment-000042.safetensors         the sequences of a segment and how they are batched (TokenSegment)
    tokens/index.json                         rows of every segment, tokens per source; exists when all are packed
    layer_07/segment-000042.safetensors       `activations [rows, d_model]`
    rows/segment-000042.safetensors           `token_id`, `sequence`, `position`, `source`, each `[rows]`; and
                                              `norm_07`, each row's Euclidean norm at layer 7, float32
    checksums/segment-000042.json             SHA-256 of the segment's files, and a checksum of every block of rows of
                                              the activations (blocks.py); written last: the segment exists

Row i of every layer's file and of the rows file is the same token. The rows of a segment are permuted, the same way
for all layers, so that any slice of it is a random sample of it. All files appear by rename: what exists is complete.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from olmoscope.activations.blocks import BLOCK_ROWS, checksums, read_blocks
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
    special_token_ids: list[int]
    """What the tokenizer calls special, for filters."""
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
    if value.get("version", 0) > VERSION:
        raise UserError(f"{store} has store format {value['version']}, this version of olmoscope reads {VERSION}: "
                        "upgrade olmoscope")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def has_segment(store: Path, segment: int) -> bool:
    """Whether a segment's activations are all written."""
    return _checksums(store, segment).exists()


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
    sums, blocks = {}, {}
    contents = {f"{layer_folder(layer)}/{name}": {"activations": tensor} for layer, tensor in activations.items()}
    norms = {norm_name(layer): torch.linalg.vector_norm(tensor, dim=1, dtype=torch.float64).float()
             for layer, tensor in activations.items()}
    contents[f"rows/{name}"] = rows | norms
    for relative, tensors in contents.items():
        permuted = {key: tensor[order] for key, tensor in tensors.items()}
        with atomic_path(store / relative) as path:
            save_file(permuted, path)
            sums[relative] = sha256(path)
        if "activations" in permuted:
            blocks[relative] = checksums(permuted["activations"])
    write_json(_checksums(store, segment), {"rows": count, "sha256": sums, "block_rows": BLOCK_ROWS, "blocks": blocks})


@dataclass(frozen=True)
class SegmentSums:
    """What checksums/segment-N.json says; paths are relative to the store."""

    sha256: dict[str, str]
    blocks: dict[str, list[str]]


def read_sums(store: Path, segment: int) -> SegmentSums:
    """Read a segment's checksums.

    Raises:
        UserError: missing or damaged.
    """
    path = _checksums(store, segment)
    value = read_json(path)
    if not isinstance(value, dict) or not {"sha256", "blocks"} <= set(value) or value["block_rows"] != BLOCK_ROWS:
        raise UserError(f"{path} is damaged or of another format; delete it and run `olmoscope collect` again")
    return SegmentSums(value["sha256"], value["blocks"])


def read_rows(store: Path, segment: int, sums: SegmentSums | None = None) -> dict[str, Tensor]:
    """`token_id`, `sequence`, `position`, `source` and the norms of a segment, each `[rows]`; the file is checked.

    Args:
        sums: the segment's checksums, where they were read before.

    Raises:
        UserError: missing or damaged.
    """
    sums = sums or read_sums(store, segment)
    _verify(store, f"rows/{segment_name(segment)}", sums)
    return read_tensors(store / "rows" / segment_name(segment), "pt")[0]


def read_activations(store: Path, layer: int, segment: int, part: slice, sums: SegmentSums | None = None,
                     out: Tensor | None = None) -> Tensor:
    """Some rows of a segment at a layer, `[part, d_model]`; only their blocks are read from the disk, and checked.

    Args:
        sums: the segment's checksums, where they were read before.
        out: memory to fill, `[part, d_model]` in the store's dtype.

    Raises:
        UserError: missing or damaged.
    """
    relative = f"{layer_folder(layer)}/{segment_name(segment)}"
    sums = sums or read_sums(store, segment)
    return read_blocks(store / relative, "activations", part, sums.blocks[relative], out)


def norm_name(layer: int) -> str:
    """The name of a layer's norms in rows/: `norm_07`."""
    return f"norm_{layer:02d}"


def verify_segment(store: Path, segment: int) -> None:
    """Compare a segment's files with their checksums.

    Raises:
        UserError: one is missing or differs.
    """
    sums = read_sums(store, segment)
    for relative in sums.sha256:
        _verify(store, relative, sums)


def _verify(store: Path, relative: str, sums: SegmentSums) -> None:
    path = store / relative
    if not path.exists():
        raise damaged(path, "it is missing")
    if sha256(path) != sums.sha256[relative]:
        raise damaged(path, "its checksum differs")


def _checksums(store: Path, segment: int) -> Path:
    return store / "checksums" / f"segment-{segment:06d}.json"
