"""A study as tables in the terminal: a row for each setting, mean and spread over seeds."""

import math
from collections.abc import Sequence

from rich.markup import escape

from olmoscope.cli.tables import console, in_lines, new_table_of_names
from olmoscope.evaluate.l0_advice import l0_advice
from olmoscope.evaluate.study import FRONTIERS, Setting, Spread, Study

MEASURED = (("nmse", "NMSE", ".4f"), ("fvu", "FVU", ".4f"), ("l0", "L0", ".1f"), ("dead", "dead", ".1%"),
            ("delta_ce", "ΔCE", ".3f"), ("loss_recovered_zero", "rec.", ".3f"), ("kl", "KL", ".3f"))
SAME_LATENTS = (("matched_share", "matched", ".1%"), ("matched_share_decoder", "by decoder", ".1%"),
                ("mmcs", "MMCS", ".3f"))
IN_TRAINING = (("nmse", "NMSE", ".4f"), ("l0", "L0", ".1f"), ("dead", "dead", ".1%"))
Columns = Sequence[tuple[str, str, str]]
"""Key of a figure, its column heading, its number format."""


def show_study(study: Study) -> None:
    """The settings of evaluated runs."""
    _show("Settings", study, MEASURED)
    if any(setting.unbeaten for setting in study.settings):
        console.print("*: by the means, no other setting at the site has a smaller FVU (ΔCE) without a larger L0.")
    if study.seeds:
        console.print("±: sample standard deviation over n seeds of training.")
    if study.stability:
        _show_stability(study)
    for advice in l0_advice(study.settings):
        console.print(advice, markup=False, highlight=False)
    if not study.same_text:
        console.print("[yellow]These runs were not measured on the same tokens: small differences mean nothing.[/]")


def show_training_study(study: Study) -> None:
    """The settings of trained runs, with the figures that training reports."""
    _show("Settings, in training", study, IN_TRAINING)
    console.print("Means over all training rows, from the first step; ±: sample standard deviation over n seeds.")


def _show(title: str, study: Study, columns: Columns) -> None:
    table = new_table_of_names(title, "setting", "n", *(head for _, head, _ in columns))
    for setting in study.settings:
        table.add_row(in_lines(setting.name), str(len(setting.runs)),
                      *(_cell(setting, key, form) for key, _, form in columns))
    console.print(table)
    if study.missing:
        console.print(f"[yellow]{len(study.missing)} of the recipe's runs have no figures yet: "
                      f"{escape(', '.join(study.missing))}[/]", soft_wrap=True)


def _show_stability(study: Study) -> None:
    table = new_table_of_names("The same latents from another seed", "setting", "pairs",
                               *(head for _, head, _ in SAME_LATENTS))
    for setting in study.settings:
        if (figures := setting.stability) is not None:
            table.add_row(in_lines(setting.name), str(len(setting.pairs)),
                          *(_said(figures[key], form) for key, _, form in SAME_LATENTS))
    console.print(table)
    console.print("matched: latents with a counterpart whose cosine is over 0.7 in decoder and encoder. MMCS: mean of "
                  "the largest decoder cosines. ±: over pairs of seeds.")


def _cell(setting: Setting, key: str, form: str) -> str:
    star = "*" if key in FRONTIERS and setting.unbeaten.get(key) else ""
    return star + _said(setting.figures[key], form)


def _said(spread: Spread, form: str) -> str:
    """The mean and, below it, the standard deviation."""
    if spread.mean is None:
        return "-"
    line = f"{spread.mean:{form}}"
    return line if spread.sd is None else f"{line}\n±{_one_digit(spread.sd, form)}"


def _one_digit(sd: float, form: str) -> str:
    """A spread with one significant digit, and no more decimals than that digit needs."""
    percent = form.endswith("%")
    value = 100 * sd if percent else sd
    decimals = 0 if value == 0 else max(0, -math.floor(math.log10(value)))
    return f"{value:.{decimals}f}" + ("%" if percent else "")
