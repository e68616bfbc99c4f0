"""Real documents in Dolma's format, as crawled, and a real text file."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from olmoscope.recipe.schema import Text
from olmoscope.text.document import Document
from olmoscope.text.mixture import Mixture


def _text(shared_data: Path, **others: Any) -> Text:
    return Text.model_validate({
        "sources": [{"kind": "dolma", "name": "web", "paths": [f"{shared_data}/dolma-documents/*.gz"]},
                    {"kind": "files", "name": "wiki", "paths": [f"{shared_data}/wikitext2-valid.txt"]}],
        "mixture": {"web": 0.9, "wiki": 0.1}, **others})


def _written(shared_data: Path) -> list[Document]:
    """The web documents, read in the simplest way."""
    return [Document(value["text"], "web", value["id"])
            for path in sorted((shared_data / "dolma-documents").glob("*.gz"))
            for value in map(json.loads, gzip.decompress(path.read_bytes()).decode().splitlines())]


@pytest.mark.parametrize("mixture", [{"web": 0.9, "wiki": 0.1}, "shards"])
def test_every_document_comes_once_and_unchanged(shared_data: Path, mixture: Any) -> None:
    text = _text(shared_data, mixture=mixture, held_out_share=0.3)
    train, held_out = list(Mixture(text, 0, "train")), list(Mixture(text, 0, "held_out"))
    read = sorted((d for d in train + held_out if d.source == "web"), key=lambda d: d.id)
    assert read == sorted(_written(shared_data), key=lambda d: d.id)
    assert len(read) == 30
    assert len({d.id for d in read}) == 30
    wiki, = (d for d in train + held_out if d.source == "wiki")
    assert wiki.id == "wikitext2-valid.txt"
    assert wiki.text == (shared_data / "wikitext2-valid.txt").read_bytes().decode()


def test_goes_on_from_every_document(shared_data: Path) -> None:
    text = _text(shared_data)
    mixture = Mixture(text, 3, "train")
    states, order = [mixture.state_dict()], []
    for document in mixture:
        order.append(document)
        states.append(mixture.state_dict())
    assert mixture.malformed == {"web": 0, "wiki": 0}
    for done, state in enumerate(states):
        again = Mixture(text, 3, "train")
        again.load_state_dict(state)
        assert list(again) == order[done:]


def test_a_real_shard_cut_short(shared_data: Path, tmp_path: Path) -> None:
    whole = (shared_data / "dolma-documents" / "cc_en_head-0091.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    text = Text.model_validate({"sources": [{"kind": "dolma", "name": "web", "paths": [f"{tmp_path}/*.gz"]}],
                                "mixture": {"web": 1}, "held_out_share": 0, "max_bad_share": 0.5})
    mixture = Mixture(text, 0, "train")
    read = list(mixture)
    assert 2 <= len(read) < 10
    assert {(d.id, d.text) for d in read} < {(d.id, d.text) for d in _written(shared_data)}
    assert mixture.malformed == {"web": 1}
