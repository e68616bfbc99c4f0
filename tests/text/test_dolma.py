"""Dolma shards: every compression, from any line on, and damage that is not mistaken for text."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import zstandard

from olmoscope.errors import UserError
from olmoscope.text import dolma
from olmoscope.text.row import Malformed, Row

LINES = [json.dumps({"id": f"doc-{i}", "text": f"Text {i} – ünïcode\nwith lines " + "x" * (i * 97 % 400)})
         for i in range(300)]
CONTENT = ("\n".join(LINES) + "\n").encode()
EXPECTED = [Row(json.loads(line)["id"], json.loads(line)["text"]) for line in LINES]


def _zstd(content: bytes) -> bytes:
    # Two frames, as parallel compressors write them.
    half = len(content) // 2 + 7
    return b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".json.gz": gzip.compress, ".jsonl.gz": gzip.compress, ".json": bytes, ".jsonl": bytes,
    ".zst": _zstd, ".jsonl.zst": _zstd, ".json.zst": _zstd,
}


def _rows(path: Path, start: int = 0) -> list[Row | Malformed]:
    return list(dolma.read(path, path.name, start))


def test_every_suffix_is_tested() -> None:
    assert set(COMPRESS) == set(dolma.SUFFIXES)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_reads_every_compression_from_any_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(COMPRESS[suffix](CONTENT))
    assert _rows(path) == EXPECTED
    for start in (1, 150, 299, 300, 301):
        assert _rows(path, start) == EXPECTED[start:]


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".zst"])
def test_last_line_may_lack_its_newline(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(COMPRESS[suffix](CONTENT.rstrip(b"\n")))
    assert _rows(path) == EXPECTED


def test_line_longer_than_any_buffer(tmp_path: Path) -> None:
    text = "long " * 200_000
    path = tmp_path / "long.zst"
    path.write_bytes(zstandard.compress(json.dumps({"text": text}).encode() + b"\n" + CONTENT))
    assert _rows(path) == [Row("long.zst:1", text), *EXPECTED]


@pytest.mark.parametrize(("line", "reason"), [
    (b'{"text": "cut', "not JSON"),
    (b'{"id": "no text"}', "no key `text` (it has id)"),
    (b'{"text": null}', "text is missing"),
    (b'{"text": 3}', "text is of type int"),
    (b'{"text": ["a"]}', "text is of type list"),
    (b'{"text": "a", "id": 1.5}', "id is of type float"),
    (b'["text"]', "not a JSON object"),
    (b'{"text": "\xff\xfe"}', "not UTF-8"),
    (b'{"text": "half a pair: \\ud800"}', "not Unicode"),
    (b'{"text": "a", "id": "\\udfff"}', "not Unicode"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": 1' + b"1" * 5000 + b"}", "not JSON"),
])
def test_malformed_lines_are_told_and_passed_over(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, bad, after = _rows(path)
    assert (before, after) == (Row("shard.jsonl:1", "before"), Row("shard.jsonl:3", "after"))
    assert isinstance(bad, Malformed)
    assert bad.reason.startswith(reason)


def test_ids_are_texts_and_never_empty(tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_text('{"text": "a", "id": 7}\n\n{"text": "b", "id": ""}\n{"text": "c", "id": null}\n')
    assert _rows(path) == [Row("7", "a"), Row("shard.jsonl:2", ""),
                           Row("shard.jsonl:3", "b"), Row("shard.jsonl:4", "c")]


@pytest.mark.parametrize("suffix", [".json.gz", ".jsonl.zst"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_shard_that_breaks_off(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut{suffix}"
    # Text that hardly compresses, so that the cut falls among the lines.
    random = Random(0)
    lines = [json.dumps({"id": str(i), "text": random.randbytes(1000).hex()}) for i in range(400)]
    whole = COMPRESS[suffix](("\n".join(lines) + "\n").encode())
    path.write_bytes(whole[: int(len(whole) * share)])
    *rows, last = _rows(path)
    assert [row.id for row in rows if isinstance(row, Row)] == [str(i) for i in range(len(rows))]
    assert isinstance(last, Malformed)
    assert "the rest of it is lost" in last.reason
    assert _rows(path, len(rows)) == [last]


def test_wrong_checksum_is_told(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(CONTENT))
    content[-6] ^= 1
    path = tmp_path / "shard.json.gz"
    path.write_bytes(content)
    *rows, last = _rows(path)
    assert rows == EXPECTED
    assert isinstance(last, Malformed)


@pytest.mark.parametrize("suffix", [".json.gz", ".zst"])
def test_shard_of_another_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_text("<html>please log in</html>")
    with pytest.raises(UserError, match=r"page.* is damaged from its start .*fetch it again"):
        _rows(path)


def test_shard_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*gone\.json\.gz: No such file"):
        _rows(tmp_path / "gone.json.gz")
