"""The sequences of a text on which an SAE is measured or indexed: their length, and whether they begin with BOS."""

from collections.abc import Sequence

from olmoscope.errors import UserError
from olmoscope.model.config import read_config
from olmoscope.model.positions import check_context, most_positions
from olmoscope.progress import console
from olmoscope.recipe.schema import Bos, Model
from olmoscope.sae.io.opened import Opened

CONTEXT = 1024
"""Tokens per sequence for SAEs that do not say what length they were trained on, if the model accepts that many."""


def text_context(subjects: Sequence[Opened], model: Model) -> int:
    """Tokens of a sequence, BOS included: the fewest that one of these SAEs was trained on.

    Raises:
        UserError: more than the model can read.
    """
    config = read_config(model)
    longest = most_positions(config) or CONTEXT
    length = min(subject.context_size or min(CONTEXT, longest) for subject in subjects)
    warn_of_context(config, length, model)
    return length


def chosen_bos(subject: Opened, option: bool | None) -> Bos:
    """Whether sequences begin with BOS: as the SAE says, else as `--bos` or `--no-bos` does, else as the tokenizer.

    Raises:
        UserError: the option contradicts the SAE.
    """
    if option is None:
        return subject.bos
    wanted: Bos = "yes" if option else "no"
    if subject.bos not in ("auto", wanted):
        raise UserError(f"--{'bos' if option else 'no-bos'}: {subject.name} says that it was trained on sequences that "
                        f"begin with{'out' if option else ''} BOS; leave the option out")
    return wanted


def warn_of_context(config: object, longest: int, model: Model) -> None:
    """Say in the terminal that sequences are longer than what the model was made for.

    Raises:
        UserError: the model cannot read them.
    """
    if (warning := check_context(config, longest, model.name)) is not None:
        console.print(f"note: {warning}", soft_wrap=True, highlight=False)
