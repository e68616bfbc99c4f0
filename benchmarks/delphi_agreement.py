"""Whether our figures of detection and fuzzing are Delphi's, on the same features and the same answers.

    python benchmarks/delphi_agreement.py INDEX PYTHON [--most 100] [--cases FILE]

PYTHON is one with eai-delphi 0.1.3. Answers are drawn: likelier for lines with the feature, one in twenty missing. Ours
are scored by `model_labels.judge`, Delphi's by its own scorers (delphi_scores.py). Prints the largest difference of
each figure; `--cases` keeps some answers and Delphi's figures, for the test of the same.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from olmoscope.features.read import FeatureIndex
from olmoscope.labelling.answerers import Kind
from olmoscope.labelling.endpoint import Failure
from olmoscope.labelling.examples import FeatureExamples, examples_of
from olmoscope.labelling.model_examples import judged_lines, marked_lines
from olmoscope.labelling.model_labels import judge
from olmoscope.labelling.run import most_important
from olmoscope.labelling.scores import Scores
from olmoscope.labelling.text_blocks import TextBlocks
from olmoscope.seeds import generator

KEPT = 6


class Drawn:
    """An answerer whose answers were drawn; it keeps what it was asked."""

    name = "drawn"

    def __init__(self, number: int, active: dict[Kind, list[bool]]) -> None:
        random = generator(0, "drawn answers", number)
        self.answers: dict[Kind, list[float | None]] = {
            kind: [None if random.random() < 0.05 else
                   round(float(np.clip(random.normal(0.4 + 0.25 * one, 0.25), 0, 1)), 2) for one in truth]
            for kind, truth in active.items()}

    def label(self, examples: Any, promoted: Any) -> str:
        return "drawn"

    def chances(self, kind: Kind, label: str, lines: Any) -> list[float | Failure]:
        return [Failure("drawn") if one is None else one for one in self.answers[kind]]

    def intruders(self, label: str, groups: Any) -> list[int | Failure]:
        return [Failure("not compared")] * len(groups)

    def likelier(self, label: str, tokens: Any) -> Failure:
        return Failure("not compared")


def main() -> None:
    """Read the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("python")
    parser.add_argument("--most", type=int, default=100)
    parser.add_argument("--cases", type=Path)
    arguments = parser.parse_args()
    blocks = TextBlocks(FeatureIndex(arguments.index))
    cases, ours = [], []
    for number in most_important(blocks.index, arguments.most):
        examples = examples_of(blocks, number)
        if isinstance(examples, FeatureExamples) and (made := compared(examples, number)) is not None:
            cases += made[0]
            ours += made[1]
    done = subprocess.run([arguments.python, str(Path(__file__).with_name("delphi_scores.py"))],
                          input=json.dumps(cases), capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    print(f"{len(cases)} comparisons")
    for name in ("auroc", "balanced_accuracy", "answers"):
        differences = [abs(one[name] - other[name]) for one, other in zip(ours, theirs, strict=True)
                       if one[name] is not None and other[name] is not None]
        print(f"{name}: {len(differences)} compared, largest difference {max(differences, default=0.0):.1e}")
    if arguments.cases:
        kept = [{"scorer": case["scorer"], "active": one["active"], "chances": one["chances"],
                 "delphi": {name: other[name] for name in ("auroc", "balanced_accuracy", "answers")}}
                for case, one, other in list(zip(cases, ours, theirs, strict=True))[:KEPT]]
        arguments.cases.write_text(json.dumps(kept, indent=1) + "\n")


def compared(examples: FeatureExamples, number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
    """A feature's two cases for Delphi, and our figures of them; None where two of its lines are the same text, or one
    holds what Delphi takes for marks."""
    truth: dict[Kind, list[bool]] = {"detect": [one.kind == "fires" for one in judged_lines(examples, 0)],
                                     "fuzz": [one.kind == "true" for one in marked_lines(examples, 0)]}
    drawn = Drawn(number, truth)
    scores = judge(drawn, "drawn", examples)
    assert isinstance(scores, Scores)
    samples = examples.few(8)
    texts = ["".join(sample.tokens) for sample in samples]
    if len(set(texts)) < len(texts) or any(mark in text for text in texts for mark in ("<<", ">>")):
        return None
    shown = [{"tokens": list(sample.tokens), "activations": list(sample.values)} for sample in samples]
    active, silent = ([one for one, truly in zip(shown, truth["detect"], strict=True) if truly is wanted]
                      for wanted in (True, False))
    detection = {"scorer": "detection", "explanation": "drawn", "active": active, "silent": silent,
                 "answers": [*map(list, zip(texts, drawn.answers["detect"], strict=True))]}
    fuzzed = active[: len(truth["fuzz"]) // 2]
    answers: list[list[Any]] = []
    for one, true, false in zip(fuzzed, drawn.answers["fuzz"][::2], drawn.answers["fuzz"][1::2], strict=True):
        answers += [[highlighted(one), true], ["".join(one["tokens"]), false]]
    fuzz = {"scorer": "fuzz", "explanation": "drawn", "active": fuzzed, "silent": [], "answers": answers}
    figures = []
    for kind, figure, accuracy in (("detect", scores.detection, scores.accuracy), ("fuzz", scores.fuzzing, None)):
        chances = drawn.answers[kind]  # type: ignore[index]
        figures.append({"auroc": None if figure is None else figure.value, "active": truth[kind],  # type: ignore[index]
                        "chances": chances, "answers": sum(one is not None for one in chances),
                        "balanced_accuracy": None if accuracy is None else accuracy.value})
    return [detection, fuzz], figures


def highlighted(one: dict[str, Any]) -> str:
    """An example with its true marks, as Delphi writes them: tokens with 0.3 of the largest activation, or more."""
    least, text, inside = 0.3 * max(one["activations"]), "", False
    for token, value in zip(one["tokens"], one["activations"], strict=True):
        if (value >= least) is not inside:
            text += ">>" if inside else "<<"
            inside = not inside
        text += token
    return text + (">>" if inside else "")


if __name__ == "__main__":
    main()
