"""The output of `olmoscope audit`: a table of several SAEs, then a page for each."""

from collections.abc import Iterator, Sequence

from olmoscope.cli.tables import console, in_lines, new_table_of_names, show_facts
from olmoscope.evaluate.audit import Audit

TRIED = 3
"""Number of other readings that a page lists."""


def show_audits(audits: Sequence[Audit]) -> None:
    """Print the results."""
    if len(audits) > 1:
        _show_table(audits)
    for one in audits:
        show_facts(one.name, _rows(one))


def _show_table(audits: Sequence[Audit]) -> None:
    table = new_table_of_names("Audit", "SAE", "EV", "EV ord.", "L0", "dead", "warnings")
    for one in audits:
        table.add_row(in_lines(one.name), _figure(one.explained_variance), _figure(one.explained_variance_ordinary),
                      f"{one.l0:.1f}", f"{one.dead:.1%}", ", ".join(warning.kind for warning in one.warnings) or "none")
    console.print(table)


def _rows(one: Audit) -> Iterator[tuple[str, str]]:
    yield "verdict", ("the SAE does what its files say" if not one.warnings else
                      f"{len(one.warnings)} warning{'s' if len(one.warnings) > 1 else ''}")
    for warning in one.warnings:
        yield "warning", f"{warning.what}. {warning.do[0].upper()}{warning.do[1:]}."
    yield "read as", f"{one.format}: {one.architecture}, {one.d_sae:,} latents, width {one.d_in:,}"
    for number, line in enumerate(one.convention):
        yield "" if number else "computes", line
    sites = ", ".join(one.reads) + (f" to {', '.join(one.writes)}" if one.writes != one.reads else "")
    yield "of", f"{one.model}, {sites}"
    yield "L0", f"{one.l0:.1f}{_stated(one, 'L0')}"
    yield "explained variance", (f"{_figure(one.explained_variance)} over all rows, "
                                 f"{_figure(one.explained_variance_ordinary)} over ordinary rows"
                                 f"{_stated(one, 'explained variance')}")
    yield "dead", f"{one.dead:.1%} of latents fired on none of {one.rows:,} tokens"
    nmse = "" if one.outlier_nmse is None else f"; NMSE there {one.outlier_nmse:.3g}"
    yield "outliers", one.outliers + nmse
    yield "scale", (f"median norm of the rows read {one.norm:,.4g}, √D {one.d_in**0.5:,.4g}"
                    + ("" if one.scale is None else f"; {one.scale}"))
    if one.twins is not None:
        yield "weights", f"mean cosine of a latent's encoder and decoder {one.twins:.2f}"
    yield "fit", f"FVU {_figure(one.fit)} as read"
    for number, other in enumerate(one.tried[:TRIED]):
        yield "" if number else "other readings", f"FVU {_figure(other.fvu)}: {other.what}"


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _stated(one: Audit, name: str) -> str:
    return f"; its owner states {one.stated[name]:g}" if name in one.stated else " (not stated in its files)"
