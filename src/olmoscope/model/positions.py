"""How long a sequence a model accepts: checked before anything is packed, from the config alone.

Most models turn positions into angles (rotary) or distances, and run on any length; beyond the length they were made
for, their outputs are unreliable. Others look positions up in a table, and fail where it ends.
"""

from typing import Any

from olmoscope.errors import UserError
from olmoscope.model.blueprint import blueprint

_LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""What configs call the longest sequence (`n_positions` and the like are aliases of the first)."""
_OFFSET = 2
"""How many rows some tables have beyond their positions."""


def most_positions(config: Any) -> int | None:
    """The longest sequence that a model was made for, in tokens; None if its config does not say.

    Args:
        config: the whole config of transformers.
    """
    text = config.get_text_config()
    return next((value for name in _LIMITS if isinstance(value := getattr(text, name, None), int) and value > 0), None)


def check_context(config: Any, longest: int, name: str) -> str | None:
    """Compare the longest sequence that a model must read with what it accepts.

    Args:
        config: the whole config of transformers; it is not changed.
        longest: tokens, BOS included.
        name: the model's name, for the message.

    Returns:
        A line of warning if the sequences are longer than the model was made for, else None.

    Raises:
        UserError: the model cannot read them, because its positions are a table that ends earlier.
    """
    limit = most_positions(config)
    if limit is None or longest <= limit:
        return None
    what = f"sequences of up to {longest} tokens are longer than the {limit} positions of {name}"
    if _has_table(config, limit):
        raise UserError(f"tokens.chunk_lengths: {what}, which are a table that ends there; set lengths up to {limit}")
    return f"tokens.chunk_lengths: {what} (max_position_embeddings): what it computes beyond them is unreliable"


def _has_table(config: Any, limit: int) -> bool:
    """Whether a tensor of the model, other than those of the vocabulary, has a row for each position. (MPT counts too:
    its distances are made for exactly that many positions.)"""
    if getattr(config.get_text_config(), "model_type", None) == "mpt":
        return True
    try:
        module = blueprint(config)
    except ValueError:
        return False  # not a causal LM: the code that loads it says so
    vocabulary = [getattr(part, "weight", None)
                  for part in (module.get_input_embeddings(), module.get_output_embeddings())]
    tensors = [tensor for part in module.modules() if not hasattr(part, "make_weights")  # such tables grow
               for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]]
    return any(tensor.dim() == 2 and limit <= len(tensor) <= limit + _OFFSET
               for tensor in tensors if all(tensor is not one for one in vocabulary))
