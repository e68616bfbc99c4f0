"""A causal LM of Hugging Face on this machine that answers questions: with yes or no, or in a few words.

The probability of a yes comes from the next token's probabilities, not from words: p(yes) / (p(yes) + p(no)), each
summed over the first tokens of its spellings; likewise for a number. An instruction model gets its chat template, any
other model the bare prompt. B prompts of T tokens, A possible answers, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.model.config import read_config
from olmoscope.model.dtype import settle_model
from olmoscope.model.load import pick_device
from olmoscope.model.weights import read_weights
from olmoscope.model_source import pinned, read_tokenizer, revision_of
from olmoscope.recipe.schema import Model

YES, NO = ("yes", "Yes", " yes", " Yes", "YES"), ("no", "No", " no", " No", "NO")
AT_ONCE = 16
"""Prompts in one pass."""
_MARK = "\ue000"
"""Stands for the prompt while the chat template is filled in."""


class LocalModel:
    """The model. One thread uses it at a time.

    Attributes:
        name: as the user gave it.
        revision: what identifies its weights.
        prompt_tokens: read so far, including those of the chat template.
    """

    def __init__(self, name: str, device: str = "auto") -> None:
        """
        Args:
            name: a hub repository, a folder, or `tiny`.

        Raises:
            UserError: it cannot be loaded, or its tokenizer does not distinguish yes from no.
        """
        model = pinned(settle_model(Model(name=name), pick_device(device)))
        self.name, self.revision = name, revision_of(model)
        self.prompt_tokens = 0
        self._module = read_weights(model, read_config(model)).to(pick_device(device))
        tokenizer = read_tokenizer(model)
        self._tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._eos = tokenizer.eos_token_id
        self._before, self._after = self._shell(tokenizer)
        found = self._told_apart([YES, NO])
        if found is None:
            raise UserError(f"the tokenizer of {name!r} begins yes and no with the same token, so the model's answer "
                            "cannot be read from the next token; use another model")
        self._yes_no = found

    def _shell(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Token ids before and after a prompt."""
        if tokenizer.chat_template is None:
            begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            return begin, self._tokenizer.encode("\nAnswer:", add_special_tokens=False).ids
        text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False,
                                             add_generation_prompt=True)
        before, found, after = str(text).partition(_MARK)
        if not found:
            raise UserError(f"the chat template of {self.name!r} does not show what a user says; use another model")
        encode = self._tokenizer.encode
        return encode(before, add_special_tokens=False).ids, encode(after, add_special_tokens=False).ids

    def _ids(self, text: str) -> list[int]:
        """Tokens of a text; none of them is a control token, whatever the text looks like."""
        self._tokenizer.encode_special_tokens = True
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = False
        return ids

    def _told_apart(self, answers: Sequence[Sequence[str]]) -> list[list[int]] | None:
        """For each answer, the tokens that begin this answer and no other; None if an answer has none.

        Args:
            answers: the spellings of each.
        """
        first = [{self._ids(spelling)[0] for spelling in spellings} for spellings in answers]
        own = [sorted(mine.difference(*first[:number], *first[number + 1:])) for number, mine in enumerate(first)]
        return own if all(own) else None

    def _prompt(self, text: str) -> list[int]:
        ids = [*self._before, *self._ids(text), *self._after]
        self.prompt_tokens += len(ids)
        return ids

    @torch.inference_mode()
    def chances_of_yes(self, prompts: Sequence[str]) -> list[float]:
        """How likely the answer to each prompt is yes rather than no, 0 to 1."""
        logits = self._logits(prompts, self._yes_no)
        return [float(torch.sigmoid(yes - no)) for yes, no in logits]

    @torch.inference_mode()
    def numbers(self, prompts: Sequence[str], most: int) -> list[int] | None:
        """The most likely answer to each prompt among the numbers 1 to `most`, counted from 0; None if the tokenizer
        does not distinguish these numbers by their first tokens."""
        answers = self._told_apart([(str(number), f" {number}") for number in range(1, most + 1)])
        return None if answers is None else [int(one.argmax()) for one in self._logits(prompts, answers)]

    def _logits(self, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each prompt the logarithm of the probability of each answer as the next token, up to a constant, float64.

        Args:
            answers: the tokens that each may begin with.
        """
        ids = [self._prompt(prompt) for prompt in prompts]
        by_length = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        found = [torch.empty(0)] * len(ids)
        for start in range(0, len(ids), AT_ONCE):
            batch = by_length[start:start + AT_ONCE]
            logits_BV = self._next_logits([ids[one] for one in batch])
            logits_BA = torch.stack([logits_BV[:, tokens].logsumexp(1) for tokens in answers], 1)
            for number, logits_A in zip(batch, logits_BA, strict=True):
                found[number] = logits_A
        return found

    def _next_logits(self, prompts: list[list[int]]) -> Tensor:
        """`[B, V]`, float64."""
        longest = max(map(len, prompts))
        # Padding after the end: attention is causal, so it changes nothing before it.
        ids_BT = torch.tensor([ids + [ids[-1]] * (longest - len(ids)) for ids in prompts], device=self._module.device)
        last_B = torch.tensor([len(ids) - 1 for ids in prompts], device=self._module.device)
        # The logits of all positions would be gigabytes.
        kept, where_B = torch.unique(last_B, return_inverse=True)
        logits = self._module(input_ids=ids_BT, use_cache=False, logits_to_keep=kept).logits
        logits_BV: Tensor = logits[torch.arange(len(prompts), device=last_B.device), where_B].double()
        return logits_BV

    @torch.inference_mode()
    def write(self, prompt: str, longest: int, start: str = "") -> str:
        """The answer to a prompt, by the most likely token at each step, up to the end of its first line.

        Args:
            start: the first words of the answer, which are given, so that small models keep to the point.
        """
        ids = [*self._prompt(prompt), *self._ids(start)]
        text, written = "", []
        step = torch.tensor([ids], device=self._module.device)
        past = None
        for _ in range(longest):
            output = self._module(input_ids=step, past_key_values=past, use_cache=True)
            token, past = int(output.logits[0, -1].argmax()), output.past_key_values
            if token == self._eos:
                break
            written.append(token)
            text = self._tokenizer.decode(written, skip_special_tokens=True).lstrip()
            if "\n" in text:
                break
            step = torch.tensor([[token]], device=self._module.device)
        return text.partition("\n")[0].strip()
