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
    """Of these two, by bootstrap over tables."""


class Probing(_Frozen):
    """Sparse probing."""

    source: str
    """Where the labelled tables are from."""
    tables: list[str]
    latents: dict[int, ProbeFigures]
    """Of probes that read the best k latents, by k."""
    activations: ProbeFigures
    """Of probes that read the activations themselves: the baseline."""
