"""Output tokens that a label is judged by: does it distinguish those that the feature makes likelier from the others?

All labels of a feature, by rules and by models, are judged by the same tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from olmoscope.features.records import Token
from olmoscope.labelling.examples import FeatureExamples
from olmoscope.labelling.prompts import one_line
from olmoscope.labelling.scores import Figure, auroc
from olmoscope.seeds import generator

Side = Literal["output", "clamped"]
"""How the effect on the output is known: by the decoder direction's effect on the logits, or by running the model with
the feature clamped."""


@dataclass(frozen=True)
class Candidate:
    """An output token that a label is judged by.

    Attributes:
        shown: its text, as a prompt shows it.
        likelier: whether the feature makes it likelier; otherwise it makes it less likely.
    """

    token: Token
    shown: str
    likelier: bool


def candidates(examples: FeatureExamples, seed: int) -> dict[Side, list[Candidate]]:
    """The tokens of each side, in random order; a side is absent if tokens of one kind or of both are not known.

    Nobody can distinguish tokens that look the same in a prompt: if they are of one kind the first stays, else none.
    """
    feature = examples.feature
    known: dict[Side, tuple[Sequence[Token], Sequence[Token]]] = {
        "output": (examples.held_out_promoted(), [one.token for one in feature.suppressed or ()]),
        "clamped": (examples.risen, examples.fallen)}
    found: dict[Side, list[Candidate]] = {}
    for side, kinds in known.items():
        likelier, others = (_by_text(tokens) for tokens in kinds)
        both = likelier.keys() & others.keys()
        made = [Candidate(token, shown, one is likelier) for one in (likelier, others) for shown, token in one.items()
                if shown not in both]
        if len({one.likelier for one in made}) == 2:
            order = generator(seed, f"order of tokens, {side}", feature.index).permutation(len(made))
            found[side] = [made[place] for place in order]
    return found


def told_apart(asked: Mapping[Side, Sequence[Candidate]], side: Side, values: Sequence[float]) -> Figure | None:
    """How well the values that a judge gives the tokens of a side distinguish the likelier ones from the others; None
    if the side is not known."""
    return auroc([value for one, value in zip(asked.get(side, ()), values, strict=True) if one.likelier],
                 [value for one, value in zip(asked.get(side, ()), values, strict=True) if not one.likelier])


def _by_text(tokens: Iterable[Token]) -> dict[str, Token]:
    found: dict[str, Token] = {}
    for token in tokens:
        if shown := one_line([token.text]):
            found.setdefault(shown, token)
    return found
