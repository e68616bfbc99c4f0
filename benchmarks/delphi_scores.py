"""Delphi's own detection and fuzzing scores of examples and answers that are given: what ours are compared with.

    python benchmarks/delphi_scores.py < cases.json > scores.json

Runs in an environment of its own with eai-delphi 0.1.3 (`pip install eai-delphi`). Its scorers prepare the examples,
ask a client that answers from the file in place of a model, and read the answers; its `log.result_analysis` counts.
No model runs here, so the packages that Delphi imports for that (`UNUSED`) are replaced by empty modules.

A case: {"explanation", "scorer": "detection" or "fuzz", "active": [{"tokens", "activations"}], "silent": [the same],
"answers": [[text, probability or null], ...]}. An answer is found by the text that the scorer shows; if that is not
there, by the text without marks. Null: the client fails. Fuzzing marks false tokens in the same active examples
(`fuzz_type="active"`). The scores: balanced accuracy ("accuracy" in Delphi), true positive and true negative rates, F1,
AUC, and how many answers were used.
"""

import asyncio
import json
import math
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pandas
import torch

UNUSED = ("vllm", "vllm.distributed", "vllm.distributed.parallel_state", "vllm.inputs", "sentence_transformers")
for name in UNUSED:
    sys.modules[name] = MagicMock()

from delphi.clients.client import Client, Response  # noqa: E402
from delphi.latents import ActivatingExample, Latent, LatentRecord, NonActivatingExample  # noqa: E402
from delphi.log.result_analysis import compute_auc, compute_classification_metrics, compute_confusion  # noqa: E402
from delphi.scorers.classifier.detection import DetectionScorer  # noqa: E402
from delphi.scorers.classifier.fuzz import FuzzingScorer  # noqa: E402


class Answers(Client):
    """A client that knows its answers."""

    def __init__(self, answers: dict[str, float | None]) -> None:
        super().__init__("answers")
        self.answers = answers
        self.texts: list[str] = []

    async def generate(self, prompt: Any, **settings: Any) -> Response:
        text = prompt[-1]["content"].partition("Example 0: ")[2][:-1]  # the scorer ends its prompt with a newline
        self.texts.append(text)
        chance = self.answers[text if text in self.answers else text.replace("<<", "").replace(">>", "")]
        if chance is None:
            raise ConnectionError("no answer")
        tops = [SimpleNamespace(token=token, logprob=math.log(max(share, 1e-300)))
                for token, share in (("1", chance), ("0", 1 - chance))]
        said = "1" if chance >= 0.5 else "0"
        return Response(f"[{said}]", logprobs=[SimpleNamespace(token=said, top_logprobs=tops)])


def examples(kind: type, given: list[dict[str, Any]], **more: Any) -> list[Any]:
    return [kind(tokens=torch.zeros(len(one["tokens"]), dtype=torch.int64), str_tokens=one["tokens"],
                 activations=torch.tensor(one["activations"]), **more) for one in given]


def scores(case: dict[str, Any]) -> dict[str, Any]:
    record = LatentRecord(Latent("layers.0", 0), explanation=case["explanation"],
                          test=examples(ActivatingExample, case["active"], quantile=1),
                          not_active=examples(NonActivatingExample, case["silent"], distance=-1.0))
    client = Answers({text: chance for text, chance in case["answers"]})
    scorer = (DetectionScorer(client, log_prob=True) if case["scorer"] == "detection"
              else FuzzingScorer(client, log_prob=True, fuzz_type="active"))
    result = asyncio.run(scorer(record))
    table = pandas.DataFrame([{"activating": one.activating, "prediction": one.prediction,
                               "probability": one.probability} for one in result.score])
    counted = compute_classification_metrics(compute_confusion(table))
    used = table[table.prediction.notna()]
    both = used.activating.nunique() == 2
    auc = compute_auc(used.astype({"activating": bool, "probability": float})) if both else None
    return {"balanced_accuracy": float(counted["accuracy"]), "true_positive_rate": float(counted["true_positive_rate"]),
            "true_negative_rate": float(counted["true_negative_rate"]), "f1": float(counted["f1_score"]),
            "auroc": None if auc is None else float(auc), "answers": int(counted["total_examples"]),
            "texts": client.texts}


if __name__ == "__main__":
    json.dump([scores(case) for case in json.load(sys.stdin)], sys.stdout, indent=1)
