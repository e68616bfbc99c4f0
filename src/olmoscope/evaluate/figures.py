"""The figures of an evaluation as a page lists them: name, meaning, and how the value is read and written.

docs/metrics.md has the definitions in full.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from olmoscope.evaluate.behaviour_results import ProbeFigures
from olmoscope.evaluate.results import Evaluation, Interval
from olmoscope.evaluate.scales import Kind, say


@dataclass(frozen=True)
class Figure:
    """One line of the table of figures.

    Attributes:
        short: its name as a column heading, with the unit; "" for figures that are never a column.
        intervals: gives the mapping that has its interval under `key`; None if it never has one.
        unit: written after the value.
        beside_outliers: whether it adds information only if there are rows of outlier norm.
    """

    key: str
    name: str
    meaning: str
    value: Callable[[Evaluation], float | None]
    kind: Kind = "number"
    unit: str = ""
    short: str = ""
    intervals: Callable[[Evaluation], Mapping[str, Interval]] | None = None
    beside_outliers: bool = False

    def said(self, evaluation: Evaluation) -> str | None:
        """The value as text, with its unit; None if it is unknown."""
        bare = self.bare(evaluation)
        return bare if bare is None or not self.unit else f"{bare} {self.unit}"

    def bare(self, evaluation: Evaluation) -> str | None:
        """The value as text, without its unit."""
        value = self.value(evaluation)
        return None if value is None else say(value, self.kind)

    def interval(self, evaluation: Evaluation) -> Interval | None:
        """[low, high], 95 %."""
        return None if self.intervals is None else self.intervals(evaluation).get(self.key)

    def interval_said(self, evaluation: Evaluation) -> str | None:
        """The interval as text: `0.0491 – 0.0513`."""
        interval = self.interval(evaluation)
        return None if interval is None else " – ".join(say(value, self.kind) for value in interval)


def _rows(evaluation: Evaluation) -> Mapping[str, Interval]:
    return evaluation.intervals


def _usual(evaluation: Evaluation) -> Mapping[str, Interval]:
    return evaluation.usual.intervals


def _probing(k: int) -> Figure:
    """AUC of the probes that read k latents or, if k is 0, the activations."""
    key = f"probing_{k}" if k else "probing_activations"

    def figures(evaluation: Evaluation) -> ProbeFigures | None:
        if (found := evaluation.probing) is None:
            return None
        return found.latents[k] if k else found.activations

    def intervals(evaluation: Evaluation) -> dict[str, Interval]:
        found = figures(evaluation)
        return {key: found.intervals["auc"]} if found and found.intervals else {}

    return Figure(key, f"AUC of {k} latent{'s' if k > 1 else ''}" if k else "AUC of the activations",
                  f"Mean over labelled tables for probes that read the best {k} latents." if k
                  else "Mean over labelled tables for probes that read the SAE's input. This is the baseline.",
                  lambda e: None if (found := figures(e)) is None else found.auc, intervals=intervals)


def _absorption_intervals(evaluation: Evaluation) -> dict[str, Interval]:
    found = evaluation.absorption
    return {} if found is None else {f"absorption_{name}": interval for name, interval in found.intervals.items()}


_ABSORPTION = (
    Figure("absorption_fraction", "Absorption fraction",
           "How far other latents represent a word's first letter instead of the letter's own latents. 0 is best.",
           lambda e: None if e.absorption is None else e.absorption.fraction, "share", intervals=_absorption_intervals),
    Figure("absorption_full", "Full absorption", "Share of words on which the letter's own latents do not fire and one "
           "other latent represents the letter.", lambda e: None if e.absorption is None else e.absorption.full,
           "share", intervals=_absorption_intervals),
    Figure("absorption_latents", "Latents per letter",
           "How many latents represent a letter. Over 1 means that features are split.",
           lambda e: None if e.absorption is None else e.absorption.latents, intervals=_absorption_intervals),
)


def _language(evaluation: Evaluation) -> Mapping[str, Interval]:
    return evaluation.language.intervals


FVU = Figure("fvu", "Fraction of variance unexplained (FVU)",
             "Σ‖x − x̂‖² / Σ‖x − μ‖², where μ is the mean row. 0 is perfect, 1 is no better than the mean. Rows of "
             "large norm have the most weight. Rows of outlier norm are left out.", lambda e: e.usual.fvu,
             intervals=_usual, short="FVU")
FVU_ALL = Figure("fvu_all", "FVU with outliers", "FVU over all rows. A few rows of outlier norm dominate it.",
                 lambda e: e.fvu, beside_outliers=True)
EXPLAINED = Figure("explained_variance", "Explained variance", "1 − FVU.", lambda e: e.usual.explained_variance,
                   "share")
NMSE = Figure("nmse", "Normalised mean squared error (NMSE)",
              "Mean over rows of ‖x − x̂‖² / ‖x‖². Every row has the same weight. x is not centred, so a large mean "
              "row makes NMSE small. Rows of outlier norm are left out.", lambda e: e.usual.nmse, intervals=_usual,
              short="NMSE")
L0 = Figure("l0", "L0", "Mean number of active latents per row.", lambda e: e.l0.mean, intervals=_rows, short="L0")
DEAD = Figure("dead", "Dead latents", "Share of latents that fired on none of the measured rows. A latent that fires "
              "rarely may count as dead, so compare only equal numbers of rows.", lambda e: e.dead.share, "share",
              short="dead")
DELTA_CE = Figure("delta_ce", "Added cross-entropy (ΔCE)",
                  "Rise in the cross-entropy of the next token when the model reads x̂ instead of x.",
                  lambda e: e.language.delta_ce, unit="nats", intervals=_language, short="ΔCE, nats")
RECOVERED = Figure("loss_recovered_zero", "Loss recovered, relative to zero ablation",
                   "1 − ΔCE / (rise with zeros instead of x). Zeros cost so much that this figure flatters the SAE.",
                   lambda e: e.language.loss_recovered_zero, "share", intervals=_language, short="loss recovered")
RECOVERED_MEAN = Figure("loss_recovered_mean", "Loss recovered, relative to mean ablation",
                        "1 − ΔCE / (rise with the mean row instead of x).",
                        lambda e: e.language.loss_recovered_mean, "share", intervals=_language)
DELTA_CE_KEPT = Figure("delta_ce_outliers_kept", "Added cross-entropy, outliers kept",
                       "ΔCE with rows of outlier norm left unchanged.",
                       lambda e: e.language.delta_ce_outliers_kept, unit="nats", intervals=_language,
                       beside_outliers=True)
KL_KEPT = Figure("kl_outliers_kept", "KL divergence, outliers kept", "KL with rows of outlier norm left unchanged.",
                 lambda e: e.language.kl_outliers_kept, unit="nats", intervals=_language, beside_outliers=True)
KL = Figure("kl", "KL divergence", "From the clean model's next-token distribution to the spliced model's.",
            lambda e: e.language.kl, unit="nats", intervals=_language, short="KL, nats")

DECODER_COSINE = Figure("decoder_cosine", "Decoder cosine, mean absolute value",
                        "Mean |cosine| of pairs of decoder directions. A study of several k at one site compares it.",
                        lambda e: e.dictionary.mean_absolute)

_ALL: tuple[tuple[str, tuple[Figure, ...]], ...] = (
    ("Reconstruction", (
        NMSE,
        Figure("nmse_random_directions", "NMSE of random directions",
               "NMSE of a projection onto k random directions around the mean. An SAE must be far below this.",
               lambda e: e.nmse_random_directions),
        FVU, EXPLAINED, FVU_ALL,
        Figure("cosine", "Cosine", "Mean over rows of cos(x, x̂). Insensitive to shrinkage.", lambda e: e.cosine,
               intervals=_rows),
        Figure("l2_ratio", "Length ratio", "Mean over rows of ‖x̂‖ / ‖x‖.", lambda e: e.l2_ratio, intervals=_rows),
        Figure("relative_reconstruction_bias", "Relative reconstruction bias",
               "E‖x̂‖² / E[x·x̂]. 1 means no bias; under 1 means shrinkage.",
               lambda e: e.relative_reconstruction_bias))),
    ("Sparsity", (
        L0,
        Figure("l1", "L1", "Mean over rows of the sum of latent activations, in units of the input.", lambda e: e.l1,
               intervals=_rows),
        DEAD,
        Figure("over_1_percent", "Latents that fire on over 1% of rows", "Share of all latents.",
               lambda e: e.density.over_1_percent, "share"),
        Figure("over_10_percent", "Latents that fire on over 10% of rows", "Share of all latents.",
               lambda e: e.density.over_10_percent, "share"))),
    ("The model, with the reconstruction spliced in", (
        DELTA_CE, DELTA_CE_KEPT, RECOVERED, RECOVERED_MEAN, KL, KL_KEPT,
        Figure("ce_clean", "Cross-entropy, clean", "The model unchanged.", lambda e: e.language.ce_clean,
               unit="nats", intervals=_language),
        Figure("ce_spliced", "Cross-entropy, spliced", "With x̂ instead of x.", lambda e: e.language.ce_spliced,
               unit="nats", intervals=_language),
        Figure("ce_mean", "Cross-entropy, mean-ablated", "With the mean row instead of x.",
               lambda e: e.language.ce_mean, unit="nats", intervals=_language),
        Figure("ce_zero", "Cross-entropy, zero-ablated", "With zeros instead of x.",
               lambda e: e.language.ce_zero, unit="nats", intervals=_language))),
    ("Dictionary", (
        Figure("cosine_mean", "Largest decoder cosine, mean",
               "For each latent, the largest cosine of its decoder direction with another's. Low means diverse.",
               lambda e: e.dictionary.mean),
        Figure("cosine_p95", "Largest decoder cosine, 95th percentile", "95th percentile of the same cosines.",
               lambda e: e.dictionary.p95),
        DECODER_COSINE,
        Figure("over_90_percent", "Latents with a near copy", "Share of latents whose largest cosine is over 0.9.",
               lambda e: e.dictionary.over_90_percent, "share"))),
)


def groups_of(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[Figure]]]:
    """The figures that the page's table shows for these evaluations, in order, under headings."""
    outliers = any(evaluation.outliers for evaluation in evaluations)
    groups = [(heading, [figure for figure in figures if outliers or not figure.beside_outliers])
              for heading, figures in _ALL]
    probed = sorted({k for one in evaluations if one.probing for k in one.probing.latents})
    if probed:
        groups.append(("Sparse probing", [_probing(k) for k in (*probed, 0)]))
    if any(one.absorption for one in evaluations):
        groups.append(("Feature absorption in first letters", list(_ABSORPTION)))
    return groups
