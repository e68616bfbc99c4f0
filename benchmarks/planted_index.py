"""An index whose features fire by known rules, over a text of drawn words: what labels by rules must find.

It has the reader's interface (`olmoscope.features.read.FeatureIndex`) as far as labelling needs it, and no files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from olmoscope.features.corpus import Corpus
from olmoscope.features.read import Vocabulary
from olmoscope.features.records import Feature, Histogram, Neighbour
from olmoscope.labelling.rules import Rule
from olmoscope.seeds import generator

SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "qui", "ro", "su", "ta", "ve",
             "wi")
FIRES, ELSEWHERE = 0.95, 0.0005
"""Shares of matching tokens and of other tokens on which a planted feature fires."""


@dataclass(frozen=True)
class Planted:
    """A feature and the rule that it was planted by."""

    kind: str
    rule: Rule


class PlantedIndex:
    """A text and features that fire on it by rules."""

    def __init__(self, each: int, tokens: int = 200_000, seed: int = 0) -> None:
        """
        Args:
            each: features of each kind: token, bigram, prefix, position.
        """
        random = generator(seed, "planted index")
        words = [f"{space}{one}{two}{three}" for space in (" ", "") for one in SYLLABLES for two in SYLLABLES
                 for three in ("", "n", "rt")]
        self.tokens = Vocabulary(words)
        share_V = 1 / np.arange(10, len(words) + 10)
        ids_T = random.permutation(len(words))[random.choice(len(words), tokens, p=share_V / share_V.sum())]
        documents = np.sort(random.choice(np.arange(1, tokens), tokens // 500, replace=False))
        sequences = np.unique(np.concatenate([[0], documents, np.arange(0, tokens, 256), [tokens]]))
        starts = np.concatenate([[0], documents])
        self.corpus = Corpus(ids_T.astype(np.int32), sequences.astype(np.int64), np.ones(tokens, np.uint8),
                             starts.astype(np.int64), np.arange(len(starts)),
                             (np.arange(len(starts)) % 2).astype(np.uint8))
        self.planted = list(self._rules(each, random))
        self.info = SimpleNamespace(identity=f"planted-{seed}", sources={"even": 0, "odd": 0}, dead=0)
        self._firings = [self._fired(one, random) for one in self.planted]

    def _rules(self, each: int, random: np.random.Generator) -> Iterator[Planted]:
        ids_T = self.corpus.tokens_T
        count_V = np.bincount(ids_T)
        frequent = np.argsort(-count_V)[: 4 * each]
        for token in frequent[:each].tolist():
            yield Planted("token", Rule("token", ids=(token,), rates=(1.0,)))
        pairs, counts = np.unique(np.stack([ids_T[:-1], ids_T[1:]]), axis=1, return_counts=True)
        for place in np.argsort(-counts, kind="stable")[:each].tolist():
            yield Planted("bigram", Rule("pair", ids=tuple(pairs[:, place].tolist()), rates=(1.0,)))
        beginnings = [one + two[:letters] for letters in (0, 1) for one in SYLLABLES for two in SYLLABLES]
        for text in random.permutation(np.unique(beginnings))[:each].tolist():
            ids = tuple(number for number, word in enumerate(self.tokens.texts(range(len(self.tokens))))
                        if word.strip().startswith(text))
            yield Planted("prefix", Rule("beginning", ids=ids, rates=(1.0,) * len(ids), text=text))
        spans = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 3), (2, 3), (4, 7), (0, 7), (8, 15), (0, 15)]
        for number in range(each):
            first, last = spans[number % len(spans)]
            yield Planted("position", Rule("position", first=first, last=last, rates=(1.0,)))

    def _fired(self, planted: Planted, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        from olmoscope.labelling.text_blocks import TextBlocks

        matches_T = planted.rule.values(TextBlocks(self), np.arange(len(self.corpus.tokens_T))) > 0  # type: ignore[arg-type]
        drawn_T = random.random(len(matches_T))
        places = np.flatnonzero(np.where(matches_T, drawn_T < FIRES, drawn_T < ELSEWHERE))
        return places.astype(np.int32), random.gamma(4, 1, len(places)).astype(np.float32)

    def firing_values(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """As `FeatureIndex.firing_values`."""
        return self._firings[feature]

    def feature(self, feature: int) -> Feature:
        """As `FeatureIndex.feature`, without examples; the planted features before it are near it."""
        places, values = self._firings[feature]
        return Feature(feature, len(places), len(places) / len(self.corpus.tokens_T), float(values.max()),
                       float(values.mean()), Histogram([], []), [], [], [], None, None,
                       [Neighbour(other, 0.5) for other in range(max(0, feature - 3), feature)], [], [], [], [])
