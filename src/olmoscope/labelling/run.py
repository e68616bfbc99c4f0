"""Features labelled one after the other, each kept as soon as it is done: a run that was killed goes on where it
was."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from olmoscope.errors import UserError
from olmoscope.features.read import FeatureIndex
from olmoscope.labelling.examples import TooFew, examples_of
from olmoscope.labelling.labeller import Labelled, Labeller
from olmoscope.labelling.proposals import Proposals
from olmoscope.labelling.text_blocks import TextBlocks
from olmoscope.progress import bar


@dataclass(frozen=True)
class Run:
    """What a run of a labeller did.

    Attributes:
        asked: features that were wanted.
        before: of these, how many were done before.
        labelled: how many have a label now.
        without: features without one, by reason.
    """

    asked: int
    before: int
    labelled: int
    without: dict[str, int]


def most_important(index: FeatureIndex, most: int | None = None) -> list[int]:
    """Features by importance, so that a small run labels what people look at: the largest activation times −log
    density, as in
    the list of features (`Sort`: `telling`). Dead ones are left out."""
    dead = index.info.dead
    order = index.order("telling")
    return [int(feature) for feature in order[: len(order) - dead][:most]]


def parse_features(text: str, d_sae: int) -> list[int]:
    """`7,12,100-199`: numbers of features, in the order given.

    Raises:
        UserError: something else, or no such feature.
    """
    features: list[int] = []
    for piece in text.split(","):
        first, _, last = piece.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise UserError(f"--features {text}: {piece.strip()!r} is not a feature; give numbers and ranges, such as "
                            "7,12,100-199")
        features += range(int(first), int(last or first) + 1)
    for feature in features:
        if feature >= d_sae:
            raise UserError(f"--features {text}: there is no feature {feature}: the SAE has features 0 to {d_sae - 1}")
    return list(dict.fromkeys(features))


def label_features(blocks: TextBlocks, labeller: Labeller, features: Sequence[int], proposals: Proposals) -> Run:
    """Label features that the labeller has not done yet, and keep each label as soon as it is scored."""
    split = blocks.identity
    done = proposals.done(labeller.name, split)
    left = [feature for feature in features if feature not in done]
    passing: Counter[str] = Counter()
    with bar(f"labels by {labeller.name}"[:40], len(left), "features") as advance:
        for feature in left:
            examples = examples_of(blocks, feature)
            found = examples if isinstance(examples, TooFew) else labeller.label(examples)
            if isinstance(found, Labelled):
                proposals.add(feature, found, labeller.name, split)
            elif isinstance(found, TooFew) or found.lasting:
                proposals.add_reason(feature, found.reason, labeller.name, split)
            else:
                passing[found.reason] += 1
            advance(1)
    wanted = set(features)
    labelled = {one.feature for one in proposals.by(labeller.name, split)} & wanted
    kept = Counter(reason for feature, reason in proposals.reasons(labeller.name, split).items()
                   if feature in wanted - labelled)
    return Run(len(features), len(features) - len(left), len(labelled), dict(kept + passing))
