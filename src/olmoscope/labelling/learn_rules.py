"""A feature's rule, learned from the tokens on which it fires.

Rules have several shapes: a token, a set of tokens, a word in any form, a beginning, an ending, a kind of token, each
of these for the token before and after; a pair of neighbours; positions; a source; the promoted tokens. The best rule
of a shape is the candidate with the largest F1 over the tokens of the part `learn`. Among these, the rule with the
largest F1 over the tokens of the part `choose` wins; a later shape, which is less simple, must be better by `MARGIN`.

Shapes: V vocabulary, M firings of the feature in a part.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from olmoscope.labelling.rules import PATTERNS, On, Rule, Shape, matching
from olmoscope.labelling.text_blocks import SHARES, Part, TextBlocks

MARGIN = 0.02
LEAST_F1 = 0.1
"""F1 over the tokens of `choose`; a worse rule does not count as an explanation."""
MOST_TOKENS = 12
"""The most tokens of a set that a rule lists one by one."""
NAMED = 40
"""How many of the feature's most frequent tokens provide beginnings, endings and words."""
LETTERS = 5
"""The most letters of a beginning or an ending."""
PAIRS = 5


@dataclass(frozen=True)
class Learned:
    """A rule and how well it fits tokens that it was not learned from."""

    rule: Rule
    f1: float


class _Tally:
    """For each token of the vocabulary, how many tokens of a part are this token, follow it, and precede it."""

    def __init__(self, blocks: TextBlocks, part: Part) -> None:
        self.mask_T = blocks.part_T == list(SHARES).index(part)
        vocabulary = int(blocks.ids_T.max()) + 1
        tokens_T: dict[On, np.ndarray] = {"this": blocks.ids_T, "previous": blocks.previous_T, "next": blocks.next_T}
        self.count_V = {on: np.bincount(tokens[self.mask_T & (tokens >= 0)], minlength=vocabulary)
                        for on, tokens in tokens_T.items()}
        self.sources = np.bincount(blocks.sources_T[self.mask_T], minlength=len(blocks.sources))
        self.positions = np.bincount(blocks.positions_T[self.mask_T])


class _Fired:
    """The same for the tokens on which a feature fires."""

    def __init__(self, blocks: TextBlocks, tally: _Tally, places: np.ndarray) -> None:
        self.places_M = places[tally.mask_T[places]]
        vocabulary = len(tally.count_V["this"])
        self.tokens_M: dict[On, np.ndarray] = {"this": blocks.ids_T[self.places_M],
                                               "previous": blocks.previous_T[self.places_M],
                                               "next": blocks.next_T[self.places_M]}
        self.count_V = {on: np.bincount(tokens[tokens >= 0], minlength=vocabulary)
                        for on, tokens in self.tokens_M.items()}
        self.sources = np.bincount(blocks.sources_T[self.places_M], minlength=len(blocks.sources))
        self.positions = np.bincount(blocks.positions_T[self.places_M], minlength=len(tally.positions))


