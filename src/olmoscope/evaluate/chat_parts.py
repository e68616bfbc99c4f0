"""Which part of a chat each token is in, where the text marks its chats with ChatML.

    <|im_start|>user
    …<|im_end|>                     prompt: all that is not the assistant's
    <|im_start|>assistant
    <think>…</think>                thinking, with its marks
    …<|im_end|>                     answer, with the mark that ends it

A document without `<|im_start|>` has no parts. A token that spans two parts is in the one where it begins.
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

NAMES = ("", "prompt", "thinking", "answer")
"""By code; 0: no part."""
_NONE, _PROMPT, _THINKING, _ANSWER = range(4)

_MARK = re.compile(r"<\|im_start\|>(?P<role>[^\n<]{0,64})\n?|(?P<end><\|im_end\|>)|"
                   r"(?P<think><think>)|(?P<stop></think>)")


def parts_of_tokens(token_ids: np.ndarray, documents: np.ndarray, piece: Callable[[int], str]) -> np.ndarray:
    """The part of each token, `[N]` uint8 codes.

    Args:
        token_ids: `[N]`, documents one after the other.
        documents: `[N]`, which document each token is of.
        piece: the text of a token; marks are plain ASCII, so half characters in it do no harm.
    """
    unique, which = np.unique(token_ids, return_inverse=True)
    pieces = [piece(int(token)) for token in unique]
    parts = np.zeros(len(token_ids), dtype=np.uint8)
    edges = np.flatnonzero(np.diff(documents, prepend=-1, append=-1))
    for start, end in pairwise(edges):
        parts[start:end] = _of_document([pieces[number] for number in which[start:end]])
    return parts


def _of_document(pieces: Sequence[str]) -> np.ndarray:
    text = "".join(pieces)
    if "<|im_start|>" not in text:
        return np.zeros(len(pieces), dtype=np.uint8)
    changes, part = [(0, _PROMPT)], _PROMPT
    for mark in _MARK.finditer(text):
        place = mark.start()
        if mark["role"] is not None:
            changes.append((place, _PROMPT))  # the mark itself is given, not said
            part, place = (_ANSWER if mark["role"].strip() == "assistant" else _PROMPT), mark.end()
        elif mark["end"]:
            part, place = _PROMPT, mark.end()
        elif mark["think"] and part == _ANSWER:
            part = _THINKING
        elif mark["stop"] and part == _THINKING:
            part, place = _ANSWER, mark.end()
        changes.append((place, part))
    begins = np.cumsum([0, *map(len, pieces[:-1])])
    places, codes = np.array(changes).T
    parts: np.ndarray = codes[np.searchsorted(places, begins, side="right") - 1].astype(np.uint8)
    return parts
