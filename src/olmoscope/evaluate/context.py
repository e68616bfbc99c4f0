"""How long the sequences of a text are, on which an SAE is measured or indexed."""

from collections.abc import Sequence

from olmoscope.evaluate.subject import Subject
from olmoscope.model.config import read_config
from olmoscope.model.positions import check_context, most_positions
from olmoscope.progress import console
from olmoscope.recipe import Model

CONTEXT = 1024
"""Tokens of a sequence, for SAEs that do not say what they were trained on, of a model that takes as many."""


def text_context(subjects: Sequence[Subject], model: Model) -> int:
    """Tokens of a sequence, BOS included: the fewest that one of these SAEs was trained on.

    Raises:
        UserError: more than the model can read.
    """
    config = read_config(model)
    longest = most_positions(config) or CONTEXT
    length = min(subject.context_size or min(CONTEXT, longest) for subject in subjects)
    warn_of_context(config, length, model)
    return length


def warn_of_context(config: object, longest: int, model: Model) -> None:
    """Say in the terminal that sequences are longer than what the model was made for.

    Raises:
        UserError: the model cannot read them.
    """
    if (warning := check_context(config, longest, model.name)) is not None:
        console.print(f"note: {warning}", soft_wrap=True, highlight=False)
