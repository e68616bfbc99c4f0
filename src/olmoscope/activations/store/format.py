"""The whole activation store on disk: this file and docs/formats.md say what another reader needs to know.

    manifest.json                             what the store is (Manifest); rewritten when it is finished or grows
    tokens/recipe.json                        which recipe's tokens these are; written before the first tokens
    tokens/segment-000042.safetensors         the sequences of a segment and how they are batched (TokenSegment)
    tokens/index.json                         rows of every segment, tokens per source; exists when all are packed
    layer_07/segment-000042.safetensors       the site layers.7: `activations [rows, D]`; with dtype float8_e4m3 also
                                              `scale [rows]`. Folders of other sites: layer_07_mlp_out, embed, ...
    rows/segment-000042.safetensors           `token_id`, `sequence`, `position`, `source`, each `[rows]`; and
                                              `norm_07`, each row's Euclidean norm at layers.7, float32
    checksums/tokens-000042.json              SHA-256 of the segment's tokens, written after them
    statistics/segment-000042.safetensors     the segment's sums (statistics.py)
    checksums/segment-000042.json             SHA-256 of the segment's files, and a checksum of every block of rows of
                                              the activations (blocks.py); written last: then the segment exists
    statistics.json, statistics.safetensors   statistics of the whole store; written when all segments exist

Row i of every site's file and of the rows file is the same token. The rows of a segment are permuted, the same way
for all sites, so that any slice of a segment is a random sample of it. All files appear by rename: what exists is
complete. No byte depends on how many processes made the store, or on what was interrupted; nothing in it has a date.
Files whose names begin with a dot (locks, half-written files) are not part of the store.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from olmoscope.activations.store import fp8
from olmoscope.activations.store.blocks import BLOCK_ROWS, checksums, read_blocks
from olmoscope.activations.store.tensors_file import write_tensors
from olmoscope.errors import UserError
from olmoscope.files import read_json, sha256, write_json
from olmoscope.recipe.schema import SiteName, Split, StoreDtype, Wanted
from olmoscope.seeds import generator
from olmoscope.site import Site, SiteModule
from olmoscope.tokens.segments import damaged, read_tensors, segment_name

VERSION = 2
"""The format's version. Version 1, which held residual streams only and named them by layer, can still be read."""
WRITERS = 4
"""How many files of a segment are written at a time."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelIdentity(_Frozen):
    """The model that the activations come from."""

    name: str
    revision: str
    """The hub's commit, or a hash of local weights."""
    architecture: str
    """e.g. `Olmo3ForCausalLM`."""
    d_model: int
    num_layers: int
    layers_path: str
    """Where the decoder layers are in the causal LM, e.g. `model.layers`."""
    base: str | None = None
    """For an adapter, the base model that it was merged into; the base's revision follows a `+` in `revision`."""


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
    """The tokens that the tokenizer calls special, for filters; includes BOS if sequences begin with it."""
    bos_token_ids: list[int] = []
    """The tokens with which each sequence begins (or each document, if documents are kept apart): BOS, or none."""
    recipe_hash: str
    wanted: Wanted | None = None
    """The number of tokens of each split that the recipe of `recipe_hash` asks for; None in older stores."""
    split: Split
    of: str | None = None
    """The recipe's name for the model of this part (`models`); None for the recipe's own model."""
    sites: list[SiteName]
    """Where the activations were taken, in the order of the model."""
    widths: list[int]
    """D of each site."""
    modules: list[SiteModule] | None = None
    """The module of the model that each site is at; None in older stores."""
    dtype: StoreDtype
    model_dtype: Literal["bfloat16", "float32"] | None = None
    """The dtype in which the model computed; None in older stores."""
    documents_apart: bool | None = None
    """Whether restarted position ids keep documents apart in this model (model/probe.py, which also refuses models that
    are not causal); None in stores older than this test."""
    segments: int
    rows: int
    sources: dict[str, SourceCount]
    finished: bool
    provenance: dict[str, Any]
    """The process that started the store, without a date, so that the same work gives the same bytes."""

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "layers" not in value or "sites" in value:
            return value
        tree = {key: part for key, part in value.items() if key != "layers"}
        return tree | {"sites": value["layers"], "widths": [value["model"]["d_model"]] * len(value["layers"])}

    def width(self, site: Site) -> int:
        """D of a site that the store has."""
        return self.widths[self.sites.index(site)]


