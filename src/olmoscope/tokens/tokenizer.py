"""The model's tokenizer, as the token stage uses it: EOS after each document, BOS where a context begins."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from olmoscope.errors import UserError
from olmoscope.model_source import pinned, read_tokenizer
from olmoscope.recipe.schema import Bos, Model


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer, the id that ends a document, and the ids that the model's contexts begin with."""

    backend: tokenizers.Tokenizer
    eos_id: int
    begin: tuple[int, ...] = ()
    """BOS, in nearly every model that puts anything first."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids (int32) of each text, with EOS appended; nothing else is added."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.eos_id], dtype=np.int32) for encoding in encodings]

    def special_ids(self) -> list[int]:
        """Ids of the tokens that the tokenizer calls special (EOS, chat markers, ...), and `begin`; ascending."""
        added = self.backend.get_added_tokens_decoder()
        return sorted({self.eos_id, *self.begin, *(number for number, token in added.items() if token.special)})

    def hash(self) -> str:
        """A hash of the whole tokenizer."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]


def load_tokenizer(model: Model, bos: Bos = "auto") -> Tokenizer:
    """Load the tokenizer of a recipe's model.

    Args:
        bos: `Tokens.bos`: whether `begin` is what the tokenizer puts first by itself, always BOS, or nothing.

    Raises:
        UserError: the tokenizer cannot be found, is not a fast one, or has no EOS token; or it has no BOS token and
            `bos` is `yes`.
    """
    model = pinned(model)
    tokenizer = read_tokenizer(model)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {model.name!r} has no fast version (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model.name!r} has no EOS token, which must separate documents: set "
                        "eos_token in its tokenizer_config.json")
    begin = () if bos == "no" else _puts_first(tokenizer, model)
    if bos == "yes" and not begin:
        if tokenizer.bos_token_id is None:
            raise UserError(f"the tokenizer of {model.name!r} has no BOS token, but sequences must begin with one "
                            "(tokens.bos: yes, --bos, or an SAE's prepend_bos); set tokens.bos=no, or use --model to "
                            "give the model that the SAE was trained on")
        begin = (tokenizer.bos_token_id,)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, tokenizer.eos_token_id, begin)


def _puts_first(tokenizer: Any, model: Model) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for first in range(len(dressed) - len(alone) + 1):
        if dressed[first : first + len(alone)] == alone:
            return tuple(dressed[:first])
    raise UserError(f"the tokenizer of {model.name!r} changes a text when it adds special tokens, so what it puts "
                    "first is unknown: set tokens.bos=yes or tokens.bos=no")
