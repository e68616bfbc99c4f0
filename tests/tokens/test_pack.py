"""The token stage: what it writes does not depend on interruptions."""

import shutil
from importlib import resources

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from helpers import recipe, write_documents
from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.recipe import Model
from olmoscope.tokens.pack import pack
from olmoscope.tokens.segments import read_token_segment
from olmoscope.tokens.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Model(name="tiny"))


def hashes(store):
    return {path.name: sha256(path) for path in sorted((store / "tokens").iterdir())}


def test_an_interrupted_stage_writes_the_same_files(tmp_path, tokenizer):
    write_documents(tmp_path / "corpus", count=90)
    job = recipe(tmp_path / "corpus")
    index = pack(job, tokenizer, "train", tmp_path / "whole")
    want = hashes(tmp_path / "whole")
    assert sum(index["rows"]) == job.tokens.count
    assert len(index["rows"]) >= 5
    for kept in range(len(index["rows"]) + 1):
        store = tmp_path / f"kept-{kept}"
        shutil.copytree(tmp_path / "whole", store)
        (store / "tokens" / "index.json").unlink()
        for segment in range(kept, len(index["rows"])):
            (store / "tokens" / f"segment-{segment:06d}.safetensors").unlink()
        pack(job, tokenizer, "train", store)
        assert hashes(store) == want


def test_what_is_there_is_left_alone(tmp_path, tokenizer):
    corpus = write_documents(tmp_path / "corpus")
    job = recipe(tmp_path / "corpus")
    first = pack(job, tokenizer, "train", tmp_path / "store")
    corpus.unlink()
    assert pack(job, tokenizer, "train", tmp_path / "store") == first


def test_splits_share_no_document_and_padding_is_bounded(tmp_path, tokenizer):
    write_documents(tmp_path / "corpus", count=200)
    job = recipe(tmp_path / "corpus", tokens__count=9000, tokens__held_out=3000)
    texts = {}
    for split in ("train", "held_out"):
        index = pack(job, tokenizer, split, tmp_path / split)
        assert 1 - sum(index["rows"]) / index["padded"] <= job.tokens.max_padding
        segments = [read_token_segment(tmp_path / split, segment) for segment in range(len(index["rows"]))]
        assert all(segment.rows <= job.tokens.segment_rows for segment in segments)
        order = np.argsort(np.concatenate([segment.sequence_numbers for segment in segments]))
        sequences = [tokens for segment in segments
                     for tokens in np.split(segment.token_ids, segment.sequence_starts[1:-1])]
        text = tokenizer.backend.decode(np.concatenate([sequences[number] for number in order]),
                                        skip_special_tokens=False)
        texts[split] = {document for document in text.split("<|endoftext|>")[1:-1] if document}
        assert index["sources"]["web"]["tokens"] == sum(index["rows"])
        assert index["sources"]["web"]["documents"] >= len(texts[split])
    assert texts["train"] and texts["held_out"]
    assert not texts["train"] & texts["held_out"]


def test_text_that_runs_out_is_used_whole(tmp_path, tokenizer):
    write_documents(tmp_path / "corpus", count=10)
    job = recipe(tmp_path / "corpus", tokens__count=10**6)
    index = pack(job, tokenizer, "train", tmp_path / "store")
    assert index["wanted"] == 10**6
    documents = index["sources"]["web"]["documents"]
    assert 0 < documents <= 10
    ends = sum(int((read_token_segment(tmp_path / "store", segment).token_ids == tokenizer.eos_id).sum())
               for segment in range(len(index["rows"])))
    assert ends == documents


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    import json

    tiny = resources.files("olmoscope") / "model" / "tiny"
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(str(tiny / name), tmp_path)
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(Model(name=str(tmp_path)))


def test_the_real_tokenizer_on_real_documents(tmp_path, shared_data):
    """OLMo's own tokenizer, Dolma's own documents: EOS between them, the text survives."""
    real = Tokenizer(Backend.from_file(str(shared_data / "dolma2-tokenizer.json")), eos_id=100257)
    shutil.copytree(shared_data / "dolma-documents", tmp_path / "corpus")
    source = {"kind": "dolma", "name": "web", "paths": [str(tmp_path / "corpus" / "*.gz")]}
    job = recipe(tmp_path / "corpus", text__sources=[source], text__held_out_share=0.1, tokens__count=20_000,
                 tokens__chunk_lengths=[(512, 2048), (3500, 5000), (7000, 8192)], tokens__segment_rows=16384,
                 tokens__batch_tokens=16384)
    index = pack(job, real, "train", tmp_path / "store")
    assert 1 - sum(index["rows"]) / index["padded"] <= 0.03
    first = read_token_segment(tmp_path / "store", 0)
    assert (first.token_ids == 100257).sum() > 0
    sequence = int(np.flatnonzero(first.sequence_numbers == 0)[0])
    start, stop = first.sequence_starts[sequence : sequence + 2]
    from olmoscope.text.mixture import Mixture

    document = next(Mixture(job.text, job.seed, "train"))
    assert real.backend.decode(first.token_ids[start:stop])[:200] == document.text[:200]
