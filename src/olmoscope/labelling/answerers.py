"""Who answers a prompt about a feature: a model behind an endpoint, or one on this machine.

Both give a label, or how likely something is. They differ only in what they are asked, and through which templates.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

from pydantic import AfterValidator, BaseModel, Field

from olmoscope.labelling.client import ChatClient
from olmoscope.labelling.endpoint import Endpoint, Failure, Question
from olmoscope.labelling.local_model import LocalModel
from olmoscope.labelling.prompts import Prompts, numbered, plain_label

LONGEST_LABEL = 200
"""Characters."""
EXPLANATION_TOKENS, CHANCE_TOKENS, NUMBERS_TOKENS = 80, 24, 120
"""The most tokens of an answer."""
NOT_ASKED = "the answer names a number that was not asked about"
LOCAL_LABEL_TOKENS = 30
LOCAL_START = "The marked words are all"
"""The first words of the answer of a model on this machine; the label is the rest."""
Kind = Literal["detect", "fuzz"]
ASKED = ("explain", "detect", "fuzz", "intruder", "output")
"""The templates that a label and its scores depend on; those for a model on this machine begin with `local-`."""


def _on_one_line(label: str) -> str:
    line = " ".join(label.split())
    if not line or not any(sign.isalnum() for sign in line):
        raise ValueError("a label needs words")
    return line


class LabelAnswer(BaseModel):
    """What an explainer answers."""

    label: Annotated[str, Field(max_length=LONGEST_LABEL), AfterValidator(_on_one_line)]


class ChanceAnswer(BaseModel):
    """What a judge answers."""

    percent: float = Field(ge=0, le=100, strict=True)


class NumberAnswer(BaseModel):
    """Which of some numbered things a judge names."""

    number: int = Field(strict=True, ge=1)


class NumbersAnswer(BaseModel):
    """Which ones of some numbered things a judge names."""

    numbers: list[Annotated[int, Field(strict=True, ge=1)]]


class Answerer(Protocol):
    """A model that answers questions about features."""

    @property
    def name(self) -> str:
        """The model, and the version of the prompts for explaining and scoring."""

    def label(self, examples: Sequence[str], promoted: Sequence[str]) -> str | Failure:
        """What the marked places of some lines have in common."""

    def chances(self, kind: Kind, label: str, lines: Sequence[str]) -> list[float | Failure]:
        """How likely each line has what a label says, or has it at its marks: 0 to 1; each line is judged alone."""

    def intruders(self, label: str, groups: Sequence[Sequence[str]]) -> list[int | Failure]:
        """Which line of each group does not have what a label says, from 0."""

    def likelier(self, label: str, tokens: Sequence[str]) -> list[float] | Failure:
        """How likely it is that a feature with this label makes each token likelier to follow: 0 to 1."""


def endpoint_name(endpoint: Endpoint, prompts: Prompts) -> str:
    """`Answerer.name` of a model behind an endpoint."""
    return f"{endpoint.model} of {endpoint.url}, prompts {prompts.version(*ASKED)}"


def label_question(prompts: Prompts, examples: Sequence[str], promoted: Sequence[str]) -> Question[LabelAnswer]:
    """The question that asks an endpoint for a label."""
    prompt = prompts.fill("explain", examples="\n".join(examples), promoted=" ".join(promoted) or "unknown")
    return Question(prompt, LabelAnswer, EXPLANATION_TOKENS)


def chance_questions(prompts: Prompts, kind: Kind, label: str, lines: Sequence[str]) -> list[Question[ChanceAnswer]]:
    """The questions to an endpoint about lines: one for each."""
    return [Question(prompts.fill(kind, label=plain_label(label), text=line), ChanceAnswer, CHANCE_TOKENS)
            for line in lines]


def intruder_questions(prompts: Prompts, label: str, groups: Sequence[Sequence[str]]) -> list[Question[NumberAnswer]]:
    """The questions to an endpoint about groups of lines: one for each."""
    return [Question(prompts.fill("intruder", label=plain_label(label), texts=numbered(lines)), NumberAnswer,
                     CHANCE_TOKENS) for lines in groups]


def output_question(prompts: Prompts, label: str, tokens: Sequence[str]) -> Question[NumbersAnswer]:
    """The question to an endpoint about output tokens: one for all of them."""
    return Question(prompts.fill("output", label=plain_label(label), tokens=numbered(tokens)), NumbersAnswer,
                    NUMBERS_TOKENS)


class EndpointAnswerer:
    """A model behind an endpoint."""

    def __init__(self, client: ChatClient, prompts: Prompts) -> None:
        self._client, self._prompts = client, prompts

    @property
    def name(self) -> str:
        return endpoint_name(self._client.endpoint, self._prompts)

    def label(self, examples: Sequence[str], promoted: Sequence[str]) -> str | Failure:
        answer, = self._client.ask([label_question(self._prompts, examples, promoted)])
        return answer if isinstance(answer, Failure) else answer.value.label

    def chances(self, kind: Kind, label: str, lines: Sequence[str]) -> list[float | Failure]:
        return [answer if isinstance(answer, Failure) else answer.value.percent / 100
                for answer in self._client.ask(chance_questions(self._prompts, kind, label, lines))]

    def intruders(self, label: str, groups: Sequence[Sequence[str]]) -> list[int | Failure]:
        answers = self._client.ask(intruder_questions(self._prompts, label, groups))
        return [answer if isinstance(answer, Failure) else answer.value.number - 1
                if answer.value.number <= len(lines) else Failure(NOT_ASKED)
                for lines, answer in zip(groups, answers, strict=True)]

    def likelier(self, label: str, tokens: Sequence[str]) -> list[float] | Failure:
        answer, = self._client.ask([output_question(self._prompts, label, tokens)])
        if isinstance(answer, Failure):
            return answer
        named = set(answer.value.numbers)
        if named and max(named) > len(tokens):
            return Failure(NOT_ASKED)
        return [float(number in named) for number in range(1, len(tokens) + 1)]


class LocalAnswerer:
    """A model on this machine."""

    def __init__(self, model: LocalModel, prompts: Prompts) -> None:
        self._model, self._prompts = model, prompts

    @property
    def name(self) -> str:
        version = self._prompts.version(*(f"local-{name}" for name in ASKED))
        return f"{self._model.name} at {self._model.revision}, prompts {version}"

    def label(self, examples: Sequence[str], promoted: Sequence[str]) -> str | Failure:
        prompt = self._prompts.fill("local-explain", examples="\n".join(examples),
                                    promoted=" ".join(promoted) or "unknown")
        text = self._model.write(prompt, LOCAL_LABEL_TOKENS, LOCAL_START)
        try:
            return _on_one_line(text[:LONGEST_LABEL])
        except ValueError:
            return Failure("the answer is empty")

    def chances(self, kind: Kind, label: str, lines: Sequence[str]) -> list[float | Failure]:
        return [*self._model.chances_of_yes([self._prompts.fill(f"local-{kind}", label=plain_label(label), text=line)
                                             for line in lines])]

    def intruders(self, label: str, groups: Sequence[Sequence[str]]) -> list[int | Failure]:
        asked = [self._prompts.fill("local-intruder", label=plain_label(label), texts=numbered(lines))
                 for lines in groups]
        named = self._model.numbers(asked, max(map(len, groups), default=0))
        return [Failure("the model's tokenizer does not tell the numbers apart")] * len(groups) if named is None \
            else [*named]

    def likelier(self, label: str, tokens: Sequence[str]) -> list[float] | Failure:
        return self._model.chances_of_yes([self._prompts.fill("local-output", label=plain_label(label), token=token)
                                           for token in tokens])
