"""Reading an index: records, windows, the list; damage is noticed."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from feature_index import small_index
from olmoscope.errors import UserError
from olmoscope.features import delphi
from olmoscope.features.read import FeatureIndex, find_indexes
from olmoscope.features.table import Filters


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return small_index(tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def index(path):
    return FeatureIndex(path)


def test_finds_indexes(path):
    assert find_indexes(path) == [path]
    assert find_indexes(path.parents[4]) == [path]
    with pytest.raises(UserError, match="holds no feature index"):
        find_indexes(path.parents[4] / "store")


def test_window_is_the_text_around_an_example(index):
    feature = index.feature(int(index.order("rows")[0]))
    places, values = index.firing_values(feature.index)
    dense = np.zeros(index.info.tokens, np.float32)
    dense[places] = values
    for example in feature.top + feature.random + [one for interval in feature.intervals for one in interval.examples]:
        assert example == index.example(feature.index, example.place)
        for window in (index.window(example), index.context(example, 3, 0), index.context(example, 10**6, 10**6)):
            stop = window.start + len(window.tokens)
            assert window.start + window.at == example.place
            assert window.activations[window.at] == example.value
            assert window.activations == dense[window.start : stop].tolist()
            assert [token.id for token in window.tokens] == index.corpus.tokens_T[window.start : stop].tolist()
            starts = index.corpus.sequences_S1
            assert starts[window.sequence] + window.position == window.start
            assert window.more_before == (window.position > 0)
            assert window.more_after == (stop < starts[window.sequence + 1])
        assert not window.more_before and not window.more_after


def test_list_is_sorted_filtered_searched_and_paged(index):
    order = index.order("max", descending=False)
    assert sorted(order) == list(range(512))
    lines = [line for start in range(0, 512, 100) for line in index.table("max", False, offset=start, limit=100).lines]
    assert [line.feature for line in lines] == order.tolist()
    assert [line.max for line in lines] == sorted(line.max for line in lines)
    alive = index.table(filters=Filters(dead=False), limit=1000)
    assert alive.total == 512 - index.info.dead == len(alive.lines)
    assert all(line.rows and line.density == line.rows / index.info.rows for line in alive.lines)
    some = Filters(min_density=0.01, max_density=0.05, min_max=1, max_max=100, besides=[3], among=range(400))
    assert index.order("feature", False, some).tolist() == [
        line.feature for line in sorted(lines, key=lambda line: line.feature)
        if 0.01 <= line.density <= 0.05 and 1 <= line.max <= 100 and line.feature != 3 and line.feature < 400]
    token = alive.lines[0].tokens[0]
    preferring = index.table(filters=Filters(token=token.upper()), limit=600).lines
    assert [line.feature for line in preferring] == [
        line.feature for line in index.table(limit=600).lines if token.lower() in "\n".join(line.tokens).lower()]
    found = index.table(search=token.upper(), limit=600, also=[511])
    assert {alive.lines[0].feature, 511} <= {line.feature for line in found.lines}
    assert all(line.feature == 511 or token.lower() in "\n".join(line.tokens + line.promoted).lower()
               for line in found.lines)


def test_hostile_searches_are_only_text(index):
    for search in ("'; DROP TABLE lines; --", "%", "_", "\0", "\\", "\n", "🙂", "\u202e", "a" * 10_000):
        index.table(search=search, filters=Filters(token=search, promoted=search))
    assert index.table().total == 512


def test_no_such_feature_or_place(index):
    for feature in (-1, 512):
        with pytest.raises(IndexError, match="features 0 to 511"):
            index.feature(feature)
    with pytest.raises(IndexError, match="the corpus has 3000 tokens"):
        index.example(0, 3000)


def test_damage_is_said_in_one_line(path, tmp_path):
    for number, (name, change, message) in enumerate((
            ("corpus/tokens.npy", lambda file: file.unlink(), "tokens.npy is damaged .it is missing"),
            ("features.parquet", lambda file: file.write_bytes(b"short"), "features.parquet is damaged .it has 5"),
            ("manifest.json", lambda file: file.write_text("{"), "manifest.json is damaged"),
            ("manifest.json", lambda file: file.write_text("{}"), "is not the manifest of a feature index"),
            ("manifest.json", lambda file: file.unlink(), "holds no feature index"),
            ("manifest.json", lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2})),
             "has index format 2"),
            ("manifest.json", lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"rows": "x"})),
             "manifest.json is damaged: rows"))):
        copy = tmp_path / str(number)
        shutil.copytree(path, copy)
        change(copy / name)
        with pytest.raises(UserError, match=message):
            FeatureIndex(copy)


def test_a_changed_byte_is_found_by_verify(path, tmp_path):
    shutil.copytree(path, tmp_path / "copy")
    part = tmp_path / "copy" / "features" / "part-000000.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match="its checksum differs"):
        FeatureIndex(tmp_path / "copy").verify()


def test_delphis_cache_has_every_firing_in_its_windows(index, tmp_path, monkeypatch):
    """tests/foreign/read_back.py has Delphi itself read one."""
    monkeypatch.setattr(delphi, "SPLIT_FIRINGS", index.info.firings // 3 + 1)
    stale = tmp_path / "latents" / str(index.info.sae.site) / "0_511.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier export")
    made = delphi.write_delphi(index, tmp_path, 64)
    assert made.folder == tmp_path / "latents" / str(index.info.sae.site)
    config = json.loads((made.folder / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_splits"], config["n_tokens"]) == (64, 3, 64 * made.windows)
    files = sorted(made.folder.glob("*.safetensors"), key=lambda path: int(path.name.partition("_")[0]))
    assert [file.stem for file in files] == ["0_169", "170_340", "341_511"]
    starts = [start for first, last in zip(index.corpus.sequences_S1[:-1], index.corpus.sequences_S1[1:], strict=True)
              for start in range(first, last - 63, 64)]
    found = 0
    for file in files:
        there, first = load_file(file), int(file.name.partition("_")[0])
        assert there["tokens"].dtype == np.int64 and there["activations"].dtype == np.float16
        assert there["locations"].dtype == np.uint16
        assert there["tokens"].tolist() == [index.corpus.tokens_T[start : start + 64].tolist() for start in starts]
        found += len(there["activations"])
        for (window, position, latent), value in list(zip(there["locations"].tolist(), there["activations"].tolist(),
                                                          strict=True))[::97]:
            example = index.example(first + latent, starts[window] + position)
            assert value == float(np.float16(example.value)) > 0
    in_windows = np.zeros(index.info.tokens, bool)
    for start in starts:
        in_windows[start : start + 64] = True
    wanted = sum(int(in_windows[index.firing_values(feature)[0]].sum()) for feature in range(index.info.sae.d_sae))
    assert found == made.firings == wanted and made.left_out == index.info.firings - wanted
    assert delphi.write_delphi(index, tmp_path).left_out < made.left_out
    with pytest.raises(UserError, match="and a window 32000: index a longer text, or give a shorter --win"):
        delphi.write_delphi(index, tmp_path, 32_000)
    with pytest.raises(UserError, match="--window 48: Delphi's examples have 32 tokens, so a window has a multiple"):
        delphi.write_delphi(index, tmp_path, 48)
