"""The index on disk: names of its files, and its manifest; docs/formats.md describes their content.

    manifest.json                            what the index is (Info) and the checksum of every file; written last
    corpus/tokens.npy                        the tokens, in the order of the text: token p is at *place* p
    corpus/sequences.npy                     where each sequence starts
    corpus/kept.npy                          which tokens are rows of the index: the filter left the others out
    corpus/documents.parquet                 where each document starts, and its source
    corpus/vocabulary.parquet                the text of each token, and how many rows it has
    features/part-000042.safetensors         all data of consecutive features: every firing, and what follows from it
    features.parquet                         a line for each feature, for the list
    work/                                    while the index is being made: sorted firings, and what a restart needs
"""

import json
import mmap
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from olmoscope.activations.store.format import ModelIdentity
from olmoscope.errors import UserError
from olmoscope.files import read_json
from olmoscope.recipe.schema import Filter, SiteName
from olmoscope.sae.io.opened import Kind
from olmoscope.site import layer_as_site

VERSION = 1
FORMAT = "olmoscope feature index"

INTERVALS = 10
"""Number of equal parts of a feature's range (0, max]."""
BINS_PER_OCTAVE = 4
LOWEST_OCTAVE = -16
BINS = 144
"""Number of bins of the histogram of activations: 36 octaves from 2**-16; lower and higher values are in the first and
last bin."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IndexedSAE(_Frozen):
    """The SAE of an index."""

    name: str
    site: SiteName
    """The site that it writes; for a crosscoder, the last one in its own model."""
    reads: list[SiteName] | None = None
    """The sites that a transcoder or a crosscoder reads; None if it reads the site that it writes."""
    d_model: int
    d_sae: int
    architecture: str
    kind: Kind
    where: str
    """Where to open the SAE: a hub id, or a folder or file relative to the index (`sae_place`)."""
    weights: str
    """Identifies its parameters."""

    _of_before = model_validator(mode="before")(layer_as_site)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def layer(self) -> int | None:
        """The site's layer; older readers know only this."""
        return self.site.layer_or_none



class IndexedFile(_Frozen):
    sha256: str
    bytes: int


class Options(_Frozen):
    """How many examples an index keeps, and how it draws them."""

    top: Annotated[int, Field(ge=1, le=1000)] = 20
    per_interval: Annotated[int, Field(ge=0, le=1000)] = 5
    random: Annotated[int, Field(ge=0, le=1000)] = 20
    nearest: Annotated[int, Field(ge=0, le=1000)] = 10
    """Largest number each of neighbours, companions, preferred, promoted and suppressed tokens."""
    seed: int = 0
    """Seed of the draws."""


class Info(_Frozen):
    """The manifest of an index."""

    format: Literal["olmoscope feature index"] = "olmoscope feature index"
    version: Annotated[int, Field(ge=1)] = VERSION
    identity: str
    """A hash of everything that determines the index: SAE, rows, filter, options."""
    sae: IndexedSAE
    model: ModelIdentity
    model_dtype: str | None
    """The dtype in which the model computed the rows; None if their store does not say."""
    store: dict[str, Any]
    """The rows' store: `recipe_hash`, `split`, `tokenizer_hash`; for a text, its `text_hash`; if its sequences begin
    with BOS, `bos_token_ids`."""
    filter: Filter
    options: Options
    tokens: int
    """Number of tokens of the corpus."""
    rows: int
    """Number of tokens that were encoded."""
    sequences: int
    documents: int
    firings: int
    """Number of pairs of a row and an active latent."""
    dead: int
    """Number of features that fired on no row."""
    sample_rows: int
    """Number of rows on which companions were counted."""
    sources: dict[str, int]
    """Number of rows of each text source, in the order of the sources' numbers."""
    position_rows: list[int]
    """Numbers of rows at position 0, at 1, at 2 to 3, at 4 to 7 and so on."""
    unembedding: str | None
    """How promoted and suppressed tokens were computed; None if there are none."""
    no_unembedding: str | None = None
    """Why there are no promoted and suppressed tokens."""
    parts: list[int]
    """The first feature of each part, then the number of features."""
    evaluation: dict[str, Any] | None
    """The SAE's evaluation.json, if there was one."""
    files: dict[str, IndexedFile]
    provenance: dict[str, Any]
    """Provenance of the process that finished the index, without a date."""


def sae_place(index: Path, info: Info) -> str:
    """The address by which `open_sae` opens the SAE of an index."""
    return info.sae.where if info.sae.kind == "hub" else str(index / info.sae.where)


def part_path(index: Path, part: int) -> Path:
    """The path of a part."""
    return index / "features" / f"part-{part:06d}.safetensors"


def bin_edges() -> np.ndarray:
    """Edges of the histogram's bins, `[BINS + 1]` float32: exact where it is a power of two."""
    exponents = np.arange(BINS + 1) / BINS_PER_OCTAVE + LOWEST_OCTAVE
    return np.exp2(exponents).astype(np.float32)


def read_info(index: Path) -> Info:
    """Read an index's manifest.

    Raises:
        UserError: missing, damaged, not the manifest of an index, or of a newer format.
    """
    path = index / "manifest.json"
    if not path.exists():
        doing = " (it is not finished: run the same `olmoscope index` again)" if (index / "work").is_dir() else ""
        raise UserError(f"{index} holds no feature index{doing}; `olmoscope index SAE -o {index}` makes one")
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a feature index")
    if isinstance(value.get("version"), int) and value["version"] > VERSION:
        raise UserError(f"{index} has index format {value['version']}, this version of olmoscope reads {VERSION}: "
                        "upgrade olmoscope")
    try:
        return Info.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def damaged(path: Path, why: str) -> UserError:
    """The error for a damaged file of an index."""
    return UserError(f"{path} is damaged ({why}); delete the index and run `olmoscope index` again")


_DTYPES = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64, "U8": np.uint8}


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, memory-mapped: only the parts that are used are read from the disk.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(memory[:8], "little")
        header = json.loads(memory[8 : 8 + size])
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                flat = np.frombuffer(memory, _DTYPES[entry["dtype"]], offset=8 + size + start,
                                     count=(end - start) // np.dtype(_DTYPES[entry["dtype"]]).itemsize)
                tensors[name] = flat.reshape(entry["shape"])
        return tensors
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise damaged(path, str(error)) from error
