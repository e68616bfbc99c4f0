"""A run of a language model over an index's features: behind an endpoint with cache and budget, or on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.labelling.answerers import EndpointAnswerer, LocalAnswerer, endpoint_name
from olmoscope.labelling.budget import Budget, Tokens
from olmoscope.labelling.cache import AnswerCache
from olmoscope.labelling.clamp import Clamping
from olmoscope.labelling.client import ChatClient, Limits
from olmoscope.labelling.endpoint import Form, endpoint_of
from olmoscope.labelling.examples import FeatureExamples, examples_of
from olmoscope.labelling.labeller import Labeller
from olmoscope.labelling.local_model import LocalModel
from olmoscope.labelling.model_labels import ModelLabeller, estimate, questions_of
from olmoscope.labelling.prompts import load_prompts
from olmoscope.labelling.proposals import Proposals
from olmoscope.labelling.run import Run, label_features
from olmoscope.labelling.text_blocks import TextBlocks

ANSWERS_FILE = "answers.sqlite"
"""Beside an index: every question asked about it, and its answer."""
ESTIMATED = 20
"""How many features' questions represent those of all when tokens are estimated before a run."""


@dataclass(frozen=True)
class Asking:
    """How to ask an endpoint.

    Attributes:
        budget: the most tokens of prompts and answers.
        form: how to ask for JSON; None: by a schema or, if the server refuses that, in a simpler form.
        prompts: a folder with the user's own prompts.
    """

    url: str
    model: str
    limits: Limits = field(default_factory=Limits)
    budget: int | None = None
    form: Form | None = None
    prompts: Path | None = None


@dataclass(frozen=True)
class Asked:
    """What a run asked.

    Attributes:
        used: tokens that the answers reported.
        unreported: answers that reported none; `used` has an estimate for them.
        asked, cached: questions that the endpoint answered now, and that it answered before.
        retries, failures: attempts that were repeated, and questions without a usable answer, by reason.
    """

    run: Run
    used: Tokens
    unreported: int
    asked: int
    cached: int
    retries: dict[str, int]
    failures: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """What a run would ask.

    Attributes:
        features: how many this model with these prompts has not done before.
        prompts: one of each kind, for the first feature that can be labelled.
        each: tokens per feature, the mean over some features.
    """

    features: int
    prompts: list[str]
    each: Tokens

    @property
    def total(self) -> Tokens:
        return self.each * self.features


def plan_asking(blocks: TextBlocks, asking: Asking, features: Sequence[int], proposals: Proposals,
                clamping: Clamping | None = None) -> Plan:
    """What `ask_endpoint` would ask; nothing is sent.

    Raises:
        UserError: a bad address or bad prompts.
    """
    endpoint, prompts = endpoint_of(asking.url, asking.model), load_prompts(asking.prompts)
    done = proposals.done(endpoint_name(endpoint, prompts), blocks.identity, clamped=clamping is not None)
    left = [feature for feature in features if feature not in done]
    shown: list[str] = []
    counted, budget = Tokens(), Budget()
    looked_at = left[:: max(1, len(left) // ESTIMATED)][:ESTIMATED]
    for feature in looked_at:
        examples = examples_of(blocks, feature, clamping)
        if isinstance(examples, FeatureExamples):
            questions = questions_of(prompts, examples, blocks.seed)
            counted += estimate(questions, budget)
            shown = shown or [some[0].prompt for some in questions.values() if some]
    each = len(looked_at) or 1
    return Plan(len(left), shown, Tokens(-(-counted.prompt // each), -(-counted.completion // each)))


def ask_endpoint(blocks: TextBlocks, asking: Asking, features: Sequence[int], proposals: Proposals,
                 clamping: Clamping | None = None) -> Asked:
    """Label features by a model behind an endpoint.

    Raises:
        UserError: a bad address or bad prompts; the endpoint refuses what it is asked, or does not answer any more.
    """
    endpoint, prompts = endpoint_of(asking.url, asking.model), load_prompts(asking.prompts)
    budget = Budget(asking.budget)

    def room(running: Sequence[FeatureExamples], one: FeatureExamples) -> bool:
        wanted = Tokens()
        for examples in (*running, one) if budget.limit is not None else ():
            wanted += estimate(questions_of(prompts, examples, blocks.seed), budget)
        return budget.has_room(wanted)

    with (AnswerCache(blocks.index.path / ANSWERS_FILE) as cache,
          ChatClient(endpoint, cache, budget, asking.limits, asking.form) as client):
        labeller = ModelLabeller(EndpointAnswerer(client, prompts), blocks.seed)
        run = label_features(blocks, labeller, features, proposals, at_once=asking.limits.concurrency, room=room,
                             clamping=clamping)
        return Asked(run, budget.used, budget.unreported, client.asked, client.cached, dict(client.retries),
                     dict(client.failures))


def local_labeller(model: str, prompts: Path | None = None, seed: int = 0) -> Labeller:
    """A causal LM on this machine as explainer and judge.

    Raises:
        UserError: it cannot be loaded, or bad prompts.
    """
    return ModelLabeller(LocalAnswerer(LocalModel(model), load_prompts(prompts)), seed)


def parse_prices(text: str) -> tuple[float, float]:
    """The prices of a million tokens of prompts and of answers, from a text such as `2.5,10`.

    Raises:
        UserError: the text is not of this form.
    """
    try:
        prompt, completion = (float(price) for price in text.split(","))
    except ValueError:
        prompt = completion = -1.0
    if not (0 <= prompt < float("inf") and 0 <= completion < float("inf")):
        raise UserError(f"--prices {text}: give the prices of a million tokens of prompts and of answers, such as "
                        "2.5,10")
    return prompt, completion
