"""The index on disk: names of its files and its manifest; docs/formats.md says what is in them.

    manifest.json                            what the index is (Info) and the checksum of every file; written last
    corpus/tokens.npy                        the tokens, in the order of the text: token number p is *place* p
    corpus/sequences.npy                     where each sequence starts
    corpus/kept.npy                          which tokens are rows of the index: the filter left the others out
    corpus/documents.parquet                 where each document starts, and its source
    corpus/vocabulary.parquet                what each token looks like, and how many rows it has
    features/part-000042.safetensors         all of some consecutive features: every firing, and what follows from it
    features.parquet                         a line for each feature, for the list
    work/                                    while it is being made: sorted firings and what else is needed to go on
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
"""Equal parts of (0, max] of a feature."""
BINS_PER_OCTAVE = 4
LOWEST_OCTAVE = -16
BINS = 144
"""Of the histogram of activations: 36 octaves from 2**-16; what is lower or higher is in the first or the last."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IndexedSAE(_Frozen):
    """The SAE that an index is of."""

    name: str
    site: SiteName
    """What it writes; of a crosscoder the last site in the model that it is about."""
    reads: list[SiteName] | None = None
    """What a transcoder or a crosscoder reads; None: the site that it writes."""
    d_model: int
    d_sae: int
    architecture: str
    kind: Kind
    where: str
    """What opens the SAE: a hub id, or a folder or file, relative to the index (`sae_place`)."""
    weights: str
    """What identifies its parameters."""

    _of_before = model_validator(mode="before")(layer_as_site)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def layer(self) -> int | None:
        """The site's layer, which is all that older readers know."""
        return self.site.layer_or_none



class IndexedFile(_Frozen):
    sha256: str
    bytes: int


class Options(_Frozen):
    """How many examples an index keeps, and of which rows."""

    top: Annotated[int, Field(ge=1, le=1000)] = 20
    per_interval: Annotated[int, Field(ge=0, le=1000)] = 5
    random: Annotated[int, Field(ge=0, le=1000)] = 20
    nearest: Annotated[int, Field(ge=0, le=1000)] = 10
    """Neighbours, companions, preferred tokens, promoted and suppressed tokens: as many of each at most."""
    seed: int = 0
    """Of the draws."""


class Info(_Frozen):
    """What an index is: its manifest."""

    format: Literal["olmoscope feature index"] = "olmoscope feature index"
    version: Annotated[int, Field(ge=1)] = VERSION
    identity: str
    """A hash of what decides the index: SAE, rows, filter, options."""
    sae: IndexedSAE
    model: ModelIdentity
    model_dtype: str | None
    """In which the model computed the rows; None where their store does not say."""
    store: dict[str, Any]
    """The rows' store: `recipe_hash`, `split`, `tokenizer_hash`; of a text, its `text_hash`; where its sequences begin
    with BOS, `bos_token_ids`."""
    filter: Filter
    options: Options
    tokens: int
    """Of the corpus."""
    rows: int
    """Tokens that were encoded."""
    sequences: int
    documents: int
    firings: int
    """(latent, row) pairs."""
    dead: int
    """Features that fired on no row."""
    sample_rows: int
    """Rows on which companions were counted."""
    sources: dict[str, int]
    """Rows of each text source, in the order of their numbers."""
    position_rows: list[int]
    """Rows at position 0, at 1, at 2 to 3, at 4 to 7 and so on."""
    unembedding: str | None
    """How promoted and suppressed tokens were computed. None: there are none."""
    no_unembedding: str | None = None
    """Why there are none."""
    parts: list[int]
    """The first feature of each part, and their number."""
    evaluation: dict[str, Any] | None
    """The SAE's evaluation.json, if there was one."""
    files: dict[str, IndexedFile]
    provenance: dict[str, Any]
    """Of the process that finished the index, without a date."""


def sae_place(index: Path, info: Info) -> str:
    """What `open_sae` takes to open the SAE of an index."""
    return info.sae.where if info.sae.kind == "hub" else str(index / info.sae.where)


def part_path(index: Path, part: int) -> Path:
    """Where a part stands."""
    return index / "features" / f"part-{part:06d}.safetensors"


def bin_edges() -> np.ndarray:
    """Edges of the histogram's bins, `[BINS + 1]` float32: the number itself where it is a power of two."""
    exponents = np.arange(BINS + 1) / BINS_PER_OCTAVE + LOWEST_OCTAVE
    return np.exp2(exponents).astype(np.float32)


def read_info(index: Path) -> Info:
    """Read an index's manifest.

    Raises:
        UserError: missing, damaged, not an index's, or of a newer format.
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
    """What to say of a damaged file of an index."""
    return UserError(f"{path} is damaged ({why}); delete the index and run `olmoscope index` again")


_DTYPES = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64, "U8": np.uint8}


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped: only what is looked at is read from the disk.

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
