"""The warnings that follow from an audit's figures: in plain words, each with what to do."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from olmoscope.evaluate.audit_variants import Cause

MUCH_BETTER = 0.9
"""Another reading counts as the right one if its FVU is below this factor times that of the SAE as it was read.

Measured over 17 good SAEs of two models (benchmarks/README.md, "Audit"): each fitted best as it was read; the closest
other reading had 1.04 times its FVU (another scale), the closest site 1.19 times. If two sites are as close as that and
an SAE states the wrong one, the ratio is 1 / 1.19 = 0.84. So 0.9 leaves room on either side."""
APART = 0.1
"""Mean cosine of encoder and decoder rows below which they do not belong together: good SAEs have 0.30 to 1, SAEs with
permuted latents −0.01 (the same measurement)."""
BAD = 0.3
"""Explained variance of ordinary rows below which an SAE is called bad, and below which another reading explains
nothing: good SAEs had 0.71 or more in that measurement."""
DENSE = 0.25
"""Share of latents active in a row above which an activation rule is probably missing: in good SAEs it was at most
0.03."""
L0_FACTOR = 2.0
"""A measured L0 may differ from what the owner states by this factor, up or down. A choice, not a measurement."""
EV_OFF = 0.15
"""The explained variance may differ by this much from what the owner states: texts and the rows counted differ. A
choice, not a measurement."""

_SAYS: dict[Cause, str] = {
    "site": "it is probably of another site",
    "scale": "the scale of its training rows is missing",
    "normalisation": "the normalisation of its training rows is missing or wrong",
    "ReLU": "it should have no ReLU",
    "rule": "its activation rule is missing",
    "weights": "a matrix has the wrong orientation",
    "bias": "its b_dec is used in the wrong place"}


@dataclass(frozen=True)
class Tried:
    """Another reading of an SAE.

    Attributes:
        cause: the convention that was misread, if this reading is right.
        what: the other reading, in words.
        do: what to do if this reading is right, as a clause.
        fvu: its FVU on the probed rows; None if it is not finite.
    """

    cause: Cause
    what: str
    do: str
    fvu: float | None


@dataclass(frozen=True)
class AuditWarning:
    """Something that is likely to be wrong.

    Attributes:
        kind: a `Cause`, or `silent`, `dense`, `mismatch`, `misfit`, `stated`.
        what: a sentence without its full stop.
        do: what to do, as a clause.
    """

    kind: str
    what: str
    do: str


@dataclass(frozen=True)
class Found:
    """The figures that warnings follow from, named as in `audit.Audit`."""

    fit: float | None
    tried: tuple[Tried, ...]
    l0: float
    d_in: int
    d_sae: int
    twins: float | None
    explained: float | None
    stated: Mapping[str, float]


def warnings_of(found: Found) -> tuple[AuditWarning, ...]:
    """All warnings; none if every figure is as it should be."""
    return (*_about_fit(found), *_about_latents(found), *_about_stated(found))


def _about_fit(found: Found) -> Iterator[AuditWarning]:
    best = next(iter(found.tried), None)
    if best is not None and best.fvu is not None and best.fvu < min(
            1 - BAD, float("inf") if found.fit is None else MUCH_BETTER * found.fit):
        where = "it fits" if best.cause == "site" else "it fits with"
        read = "not finite" if found.fit is None else f"{found.fit:.3f}"
        yield AuditWarning(best.cause, f"{_SAYS[best.cause]}: {where} {best.what}, with FVU {best.fvu:.3f} instead of "
                           f"{read}", best.do)
    elif found.explained is None or found.explained < BAD:
        explained = "nothing" if found.explained is None else f"{found.explained:.3f} of the variance"
        if found.twins is not None and found.twins < APART:
            yield AuditWarning(
                "mismatch", f"it explains {explained} of ordinary rows, and its decoder rows do not point the same way "
                f"as its encoder rows (mean cosine {found.twins:.2f})",
                "check that encoder and decoder come from the same SAE and have the same order of latents")
        else:
            yield AuditWarning(
                "misfit", f"it explains {explained} of ordinary rows, and no other reading fits much better",
                "check the language model, the layer and the text")


def _about_latents(found: Found) -> Iterator[AuditWarning]:
    if found.l0 == 0:
        yield AuditWarning("silent", "no latent fires on any token", "check thresholds and the scale of the rows")
    elif found.l0 > min(found.d_in, DENSE * found.d_sae):
        yield AuditWarning("dense", f"{found.l0:,.0f} of {found.d_sae:,} latents are active in a row of {found.d_in:,} "
                           "values",
                           "check the activation rule and its thresholds")


def _about_stated(found: Found) -> Iterator[AuditWarning]:
    if (l0 := found.stated.get("L0")) and not l0 / L0_FACTOR <= found.l0 <= L0_FACTOR * l0:
        yield AuditWarning("stated", f"its owner states an L0 of {l0:g}, and it is {found.l0:.1f} here",
                           "check the language model, BOS and the text")
    explained = found.stated.get("explained variance")
    if explained is not None and found.explained is not None and abs(explained - found.explained) > EV_OFF:
        yield AuditWarning("stated", f"its owner states an explained variance of {explained:.3f}, and it is "
                           f"{found.explained:.3f} on ordinary rows here", "check the language model, BOS and the text")
