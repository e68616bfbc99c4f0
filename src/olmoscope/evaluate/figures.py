"""The figures of an evaluation as a page lists them: name, meaning, how the value is read and written.

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
        short: its name at the head of a column, with the unit; "" for figures that no such table has.
        intervals: where its interval stands, under `key`; None if it never has one.
        unit: written after the value.
        beside_outliers: whether it says something of its own only where there are rows of outlier norm.
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
        """The value, written; None if it was not to be had."""
        bare = self.bare(evaluation)
        return bare if bare is None or not self.unit else f"{bare} {self.unit}"

    def bare(self, evaluation: Evaluation) -> str | None:
        """The value, written without its unit."""
        value = self.value(evaluation)
        return None if value is None else say(value, self.kind)

    def interval(self, evaluation: Evaluation) -> Interval | None:
        """[low, high], 95 %."""
        return None if self.intervals is None else self.intervals(evaluation).get(self.key)

    def interval_said(self, evaluation: Evaluation) -> str | None:
        """The interval, written: `0.0491 – 0.0513`."""
        interval = self.interval(evaluation)
        return None if interval is None else " – ".join(say(value, self.kind) for value in interval)


def _rows(evaluation: Evaluation) -> Mapping[str, Interval]:
    return evaluation.intervals


def _usual(evaluation: Evaluation) -> Mapping[str, Interval]:
    return evaluation.usual.intervals


def _probing(k: int) -> Figure:
    """AUC of the probes that read k latents; k 0: of those that read the activations."""
    key = f"probing_{k}" if k else "probing_activations"

    def figures(evaluation: Evaluation) -> ProbeFigures | None:
        if (found := evaluation.probing) is None:
            return None
        return found.latents[k] if k else found.activations

    def intervals(evaluation: Evaluation) -> dict[str, Interval]:
        found = figures(evaluation)
        return {key: found.intervals["auc"]} if found and found.intervals else {}

    return Figure(key, f"AUC of {k} latent{'s' if k > 1 else ''}" if k else "AUC of the activations",
                  f"Of probes that read the best {k} latents on labelled texts, mean over tables." if k
                  else "Of probes that read what the SAE reads: the mark to come near.",
                  lambda e: None if (found := figures(e)) is None else found.auc, intervals=intervals)


def _absorption_intervals(evaluation: Evaluation) -> dict[str, Interval]:
    found = evaluation.absorption
    return {} if found is None else {f"absorption_{name}": interval for name, interval in found.intervals.items()}


_ABSORPTION = (
    Figure("absorption_fraction", "Absorption fraction",
           "How far other latents stand for a word's first letter in the place of the letter's own. 0 is best.",
           lambda e: None if e.absorption is None else e.absorption.fraction, "share", intervals=_absorption_intervals),
    Figure("absorption_full", "Full absorption", "Share of words on which the letter's latents are silent and one "
           "other stands for it.", lambda e: None if e.absorption is None else e.absorption.full, "share",
           intervals=_absorption_intervals),
    Figure("absorption_latents", "Latents a letter", "How many latents stand for a letter: over 1, features are split.",
           lambda e: None if e.absorption is None else e.absorption.latents, intervals=_absorption_intervals),
)


def _language(evaluation: Evaluation) -> Mapping[str, Interval]:
    return evaluation.language.intervals


FVU = Figure("fvu", "Fraction of variance unexplained (FVU)",
             "Σ‖x − x̂‖² / Σ‖x − μ‖², μ the mean row. 0 is perfect, 1 is no better than the mean. Rows of large norm "
             "weigh most; rows of outlier norm are left out.", lambda e: e.usual.fvu, intervals=_usual, short="FVU")
FVU_ALL = Figure("fvu_all", "FVU, outliers among the rows", "A few rows of outlier norm decide it.",
                 lambda e: e.fvu, beside_outliers=True)
EXPLAINED = Figure("explained_variance", "Explained variance", "1 − FVU.", lambda e: e.usual.explained_variance,
                   "share")
NMSE = Figure("nmse", "Normalised mean squared error (NMSE)",
              "Mean over rows of ‖x − x̂‖² / ‖x‖². Every row weighs the same; x is not centred, so a large mean row "
              "makes it small. Rows of outlier norm are left out.", lambda e: e.usual.nmse, intervals=_usual,
              short="NMSE")
L0 = Figure("l0", "L0", "Active latents of a row, on average.", lambda e: e.l0.mean, intervals=_rows, short="L0")
DEAD = Figure("dead", "Dead latents", "Share of latents that fired on none of the rows measured. Rare is not dead: "
              "compare only equal numbers of rows.", lambda e: e.dead.share, "share", short="dead")
DELTA_CE = Figure("delta_ce", "Added cross-entropy (ΔCE)",
                  "What reading x̂ in the place of x costs the model in predicting the next token.",
                  lambda e: e.language.delta_ce, unit="nats", intervals=_language, short="ΔCE, nats")
RECOVERED = Figure("loss_recovered_zero", "Loss recovered, of zero ablation",
                   "1 − ΔCE / (what zeros in the place of x cost). Zeros cost so much that it flatters.",
                   lambda e: e.language.loss_recovered_zero, "share", intervals=_language, short="loss recovered")
RECOVERED_MEAN = Figure("loss_recovered_mean", "Loss recovered, of mean ablation",
                        "1 − ΔCE / (what the mean row in the place of x costs).",
                        lambda e: e.language.loss_recovered_mean, "share", intervals=_language)
DELTA_CE_KEPT = Figure("delta_ce_outliers_kept", "Added cross-entropy, outliers kept",
                       "The same with rows of outlier norm left as they are.",
                       lambda e: e.language.delta_ce_outliers_kept, unit="nats", intervals=_language,
                       beside_outliers=True)
KL_KEPT = Figure("kl_outliers_kept", "KL divergence, outliers kept", "The same with rows of outlier norm left as they "
                 "are.", lambda e: e.language.kl_outliers_kept, unit="nats", intervals=_language,
                 beside_outliers=True)
KL = Figure("kl", "KL divergence", "Of the spliced model's next-token distribution from the clean one's.",
            lambda e: e.language.kl, unit="nats", intervals=_language, short="KL, nats")

DECODER_COSINE = Figure("decoder_cosine", "Decoder cosine, mean absolute value",
                        "Mean |cosine| of pairs of decoder directions. Over several L0 of one site: l0_advice.py.",
                        lambda e: e.dictionary.mean_absolute)

_ALL: tuple[tuple[str, tuple[Figure, ...]], ...] = (
    ("Reconstruction", (
        NMSE,
        Figure("nmse_random_directions", "NMSE of random directions",
               "What k random directions around the mean would give: the floor that an SAE must be far below.",
               lambda e: e.nmse_random_directions),
        FVU, EXPLAINED, FVU_ALL,
        Figure("cosine", "Cosine", "Mean over rows of cos(x, x̂). Blind to shrinkage.", lambda e: e.cosine,
               intervals=_rows),
        Figure("l2_ratio", "Length ratio", "Mean over rows of ‖x̂‖ / ‖x‖.", lambda e: e.l2_ratio, intervals=_rows),
        Figure("relative_reconstruction_bias", "Relative reconstruction bias",
               "E‖x̂‖² / E[x·x̂]. 1 is none, under 1 is shrinkage.", lambda e: e.relative_reconstruction_bias))),
    ("Sparsity", (
        L0,
        Figure("l1", "L1", "Sum of a row's activations, on average; in units of the activations.", lambda e: e.l1,
               intervals=_rows),
        DEAD,
        Figure("over_1_percent", "Latents that fire on over 1% of rows", "Share of all latents.",
               lambda e: e.density.over_1_percent, "share"),
        Figure("over_10_percent", "Latents that fire on over 10% of rows", "Share of all latents.",
               lambda e: e.density.over_10_percent, "share"))),
    ("The model, with the reconstruction spliced in", (
        DELTA_CE, DELTA_CE_KEPT, RECOVERED, RECOVERED_MEAN, KL, KL_KEPT,
        Figure("ce_clean", "Cross-entropy, clean", "Of the model as it is.", lambda e: e.language.ce_clean,
               unit="nats", intervals=_language),
        Figure("ce_spliced", "Cross-entropy, spliced", "With x̂ in the place of x.", lambda e: e.language.ce_spliced,
               unit="nats", intervals=_language),
        Figure("ce_mean", "Cross-entropy, mean-ablated", "With the mean row in the place of every x.",
               lambda e: e.language.ce_mean, unit="nats", intervals=_language),
        Figure("ce_zero", "Cross-entropy, zero-ablated", "With zeros in the place of x.",
               lambda e: e.language.ce_zero, unit="nats", intervals=_language))),
    ("Dictionary", (
        Figure("cosine_mean", "Largest decoder cosine, mean",
               "For each latent, the largest cosine of its decoder direction with another's: low is diverse.",
               lambda e: e.dictionary.mean),
        Figure("cosine_p95", "Largest decoder cosine, 95th percentile", "As above.", lambda e: e.dictionary.p95),
        DECODER_COSINE,
        Figure("over_90_percent", "Latents with a near copy", "Share of latents whose largest cosine is over 0.9.",
               lambda e: e.dictionary.over_90_percent, "share"))),
)


def groups_of(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[Figure]]]:
    """The figures of the page's table for some evaluations, in order, under headings."""
    outliers = any(evaluation.outliers for evaluation in evaluations)
    groups = [(heading, [figure for figure in figures if outliers or not figure.beside_outliers])
              for heading, figures in _ALL]
    probed = sorted({k for one in evaluations if one.probing for k in one.probing.latents})
    if probed:
        groups.append(("Sparse probing", [_probing(k) for k in (*probed, 0)]))
    if any(one.absorption for one in evaluations):
        groups.append(("Feature absorption in first letters", list(_ABSORPTION)))
    return groups