class RuleLearner:
    """Learns the rules of an index's features."""

    def __init__(self, blocks: TextBlocks) -> None:
        self.blocks = blocks
        self._tally: dict[Part, _Tally] = {part: _Tally(blocks, part) for part in ("learn", "choose")}

    @cached_property
    def _texts(self) -> dict[int, str]:
        """What the tokens of the text look like."""
        ids = np.unique(self.blocks.ids_T).tolist()
        return dict(zip(ids, self.blocks.index.tokens.texts(ids), strict=True))

    @cached_property
    def _named_sets(self) -> dict[tuple[Shape, str], np.ndarray]:
        """Every word, beginning, ending and kind of token, and the tokens that have it."""
        found: defaultdict[tuple[Shape, str], list[int]] = defaultdict(list)
        for token, text in self._texts.items():
            for key in _names(text):
                found[key].append(token)
            for pattern in PATTERNS:
                if matching(pattern, text):
                    found["pattern", pattern].append(token)
        return {key: np.array(sorted(tokens)) for key, tokens in found.items()}

    def learn(self, number: int) -> Learned | None:
        """The rule of a feature; None if none fits well enough, or the feature does not fire in both parts.

        Raises:
            IndexError: no such feature.
        """
        places, _ = self.blocks.index.firing_values(number)
        learn, choose = (_Fired(self.blocks, self._tally[part], places) for part in ("learn", "choose"))
        if not len(learn.places_M) or not len(choose.places_M):
            return None
        best: Learned | None = None
        for candidates in self._candidates(number, learn):
            rules = [(self._f1(rule, "learn", learn), rule) for rule in candidates]
            if not rules:
                continue
            _, rule = max(rules, key=lambda one: one[0])
            f1 = self._f1(rule, "choose", choose)
            if f1 >= (LEAST_F1 if best is None else best.f1 + MARGIN):
                best = Learned(rule, f1)
        return best

    def words(self, rule: Rule) -> str:
        """The rule as a label."""
        return rule.in_words({token: self.blocks.index.tokens.text(token) for token in rule.ids})

    def _candidates(self, number: int, fired: _Fired) -> Iterator[list[Rule]]:
        """Rules by shape, the simplest shape first."""
        yield self._single("this", fired)
        yield self._position(fired)
        yield self._source(fired)
        yield self._named("word", "this", fired)
        yield self._several("this", fired)
        yield self._named("beginning", "this", fired)
        yield self._named("ending", "this", fired)
        yield self._named("pattern", "this", fired)
        for on in ("previous", "next"):
            yield self._single(on, fired)
            yield self._named("word", on, fired)
            yield self._several(on, fired)
            yield self._named("pattern", on, fired)
        yield self._pair(fired)
        yield self._promoted(number, fired)

    def _f1(self, rule: Rule, part: Part, fired: _Fired) -> float:
        tally = self._tally[part]
        if rule.shape == "position":
            span = slice(rule.first, rule.last + 1)
            matches, hits = tally.positions[span].sum(), fired.positions[span].sum()
        elif rule.shape == "source":
            number = self.blocks.sources.index(rule.text)
            matches, hits = tally.sources[number], fired.sources[number]
        elif rule.shape == "pair":
            before, this = rule.ids
            at = self.blocks.places_of(this)
            at = at[(self.blocks.previous_T[at] == before) & tally.mask_T[at]]
            matches = len(at)
            hits = int(((fired.tokens_M["previous"] == before) & (fired.tokens_M["this"] == this)).sum())
        else:
            ids = np.asarray(rule.ids)
            matches, hits = tally.count_V[rule.on][ids].sum(), fired.count_V[rule.on][ids].sum()
        return 2 * float(hits) / float(matches + len(fired.places_M))

    def _of_ids(self, shape: Shape, on: On, ids: Iterable[int] | np.ndarray, fired: _Fired, text: str = "") -> Rule:
        """A rule for a set of tokens, with how often the feature fired on each; tokens not seen have the mean."""
        set_ = np.unique(np.asarray(list(ids)))
        hits, seen = fired.count_V[on][set_], self._tally["learn"].count_V[on][set_]
        mean = hits.sum() / max(1, seen.sum())
        rates = (hits + mean) / (seen + 1)
        return Rule(shape, on, tuple(set_.tolist()), tuple(np.minimum(rates, 1.0).tolist()), text)

    def _single(self, on: On, fired: _Fired) -> list[Rule]:
        count_V = fired.count_V[on]
        f1_V = 2 * count_V / (self._tally["learn"].count_V[on] + len(fired.places_M))
        return [self._of_ids("token", on, [int(f1_V.argmax())], fired)] if count_V.any() else []

    def _several(self, on: On, fired: _Fired) -> list[Rule]:
        """The set of tokens with the largest F1; such a set always holds the tokens with the largest rates."""
        hits_V, seen_V = fired.count_V[on], self._tally["learn"].count_V[on]
        tokens = np.flatnonzero(hits_V >= max(2, len(fired.places_M) / 100))
        tokens = tokens[np.argsort(-hits_V[tokens], kind="stable")][: 4 * MOST_TOKENS]
        tokens = tokens[np.argsort(-hits_V[tokens] / np.maximum(1, seen_V[tokens]), kind="stable")][:MOST_TOKENS]
        return [self._of_ids("tokens", on, tokens[:size], fired) for size in range(2, len(tokens) + 1)]

    def _named(self, shape: Shape, on: On, fired: _Fired) -> list[Rule]:
        if shape == "pattern":
            keys = [key for key in self._named_sets if key[0] == "pattern"]
        else:
            common = np.argsort(-fired.count_V[on], kind="stable")[:NAMED]
            names = Counter(key for token in common.tolist() if fired.count_V[on][token]
                            for key in _names(self._texts[token]) if key[0] == shape)
            keys = list(names)
        return [self._of_ids(shape, on, self._named_sets[key], fired, key[1]) for key in keys]

    def _pair(self, fired: _Fired) -> list[Rule]:
        pairs = Counter(zip(fired.tokens_M["previous"].tolist(), fired.tokens_M["this"].tolist(), strict=True))
        return [Rule("pair", ids=pair, rates=(1.0,)) for pair, _ in pairs.most_common(PAIRS) if pair[0] >= 0]

    def _position(self, fired: _Fired) -> list[Rule]:
        last = len(self._tally["learn"].positions) - 1
        spans = [(0, 0), (1, 1), (2, 2), (3, 3), *((0, 2**power - 1) for power in range(1, 10)),
                 *((2**power, 2 ** (power + 1) - 1) for power in range(1, 9))]
        return [Rule("position", first=first, last=end, rates=(1.0,)) for first, end in spans if end <= last]

    def _source(self, fired: _Fired) -> list[Rule]:
        if len(self.blocks.sources) < 2:
            return []
        return [Rule("source", text=source, rates=(1.0,)) for source in self.blocks.sources]

    def _promoted(self, number: int, fired: _Fired) -> list[Rule]:
        promoted = self.blocks.index.feature(number).promoted or []
        ids = [one.token.id for one in promoted if one.token.id < len(fired.count_V["next"])]
        return [self._of_ids("promoted", "next", ids, fired)] if ids else []


def _names(text: str) -> Iterator[tuple[Shape, str]]:
    """The word, beginnings and endings that a token has."""
    word = text.strip()
    if len(word) > 1 and word.isalpha():
        yield "word", word.lower()
    for letters in range(1, min(LETTERS, len(word) - 1) + 1):
        yield "beginning", word[:letters]
        yield "ending", word[-letters:]
