"""Parts of marked chats, and the facts about each token of a text."""

import numpy as np
import pytest
import torch

from olmoscope.evaluate.chat_parts import NAMES, parts_of_tokens
from olmoscope.evaluate.sequences import Sequences

CHAT = ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        "<think>A greeting.</think>Hi!<|im_end|>\n<|im_start|>user\nwhy <think>so</think><|im_end|>\n"
        "<|im_start|>assistant\nNo reason.<|im_end|>\n")


@pytest.mark.parametrize("size", [1, 3, 7])
def test_parts_of_a_chat(size):
    """However the text is cut into tokens, a token's part is that of its first character."""
    plain = "Nothing <think>marked</think> here.<|im_end|>"
    pieces = [plain[start : start + size] for start in range(0, len(plain), size)]
    count = len(pieces)
    pieces += [CHAT[start : start + size] for start in range(0, len(CHAT), size)]
    parts = parts_of_tokens(np.arange(len(pieces)), np.array([0] * count + [1] * (len(pieces) - count)),
                            lambda token: pieces[token])
    assert set(parts[:count]) == {0}
    found = dict.fromkeys(NAMES[1:], "")
    for piece, part in zip(pieces[count:], parts[count:], strict=True):
        found[NAMES[part]] += piece
    if size == 1:
        assert found["thinking"] == "<think>A greeting.</think>"
        assert found["answer"] == "Hi!<|im_end|>No reason.<|im_end|>"
        assert found["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>")
        assert "why <think>so</think>" in found["prompt"]
    starts = np.arange(0, len(CHAT), size)
    one_by_one = parts_of_tokens(np.arange(len(CHAT)), np.zeros(len(CHAT), int), lambda token: CHAT[token])
    assert parts[count:].tolist() == one_by_one[starts].tolist()


def sequences(apart):
    """Documents 0 to 2 in sequences of 5, 3 and 4 tokens."""
    documents = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    return Sequences(np.arange(10, 22, dtype=np.int32), np.array([0, 5, 8, 12]), documents,
                     np.zeros(12, np.uint8), np.zeros(12, bool), apart)


def test_next_tokens_stay_in_the_sequence_and_in_documents_apart():
    assert sequences(False).next_tokens().tolist() == [11, 12, 13, 14, -1, 16, 17, -1, 19, 20, 21, -1]
    assert sequences(True).next_tokens().tolist() == [11, 12, -1, 14, -1, 16, -1, -1, 19, 20, 21, -1]
    assert sequences(False).positions().tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]


def test_the_first_tokens():
    first = sequences(False).first(7)
    assert first.starts.tolist() == [0, 5, 7]
    assert first.next_tokens().tolist() == [11, 12, 13, 14, -1, 16, -1]
    assert first.hash() != sequences(False).hash() != sequences(True).hash()
    assert sequences(False).first(99).rows == 12


@pytest.mark.parametrize("batch_tokens", [1, 8, 100])
def test_batches_hold_every_token_once(batch_tokens):
    text, seen = sequences(True), []
    for numbers in text.plan(batch_tokens):
        batch = text.batch(numbers)
        assert torch.equal(batch.token_ids_BT.flatten()[batch.real_R],
                           torch.from_numpy(text.token_ids).long()[batch.index_R])
        positions = batch.positions_BT.flatten()[batch.real_R].numpy()
        starts = (positions == 0).nonzero()[0]
        wanted = np.diff(text.documents[batch.index_R.numpy()], prepend=-1) != 0
        assert set(wanted.nonzero()[0].tolist()) <= set(starts.tolist())  # each document begins anew, in any sequence
        seen += batch.index_R.tolist()
    assert sorted(seen) == list(range(12))
