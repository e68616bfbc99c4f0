"""How good labels by rules are: on planted features, whose rules are known, and on indexes of real SAEs.

    python benchmarks/labels.py [--each 50] [INDEX ...] [--most 500]

Planted features (planted_index.py): the share whose rule is found, by kind; how often a score's 95% interval holds the
score on all held-out text; what the labels of other features score. Of an INDEX: its most important features, the share
with a label and with a detection AUROC over 0.9.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

import numpy as np

from olmoscope.features.read import FeatureIndex
from olmoscope.labelling.examples import NEGATIVES, FeatureExamples, examples_of, silent_blocks
from olmoscope.labelling.labeller import Labelled
from olmoscope.labelling.learn_rules import RuleLearner
from olmoscope.labelling.rule_labels import RuleLabeller, score_rule
from olmoscope.labelling.rules import Rule
from olmoscope.labelling.run import most_important
from olmoscope.labelling.text_blocks import TextBlocks
from planted_index import Planted, PlantedIndex

GOOD = 0.9


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("indexes", nargs="*", type=Path)
    parser.add_argument("--each", type=int, default=50, help="planted features of each kind; 0: none")
    parser.add_argument("--most", type=int, default=500, help="features of an index")
    arguments = parser.parse_args()
    if arguments.each:
        print(planted(PlantedIndex(arguments.each)).table())
    for path in arguments.indexes:
        print(of_index(path, arguments.most))


class PlantedFigures:
    """What was measured of planted features."""

    def __init__(self) -> None:
        self.found: dict[str, list[bool]] = defaultdict(list)
        self.covered: list[bool] = []
        self.scores: list[float] = []
        self.of_others: list[float] = []

    def table(self) -> str:
        """In Markdown."""
        lines = ["| planted rule | features | found |", "|---|--:|--:|"]
        lines += [f"| {kind} | {len(found)} | {mean(found):.1%} |" for kind, found in self.found.items()]
        return "\n".join([
            *lines, "",
            f"Detection AUROC of the rules found: median {median(self.scores):.3f}. Its interval holds the AUROC over "
            f"all held-out text for {mean(self.covered):.1%} of {len(self.covered)} features. Labels of other features "
            f"have a mean AUROC of {mean(self.of_others):.3f}."])


def planted(index: PlantedIndex) -> PlantedFigures:
    """Learn the rules of planted features, and compare."""
    blocks, figures = TextBlocks(index), PlantedFigures()  # type: ignore[arg-type]
    learner = RuleLearner(blocks)
    learned = [learner.learn(number) for number in range(len(index.planted))]
    for number, (truth, one) in enumerate(zip(index.planted, learned, strict=True)):
        figures.found[truth.kind].append(one is not None and same(truth, one.rule, blocks))
        examples = examples_of(blocks, number)
        if one is None or not isinstance(examples, FeatureExamples):
            continue
        scored = score_rule(blocks, one.rule, examples).detection
        other = learned[(number + len(index.planted) // 2 + 1) % len(index.planted)]
        assert scored is not None and other is not None
        figures.scores.append(scored.value)
        figures.covered.append(scored.low - 1e-9 <= over_all(blocks, number, one.rule, examples) <= scored.high + 1e-9)
        of_other = score_rule(blocks, other.rule, examples).detection
        assert of_other is not None
        figures.of_others.append(of_other.value)
    return figures


def same(truth: Planted, rule: Rule, blocks: TextBlocks) -> bool:
    """Whether a rule matches the same tokens of the text as the planted one, in 95% of those that either matches."""
    every = np.arange(len(blocks.ids_T))
    one, two = (each.values(blocks, every) > 0 for each in (truth.rule, rule))
    return bool((one & two).sum() >= 0.95 * (one | two).sum())


def over_all(blocks: TextBlocks, number: int, rule: Rule, examples: FeatureExamples) -> float:
    """The AUROC that the drawn samples estimate: all held-out blocks with a firing, against all without, each kind of
    negative
    weighted as in the sample."""
    value_T = rule.values(blocks, np.arange(len(blocks.ids_T)))
    value_B = np.maximum.reduceat(value_T, np.stack([blocks.starts_B, blocks.ends_B - 1], 1).ravel())[::2]
    value_B = np.maximum(value_B, value_T[blocks.ends_B - 1])
    places, _ = blocks.index.firing_values(number)
    fires = np.unique(blocks.blocks_at(places))
    fires = fires[fires >= 0]
    positive = value_B[fires[blocks.part_B[fires] == 2]]
    silent = silent_blocks(blocks, examples.feature, places)
    counts = {kind: sum(one.kind == kind for one in examples.score) for kind in NEGATIVES}
    total = 0.0
    for kind, number_of in counts.items():
        negative = np.sort(value_B[np.setdiff1d(silent[kind], fires)])
        if number_of:
            below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
            total += number_of * float(below.mean()) / (2 * len(negative))
    return total / sum(counts.values())


def of_index(path: Path, most: int) -> str:
    """How many of the most important features rules describe."""
    index = FeatureIndex(path)
    blocks = TextBlocks(index)
    labeller, features = RuleLabeller(blocks), most_important(index, most)
    values = []
    for number in features:
        examples = examples_of(blocks, number)
        found = labeller.label(examples) if isinstance(examples, FeatureExamples) else None
        if isinstance(found, Labelled) and found.scores.detection is not None:
            values.append(found.scores.detection.value)
    good = sum(value > GOOD for value in values)
    return (f"{index.info.sae.name}: {len(values)} of {len(features)} features have a rule, {good} "
            f"({good / len(features):.1%}) with a detection AUROC over {GOOD}; median {median(values):.3f}")


if __name__ == "__main__":
    main()
