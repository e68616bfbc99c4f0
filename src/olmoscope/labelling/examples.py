"""The examples that explain a feature, and those that its labels are scored on: pieces of text on which it fires, and
three kinds of text on which it does not.

Explanations see documents of the parts `learn` and `choose`; scores come from documents of the part `score`
(text_blocks.py). Positives are drawn with equal probability from all blocks with a firing, so a score is about
everything that the feature fires on, not only about its strongest examples. Negatives are
  random       any block in which it is silent,
  same token   blocks with a token on which it fires most often, in which it is silent,
  near miss    blocks in which a companion fires, or a feature with a near decoder direction, and it is silent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from olmoscope.features.records import Feature, Token
from olmoscope.labelling.clamp import Clamping
from olmoscope.labelling.text_blocks import Part, TextBlocks
from olmoscope.seeds import generator

Kind = Literal["fires", "random", "same token", "near miss"]
NEGATIVES: tuple[Kind, ...] = ("random", "same token", "near miss")
POSITIVES, PER_NEGATIVE = 40, 20
"""The most blocks to score on: on which it fires, and of each kind on which it does not."""
STRONGEST, DRAWN = 10, 10
"""Blocks for an explanation: the strongest, and others drawn with equal probability."""
LEAST = 5
"""The fewest blocks with a firing in a part from which something can be learned or measured."""
TOP_TOKENS, LIKE_IT = 3, 10
"""How many tokens and features are used to find negatives."""


@dataclass(frozen=True)
class Sample:
    """A block of text, and what the feature does on each of its tokens."""

    kind: Kind
    block: int
    document: int
    """Its number in the store."""
    source: str
    position: int
    """The first token's, in its sequence."""
    places: range
    """The places of its tokens in the corpus."""
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    """The feature's activations; 0 where it is silent."""


@dataclass(frozen=True)
class FeatureExamples:
    """All examples of a feature, for explanations and scores."""

    feature: Feature
    explain: tuple[Sample, ...]
    """On which it fires: the strongest first, then others in the order of the text."""
    score: tuple[Sample, ...]
    """On which it fires, then the negatives by kind."""
    promoted: tuple[str, ...]
    """Output tokens that its direction makes likelier, for explanations: every second one, the likeliest first. The
    others are for scores (`held_out_promoted`). Empty if the index has none."""
    risen: tuple[Token, ...] = ()
    fallen: tuple[Token, ...] = ()
    """Output tokens that become likelier and less likely when it is clamped; empty if that was not tried."""

    def held_out_promoted(self) -> tuple[Token, ...]:
        """Output tokens that its direction makes likelier and that no labeller sees."""
        return tuple(one.token for one in (self.feature.promoted or ())[1::2])

    def firing(self) -> tuple[Sample, ...]:
        """Those of `score` on which it fires."""
        return tuple(one for one in self.score if one.kind == "fires")

    def silent(self, most: int) -> tuple[Sample, ...]:
        """At most `most` negatives of `score`, from each kind in turn."""
        by_kind = {kind: [one for one in self.score if one.kind == kind] for kind in NEGATIVES}
        found: list[Sample] = []
        for turn in range(most):
            found += [by_kind[kind][turn] for kind in NEGATIVES if turn < len(by_kind[kind])]
        return tuple(found[:most])

    def few(self, each: int) -> tuple[Sample, ...]:
        """A balanced part of `score`: `each` samples on which it fires, and as many negatives."""
        return (*self.firing()[:each], *self.silent(each))


@dataclass(frozen=True)
class TooFew:
    """A feature that cannot be labelled: it fires in too few pieces of text."""

    feature: int
    reason: str