def segment_path(store: Path, folder: str, segment: int) -> Path:
    """The path of a segment's file in a folder (`layer_07`, `rows`, `statistics`)."""
    return store / folder / segment_name(segment)


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Write manifest.json, atomically."""
    write_json(store / "manifest.json", manifest.model_dump(mode="json"))


def read_manifest(store: Path) -> Manifest:
    """Read manifest.json.

    Raises:
        UserError: it is missing, damaged, not the manifest of a store, or in a newer format.
    """
    path = store / "manifest.json"
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != "olmoscope activation store":
        raise UserError(f"{path} is not the manifest of an activation store")
    if isinstance(value.get("version"), int) and value["version"] > VERSION:
        raise UserError(f"{store} has store format {value['version']}, but this version of olmoscope reads {VERSION}: "
                        "upgrade olmoscope")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def has_segment(store: Path, segment: int) -> bool:
    """Whether all of a segment's activations are written."""
    return segment_checksum(store, segment).exists()


def stored_order(seed: int, segment: int, rows: int) -> np.ndarray:
    """For each row of a stored segment, its row number in the token segment, `[rows]` int64."""
    return generator(seed, "rows of a segment", segment).permutation(rows)


def write_segment(store: Path, segment: int, tensors: dict[str, dict[str, Tensor]],
                  between: Callable[[], None] = lambda: None) -> None:
    """Write a segment's files in parallel (hashing a file takes as long as a fast disk takes to write it), with rows in
    `stored_order`; write its checksums last.

    Args:
        tensors: the contents of its file in each folder: `layer_07`, ..., `rows`, `statistics`; all on the CPU.
        between: as in `write_tensors`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    def write(folder: str) -> tuple[str, str, dict[str, list[str]]]:
        path, contents = segment_path(store, folder, segment), tensors[folder]
        digest = write_tensors(path, contents, between)
        return str(path.relative_to(store)), digest, (
            {name: checksums(tensor) for name, tensor in contents.items()} if "activations" in contents else {})

    with ThreadPoolExecutor(WRITERS) as pool:
        written = list(pool.map(write, tensors))
    rows = len(tensors["rows"]["token_id"])
    sums = {path: digest for path, digest, _ in written}
    blocks = {path: of_file for path, _, of_file in written if of_file}
    write_json(segment_checksum(store, segment),
               {"rows": rows, "sha256": sums, "block_rows": BLOCK_ROWS, "blocks": blocks})


@dataclass(frozen=True)
class SegmentSums:
    """The contents of checksums/segment-N.json; paths are relative to the store."""

    sha256: dict[str, str]
    blocks: dict[str, dict[str, list[str]]]
    """For each file of activations, the checksums of the blocks of each of its tensors."""


def read_sums(store: Path, segment: int) -> SegmentSums:
    """Read a segment's checksums.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = segment_checksum(store, segment)
    value = read_json(path)
    if not isinstance(value, dict) or not {"sha256", "blocks"} <= set(value) or value["block_rows"] != BLOCK_ROWS:
        raise UserError(f"{path} is damaged or in another format; delete it and run `olmoscope collect` again")
    return SegmentSums(value["sha256"], value["blocks"])


def read_rows(store: Path, segment: int, sums: SegmentSums | None = None) -> dict[str, Tensor]:
    """`token_id`, `sequence`, `position`, `source` and the norms of a segment, each `[rows]`; the file is checked.

    Args:
        sums: the segment's checksums, if they are already read.

    Raises:
        UserError: a file is missing or damaged.
    """
    sums = sums or read_sums(store, segment)
    path = segment_path(store, "rows", segment)
    _verify(store, str(path.relative_to(store)), sums)
    return read_tensors(path, "pt")[0]


def read_activations(store: Path, site: Site, segment: int, part: slice, sums: SegmentSums | None = None,
                     out: Tensor | None = None) -> Tensor:
    """Some rows of a segment at a site, `[part, D]`. Only the blocks with these rows are read and checked.

    The dtype is `read_dtype`: the store's dtype, except that 8-bit rows are returned in bfloat16.

    Args:
        sums: the segment's checksums, if they are already read.
        out: memory to fill, `[part, D]`.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = segment_path(store, site.folder, segment)
    blocks = (sums or read_sums(store, segment)).blocks[f"{site.folder}/{segment_name(segment)}"]
    if "scale" not in blocks:
        return read_blocks(path, "activations", part, blocks["activations"], out)
    rows_RD = fp8.dequantize(*(read_blocks(path, name, part, blocks[name]) for name in ("activations", "scale")))
    return rows_RD if out is None else out.copy_(rows_RD)


NORM = "norm_"
"""The prefix of the names of norms in rows/."""


def norm_name(site: Site) -> str:
    """The name of a site's norms in rows/: `norm_07`, `norm_07_mlp_out`, `norm_embed`."""
    return f"{NORM}{site.folder.removeprefix('layer_')}"


def read_dtype(dtype: StoreDtype) -> torch.dtype:
    """The dtype in which readers get the rows of a store: the store's own, or bfloat16 for 8-bit rows."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
            "float8_e4m3": torch.bfloat16}[dtype]


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


def segment_checksum(store: Path, segment: int) -> Path:
    """The path of a segment's checksums."""
    return store / "checksums" / f"segment-{segment:06d}.json"
