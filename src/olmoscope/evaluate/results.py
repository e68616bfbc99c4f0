"""Types of evaluation.json, which `olmoscope evaluate` writes and the release, the card and the report read.

Every figure is defined in docs/metrics.md. An interval is [low, high], 95 %, by bootstrap over documents.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, computed_field, model_validator

from olmoscope.activations.store.outliers import Outliers
from olmoscope.activations.store.statistics import OUTLIER
from olmoscope.errors import UserError
from olmoscope.evaluate.behaviour_results import Absorption, Probing
from olmoscope.evaluate.behaviour_results import Interval as Interval
from olmoscope.files import read_json, write_json
from olmoscope.recipe.schema import SiteName
from olmoscope.site import layer_as_site

EVALUATION = "evaluation.json"


class _Frozen(BaseModel):
    """Fields may be added within a version, so unknown ones are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class L0(_Frozen):
    """Active latents per row."""

    mean: FiniteFloat
    p5: int
    p25: int
    p50: int
    p75: int
    p95: int
    values: list[int]
    """The numbers of active latents that occur, ascending."""
    rows: list[int]
    """On how many rows each of `values` occurs."""


class Dead(_Frozen):
    """Latents that did not fire in a window of tokens."""

    share: FiniteFloat
    window: int


class Density(_Frozen):
    """How often latents fire: `latents[i]` of them on a share of rows from `bin_edges[i]` to `bin_edges[i + 1]`."""

    bin_edges: list[FiniteFloat]
    latents: list[int]
    over_1_percent: FiniteFloat
    over_10_percent: FiniteFloat


class Language(_Frozen):
    """How the model responds when the reconstruction replaces the site's activations. In nats."""

    rows: int
    """Number of tokens read; KL is a mean over them."""
    predictions: int
    """Number of tokens that have a next token; cross-entropies are means over them."""
    ce_clean: FiniteFloat
    ce_spliced: FiniteFloat
    ce_zero: FiniteFloat
    ce_mean: FiniteFloat
    delta_ce: FiniteFloat
    loss_recovered_zero: FiniteFloat | None
    loss_recovered_mean: FiniteFloat | None
    kl: FiniteFloat
    kl_zero: FiniteFloat
    kl_mean: FiniteFloat
    ce_outliers_kept: FiniteFloat | None = None
    """With x̂ instead of x, except that rows of outlier norm stay as they are; None, like the two below, in files of
    versions that did not measure it."""
    delta_ce_outliers_kept: FiniteFloat | None = None
    kl_outliers_kept: FiniteFloat | None = None
    intervals: dict[str, Interval]
    """The intervals of these figures, by name."""


class Subset(_Frozen):
    """The figures of some of the rows."""

    rows: int
    zero_rows: int = 0
    """Rows of zeros, which `nmse`, `cosine` and `l2_ratio` leave out; absent from files of earlier versions, which had
    no figures if there were such rows."""
    fvu: FiniteFloat | None
    """None, like `explained_variance`, if all rows are the same."""
    explained_variance: FiniteFloat | None
    nmse: FiniteFloat | None
    """None, like `cosine` and `l2_ratio`, if all rows are zeros."""
    cosine: FiniteFloat | None
    l2_ratio: FiniteFloat | None
    relative_reconstruction_bias: FiniteFloat | None
    l0: FiniteFloat
    l1: FiniteFloat
    intervals: dict[str, Interval]
    language: Language | None


class PositionBin(_Frozen):
    """Rows at positions `first` to `last` of their sequence."""

    first: int
    last: int
    rows: int
    norm: FiniteFloat
    """Mean of ‖x‖."""
    nmse: FiniteFloat | None
    """None: all rows are zeros."""


class NormBin(_Frozen):
    """A tenth of the rows, by their norm: from `low` to `high`."""

    low: FiniteFloat
    high: FiniteFloat
    rows: int
    nmse: FiniteFloat | None
    """None: all rows are zeros."""
    share_of_error: FiniteFloat
    """Share of Σ‖x − x̂‖² over all rows."""
    share_of_variance: FiniteFloat
    """Share of Σ‖x − μ‖² over all rows."""


class DecoderNorm(_Frozen):
    """For a crosscoder, over its latents: the share of the decoder's length at a site, from 0 to 1. Lengths are in
    units of the site's median row; the squares of a latent's shares add up to 1."""

    mean: FiniteFloat
    p5: FiniteFloat
    p50: FiniteFloat
    p95: FiniteFloat


class SiteFigures(_Frozen):
    """One site that a crosscoder writes; the model's figures are measured with only this site replaced."""

    site: SiteName
    nmse: FiniteFloat | None
    fvu: FiniteFloat | None
    explained_variance: FiniteFloat | None
    cosine: FiniteFloat | None
    delta_ce: FiniteFloat
    loss_recovered_zero: FiniteFloat | None
    kl: FiniteFloat
    decoder_norm: DecoderNorm


