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
    index: Annotated[Path | None, typer.Argument(metavar="INDEX", help="A feature index.")] = None,
    endpoint: EndpointOption = None,
    model: ModelOption = None,
    features: Annotated[str | None, typer.Option("--features", metavar="N,N-M,...", help=(
        "Which features; by default all, the most telling first."))] = None,
    most: Annotated[int | None, typer.Option("--most", min=1, help="So many features, the most telling ones.")] = None,
    budget: BudgetOption = None,
    concurrency: ConcurrencyOption = 8,
    per_minute: RateOption = None,
    answers: AnswersOption = "auto",
    prompts: PromptsOption = None,
    prices: PricesOption = None,
    dry_run: DryRunOption = False,
    copy_prompts: Annotated[Path | None, typer.Option("--copy-prompts", metavar="DIR", help=(
        "Write the package's prompts into a folder, to be changed, and end."))] = None,
) -> None:
    """Label features and score the labels on text that they were not made from: by rules, or by a language model."""
    from olmoscope.features.read import FeatureIndex
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
        raise UserError("which index? `olmoscope label INDEX`")
    refuse_idle(endpoint, budget=budget is not None, per_minute=per_minute is not None, dry_run=dry_run,
                prices=prices is not None, answers=answers != "auto", concurrency=concurrency != 8)
    if endpoint is not None and model is None:
        raise UserError("--endpoint needs --model, the name of one of its models")
    if model is None and prompts is not None:
        raise UserError("--prompts is for a language model; give --model, or --endpoint and --model")
    if features is not None and most is not None:
        raise UserError("--features and --most: give one of them")
    opened = FeatureIndex(index)
    blocks = TextBlocks(opened)
    wanted = most_important(opened, most) if features is None else parse_features(features, opened.info.sae.d_sae)
    proposals = Proposals(index / PROPOSALS_FILE, opened.info.sae.d_sae)
    if endpoint is None:
        labeller = RuleLabeller(blocks) if model is None else local_labeller(model, prompts, blocks.seed)
        run = label_features(blocks, labeller, wanted, proposals)
    else:
        assert model is not None
        asking = Asking(endpoint, model, Limits(concurrency, per_minute), budget,
                        None if answers == "auto" else answers, prompts)
        costs = None if prices is None else parse_prices(prices)
        if dry_run:
            show_plan(blocks, asking, wanted, proposals, costs)
            return
        run = ask(blocks, asking, wanted, proposals, costs)
    say(f"{run.labelled:,} of {run.asked:,} features have a label, {run.before:,} were done before.")
    for reason, count in sorted(run.without.items(), key=lambda pair: -pair[1]):
        say(f"Without a label: {count:,}: {reason}")
    if run.out_of_budget:
        say("The budget ended the run: run the same command again with another one to go on.")
