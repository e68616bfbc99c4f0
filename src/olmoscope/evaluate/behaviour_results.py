"""Types of the parts of evaluation.json that `--probing` and `--absorption` fill: what an SAE's latents are good for.

Every figure is defined in docs/metrics.md. An interval is [low, high], 95 %, by bootstrap.
"""

from pydantic import BaseModel, ConfigDict, FiniteFloat

Interval = tuple[FiniteFloat, FiniteFloat]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ProbeFigures(_Frozen):
    """Means over tables; each table's figures are those of its probes on its test texts."""

    auc: FiniteFloat
    """Area under the ROC curve."""
    accuracy: FiniteFloat
    intervals: dict[str, Interval]
    """For `auc` and `accuracy`, by bootstrap over tables."""


class Probing(_Frozen):
    """Sparse probing."""

    source: str
    """Where the labelled tables come from."""
    tables: list[str]
    latents: dict[int, ProbeFigures]
    """For each k, the probes that read the best k latents."""
    activations: ProbeFigures
    """The baseline: probes that read the activations themselves."""


class LetterAbsorption(_Frozen):
    """One letter of the first-letter task."""

    letter: str
    words: int
    probe_f1: FiniteFloat | None
    """F1 of the ground-truth probe on the test words: whether the model knows the letter. None if no word begins with
    it."""
    recognised: int
    """Test words of the letter that this probe recognises."""
    split: list[int]
    """The latents that represent the letter."""
    fraction: FiniteFloat | None
    """How far these words are absorbed, on average; None, like `full`, if the model does not know the letter."""
    full: FiniteFloat | None
    """Share of these words that one other latent fully absorbs."""


class Absorption(_Frozen):
    """Feature absorption in first letters."""

    identity: str
    words: int
    left_out: int
    """Words that do not stay one token in the prompt."""
    letters: list[LetterAbsorption]
    counted: int
    """Number of letters with figures; the means are over these."""
    fraction: FiniteFloat | None
    """None, like `full` and `latents`, if the model knows too few letters."""
    full: FiniteFloat | None
    latents: FiniteFloat | None
    """Mean number of latents that represent a letter."""
    intervals: dict[str, Interval]
    """For `fraction`, `full` and `latents`, by bootstrap over letters."""
