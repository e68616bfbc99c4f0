"""What an SAE's latents are good for, as types: the parts of evaluation.json that `--probing` and `--absorption` fill.

Every figure is defined in docs/metrics.md. An interval is [low, high], 95 %, by bootstrap.
"""

from pydantic import BaseModel, ConfigDict, FiniteFloat

Interval = tuple[FiniteFloat, FiniteFloat]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ProbeFigures(_Frozen):
    """Means over tables, of probes on the test texts of each."""

    auc: FiniteFloat
    """Area under the ROC curve."""
    accuracy: FiniteFloat
    intervals: dict[str, Interval]
    """For `auc` and `accuracy`, by bootstrap over tables."""


class Probing(_Frozen):
    """Sparse probing."""

    source: str
    """Where the labelled tables are from."""
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
    """How well the ground-truth probe does on the test words: whether the model knows the letter. None if no word
    begins with it."""
    recognised: int
    """Test words of the letter that this probe recognises."""
    split: list[int]
    """The latents that stand for the letter."""
    fraction: FiniteFloat | None
    """Mean share of these words that is absorbed; None, as `full`, where the model does not know the letter."""
    full: FiniteFloat | None
    """Share of these words that one other latent absorbs wholly."""


class Absorption(_Frozen):
    """Feature absorption in first letters."""

    identity: str
    words: int
    left_out: int
    """Words that the tokenizer does not leave one token in the prompt."""
    letters: list[LetterAbsorption]
    counted: int
    """Letters with figures: the means are over them."""
    fraction: FiniteFloat | None
    """None, as `full` and `latents`: the model knows too few letters."""
    full: FiniteFloat | None
    latents: FiniteFloat | None
    """Mean number of latents that stand for a letter."""
    intervals: dict[str, Interval]
    """For `fraction`, `full` and `latents`, by bootstrap over letters."""
