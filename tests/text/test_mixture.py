"""The mixture: proportions, resuming from anywhere, splits, and bad text."""

import gzip
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from olmoscope.errors import UserError
from olmoscope.recipe.schema import Text
from olmoscope.text.mixture import Mixture, Split

Order = list[tuple[str, str, str]]


def _dolma_shard(path: Path, ids: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": each, "text": f"text of {each}"}) for each in ids]
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))


def _chat_shard(path: Path, ids: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    messages = [[{"role": "user", "content": each}] for each in ids]
    pq.write_table(pa.table({"messages": messages, "id": ids}), path, row_group_size=4)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """4 Dolma shards of 15 documents, 3 chat shards of 10, 6 plain files; an empty shard among them."""
    for shard in range(4):
        _dolma_shard(tmp_path / f"web/{shard}.json.gz", [f"web-{shard}-{row}" for row in range(15)])
    _dolma_shard(tmp_path / "web/empty.json.gz", [])
    for shard in range(3):
        _chat_shard(tmp_path / f"chats/{shard}.parquet", [f"chat-{shard}-{row}" for row in range(10)])
    for number in range(6):
        file = tmp_path / f"books/part{number % 2}/{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"book {number}\r\n")
    return tmp_path


def _text(corpus: Path, mixture: Any = None, **others: Any) -> Text:
    return Text.model_validate({
        "sources": [{"kind": "dolma", "name": "web", "paths": [f"{corpus}/web/*.json.gz"]},
                    {"kind": "chat", "name": "chats", "paths": [f"{corpus}/chats/*.parquet"]},
                    {"kind": "files", "name": "books", "paths": [f"{corpus}/books/*/*.txt"]}],
        "mixture": mixture or {"web": 3.0, "chats": 2.0, "books": 1.0},
        "held_out_share": 0.2, **others})


def _one(path: Path, kind: str = "dolma", **others: Any) -> Text:
    return Text.model_validate({"sources": [{"kind": kind, "name": "only", "paths": [str(path)]}],
                                "mixture": {"only": 1}, "held_out_share": 0, **others})


def _order(mixture: Mixture) -> Order:
    return [(document.source, document.id, document.text) for document in mixture]


@pytest.mark.parametrize("mixture", [None, "shards"])
def test_splits_are_disjoint_and_together_everything(corpus: Path, mixture: Any) -> None:
    train, held_out = (_order(Mixture(_text(corpus, mixture), 0, split)) for split in ("train", "held_out"))
    everything = {("web", f"web-{s}-{r}") for s in range(4) for r in range(15)}
    everything |= {("chats", f"chat-{s}-{r}") for s in range(3) for r in range(10)}
    everything |= {("books", f"part{n % 2}/{n}.txt") for n in range(6)}
    assert Counter((source, each) for source, each, _ in train + held_out) == Counter(everything)
    assert 5 < len(held_out) < 35
    assert {text for source, _, text in train + held_out if source == "books"} == {f"book {n}\r\n" for n in range(6)}


@pytest.mark.parametrize("mixture", [None, "shards"])
@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("seed", [0, 7])
def test_goes_on_from_every_document(corpus: Path, mixture: Any, split: Split, seed: int) -> None:
    text = _text(corpus, mixture)
    whole = Mixture(text, seed, split)
    states = [whole.state_dict()]
    order: Order = []
    for document in whole:
        order.append((document.source, document.id, document.text))
        states.append(whole.state_dict())
    end = whole.state_dict()
    for done, state in enumerate(states):
        stored = json.loads(json.dumps(state))
        again = Mixture(text, seed, split)
        again.load_state_dict(stored)
        assert _order(again) == order[done:]
        assert again.state_dict() == end
        assert again.documents == whole.documents


def test_loading_a_state_midway_leaves_nothing_of_the_old_place(corpus: Path) -> None:
    text = _text(corpus)
    mixture = Mixture(text, 0, "train")
    order = [next(mixture).id for _ in range(10)]
    state = mixture.state_dict()
    rest = [next(mixture).id for _ in range(20)]
    mixture.load_state_dict(state)
    assert [next(mixture).id for _ in range(20)] == rest
    assert order[0] not in rest


def test_state_is_small(corpus: Path) -> None:
    mixture = Mixture(_text(corpus), 0, "train")
    next(mixture)
    assert len(json.dumps(mixture.state_dict())) < 300


def test_state_of_other_text_is_refused(corpus: Path) -> None:
    state = Mixture(_text(corpus), 0, "train").state_dict()
    others = [Mixture(_text(corpus), 1, "train"), Mixture(_text(corpus), 0, "held_out"),
              Mixture(_text(corpus, "shards"), 0, "train"), Mixture(_text(corpus, held_out_share=0.1), 0, "train")]
    _dolma_shard(corpus / "web/new.json.gz", ["new"])
    others.append(Mixture(_text(corpus), 0, "train"))
    for other in others:
        with pytest.raises(UserError, match="cannot resume: the text"):
            other.load_state_dict(state)


def test_order_does_not_depend_on_where_the_files_are(corpus: Path, tmp_path_factory: pytest.TempPathFactory,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "deeper"
    corpus.rename(elsewhere)
    absolute = Mixture(_text(elsewhere), 0, "train")
    monkeypatch.chdir(elsewhere)
    relative = Mixture(_text(Path()), 0, "train")
    assert absolute.state_dict() == relative.state_dict()
    assert _order(absolute) == _order(relative)


def test_seed_decides_the_order(corpus: Path) -> None:
    orders = [_order(Mixture(_text(corpus), seed, "train")) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_proportions(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        _dolma_shard(tmp_path / name / "0.json.gz", [f"{name}{i}" for i in range(1000)])
    text = Text.model_validate({
        "sources": [{"kind": "dolma", "name": name, "paths": [f"{tmp_path}/{name}/*"]} for name in ("a", "b", "c")],
        "mixture": {"a": 1, "b": 3, "c": 6}})
    counts: Counter[str] = Counter()
    for seed in range(20):
        mixture = Mixture(text, seed, "train")
        drawn = Counter(next(mixture).source for _ in range(200))
        counts += drawn
        assert 80 < drawn["c"] < 160
        assert mixture.documents == dict(drawn)
        assert mixture.exhausted == []
    # Standard deviations are 19 to 31.
    assert abs(counts["a"] - 400) < 80
    assert abs(counts["b"] - 1200) < 120
    assert abs(counts["c"] - 2400) < 120


def test_documents_of_a_shard_stay_in_order(corpus: Path) -> None:
    order = _order(Mixture(_text(corpus, held_out_share=0), 0, "train"))
    web = [each for source, each, _ in order if source == "web"]
    shards = [web[at: at + 15] for at in range(0, 60, 15)]
    for shard in shards:
        number = shard[0].split("-")[1]
        assert shard == [f"web-{number}-{row}" for row in range(15)]
    assert [source for source, _, _ in order[:30]] != sorted(source for source, _, _ in order[:30])


def test_shard_order_depends_on_the_seed(corpus: Path) -> None:
    firsts = {next(d.id for d in Mixture(_text(corpus), seed, "train") if d.source == "web").split("-")[1]
              for seed in range(12)}
    assert len(firsts) > 1


def test_shards_mode_reads_each_shard_to_its_end(corpus: Path) -> None:
    orders = set()
    for seed in range(5):
        order = _order(Mixture(_text(corpus, "shards", held_out_share=0), seed, "train"))
        assert len(order) == 96
        shards = [each.rsplit("-", 1)[0] for _, each, _ in order]
        visits = [shard for before, shard in zip([None, *shards], shards, strict=False) if before != shard]
        assert len(visits) == len(set(visits)) == 4 + 3 + 6
        orders.add(tuple(visits))
    assert len(orders) == 5


def test_exhausted_source_drops_out(corpus: Path) -> None:
    mixture = Mixture(_text(corpus, {"web": 1, "chats": 1, "books": 1000}, held_out_share=0), 0, "train")
    order = [next(mixture).source for _ in range(40)]
    assert mixture.documents["books"] == 6
    assert mixture.exhausted == ["books"]
    rest = _order(mixture)
    assert len(order) + len(rest) == 96
    assert mixture.documents == {"web": 60, "chats": 30, "books": 6}
    assert mixture.exhausted == ["web", "chats", "books"]
    assert list(mixture) == []


def test_malformed_and_empty_rows_are_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps({"id": f"d{i}", "text": f"text {i}"}) for i in range(2000)]
    for bad in range(15):
        lines[100 + 100 * bad] = '{"text": '
    lines[3] = '{"text": " \\n\\t"}'
    lines[4] = ""
    path = tmp_path / "shard.jsonl"
    path.write_text("\n".join(lines))
    mixture = Mixture(_one(path), 0, "train")
    with caplog.at_level(logging.WARNING):
        order = _order(mixture)
    assert len(order) == mixture.documents["only"] == 2000 - 15 - 2
    assert mixture.malformed == {"only": 15}
    assert mixture.empty == {"only": 2}
    assert mixture.rows == {"only": 2000}
    assert len(caplog.messages) == 11
    assert caplog.messages[0].startswith(f"source only: skipped {path}:101: not JSON")
    assert caplog.messages[9].endswith("the rest are only counted")
    assert caplog.messages[10] == "source only: 15 of 2000 rows malformed"


def test_too_many_malformed_rows_stop_the_run(tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"d{i}", "text": "text"}) for i in range(1000)]
    lines[5] = lines[70] = "{"
    path = tmp_path / "shard.jsonl"
    path.write_text("\n".join(lines))
    mixture = Mixture(_one(path), 0, "train")
    with pytest.raises(UserError, match=r"source only: 2 of 100 rows are malformed, over text.max_bad_share \(1.00%\), "
                                        r"the last one .*shard.jsonl:71: not JSON.*; fix the files or raise"):
        list(mixture)
    assert mixture.documents["only"] == 97
    assert len(_order(Mixture(_one(path, max_bad_share=0.05), 0, "train"))) == 998


def test_share_of_malformed_rows_is_of_the_source_not_of_the_shard(tmp_path: Path) -> None:
    for shard in range(10):
        lines = [json.dumps({"id": f"{shard}-{i}", "text": "text"}) for i in range(99)] + ["{"] * (shard % 2)
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(lines))
    assert len(_order(Mixture(_one(tmp_path / "*.jsonl"), 0, "train"))) == 990


