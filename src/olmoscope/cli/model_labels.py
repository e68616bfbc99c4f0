"""`label` with a language model: estimate what a run needs, ask the questions, and report what it took."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from olmoscope.errors import UserError
from olmoscope.terminal import say

if TYPE_CHECKING:
    from olmoscope.labelling.clamp import Clamping
    from olmoscope.labelling.model_run import Asking
    from olmoscope.labelling.proposals import Proposals
    from olmoscope.labelling.run import Run
    from olmoscope.labelling.text_blocks import TextBlocks

EndpointOption = Annotated[str | None, typer.Option("--endpoint", metavar="URL", help=(
    "An OpenAI-compatible endpoint, such as http://localhost:8000/v1; OPENAI_API_KEY may hold its key."))]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="NAME", help=(
    "The endpoint's model; without --endpoint, a causal LM on this machine: a hub id, a folder, or tiny."))]
BudgetOption = Annotated[int | None, typer.Option("--budget", min=1, metavar="TOKENS", help=(
    "The most tokens to spend on prompts and answers; the run stops between features."))]
ConcurrencyOption = Annotated[int, typer.Option("--concurrency", min=1, help="The most requests in flight at a time.")]
RateOption = Annotated[float | None, typer.Option("--per-minute", min=0.001, help="The most requests per minute.")]
AnswersOption = Annotated[Literal["auto", "schema", "object", "text"], typer.Option("--answers", help=(
    "How to ask the endpoint for JSON; auto: by a schema, or more simply if it refuses that."))]
PromptsOption = Annotated[Path | None, typer.Option("--prompts", metavar="DIR", help=(
    "A folder with your own prompts; each replaces the package's prompt of the same name."))]
PricesOption = Annotated[str | None, typer.Option("--prices", metavar="PROMPT,ANSWER", help=(
    "Prices of a million tokens of prompts and of answers, to show the cost."))]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help=(
    "Print one prompt of each kind and an estimate of the run; send nothing."))]


def show_plan(blocks: "TextBlocks", asking: "Asking", features: Sequence[int], proposals: "Proposals",
              prices: tuple[float, float] | None, clamping: "Clamping | None") -> None:
    """Print what a run would ask."""
    from olmoscope.labelling.model_run import plan_asking

    plan = plan_asking(blocks, asking, features, proposals, clamping)
    for number, prompt in enumerate(plan.prompts, 1):
        say(f"--- prompt {number} of {len(plan.prompts)}\n{prompt}\n")
    _show_estimate(plan.features, plan.total.prompt, plan.total.completion, asking.budget, prices)
    say("Nothing was sent (--dry-run).")


def ask(blocks: "TextBlocks", asking: "Asking", features: Sequence[int], proposals: "Proposals",
        prices: tuple[float, float] | None, clamping: "Clamping | None") -> "Run":
    """Print what a run will take, run it, and print what it took.

    Raises:
        UserError: as `ask_endpoint`.
    """
    from olmoscope.labelling.model_run import ask_endpoint, plan_asking

    plan = plan_asking(blocks, asking, features, proposals, clamping)
    _show_estimate(plan.features, plan.total.prompt, plan.total.completion, asking.budget, prices)
    asked = ask_endpoint(blocks, asking, features, proposals, clamping)
    cost = "" if prices is None else f", cost {asked.used.cost(prices):.2f}"
    say(f"Asked {asked.asked:,} questions ({asked.cached:,} were answered before): {asked.used.prompt:,} tokens of "
        f"prompts, {asked.used.completion:,} of answers{cost}.")
    if asked.unreported:
        say(f"{asked.unreported:,} answers reported no token counts; estimates are used for these.")
    for what, counts in (("Repeated", asked.retries), ("Failed questions", asked.failures)):
        for reason, count in sorted(counts.items(), key=lambda pair: -pair[1]):
            say(f"{what}: {count:,}: {reason}")
    return asked.run


def _show_estimate(features: int, prompt: int, completion: int, budget: int | None,
                   prices: tuple[float, float] | None) -> None:
    from olmoscope.labelling.budget import Tokens

    cost = "" if prices is None else f", cost at most {Tokens(prompt, completion).cost(prices):.2f}"
    limit = "" if budget is None else f"; the budget is {budget:,}"
    say(f"Estimate for {features:,} features: {prompt:,} tokens of prompts (UTF-8 bytes / 3), at most {completion:,} "
        f"of answers{cost}{limit}. Cached answers cost nothing.")


def refuse_idle(endpoint: str | None, **given: bool) -> None:
    """Refuse options that only an endpoint uses.

    Raises:
        UserError: one is given without an endpoint.
    """
    for option, is_given in given.items():
        if endpoint is None and is_given:
            raise UserError(f"--{option.replace('_', '-')} is for an endpoint; give --endpoint and --model too")
