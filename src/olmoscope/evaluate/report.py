"""report.html: the evaluations of one or several SAEs as one self-contained page.

It loads no file, font or script: the style sheet, a short script and all figures are in the page, and its
Content-Security-Policy allows only these, by their hashes. The template escapes every text.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from olmoscope.errors import UserError
from olmoscope.evaluate import cards
from olmoscope.evaluate.cards import COLOURS, Card, Shown, TrainingLine, outliers_said, subset_name
from olmoscope.evaluate.figures import DEAD, DELTA_CE, EXPLAINED, FVU, FVU_ALL, L0, NMSE, RECOVERED, Figure, groups_of
from olmoscope.evaluate.l0_advice import l0_advice
from olmoscope.evaluate.report_links import NO_LINKS, Links, links_of_one, links_of_several
from olmoscope.evaluate.results import Evaluation, Subset, read_evaluation
from olmoscope.evaluate.scales import say
from olmoscope.evaluate.study import Study
from olmoscope.evaluate.study_cards import study_cards, study_heads, study_rows
from olmoscope.files import write_text
from olmoscope.units import format_count

REPORT = "report.html"
OVERVIEW = (NMSE, FVU, L0, DEAD, DELTA_CE, RECOVERED)


def report_of_folders(folders: Sequence[Path]) -> list[Shown]:
    """Read the SAEs of a report from folders that each have `evaluation.json` and, for our own runs, `metrics.jsonl`.

    Raises:
        UserError: a folder is not evaluated, or a file is damaged.
    """
    return [Shown(number, evaluation.sae, evaluation, _training(folder / "metrics.jsonl"))
            for number, (folder, evaluation) in
            enumerate(((folder, read_evaluation(folder / "evaluation.json")) for folder in folders), 1)]


def write_report(path: Path, shown: Sequence[Shown], study: Study | None = None, links: Links = NO_LINKS) -> bool:
    """Write the page, atomically; False if the same page was there already. The same evaluations and links give the
    same page."""
    page = report_page(shown, study, links)
    if path.is_file() and path.read_bytes() == page.encode():
        return False
    write_text(path, page)
    return True


def write_reports(folders: Sequence[Path], together: Path, study: Study | None = None,
                  card: Path | None = None) -> list[Path]:
    """Write `report.html` into each evaluated folder and, if there are several, a common one into `together`. The
    reports link to each other.

    Args:
        study: their study, if they are runs of a recipe that can be compared by setting.
        card: the model card of their release, if there is one; the reports link to it.

    Returns:
        The pages, including those that were there already.
    """
    own, common = [folder / REPORT for folder in folders], together / REPORT if len(folders) > 1 else None
    for folder, page in zip(folders, own, strict=True):
        write_report(page, report_of_folders([folder]), links=links_of_one(page, card, common))
    if common is None:
        return own
    write_report(common, report_of_folders(folders), study, links_of_several(common, own, card))
    return [*own, common]


def report_page(shown: Sequence[Shown], study: Study | None = None, links: Links = NO_LINKS) -> str:
    """The page of one SAE, or of several side by side."""
    page, (style, script) = resources.files("olmoscope.evaluate") / "page", _style_and_script()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True, finalize=_refuse_none)
    return environment.from_string((page / "report.html").read_text(encoding="utf-8")).render(
        style=Markup(style), script=Markup(script), policy=report_policy(), shown=shown, links=links,
        title=shown[0].name if len(shown) == 1 else f"{len(shown)} SAEs compared", say=say,
        tiles=_tiles(shown[0]) if len(shown) == 1 else [], overview=OVERVIEW,
        groups=groups_of([sae.evaluation for sae in shown]),
        sections=_sections(shown[:COLOURS]), colours=COLOURS, data=_data(shown),
        subsets={sae.number: _subsets(sae.evaluation) for sae in shown},
        facts={sae.number: _facts(sae) for sae in shown},
        settings=study_rows(study) if study else [], setting_heads=study_heads(study) if study else [],
        stability=study is not None and study.stability, l0_advice=l0_advice(study.settings) if study else [],
        setting_cards=study_cards(study) if study else [], missing=list(study.missing) if study else [],
        models=len({(sae.evaluation.model, sae.evaluation.model_revision) for sae in shown}),
        mixed=len({sae.evaluation.text.tokens_hash for sae in shown}) > 1)


def report_policy() -> str:
    """The Content-Security-Policy of every report: only its own style sheet and script, by their hashes."""
    style, script = (f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
                     for text in _style_and_script())
    return f"default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'"


def _style_and_script() -> tuple[str, str]:
    page = resources.files("olmoscope.evaluate") / "page"
    return (page / "report.css").read_text(encoding="utf-8"), (page / "report.js").read_text(encoding="utf-8")


def _refuse_none(value: object) -> object:
    assert value is not None, "the template must handle an absent figure"
    return value


def _data(shown: Sequence[Shown]) -> Markup:
    """The evaluations as JSON that cannot close the element around it."""
    text = json.dumps([sae.evaluation.model_dump(mode="json") for sae in shown], allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _tiles(sae: Shown) -> list[tuple[str, str, str, str]]:
    """The figures to read first: name, value, unit, and the line under it."""
    e = sae.evaluation

    def interval(figure: Figure) -> str:
        said = figure.interval_said(e)
        return f"95%: {said}" if said else ""

    recovered = RECOVERED.said(e)
    return [
        ("Explained variance", EXPLAINED.said(e) or "none", "", f"FVU {FVU.said(e) or 'none'}"
         + (f"; {FVU_ALL.said(e)} with outliers" if e.outliers else "")),
        ("NMSE", NMSE.said(e) or "none", "", interval(NMSE)),
        ("L0", f"{e.l0.mean:,.1f}", "", f"of {e.d_sae:,} latents"),
        ("Dead latents", say(e.dead.share, "share"), "", f"in {e.dead.window:,} rows"),
        ("Added cross-entropy", say(e.language.delta_ce), "nats", interval(DELTA_CE)),
        ("Loss recovered", recovered or "—", "",
         "relative to zero ablation" if recovered else "zero ablation costs nothing here"),
    ]


def _sections(drawn: Sequence[Shown]) -> list[tuple[str, str, list[Card]]]:
    training = cards.training_cards(drawn)
    sections = [
        ("Error against sparsity", "", cards.frontier_cards(drawn) if len(drawn) > 1 else []),
        ("What the reconstruction costs the model", "While the model runs, the SAE's reconstruction replaces the "
         "activations at the site. For comparison, the mean row or zeros replace them. Thin lines are 95% intervals.",
         cards.model_cards(drawn)),
        ("Sparsity and dictionary", "", cards.sparsity_cards(drawn)),
        ("Where the error is large", f"Outliers: {outliers_said(drawn[0].evaluation)}." if len(drawn) == 1 else "",
         cards.place_cards(drawn)),
        ("Training", "" if training else "Not known: there is no metrics.jsonl of a run beside these evaluations.",
         training),
    ]
    return [section for section in sections if section[1] or section[2]]


def _subsets(evaluation: Evaluation) -> list[tuple[str, int, float, Evaluation | Subset, float, float | None]]:
    """Name, rows, share of rows, figures, mean L0 and added cross-entropy of each subset; all rows first."""
    rows: list[tuple[str, int, float, Evaluation | Subset, float, float | None]] = [
        ("all rows", evaluation.rows, 1.0, evaluation, evaluation.l0.mean,
         evaluation.language.delta_ce)]
    rows += [(subset_name(name), subset.rows, subset.rows / evaluation.rows, subset, subset.l0,
              None if subset.language is None else subset.language.delta_ce)
             for name, subset in evaluation.subsets.items()]
    return rows


def _facts(sae: Shown) -> list[tuple[str, str]]:
    """What was measured, and on which text."""
    e, text = sae.evaluation, sae.evaluation.text
    facts = [
        ("SAE", e.sae),
        ("Architecture", e.architecture + (f", k {e.k}" if e.k is not None else "")),
        ("Width", f"{e.d_sae:,} latents of {e.d_model:,} dimensions"),
        ("Input", "unchanged" if e.normalize == "none" else e.normalize.replace("_", " ")),
        ("Model", e.model),
        ("Revision", e.model_revision), ("Computed in", e.model_dtype or "not recorded"),
        ("Site", f"{e.site}, the residual stream" if e.site.is_layer_output else str(e.site)),
        ("Measured on", f"{text.name}: {e.rows:,} rows of {text.documents:,} documents"
         + (" (an activation store)" if text.kind == "store" else "")),
        *([("Rows of zeros", f"{e.zero_rows:,}, left out of NMSE, cosine and length ratio")] if e.zero_rows else []),
        ("Cross-entropy on", f"{e.language.predictions:,} predicted tokens"),
        ("Tokens", f"hash {text.tokens_hash}"),
        ("First positions", "the first of each sequence" if text.first_positions == 1
         else f"the first {text.first_positions} of each sequence"),
        ("Outlier norm", f"over {say(text.outlier_norm)}"), ("Outliers", f"{outliers_said(e)}."),
        ("Mean ablation", f"mean over {text.mean_of}"),
        ("Intervals", f"95%, bootstrap over {text.resampled:,} "
         + ("documents" if text.resampled == text.documents else "groups of documents")),
    ]
    if sae.training:
        facts.append(("Trained on", f"{format_count(sae.training[-1].tokens)} tokens"))
    if e.run_hash is not None:
        facts.append(("Run", e.run_hash))
    return facts


def _training(path: Path) -> list[TrainingLine]:
    """The lines of metrics.jsonl; none if there is no such file."""
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged (not JSON: {error}); train the SAE again in an empty folder") from error
    return [TrainingLine(line["tokens"], line["loss"], line["lr"], line["dead_share"]) for line in lines]