class Dictionary(_Frozen):
    """Statistics over latents of the largest cosine of a latent's decoder direction with another's."""

    latents: int
    """How many latents were compared with all others: all, or a sample of a wide dictionary."""
    mean_absolute: FiniteFloat | None = None
    """Mean |cosine| of pairs of directions; None in evaluations of earlier versions."""
    mean: FiniteFloat
    p50: FiniteFloat
    p95: FiniteFloat
    largest: FiniteFloat
    over_90_percent: FiniteFloat
    """Share of latents whose cosine is over 0.9."""
    bin_edges: list[FiniteFloat]
    counts: list[int]


class OutlierRows(_Frozen):
    """The rows of outlier norm."""

    first: int
    """How many are at the first position of their sequence."""
    norm: FiniteFloat
    """Mean of ‖x‖."""
    alike: FiniteFloat
    """Mean cosine with their mean direction."""


class EvaluatedText(_Frozen):
    """The text on which the SAE was measured."""

    kind: Literal["store", "text"]
    """`store`: the rows of an activation store (the language model reads the first of its tokens); else a text that the
    model read for this evaluation."""
    name: str
    """Name of the recipe, file or dataset."""
    tokens_hash: str
    """Identifies the tokens."""
    documents: int
    resampled: int
    """Number of groups that the bootstrap draws: documents, or groups of them if there are very many."""
    first_positions: int
    """How many positions of a sequence `without_first` leaves out."""
    outlier_norm: FiniteFloat
    """Norm above which `without_outliers` leaves a row out."""
    mean_of: str
    """Description of the rows whose mean is the mean row of mean ablation."""


class Evaluation(_Frozen):
    """evaluation.json."""

    format: Literal["olmoscope evaluation"] = "olmoscope evaluation"
    version: Literal[1] = 1
    sae: str
    run_hash: str | None
    """The `run_hash` of one of our own runs; None for other SAEs."""
    files: dict[str, str] | None = None
    """The SHA-256 of each file of the SAE that was read, by its path in the SAE's folder; None for our own runs, and in
    files written before this was recorded."""
    identity: str
    """Identifies what was evaluated and how; an evaluation with the same identity is not repeated."""
    store: str | None
    """The `recipe_hash` of the store, if there is one."""
    model: str
    model_revision: str
    model_dtype: str | None = None
    """The dtype in which the language model computed; None in files written before this was recorded."""
    site: SiteName
    """The site that it reconstructs; for a crosscoder the last one, whose figures are the coder's own."""
    reads: list[SiteName] | None = None
    """The sites that a transcoder or a crosscoder reads; None if it reads the site that it writes."""
    by_site: list[SiteFigures] | None = None
    """The figures of each site that a crosscoder writes; None for any other coder."""
    architecture: str
    d_model: int
    d_sae: int
    k: int | None
    """k of a TopK SAE."""
    normalize: str
    text: EvaluatedText

    rows: int
    zero_rows: int = 0
    """As in `Subset`."""
    fvu: FiniteFloat
    explained_variance: FiniteFloat
    nmse: FiniteFloat
    nmse_random_directions: FiniteFloat | None
    cosine: FiniteFloat
    l2_ratio: FiniteFloat
    relative_reconstruction_bias: FiniteFloat | None
    l0: L0
    l1: FiniteFloat
    dead: Dead
    density: Density
    outlier_rows: OutlierRows | None = None
    """None if there are none, or if the file was written before this was recorded."""
    _of_before = model_validator(mode="before")(layer_as_site)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def layer(self) -> int | None:
        """The site's layer; older readers know only this."""
        return self.site.layer_or_none

    intervals: dict[str, Interval]
    """The intervals of `fvu`, `nmse`, `cosine`, `l2_ratio`, `l0`, `l1`."""
    language: Language
    dictionary: Dictionary
    by_position: list[PositionBin]
    by_norm: list[NormBin]
    subsets: dict[str, Subset]
    """`without_special`, `without_first`, `without_outliers`, `ordinary` (without all three) and, if the text marks
    chats, `prompt`, `thinking`, `answer`. A subset without rows is absent."""
    probing: Probing | None = None
    """None if not measured (`--probing`)."""
    absorption: Absorption | None = None
    """None if not measured (`--absorption`)."""

    @property
    def outliers(self) -> int:
        """Number of rows of outlier norm."""
        subset = self.subsets.get("without_outliers")
        return 0 if subset is None else self.rows - subset.rows

    @property
    def outliers_found(self) -> Outliers:
        """The rows of outlier norm, with whatever else is known of them."""
        like = self.outlier_rows.model_dump() if self.outlier_rows is not None else {}
        return Outliers(self.rows, self.outliers, self.text.outlier_norm / OUTLIER, **like)

    @property
    def usual(self) -> "Subset | Evaluation":
        """The main figures of reconstruction: over all rows but outliers, which would hide the others."""
        return self.subsets["without_outliers"] if self.outliers else self


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json, atomically."""
    write_json(path, evaluation.model_dump(mode="json"))


def is_evaluated(path: Path, identity: str) -> bool:
    """Whether an evaluation with this identity is there already."""
    try:
        return path.exists() and read_evaluation(path).identity == identity
    except UserError:  # of an older version, or damaged: evaluate again
        return False


def read_evaluation(path: Path) -> Evaluation:
    """Read evaluation.json.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """
    value = read_json(path)
    try:
        return Evaluation.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; evaluate the SAE again with this "
                        "version of olmoscope") from error