@pytest.mark.parametrize("mixture", [{"only": 1}, "shards"])
def test_few_rows_are_judged_at_the_end(tmp_path: Path, mixture: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "cut\n')
    text = _one(tmp_path / "a.jsonl", mixture=mixture)
    each = Mixture(text, 0, "train")
    assert next(each).text == "fine"
    with pytest.raises(UserError, match="1 of 2 rows are malformed"):
        next(each)


def test_malformed_rows_count_on_after_going_on(tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"d{i}", "text": "text"}) for i in range(1000)]
    lines[5] = lines[70] = "{"
    path = tmp_path / "shard.jsonl"
    path.write_text("\n".join(lines))
    mixture = Mixture(_one(path), 0, "train")
    for _ in range(80):
        next(mixture)
    again = Mixture(_one(path), 0, "train")
    again.load_state_dict(mixture.state_dict())
    with pytest.raises(UserError, match=r"2 of 100 rows are malformed, over text.max_bad_share \(1.00%\); fix"):
        list(again)


def test_shard_that_breaks_off_is_read_as_far_as_it_goes(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    _dolma_shard(corpus / "web/0.json.gz", [f"web-0-{row}-{row ** 31}" for row in range(500)])
    whole = (corpus / "web/0.json.gz").read_bytes()
    (corpus / "web/0.json.gz").write_bytes(whole[: len(whole) // 2])
    text = _text(corpus, held_out_share=0, max_bad_share=0.02)
    mixture = Mixture(text, 0, "train")
    with caplog.at_level(logging.WARNING):
        order = _order(mixture)
    read = mixture.documents["web"] - 45
    assert 100 < read < 400
    assert mixture.malformed["web"] == 1
    assert f"web/0.json.gz:{read + 1}: the file is damaged from here on" in caplog.text

    states = Mixture(text, 0, "train")
    for done in range(len(order)):
        if done % 20 == 0:
            again = Mixture(text, 0, "train")
            again.load_state_dict(states.state_dict())
            assert _order(again) == order[done:]
            assert again.malformed["web"] == 1
        next(states)


def test_parts_of_one_whole_stay_on_one_side(tmp_path: Path) -> None:
    _dolma_shard(tmp_path / "a.jsonl.gz", [f"module{i % 20}#part{i}" for i in range(200)])
    families = [{each.split("#")[0] for _, each, _ in _order(Mixture(_one(tmp_path / "a.jsonl.gz", held_out_share=0.3),
                                                                     0, split))}
                for split in ("train", "held_out")]
    assert families[0].isdisjoint(families[1])
    assert len(families[0] | families[1]) == 20


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n{"text": "  "}\n'])
def test_text_without_a_usable_document(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"no usable document in only \(\d rows read"):
        list(Mixture(_one(tmp_path / "a.jsonl"), 0, "train"))


def test_split_without_a_document(tmp_path: Path) -> None:
    _dolma_shard(tmp_path / "a.jsonl.gz", ["one", "two"])
    with pytest.raises(UserError, match="held_out_share is 0"):
        Mixture(_one(tmp_path / "a.jsonl.gz"), 0, "held_out")
    with pytest.raises(UserError, match="none of its 2 documents falls into the held_out split"):
        list(Mixture(_one(tmp_path / "a.jsonl.gz", held_out_share=1e-9), 0, "held_out"))


@pytest.mark.parametrize(("source", "message"), [
    ({"kind": "dolma", "paths": ["absent/*.gz"]}, "source bad: no file matches 'absent/*.gz'"),
    ({"kind": "chat", "paths": ["absent.parquet"]}, "source bad: no file matches 'absent.parquet'"),
    ({"kind": "files", "paths": []}, "source bad has no shards: give paths"),
    ({"kind": "dolma"}, "source bad has no shards: give paths or url_list"),
    ({"kind": "chat"}, "source bad has no shards: give paths or repo"),
    ({"kind": "files", "paths": ["folder"]}, "source bad: folder is a folder; say which files in it"),
    ({"kind": "dolma", "paths": ["a.csv"]}, "source bad: a.csv is not a Dolma shard"),
    ({"kind": "dolma", "url_list": "absent.txt"}, "source bad: the list of shards absent.txt is missing"),
    ({"kind": "dolma", "url_list": "empty.txt"}, "source bad: the list of shards empty.txt is empty"),
    ({"kind": "dolma", "url_list": "odd.txt"}, "source bad: ftp://host/a.json.gz, listed in odd.txt, is neither"),
])
def test_sources_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, Any],
                                   message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.csv").touch()
    (tmp_path / "empty.txt").write_text("\n# nothing yet\n")
    (tmp_path / "odd.txt").write_text("ftp://host/a.json.gz\n")
    text = Text.model_validate({"sources": [{"name": "bad"} | source], "mixture": {"bad": 1}})
    with pytest.raises(UserError) as trouble:
        Mixture(text, 0, "train")
    assert str(trouble.value).startswith(message)
    assert "\n" not in str(trouble.value)


def test_list_of_local_shards(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)
    (corpus / "list.txt").write_text("# two of them\nweb/0.json.gz\n\n  web/2.json.gz  \nweb/0.json.gz\n")
    text = Text.model_validate({"sources": [{"kind": "dolma", "name": "web", "url_list": "list.txt"}],
                                "mixture": {"web": 1}, "held_out_share": 0})
    assert {d.id.split("-")[1] for d in Mixture(text, 0, "train")} == {"0", "2"}


def test_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("bracketed")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xff")
    assert [d.text for d in Mixture(_one(tmp_path / "a[1].txt", "files"), 0, "train")] == ["bracketed"]
    with pytest.raises(UserError, match=r"1 of 1 rows are malformed.*bad\.txt:1: not UTF-8"):
        list(Mixture(_one(tmp_path / "bad.txt", "files"), 0, "train"))


def test_shards_are_fetched_when_they_are_read(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from olmoscope.text import sources

    fetched = []

    def fetch(address: str) -> Path:
        fetched.append(address)
        return corpus / "web" / address.rsplit("/", 1)[1]

    (corpus / "urls.txt").write_text("".join(f"https://example.org/v1/{n}.json.gz\n" for n in range(4)))
    monkeypatch.setattr(sources, "fetch", lambda address: Path(address) if address.endswith(".txt") else fetch(address))
    text = Text.model_validate({"sources": [{"kind": "dolma", "name": "web", "url_list": str(corpus / "urls.txt")}],
                                "mixture": {"web": 1}, "held_out_share": 0})
    mixture = Mixture(text, 0, "train")
    assert fetched == []
    for _ in range(15):
        next(mixture)
    assert len(fetched) == 1
    assert len(_order(mixture)) == 45
    assert len(fetched) == len(set(fetched)) == 4
