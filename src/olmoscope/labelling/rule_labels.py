"""Labels by rules, without a language model. A rule is its own judge, so its scores cost nothing."""

from collections.abc import Mapping, Sequence

import numpy as np

from olmoscope.labelling.examples import NEGATIVES, FeatureExamples, marks
from olmoscope.labelling.labeller import Labelled, NotLabelled
from olmoscope.labelling.learn_rules import LEAST_F1, RuleLearner
from olmoscope.labelling.model_examples import intruder_groups, judged_lines, marked_lines
from olmoscope.labelling.outputs import Candidate, Side, candidates, told_apart
from olmoscope.labelling.rules import Rule
from olmoscope.labelling.scores import Figure, Scores, auroc, balanced_accuracy, credit, intruders, on_lines
from olmoscope.labelling.text_blocks import TextBlocks


class RuleLabeller:
    """Labels features by rules (a `Labeller`)."""

    name = "rules 2"

    def __init__(self, blocks: TextBlocks) -> None:
        self._blocks, self._learner = blocks, RuleLearner(blocks)

    def label(self, examples: FeatureExamples) -> Labelled | NotLabelled:
        """The rule of a feature, in words."""
        learned = self._learner.learn(examples.feature.index)
        if learned is None:
            return NotLabelled(f"no rule has an F1 of {LEAST_F1} or more")
        rule = learned.rule
        return Labelled(self._learner.words(rule), score_rule(self._blocks, rule, examples),
                        {**rule.as_json(), "f1": learned.f1})


def score_rule(blocks: TextBlocks, rule: Rule, examples: FeatureExamples) -> Scores:
    """The scores of a rule on held-out text: the value of a piece of text is that of its strongest token, the value of
    marked tokens their mean."""

    def strongest(places: range) -> float:
        return float(rule.values(blocks, places).max())

    def mean(places: Sequence[int]) -> float:
        return float(rule.values(blocks, np.asarray(places)).mean())

    found = {kind: [strongest(one.places) for one in examples.score if one.kind == kind]
             for kind in ("fires", *NEGATIVES)}
    positive, negative = found["fires"], [value for kind in NEGATIVES for value in found[kind]]
    marked = [(real, mean(places)) for sample in examples.score for real, places in marks(sample, blocks.seed)]
    outputs, seed = candidates(examples, blocks.seed), blocks.seed
    return Scores(
        auroc(positive, negative),
        {kind: figure for kind in NEGATIVES if (figure := auroc(positive, found[kind])) is not None},
        balanced_accuracy(positive, negative),
        fuzzing=auroc([value for real, value in marked if real], [value for real, value in marked if not real]),
        on_lines=on_lines([(line.fires, strongest(line.places)) for line in judged_lines(examples, seed)],
                          [(line.fires, mean(line.marked)) for line in marked_lines(examples, seed)]),
        intruder=intruders([credit([strongest(line.places) for line in group.lines], group.intruder)
                            for group in intruder_groups(examples, seed)]),
        output=_output(rule, outputs, "output"), clamped=_output(rule, outputs, "clamped"),
        clamped_tokens=len(outputs.get("clamped", ())), positives=len(positive), negatives=len(negative))


def _output(rule: Rule, outputs: Mapping[Side, list[Candidate]], side: Side) -> Figure | None:
    """How well a rule distinguishes output tokens; None if it is not about the next token, or is made from these
    tokens."""
    if rule.on != "next" or side not in outputs or (side == "output" and rule.shape == "promoted"):
        return None
    named = set(rule.ids)
    return told_apart(outputs, side, [float(one.token.id in named) for one in outputs[side]])
