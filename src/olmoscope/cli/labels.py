"""Labels of features: by rules, by a model behind an endpoint, or by a model on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from olmoscope.cli.model_labels import (
    AnswersOption,
    BudgetOption,
    ConcurrencyOption,
    DryRunOption,
    EndpointOption,
    ModelOption,
    PricesOption,
    PromptsOption,
    RateOption,
    ask,
    refuse_idle,
    show_plan,
)
from olmoscope.errors import UserError
from olmoscope.terminal import say


def label(
    index: Annotated[Path | None, typer.Argument(
        metavar="INDEX", help="A feature index, or a folder that contains one.")] = None,
    endpoint: EndpointOption = None,
    model: ModelOption = None,
    features: Annotated[str | None, typer.Option("--features", metavar="N,N-M,...", help=(
        "Label these features; by default all, the most telling first."))] = None,
    most: Annotated[int | None, typer.Option("--most", min=1, metavar="N", help=(
        "Label only the N most telling features, those that are strong and rare."))] = None,
    budget: BudgetOption = None,
    concurrency: ConcurrencyOption = 8,
    per_minute: RateOption = None,
    answers: AnswersOption = "auto",
    prompts: PromptsOption = None,
    prices: PricesOption = None,
    dry_run: DryRunOption = False,
    clamp: Annotated[bool, typer.Option("--clamp", help=(
        "Also score labels by what clamping a feature does to the next token; this runs the index's model."))] = False,
    copy_prompts: Annotated[Path | None, typer.Option("--copy-prompts", metavar="DIR", help=(
        "Only copy the package's prompts into this folder, for you to change."))] = None,
    export: Annotated[Path | None, typer.Option("--export", metavar="FILE", help=(
        "Only write all proposed labels with their scores to this file, as JSON lines."))] = None,
    import_: Annotated[Path | None, typer.Option("--import", metavar="FILE", help=(
        "Only read proposed labels from this file of JSON lines."))] = None,
) -> None:
    """Label features, by rules or with a language model, and score the labels on text that they were not made from."""
    from olmoscope.cli.label_tables import show_labels
    from olmoscope.features.read import FeatureIndex, find_indexes
    from olmoscope.files import write_text
    from olmoscope.labelling.clamp import Clamping
    from olmoscope.labelling.client import Limits
    from olmoscope.labelling.model_run import Asking, local_labeller, parse_prices
    from olmoscope.labelling.prompts import copy_prompts as copy
    from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposals
    from olmoscope.labelling.rule_labels import RuleLabeller
    from olmoscope.labelling.run import label_features, most_important, parse_features
    from olmoscope.labelling.text_blocks import TextBlocks

    if copy_prompts is not None:
        say(f"{len(copy(copy_prompts))} prompts written to {copy_prompts}; use them with --prompts {copy_prompts}")
        return
    if index is None:
        raise UserError("no index given; run `olmoscope label INDEX`")
    refuse_idle(endpoint, budget=budget is not None, per_minute=per_minute is not None, dry_run=dry_run,
                prices=prices is not None, answers=answers != "auto", concurrency=concurrency != 8)
    if endpoint is not None and model is None:
        raise UserError("--endpoint needs --model: give the name of one of its models")
    if model is None and prompts is not None:
        raise UserError("--prompts is for a language model; give --model, or --endpoint and --model")
    if features is not None and most is not None:
        raise UserError("--features and --most exclude each other; give only one")
    paths = find_indexes(index)
    if len(paths) > 1:
        raise UserError(f"{index} holds {len(paths)} indexes: give the folder of one, such as {paths[-1]}")
    opened = FeatureIndex(paths[0])
    proposals = Proposals(paths[0] / PROPOSALS_FILE, opened.info.sae.d_sae)
    if export is not None:
        write_text(export, "".join(proposals.export()))
        say(f"{export}: written")
        return
    if import_ is not None:
        say(f"{proposals.path}: {proposals.import_lines(_lines(import_))} new labels")
        return
    blocks = TextBlocks(opened)
    wanted = most_important(opened, most) if features is None else parse_features(features, opened.info.sae.d_sae)
    clamping = Clamping(blocks) if clamp else None
    if endpoint is None:
        labeller = RuleLabeller(blocks) if model is None else local_labeller(model, prompts, blocks.seed)
        run = label_features(blocks, labeller, wanted, proposals, clamping=clamping)
    else:
        assert model is not None
        asking = Asking(endpoint, model, Limits(concurrency, per_minute), budget,
                        None if answers == "auto" else answers, prompts)
        costs = None if prices is None else parse_prices(prices)
        if dry_run:
            show_plan(blocks, asking, wanted, proposals, costs, clamping)
            return
        run = ask(blocks, asking, wanted, proposals, costs, clamping)
    chosen = set(wanted)
    show_labels(opened.info.sae.name, run, [one for one in proposals.by(run.labeller, blocks.identity)
                                            if one.feature in chosen])
    if run.out_of_budget:
        say("The run reached its budget: to continue, run the same command again with another budget.")
    say(f"Read them with `olmoscope browse {index}`.")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
