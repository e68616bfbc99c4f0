"""Labels by a language model, which then judges them on lines that they were not made from, one line at a time.

An unusable answer counts in `Scores.failed`, and is not a score. If the endpoint gives no answer at all, the feature
stays without a label, and a later run asks the missing questions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from olmoscope.labelling.answerers import (
    Answerer,
    chance_questions,
    intruder_questions,
    label_question,
    output_question,
)
from olmoscope.labelling.budget import Budget, Tokens
from olmoscope.labelling.endpoint import Failure, Question
from olmoscope.labelling.examples import NEGATIVES, FeatureExamples
from olmoscope.labelling.labeller import Labelled, NotLabelled
from olmoscope.labelling.model_examples import (
    Group,
    Line,
    explaining_lines,
    intruder_groups,
    judged_lines,
    marked_lines,
    promoted_tokens,
)
from olmoscope.labelling.outputs import candidates, told_apart
from olmoscope.labelling.prompts import Prompts
from olmoscope.labelling.scores import Scores, auroc, balanced_accuracy, intruders, on_lines

TYPICAL_LABEL = "verbs in the past tense that follow the name of a person"
"""A placeholder for a label that is not yet known, to estimate tokens."""


class ModelLabeller:
    """Labels features by a language model (a `Labeller`). As many threads may use it as its answerer allows."""

    def __init__(self, answerer: Answerer, seed: int = 0) -> None:
        """
        Args:
            seed: `TextBlocks.seed`.
        """
        self._answerer, self._seed = answerer, seed

    @property
    def name(self) -> str:
        return self._answerer.name

    def label(self, examples: FeatureExamples) -> Labelled | NotLabelled:
        """The model's label for a feature, and its scores on other documents."""
        label = self._answerer.label(explaining_lines(examples), promoted_tokens(examples))
        if isinstance(label, Failure):
            return NotLabelled(label.reason, not label.may_pass)
        scores = judge(self._answerer, label, examples, self._seed)
        return scores if isinstance(scores, NotLabelled) else Labelled(label, scores)


def judge(answerer: Answerer, label: str, examples: FeatureExamples, seed: int = 0) -> Scores | NotLabelled:
    """A model's scores for a label, whoever wrote it; not labelled if an answer is missing."""
    detection, fuzzing = judged_lines(examples, seed), marked_lines(examples, seed)
    detected = answerer.chances("detect", label, [line.text for line in detection])
    fuzzed = answerer.chances("fuzz", label, [line.text for line in fuzzing]) if fuzzing else []
    groups, outputs = intruder_groups(examples, seed), candidates(examples, seed)
    named = answerer.intruders(label, _texts(groups)) if groups else []
    told = {side: answerer.likelier(label, [one.shown for one in some]) for side, some in outputs.items()}
    failures = [answer for answer in (*detected, *fuzzed, *named, *told.values()) if isinstance(answer, Failure)]
    for failure in failures:
        if failure.may_pass:
            return NotLabelled(failure.reason, lasting=False)
    sides = {side: told_apart(outputs, side, values) for side, values in told.items()
             if not isinstance(values, Failure)}
    positive, negative = _of(detection, detected, "fires"), _of(detection, detected, *NEGATIVES)
    return Scores(
        auroc(positive, negative),
        {kind: figure for kind in NEGATIVES
         if (figure := auroc(positive, _of(detection, detected, kind))) is not None},
        balanced_accuracy(positive, negative),
        fuzzing=auroc(_of(fuzzing, fuzzed, "true"), _of(fuzzing, fuzzed, "false")),
        on_lines=on_lines(_known(detection, detected), _known(fuzzing, fuzzed)),
        intruder=intruders([None if isinstance(answer, Failure) else float(answer == group.intruder)
                            for group, answer in zip(groups, named, strict=True)]),
        output=sides.get("output"), clamped=sides.get("clamped"),
        clamped_tokens=len(outputs.get("clamped", ())), positives=len(positive), negatives=len(negative),
        failed=Counter(failure.reason for failure in failures))


def questions_of(prompts: Prompts, examples: FeatureExamples, seed: int = 0) -> dict[str, list[Question[Any]]]:
    """All questions to an endpoint about a feature, by the name of the prompt, with a typical label where one is
    needed."""
    return {
        "explain": [label_question(prompts, explaining_lines(examples), promoted_tokens(examples))],
        "detect": [*chance_questions(prompts, "detect", TYPICAL_LABEL,
                                     [one.text for one in judged_lines(examples, seed)])],
        "fuzz": [*chance_questions(prompts, "fuzz", TYPICAL_LABEL,
                                   [one.text for one in marked_lines(examples, seed)])],
        "intruder": [*intruder_questions(prompts, TYPICAL_LABEL, _texts(intruder_groups(examples, seed)))],
        "output": [output_question(prompts, TYPICAL_LABEL, [one.shown for one in some])
                   for some in candidates(examples, seed).values()]}


def estimate(questions: Mapping[str, Sequence[Question[Any]]], budget: Budget) -> Tokens:
    """Tokens of some questions, with answers of the largest length."""
    total = Tokens()
    for question in chain.from_iterable(questions.values()):
        total += budget.estimate(question.prompt, question.longest)
    return total


def _texts(groups: Sequence[Group]) -> list[list[str]]:
    return [[line.text for line in group.lines] for group in groups]


def _known(lines: list[Line], answers: list[float | Failure]) -> list[tuple[bool, float]]:
    """Whether the feature fires on each line with a usable answer, and the answer."""
    return [(line.fires, answer) for line, answer in zip(lines, answers, strict=True)
            if not isinstance(answer, Failure)]


def _of(lines: list[Line], answers: list[float | Failure], *kinds: str) -> list[float]:
    """The usable answers about lines of some kinds."""
    return [answer for line, answer in zip(lines, answers, strict=True)
            if line.kind in kinds and not isinstance(answer, Failure)]
