"""The data of an index for the page, as JSON values: the same for the server and for the static site.

An answer has each token's text once, in `texts` by its id; windows of text have only ids.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from olmoscope.features.read import FeatureIndex
from olmoscope.features.records import Example, Feature, Token, TokenLogit, Window
from olmoscope.labelling.scores import Figure

SHOWN = {"top": 20, "interval": 5, "random": 10}
"""How many examples of each kind a page gets."""
BEFORE, AFTER = 24, 12
"""Tokens around an example."""


class _Texts:
    """Collects the texts of the tokens of one answer."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}

    def __call__(self, tokens: Iterable[Token]) -> list[int]:
        ids = []
        for token in tokens:
            self.texts[token.id] = token.text
            ids.append(token.id)
        return ids


def feature_payload(index: FeatureIndex, number: int, labels: dict[int, str], *, before: int = BEFORE,
                    after: int = AFTER, shown: dict[str, int] = SHOWN) -> dict[str, Any]:
    """All that a feature's page shows, except what people wrote about this feature.

    Args:
        labels: labels of other features, for those that the page names.
        shown: how many examples of each kind to show.

    Raises:
        IndexError: no such feature.
    """
    feature = index.feature(number)
    texts = _Texts()

    def windows(examples: list[Example], most: int) -> list[dict[str, Any]]:
        return [_window(index.context(example, before, after), example, texts) for example in examples[:most]]

    groups: list[dict[str, Any]] = [{"kind": "top", "examples": windows(feature.top, shown["top"])}]
    for interval in reversed(feature.intervals):
        groups.append({"kind": "interval", "low": interval.low, "high": interval.high, "rows": interval.rows,
                       "examples": windows(interval.examples, shown["interval"])})
    groups.append({"kind": "random", "examples": windows(feature.random, shown["random"])})
    named = {one.feature for one in feature.neighbours} | {one.feature for one in feature.companions}
    return {
        "feature": number, "rows": feature.rows, "density": feature.density, "max": feature.max, "mean": feature.mean,
        "histogram": asdict(feature.histogram),
        "promoted": _logits(feature.promoted, texts), "suppressed": _logits(feature.suppressed, texts),
        "neighbours": [asdict(one) for one in feature.neighbours],
        "companions": [asdict(one) for one in feature.companions],
        **_preferences(feature, texts),
        "groups": groups,
        "labels": {other: labels[other] for other in sorted(named & labels.keys())},
        "texts": texts.texts,
    }


def window_payload(index: FeatureIndex, example: Example, before: int, after: int) -> dict[str, Any]:
    """An example with some of the text around it, and the texts of its tokens."""
    texts = _Texts()
    return {"window": _window(index.context(example, before, after), example, texts), "texts": texts.texts}


def _preferences(feature: Feature, texts: _Texts) -> dict[str, Any]:
    tokens = [{"token": texts([one.token])[0], "rows": one.rows, "lift": one.lift, "mean": one.mean}
              for one in feature.tokens]
    return {"tokens": tokens, "sources": [asdict(one) for one in feature.sources],
            "positions": [asdict(one) for one in feature.positions]}


def _logits(logits: list[TokenLogit] | None, texts: _Texts) -> list[dict[str, Any]] | None:
    return None if logits is None else [{"token": texts([one.token])[0], "logit": one.logit} for one in logits]


def _window(window: Window, example: Example, texts: _Texts) -> dict[str, Any]:
    return {
        "place": example.place, "value": example.value, "at": window.at, "ids": texts(window.tokens),
        "values": window.activations, "left_out": [i for i, kept in enumerate(window.kept) if not kept],
        "starts": window.document_starts, "sequence": window.sequence, "position": window.position,
        "document": window.document, "source": window.source, "more_before": window.more_before,
        "more_after": window.more_after,
    }


def figure_columns(figure: tuple[Figure, str] | None) -> dict[str, Any]:
    """A proposed label's detection AUROC as the list shows it; null if unknown."""
    if figure is None:
        return {"score": None, "interval": None, "labeller": None}
    auroc, labeller = figure
    return {"score": auroc.value, "interval": [auroc.low, auroc.high], "labeller": labeller}