def examples_of(blocks: TextBlocks, number: int, clamping: Clamping | None = None) -> FeatureExamples | TooFew:
    """The examples of a feature. They depend only on the index, the seed of the blocks and the feature.

    Args:
        clamping: finds out which output tokens change when the feature is clamped; None: not tried.

    Raises:
        IndexError: no such feature.
    """
    feature = blocks.index.feature(number)
    places, values = blocks.index.firing_values(number)
    firing_blocks = blocks.blocks_at(places)
    fires = np.unique(firing_blocks[firing_blocks >= 0])
    random = generator(blocks.seed, "labels of a feature", number)
    explaining = fires[np.isin(blocks.part_B[fires], (0, 1))]
    scoring = fires[blocks.part_B[fires] == 2]
    for what, found in (("explain it by", explaining), ("score it on", scoring)):
        if len(found) < LEAST:
            return TooFew(number, f"it fires in under {LEAST} pieces of text to {what}")

    def sample(kind: Kind, block: int) -> Sample:
        first, end = int(blocks.starts_B[block]), int(blocks.ends_B[block])
        low, high = np.searchsorted(places, [first, end])
        active = np.zeros(end - first, np.float32)
        active[places[low:high] - first] = values[low:high]
        document = int(blocks.document_B[block])
        return Sample(kind, block, int(blocks.index.corpus.document_ids_N[document]),
                      blocks.sources[int(blocks.index.corpus.document_sources_N[document])],
                      int(blocks.positions_T[first]), range(first, end),
                      tuple(blocks.index.tokens.texts(blocks.ids_T[first:end].tolist())), tuple(active.tolist()))

    strength = np.zeros(len(blocks.starts_B), np.float32)
    np.maximum.at(strength, firing_blocks[firing_blocks >= 0], values[firing_blocks >= 0])
    strongest = explaining[np.argsort(-strength[explaining], kind="stable")][:STRONGEST]
    others = _drawn(random, np.setdiff1d(explaining, strongest), DRAWN)
    score: list[tuple[Kind, int]] = [("fires", block) for block in _drawn(random, scoring, POSITIVES).tolist()]
    taken = fires
    for kind, candidates in silent_blocks(blocks, feature, places).items():
        chosen = _drawn(random, np.setdiff1d(candidates, taken), PER_NEGATIVE)
        taken = np.union1d(taken, chosen)
        score += [(kind, block) for block in chosen.tolist()]
    return FeatureExamples(
        feature, tuple(sample("fires", block) for block in (*strongest.tolist(), *others.tolist())),
        tuple(sample(kind, block) for kind, block in score),
        tuple(one.token.text for one in (feature.promoted or ())[::2]),
        *(((), ()) if clamping is None else clamping.tokens(feature)))


def marks(sample: Sample, seed: int) -> list[tuple[bool, list[int]]]:
    """True marks of a block, the places on which the feature fires, and as many false ones, other places. Nothing for a
    block in which it is silent, or that has too few others."""
    fires = [place for place, value in zip(sample.places, sample.values, strict=True) if value > 0]
    silent = [place for place, value in zip(sample.places, sample.values, strict=True) if value == 0]
    if not fires or len(silent) < len(fires):
        return []
    drawn = generator(seed, "false marks of a block", sample.block).choice(silent, len(fires), replace=False)
    return [(True, fires), (False, sorted(drawn.tolist()))]


def silent_blocks(blocks: TextBlocks, feature: Feature, places: np.ndarray) -> dict[Kind, np.ndarray]:
    """Blocks of the part `score` from which negatives of each kind are drawn; they still include those in which the
    feature fires. The rarest kinds come first, so that others do not use up their blocks.

    Args:
        places: where the feature fires.
    """
    part: Part = "score"
    companions, neighbours = ([one.feature for one in feature.companions], [one.feature for one in feature.neighbours])
    like_it = list(dict.fromkeys(companions + neighbours))[:LIKE_IT]
    near = [blocks.index.firing_values(one)[0] for one in like_it]
    counts = np.bincount(blocks.ids_T[places])
    tokens = np.argsort(-counts, kind="stable")[:TOP_TOKENS]
    same = [blocks.places_of(int(token)) for token in tokens if counts[token]]
    return {"near miss": _blocks_of_part(blocks, near, part), "same token": _blocks_of_part(blocks, same, part),
            "random": blocks.of_part(part)}


def _blocks_of_part(blocks: TextBlocks, places: Sequence[np.ndarray], part: Part) -> np.ndarray:
    found = np.unique(blocks.blocks_at(np.concatenate([*places, np.zeros(0, np.int64)])))
    return np.intersect1d(found, blocks.of_part(part))


def _drawn(random: np.random.Generator, blocks: np.ndarray, most: int) -> np.ndarray:
    """At most this many of the blocks, drawn with equal probability, in the order of the text."""
    if len(blocks) <= most:
        return blocks
    return np.sort(random.choice(blocks, most, replace=False))
