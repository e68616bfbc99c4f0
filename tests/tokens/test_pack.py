"""The token stage: what it writes does not depend on interruptions."""

import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from helpers import recipe, write_documents
from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.recipe.schema import Model
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


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """A recipe whose first document is thirty segments long."""
    folder = tmp_path_factory.mktemp("huge")
    words = " ".join(f"word{(place * place) % 997} is" for place in range(12000))
    (folder / "a.txt").write_text(words)
    (folder / "b.txt").write_text("A short one.")
    source = {"kind": "files", "name": "web", "paths": [str(folder / "*.txt")]}
    return recipe(folder, text__sources=[source], text__mixture="shards", text__held_out_share=0.0,
                  tokens__count=30_000, tokens__segment_rows=1024)


def test_a_huge_document_takes_disk_for_the_tokens_kept(huge, tokenizer, tmp_path):
    index = pack(huge, tokenizer, "train", tmp_path / "store")
    files = list((tmp_path / "store" / "tokens").glob("segment-*"))
    assert len(files) > 25
    per_token = sum(path.stat().st_size for path in files) / sum(index["rows"])
    assert per_token < 40, "13 bytes, as much again that may wait, and a header of each file"


@pytest.mark.parametrize("changed", [False, True])
def test_packing_goes_on_inside_a_huge_document(huge, tokenizer, tmp_path, changed):
    """Its rest is read again: the files are the same. A document that has changed is refused."""
    index = pack(huge, tokenizer, "train", tmp_path / "whole")
    want = hashes(tmp_path / "whole")
    if changed:
        text = Path(huge.text.sources[0].paths[0]).with_name("a.txt")
        old = text.read_text()
    for kept in {0, 1, 7, len(index["rows"]) - 2, len(index["rows"])} if not changed else {7}:
        store = tmp_path / f"kept-{kept}"
        shutil.copytree(tmp_path / "whole", store)
        (store / "tokens" / "index.json").unlink()
        for segment in range(kept, len(index["rows"])):
            (store / "tokens" / f"segment-{segment:06d}.safetensors").unlink()
        if changed:
            text.write_text(old.replace("word1 is", "word2 is"))
            with pytest.raises(UserError, match=r"cannot resume: document \d of the text \(a.txt\) has changed"):
                pack(huge, tokenizer, "train", store)
            text.write_text(old)
        else:
            pack(huge, tokenizer, "train", store)
            assert hashes(store) == want


def test_what_chats_lose_is_counted_by_source(tokenizer, tmp_path, caplog):
    """This also holds for an interrupted stage."""
    image = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "What is this? " * 40}]
    talk = [{"role": "user", "content": image}, {"role": "assistant", "content": "It.", "refusal": "no"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 40)
    source = {"kind": "chat", "name": "web", "paths": [str(tmp_path / "*.jsonl")]}
    job = recipe(tmp_path, text__sources=[source])
    index = pack(job, tokenizer, "train", tmp_path / "store")
    documents = index["sources"]["web"]["documents"]
    assert index["sources"]["web"]["lost"] == {"image": documents, "refusal": documents}
    assert "the text of a message lacks its image" in caplog.text
    (tmp_path / "store" / "tokens" / "index.json").unlink()
    (tmp_path / "store" / "tokens" / "segment-000002.safetensors").unlink()
    assert pack(job, tokenizer, "train", tmp_path / "store") == index


def test_a_changed_recipe_of_bos_is_another(tmp_path, tokenizer):
    """`auto` and `no` give the tokens from before the setting existed; `yes` gives other tokens."""
    write_documents(tmp_path / "corpus")
    old, no, yes = (recipe(tmp_path / "corpus", tokens__bos=bos) for bos in ("auto", "no", True))
    assert old.tokens_hash() == no.tokens_hash() != yes.tokens_hash()
    assert old.store_hash() == no.store_hash() != yes.store_hash()
    pack(no, tokenizer, "train", tmp_path / "store")
    with_bos = Tokenizer(tokenizer.backend, tokenizer.eos_id, (2,))
    with pytest.raises(UserError, match="holds tokens of another recipe"):
        pack(yes, with_bos, "train", tmp_path / "store")
    pack(yes, with_bos, "train", tmp_path / "other")
    first = read_token_segment(tmp_path / "other", 0)
    assert (first.token_ids[first.sequence_starts[:-1]] == 2).all()
    short = recipe(tmp_path / "corpus", tokens__bos="yes", tokens__chunk_lengths=[(1, 40)])
    with pytest.raises(UserError, match="a sequence of 1 would hold nothing but BOS"):
        pack(short, with_bos, "train", tmp_path / "short")


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
    tiny = resources.files("olmoscope") / "model" / "tiny"
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(str(tiny / name), tmp_path)
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(Model(name=str(tmp_path)))


def test_the_real_tokenizer_on_real_documents(tmp_path, shared_data):
    """With OLMo's own tokenizer and Dolma's own documents: EOS is between them, and the text survives."""
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
