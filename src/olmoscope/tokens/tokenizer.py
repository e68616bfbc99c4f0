"""The model's tokenizer, as the token stage uses it: no special tokens added, EOS known."""

import hashlib
from dataclasses import dataclass

import numpy as np
import tokenizers

from olmoscope.errors import UserError
from olmoscope.model_source import loading, locate, pinned
from olmoscope.recipe import Model


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer and the id that ends a document."""

    backend: tokenizers.Tokenizer
    eos_id: int

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids (int32) of each text, with EOS appended; nothing else is added."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.eos_id], dtype=np.int32) for encoding in encodings]

    def special_ids(self) -> list[int]:
        """Ids of the tokens that the tokenizer calls special (EOS, chat marks and the like), ascending."""
        added = self.backend.get_added_tokens_decoder()
        return sorted({self.eos_id, *(number for number, token in added.items() if token.special)})

    def hash(self) -> str:
        """Identifies the tokenizer by all that it consists of."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]


def load_tokenizer(model: Model) -> Tokenizer:
    """Load the tokenizer of a recipe's model.

    Raises:
        UserError: it cannot be found, is not a fast one, or has no EOS token.
    """
    from transformers import AutoTokenizer

    model = pinned(model)
    with loading(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**locate(model))
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {model.name!r} has no fast version (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model.name!r} has no EOS token, which must stand between documents: "
                        "set eos_token in its tokenizer_config.json")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, tokenizer.eos_token_id)
