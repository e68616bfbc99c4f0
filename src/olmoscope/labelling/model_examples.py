"""The part of a feature's examples that a language model sees: lines of a prompt, short enough to be affordable. Rules
are judged on the same lines.

A line is the part of a block around a place, `BEFORE` tokens before it and `AFTER` after it. The place is the strongest
firing; in a block without a firing it is a token on which the feature often fires, or any place.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from olmoscope.labelling.examples import FeatureExamples, Sample, marks
from olmoscope.labelling.prompts import one_line
from olmoscope.seeds import generator

BEFORE, AFTER = 11, 4
"""Tokens of a line on either side of its place, if the block has them."""
STRONGEST, DRAWN = 6, 3
"""Lines for an explanation: from the strongest blocks, and from others."""
JUDGED = 8
"""A label is judged on this many lines on which the feature fires, and as many on which it is silent."""
FUZZED = 4
"""A label is judged on this many blocks with marks, each once with true marks and once with false ones."""
GROUPS, FIRING = 5, 4
"""Groups of lines in which a label must find the one without a firing, and the number of other lines in a group."""
MARKED_ABOVE = 0.3
"""In an explanation's lines, tokens with at least this share of the line's largest activation are marked."""


@dataclass(frozen=True)
class Line:
    """A line that a label is judged on."""

    text: str
    kind: str
    """`Sample.kind`; for a line with marks, `true` or `false`."""
    places: range
    """The places of its tokens in the corpus."""
    marked: tuple[int, ...] = ()
    """Places of marked tokens."""

    @property
    def fires(self) -> bool:
        """Whether the feature fires on it; for a line with marks, whether it fires on these."""
        return self.kind in ("fires", "true")


@dataclass(frozen=True)
class Group:
    """Lines, all with a firing except one.

    Attributes:
        intruder: the place of the one without, from 0.
    """

    lines: tuple[Line, ...]
    intruder: int


def explaining_lines(examples: FeatureExamples) -> list[str]:
    """Lines with marks where the feature fires: from the strongest blocks, then from others."""
    strongest = sorted(examples.explain, key=lambda sample: -max(sample.values))[:STRONGEST]
    others = [sample for sample in examples.explain if sample not in strongest][:DRAWN]
    lines = []
    for sample in (*strongest, *others):
        least = MARKED_ABOVE * max(sample.values)
        lines.append(_line(sample, _strongest(sample),
                           {at for at, value in enumerate(sample.values) if value > 0 and value >= least}))
    return lines


def promoted_tokens(examples: FeatureExamples) -> list[str]:
    """Output tokens that the feature promotes, each as text for a prompt; without those that labels are judged by."""
    return [one_line([text]) for text in examples.promoted]


def judged_lines(examples: FeatureExamples, seed: int, each: int = JUDGED) -> list[Line]:
    """Lines without marks, from blocks that the label was not made from; half of them have a firing."""
    liked = {one.token.text for one in examples.feature.tokens}
    return [_judged(sample, liked, seed) for sample in examples.few(each)]


def intruder_groups(examples: FeatureExamples, seed: int, groups: int = GROUPS) -> list[Group]:
    """Groups of lines without marks, from blocks that the label was not made from; fewer if there are too few lines."""
    random = generator(seed, "groups with an intruder", examples.feature.index)
    liked = {one.token.text for one in examples.feature.tokens}
    firing = [examples.firing()[place] for place in random.permutation(len(examples.firing()))]
    made = []
    for number, silent in enumerate(examples.silent(min(groups, len(firing) // FIRING))):
        at = int(random.integers(FIRING + 1))
        samples = firing[FIRING * number:FIRING * (number + 1)]
        lines = [_judged(sample, liked, seed) for sample in (*samples[:at], silent, *samples[at:])]
        made.append(Group(tuple(lines), at))
    return made


def marked_lines(examples: FeatureExamples, seed: int, blocks: int = FUZZED) -> list[Line]:
    """Lines with marks where the feature fires, and the same lines with marks where it is silent."""
    lines: list[Line] = []
    for sample in examples.firing():
        first, end = _ends(_strongest(sample))
        shown = replace(sample, places=sample.places[first:end], tokens=sample.tokens[first:end],
                        values=sample.values[first:end])
        for real, places in marks(shown, seed):
            marked = {place - shown.places.start for place in places}
            lines.append(Line(one_line(shown.tokens, marked), "true" if real else "false", shown.places,
                              tuple(places)))
        if len(lines) == 2 * blocks:
            break
    return lines


def _judged(sample: Sample, liked: Collection[str], seed: int) -> Line:
    at = _place(sample, liked, seed)
    first, end = _ends(at)
    return Line(_line(sample, at), sample.kind, sample.places[first:end])


def _strongest(sample: Sample) -> int:
    return max(range(len(sample.values)), key=lambda at: sample.values[at])


def _place(sample: Sample, liked: Collection[str], seed: int) -> int:
    """The token of a block that its line is about."""
    if sample.kind == "fires":
        return _strongest(sample)
    if sample.kind == "same token":
        found = [at for at, token in enumerate(sample.tokens) if token in liked]
        if found:
            return found[0]
    return int(generator(seed, "place of a silent line", sample.block).integers(len(sample.tokens)))


def _line(sample: Sample, at: int, marked: Collection[int] = ()) -> str:
    first, end = _ends(at)
    return one_line(sample.tokens[first:end], {one - first for one in marked if first <= one < end})


def _ends(at: int) -> tuple[int, int]:
    """The first token of the line about a token of a block, and the one after its last."""
    return max(0, at - BEFORE), at + AFTER + 1
