"""The model in the package: its shape and size, its tokenizer, and that it has learned something."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmoscope.text.document import Document
from olmoscope.text.split import is_held_out
from olmoscope.text.standard_library import modules

FOLDER = Path(str(resources.files("olmoscope") / "model" / "tiny"))
SHARE = 0.05


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(modules())


def test_it_is_a_small_olmo3_in_bfloat16(model):
    config = model.config
    assert type(model).__name__ == "Olmo3ForCausalLM"
    assert config.num_hidden_layers == 8
    assert config.layer_types == [*["sliding_attention"] * 3, "full_attention"] * 2
    assert config.sliding_window == 128
    assert config.max_position_embeddings >= 2048
    assert config.tie_word_embeddings
    assert model.dtype == torch.bfloat16
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_it_fits_in_the_package():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12_000_000


def test_the_tokenizer_spells_any_text(tokenizer, model):
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert tokenizer.eos_token_id == model.config.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    for text in ("def f(x):\n    return x ** 2\n", "  leading and trailing  ", "日本語 ελληνικά 🦊\t\r\n\x00", ""):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer(text)["input_ids"] == ids  # nothing is added


def test_it_predicts_held_out_text_better_than_counting(tokenizer, documents: list[Document]):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids_of = {document.id: np.array(tokenizer(document.text, verbose=False)["input_ids"]) for document in documents}
    training = [ids for name, ids in ids_of.items() if not is_held_out(name, SHARE)]
    counts = np.bincount(np.concatenate(training), minlength=4096)
    unigram = (counts + 1) / (counts.sum() + 4096)
    pairs = np.bincount(np.concatenate([ids[:-1] * 4096 + ids[1:] for ids in training]),
                        minlength=4096 * 4096).reshape(4096, 4096)

    losses: dict[str, list[float]] = {"model": [], "bigram": [], "unigram": []}
    for ids in [ids[:512] for name, ids in ids_of.items() if is_held_out(name, SHARE)][:12]:
        before, after = ids[:-1], ids[1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0, :-1].float()
        losses["model"] += cross_entropy(logits, torch.tensor(after), reduction="none").tolist()
        losses["unigram"] += (-np.log(unigram[after])).tolist()
        smoothed = (pairs[before, after] + 32 * unigram[after]) / (pairs[before].sum(axis=1) + 32)
        losses["bigram"] += (-np.log(smoothed)).tolist()
    mean = {name: sum(values) / len(values) for name, values in losses.items()}
    assert mean["model"] < mean["bigram"] - 0.5 < mean["unigram"], mean


def test_the_card_states_its_loss_beside_the_baselines_and_the_licence():
    card = (FOLDER / "README.md").read_text()
    rows = {cells[1].strip(): float(cells[-2]) for line in card.splitlines()
            if len(cells := line.split("|")) == 6 and cells[1].strip() in ("this model", "bigram", "unigram")}
    assert rows["this model"] < rows["bigram"] < rows["unigram"]
    assert "PSF-2.0" in card
    assert "tools/train_tiny_model.py" in card
