"""Rules that say on which tokens a feature fires: what they look at, and how they read as words.

A rule gives each token a value: 0 if the token does not match, else from 0.5 to 1, by how often the feature fired on
such a token in the text that the rule was learned from. A rule is its own judge.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from olmoscope.labelling.text_blocks import TextBlocks

On = Literal["this", "previous", "next"]
Shape = Literal["token", "tokens", "word", "beginning", "ending", "pattern", "pair", "position", "source", "promoted"]
PATTERNS: dict[str, str] = {
    "line breaks": r"\s*[\r\n]\s*", "spaces": r"[ \t]+", "numbers": r"\s*\d+", "single letters": r"\s*[^\W\d_]",
    "words with a capital": r"\s*[A-Z][a-z]+", "words in capitals": r"\s*[A-Z]{2,}", "lower-case words": r" [a-z]+",
    "word pieces": r"[a-z]+", "opening brackets": r"\s*[(\[{<]+", "closing brackets": r"\s*[)\]}>]+",
    "quotation marks": r"\s*[\"'`“”‘’]+", "full stops and other ends of sentences": r"\s*[.!?]+", "commas": r"\s*,",
    "colons and semicolons": r"\s*[:;]",
    "dashes": r"\s*[-–—]+", "underscores": r"\s*_+", "operators": r"\s*[=+*/%&|^~-]+",
    "text that is not ASCII": r"\s*[^\x00-\x7f]+"}
"""Kinds of tokens with a name; each must match a whole token."""
SHOWN = 5
"""Tokens that a label names."""


@dataclass(frozen=True)
class Rule:
    """On which tokens a feature fires.

    Attributes:
        shape: what decides: a set of tokens (`token`, `tokens`, `word`, `beginning`, `ending`, `pattern`, `promoted`),
            a `pair` of neighbours, the `position` in the sequence or the `source` of the text.
        on: which token is in the set: the one on which the feature fires, the one before it, or the one after it.
        ids: the tokens, ascending; for a pair, the one before and the one on which the feature fires.
        rates: how often the feature fired on each of them, 0 to 1.
        text: of a word, beginning, ending, pattern or source.
        first, last: positions.
    """

    shape: Shape
    on: On = "this"
    ids: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    text: str = ""
    first: int = 0
    last: int = 0

    def values(self, blocks: TextBlocks, places: range | np.ndarray) -> np.ndarray:
        """The value of each token at some places of the corpus, float64."""
        at = np.asarray(places)
        if self.shape == "position":
            position = blocks.positions_T[at]
            return _value((position >= self.first) & (position <= self.last), self.rates[0])
        if self.shape == "source":
            return _value(blocks.sources_T[at] == blocks.sources.index(self.text), self.rates[0])
        if self.shape == "pair":
            return _value((blocks.previous_T[at] == self.ids[0]) & (blocks.ids_T[at] == self.ids[1]), self.rates[0])
        tokens = {"this": blocks.ids_T, "previous": blocks.previous_T, "next": blocks.next_T}[self.on][at]
        where = np.minimum(np.searchsorted(self.ids, tokens), len(self.ids) - 1)
        return _value(np.asarray(self.ids)[where] == tokens, np.asarray(self.rates)[where])

    def in_words(self, texts: dict[int, str]) -> str:
        """The rule as a label.

        Args:
            texts: of the tokens that it names.
        """
        if self.shape == "position":
            if self.last == self.first:
                return "the first token of a sequence" if self.first == 0 else f"position {self.first} of a sequence"
            return f"the first {self.last + 1} tokens of a sequence" if self.first == 0 else \
                f"positions {self.first} to {self.last} of a sequence"
        if self.shape == "source":
            return f"text of the source {self.text}"
        if self.shape == "pair":
            return f"{shown(texts[self.ids[1]])} after {shown(texts[self.ids[0]])}"
        return {"this": "", "previous": "the token after ", "next": "the token before "}[self.on] + self._set(texts)

    def _set(self, texts: dict[int, str]) -> str:
        if self.shape == "word":
            return f"the word {shown(self.text)} in any form"
        if self.shape == "beginning":
            return f"tokens that begin with {shown(self.text)}"
        if self.shape == "ending":
            return f"tokens that end with {shown(self.text)}"
        if self.shape == "pattern":
            return self.text
        by_rate = [self.ids[place] for place in np.argsort(-np.asarray(self.rates), kind="stable").tolist()]
        named = ", ".join(shown(texts[token]) for token in by_rate[:SHOWN])
        more = f" and {len(self.ids) - SHOWN} more" if len(self.ids) > SHOWN else ""
        return f"tokens that it promotes: {named}{more}" if self.shape == "promoted" else named + more

    def as_json(self) -> dict[str, Any]:
        """What decides the rule; sets with a name are without their tokens, which follow from the name."""
        named = self.shape in ("word", "beginning", "ending", "pattern")
        return {"shape": self.shape, "on": self.on, **({"text": self.text} if self.text else {}),
                **({"ids": list(self.ids)} if self.ids and not named else {}),
                **({"first": self.first, "last": self.last} if self.shape == "position" else {})}


def _value(matches: np.ndarray, rate: np.ndarray | float) -> np.ndarray:
    return np.where(matches, 0.5 + np.asarray(rate) / 2, 0.0)


def shown(text: str) -> str:
    """A token's text in a label, in quotation marks: a line of its own, with signs for what cannot be seen."""
    seen = "".join(sign if sign.isprintable() else {"\n": "↵", "\t": "⇥", "\r": "␍"}.get(sign, "�") for sign in text)
    spaces = len(seen) - len(seen.lstrip(" "))
    if spaces > 8:
        seen = f"{spaces} spaces{' and ' + seen.strip() if seen.strip() else ''}"
    return f"“{seen[:40]}{'…' if len(seen) > 40 else ''}”"


def matching(pattern: str, text: str) -> bool:
    """Whether a token is of a kind of `PATTERNS`."""
    return re.fullmatch(PATTERNS[pattern], text) is not None
