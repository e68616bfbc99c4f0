"""Who answers a prompt about a feature: a model behind an endpoint, or one on this machine.

Both give a label, or how likely something is; what they are asked, and through which templates, is all that differs.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

from pydantic import AfterValidator, BaseModel, Field

from olmoscope.labelling.client import ChatClient
from olmoscope.labelling.endpoint import Failure, Question
from olmoscope.labelling.local_model import LocalModel
from olmoscope.labelling.prompts import Prompts, plain_label

LONGEST_LABEL = 200
"""Characters."""
EXPLANATION_TOKENS, CHANCE_TOKENS = 80, 24
"""Of an answer, at most."""
LOCAL_LABEL_TOKENS = 30
Kind = Literal["detect", "fuzz"]


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
    """Which of several texts."""

    number: int = Field(ge=1, strict=True)


class Answerer(Protocol):
    """A model that is asked about features."""

    @property
    def name(self) -> str:
        """The model, and the version of the prompts for explaining and scoring."""

    def label(self, examples: Sequence[str], promoted: Sequence[str]) -> str | Failure:
        """What the marked places of some lines have in common."""

    def chances(self, kind: Kind, label: str, lines: Sequence[str]) -> list[float | Failure]:
        """How likely each line has what a label says, or has it where it is marked: 0 to 1; each is judged alone."""


class EndpointAnswerer:
    """A model behind an endpoint."""

    def __init__(self, client: ChatClient, prompts: Prompts) -> None:
        self._client, self._prompts = client, prompts

    @property
    def name(self) -> str:
        return f"{self._client.endpoint.model}, prompts {self._prompts.version('explain', 'detect', 'fuzz')}"

    def label_question(self, examples: Sequence[str], promoted: Sequence[str]) -> Question[LabelAnswer]:
        prompt = self._prompts.fill("explain", examples="\n".join(examples), promoted=" ".join(promoted) or "unknown")
        return Question(prompt, LabelAnswer, EXPLANATION_TOKENS)

    def chance_questions(self, kind: Kind, label: str, lines: Sequence[str]) -> list[Question[ChanceAnswer]]:
        return [Question(self._prompts.fill(kind, label=plain_label(label), text=line), ChanceAnswer, CHANCE_TOKENS)
                for line in lines]

    def label(self, examples: Sequence[str], promoted: Sequence[str]) -> str | Failure:
        answer, = self._client.ask([self.label_question(examples, promoted)])
        return answer if isinstance(answer, Failure) else answer.value.label

    def chances(self, kind: Kind, label: str, lines: Sequence[str]) -> list[float | Failure]:
        return [answer if isinstance(answer, Failure) else answer.value.percent / 100
                for answer in self._client.ask(self.chance_questions(kind, label, lines))]

    def intruder(self, lines: Sequence[str]) -> int | Failure:
        """Which of some lines does not belong with the others, from 0."""
        texts = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
        answer, = self._client.ask([Question(self._prompts.fill("intruder", texts=texts), NumberAnswer,
                                             CHANCE_TOKENS)])
        if isinstance(answer, Failure):
            return answer
        if answer.value.number > len(lines):
            return Failure("the answer does not fit its schema: number: less_than_equal")
        return answer.value.number - 1


class LocalAnswerer:
    """A model on this machine."""

    def __init__(self, model: LocalModel, prompts: Prompts) -> None:
        self._model, self._prompts = model, prompts

    @property
    def name(self) -> str:
        version = self._prompts.version("local-explain", "local-detect", "local-fuzz")
        return f"{self._model.name} at {self._model.revision}, prompts {version}"

    def label(self, examples: Sequence[str], promoted: Sequence[str]) -> str | Failure:
        text = self._model.write(self._prompts.fill("local-explain", examples="\n".join(examples),
                                                    promoted=" ".join(promoted) or "unknown"), LOCAL_LABEL_TOKENS)
        try:
            return _on_one_line(text[:LONGEST_LABEL])
        except ValueError:
            return Failure("the answer is empty")

    def chances(self, kind: Kind, label: str, lines: Sequence[str]) -> list[float | Failure]:
        return [*self._model.chances_of_yes([self._prompts.fill(f"local-{kind}", label=plain_label(label), text=line)
                                             for line in lines])]
