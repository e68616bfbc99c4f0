"""A text named on the command line becomes a recipe's sources."""

import pytest

from helpers import write_documents
from olmoscope.errors import UserError
from olmoscope.recipe import Text
from olmoscope.text.given import given_sources
from olmoscope.text.mixture import Mixture


def documents(sources):
    mixture = {source["name"]: 1.0 for source in sources}
    text = Text.model_validate({"sources": sources, "mixture": mixture, "held_out_share": 0.0})
    return {(document.source, document.id) for document in Mixture(text, 0, "train")}


def test_files_by_their_kinds(tmp_path):
    shard = write_documents(tmp_path / "folder" / "dolma", count=3)
    (tmp_path / "folder" / "notes.txt").write_text("One note.")
    (tmp_path / "folder" / ".hidden").write_text("Not read.")
    sources = given_sources(str(tmp_path / "folder"))
    assert {source["kind"] for source in sources} == {"dolma", "files"}
    assert {name for name, _ in documents(sources)} == {"dolma", "files"}
    assert len(documents(sources)) == 4
    assert given_sources(str(shard)) == [{"kind": "dolma", "name": "dolma", "paths": [str(shard.resolve())]}]
    (tmp_path / "chats.parquet").touch()
    assert given_sources(str(tmp_path / "chats.parquet"))[0] | {"paths": []} == {
        "kind": "chat", "name": "chat", "paths": [], "format": "chatml"}


def test_hub_datasets():
    assert given_sources("someone/texts") == [
        {"kind": "hub", "name": "text", "repo": "someone/texts", "split": "train"}]
    assert given_sources("someone/texts:test")[0]["split"] == "test"


def test_nothing_of_the_kind(tmp_path):
    for text, message in (("no-such-file", "it is no hub dataset"), (str(tmp_path), "the folder has no files")):
        with pytest.raises(UserError, match=message):
            given_sources(text)
