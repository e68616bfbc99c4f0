"""A text named on the command line becomes a recipe's text, identified by its content."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import save_small_model, write_documents
from olmoscope.errors import UserError
from olmoscope.recipe.schema import Model, Text
from olmoscope.text.given import given_sources, given_text
from olmoscope.text.mixture import Mixture

TINY = Model(name="tiny")


def documents(sources):
    mixture = {source["name"]: 1.0 for source in sources}
    text = Text.model_validate({"sources": sources, "mixture": mixture, "held_out_share": 0.0})
    return {(document.source, document.id) for document in Mixture(text, 0, "train")}


def texts(path):
    return sorted(document.text for document in Mixture(given_text(str(path), TINY), 0, "train"))


def test_files_by_their_kinds(tmp_path):
    shard = write_documents(tmp_path / "folder" / "dolma", count=3)
    (tmp_path / "folder" / "notes.txt").write_text("One note.")
    (tmp_path / "folder" / ".hidden").write_text("Not read.")
    sources = given_sources(str(tmp_path / "folder"))
    assert {source["kind"] for source in sources} == {"dolma", "files"}
    assert {name for name, _ in documents(sources)} == {"dolma", "files"}
    assert len(documents(sources)) == 4
    assert given_sources(str(shard)) == [{"kind": "dolma", "name": "dolma", "paths": [str(shard.resolve())]}]


CHAT = [{"role": "user", "content": "Hello"}]
SHARE_GPT = [{"from": "human", "value": "Hello"}]


@pytest.mark.parametrize(("columns", "kind", "wanted"), [
    ({"text": ["One.", "Two."], "url": ["a", "b"]}, None, ["One.", "Two."]),
    ({"messages": [CHAT]}, "chat", ["<|im_start|>user\nHello<|im_end|>\n"]),
    ({"conversations": [SHARE_GPT]}, "chat", ["<|im_start|>user\nHello<|im_end|>\n"]),
    ({"messages": [json.dumps(CHAT)]}, "chat", ["<|im_start|>user\nHello<|im_end|>\n"]),
])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_columns_decide(tmp_path, columns, kind, wanted, suffix):
    path = tmp_path / f"train-00000{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    [source] = given_sources(str(path))
    assert source["kind"] == (kind or ("table" if suffix == ".parquet" else "dolma"))
    assert texts(path) == wanted


def test_hub_datasets():
    hub = {"kind": "hub", "name": "text", "repo": "someone/texts", "split": "train", "column": None}
    assert given_sources("someone/texts") == [hub]
    assert given_sources("someone/texts:test") == [hub | {"split": "test"}]


def test_nothing_of_the_kind(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "url": ["b"]}), tmp_path / "other.parquet")
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "empty").mkdir()
    for text, message in (
            ("no-such-file", "it is not a hub dataset"), (str(tmp_path / "empty"), "the folder has no files"),
            (str(tmp_path / "other.parquet"), r"none of the columns text, messages, conversations, conversation "
                                              r"\(it has body, url\); name its column in a recipe's source of kind"),
            (str(tmp_path / "other.jsonl"), r"it has body\)")):
        with pytest.raises(UserError, match=message) as raised:
            given_sources(text)
        assert "\n" not in str(raised.value)


def test_a_text_is_what_it_holds(tmp_path):
    shard = write_documents(tmp_path / "one", count=3)
    (tmp_path / "two").mkdir()
    copy = shutil.copy(shard, tmp_path / "two" / "copy.json.gz")
    text = given_text(str(shard), TINY)
    assert given_text(str(copy), TINY).content == text.content
    assert given_text(str(tmp_path / "two"), TINY).content == text.content
    mixture, moved = (Mixture(given_text(str(path), TINY), 0, "train") for path in (shard, copy))
    next(mixture)
    moved.load_state_dict(mixture.state_dict())  # work started with one continues with the other
    assert [document.text for document in moved] == [document.text for document in mixture]
    write_documents(tmp_path / "one", count=4)
    assert given_text(str(shard), TINY).content != text.content


def test_chats_go_by_the_template_of_a_model_that_has_one(tmp_path):
    pq.write_table(pa.table({"messages": [CHAT]}), tmp_path / "chats.parquet")
    model = save_small_model("Llama", tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    assert given_text(str(tmp_path / "chats.parquet"), Model(name=str(model))).sources[0].format == "template"
    assert given_text(str(tmp_path / "chats.parquet"), TINY).sources[0].format == "chatml"
