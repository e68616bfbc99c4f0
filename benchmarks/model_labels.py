"""Labels by a language model on this machine beside labels by rules, on the same features of an index.

    python benchmarks/model_labels.py INDEX MODEL [--most 40] [--read 20]

The share of features with a detection AUROC over 0.9: of rules, which judge themselves; of rules' labels in words,
judged by the model; of the model's labels, judged by the model. With `--read`, both labels of so many features with
some of their lines, for a person to judge.
"""

import argparse
from pathlib import Path
from statistics import median

from olmoscope.features.read import FeatureIndex
from olmoscope.labelling.answerers import LocalAnswerer
from olmoscope.labelling.examples import FeatureExamples, examples_of
from olmoscope.labelling.labeller import Labelled
from olmoscope.labelling.local_model import LocalModel
from olmoscope.labelling.model_examples import explaining_lines, judged_lines
from olmoscope.labelling.model_labels import ModelLabeller, judge
from olmoscope.labelling.prompts import load_prompts
from olmoscope.labelling.rule_labels import RuleLabeller
from olmoscope.labelling.run import most_important
from olmoscope.labelling.scores import Scores
from olmoscope.labelling.text_blocks import TextBlocks

GOOD = 0.9


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("model")
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--read", type=int, default=0)
    arguments = parser.parse_args()
    index = FeatureIndex(arguments.index)
    blocks = TextBlocks(index)
    model = LocalModel(arguments.model)
    answerer = LocalAnswerer(model, load_prompts())
    rules, models = RuleLabeller(blocks), ModelLabeller(answerer)
    values: dict[str, list[float]] = {"rules": [], "rules, judged by the model": [], "the model": []}
    features = 0
    for number in most_important(index, arguments.most):
        examples = examples_of(blocks, number)
        if not isinstance(examples, FeatureExamples):
            continue
        features += 1
        rule, words = rules.label(examples), models.label(examples)
        shown = []
        for name, found in (("rules", rule), ("the model", words)):
            if isinstance(found, Labelled):
                shown.append(f"{name}: {found.label}{_add(values[name], found.scores)}")
            else:
                shown.append(f"{name}: none, {found.reason}")
        if isinstance(rule, Labelled) and isinstance(judged := judge(answerer, rule.label, examples), Scores):
            _add(values["rules, judged by the model"], judged)
        if features <= arguments.read:
            lines = [*explaining_lines(examples)[:3], *(line.text for line in judged_lines(examples, 0)[:3])]
            print("\n".join([f"feature {number}", *shown, *(f"    {line}" for line in lines)]), flush=True)
    print(f"{index.info.sae.name}, {features} features, {model.prompt_tokens / features:.0f} prompt tokens a feature\n")
    print("| label and judge | features | AUROC over 0.9 | median |\n|---|--:|--:|--:|")
    for name, found in values.items():
        good = sum(value > GOOD for value in found)
        print(f"| {name} | {len(found)} | {good} ({good / features:.0%}) | {median(found):.2f} |")


def _add(values: list[float], scores: Scores) -> str:
    if scores.detection is None:
        return ""
    values.append(scores.detection.value)
    return f" [{scores.detection.value:.2f}]"


if __name__ == "__main__":
    main()
