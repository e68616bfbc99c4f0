"""Downloads: from a server that demands our user agent, cuts connections, and lies."""

import errno
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import run_forked
from hub_endpoint import HubEndpoint
from olmoscope.errors import UserError
from olmoscope.text import download, hub_files

CONTENT = b"".join(hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(30_000))


class Server:
    """Serves `content` at every path, with the faults that a test asks for."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.cuts: list[int] = []
        """For each coming answer, the bytes after which the connection is cut."""
        self.statuses: list[int] = []
        """For each coming answer, a status to refuse with."""
        self.boast = 0
        """Bytes that are announced and do not exist."""
        self.ranges = True
        self.length = True
        self.pause = 0.0
        """Seconds to wait after each 64 KiB."""
        self.asked: list[tuple[str, str | None]] = []
        """Path and `Range` of each request."""
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.asked.append((request.path, asked))
        if not re.fullmatch(r"olmoscope/[\d.]+", request.headers.get("User-Agent", "")):
            return request.send_error(403)
        if self.statuses:
            return request.send_error(self.statuses.pop(0))
        start, total = 0, len(self.content) + self.boast
        condition = request.headers.get("If-Range")
        if asked and self.ranges and condition in (None, self.etag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.content):
                return request.send_error(416)
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            request.send_response(200)
        if self.length:
            request.send_header("Content-Length", str(total - start))
        if self.etag:
            request.send_header("ETag", self.etag)
        request.end_headers()
        body = self.content[start:]
        if self.cuts:
            body = body[: self.cuts.pop(0)]
        for at in range(0, len(body), 1 << 16):
            try:
                request.wfile.write(body[at: at + (1 << 16)])
            except ConnectionError:  # the client was killed
                return
            time.sleep(self.pause)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("OLMOSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "_WAITS", (0.0,) * 4)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def _parts(cache: Path) -> list[Path]:
    return list(cache.rglob("*.part"))


def test_fetches_once(server: Server, tmp_path: Path) -> None:
    path = download.fetch(f"{server.url}/v1/shard-0000.json.gz")
    assert path.read_bytes() == CONTENT
    assert path.name == "shard-0000.json.gz"
    assert path.is_relative_to(tmp_path / "cache")
    assert download.fetch(f"{server.url}/v1/shard-0000.json.gz") == path
    assert len(server.asked) == 1
    assert not list(path.parent.glob("*.part*"))


def test_same_name_elsewhere_is_another_file(server: Server) -> None:
    first = download.fetch(f"{server.url}/a/shard.json.gz")
    assert download.fetch(f"{server.url}/b/shard.json.gz") != first
    assert download.fetch(f"{server.url}/a/shard.json.gz?v=2") != first


def test_local_paths_stay_as_they_are() -> None:
    assert download.fetch("corpus/a.json.gz") == Path("corpus/a.json.gz")


def test_goes_on_where_connections_were_cut(server: Server) -> None:
    server.cuts = [100_000, 0, 250_000, 1]
    assert download.fetch(f"{server.url}/shard.json.gz").read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", "bytes=100000-", "bytes=350000-",
                                                    "bytes=350001-"]


def test_starts_over_where_the_server_cannot_resume(server: Server) -> None:
    server.ranges = False
    server.cuts = [100_000, 300_000]
    assert download.fetch(f"{server.url}/shard.json.gz").read_bytes() == CONTENT


def test_starts_over_where_the_file_has_changed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.cuts = [100_000]
    server.statuses = []
    monkeypatch.setattr(download, "_WAITS", ())
    with pytest.raises(UserError, match="closed at 100000 of 960000 bytes"):
        download.fetch(f"{server.url}/shard.json.gz")
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert download.fetch(f"{server.url}/shard.json.gz").read_bytes() == CONTENT[::-1]


def test_without_a_validator_the_size_must_agree(server: Server) -> None:
    server.etag = None
    server.cuts = [100_000]
    assert download.fetch(f"{server.url}/same.json.gz").read_bytes() == CONTENT
    server.cuts = [100_000]
    original = server.answer

    def shrink(request: Any) -> None:
        original(request)
        server.content = CONTENT[:500_000]

    server.answer = shrink  # type: ignore[method-assign]
    assert download.fetch(f"{server.url}/other.json.gz").read_bytes() == CONTENT[:500_000]


def test_unknown_length_is_taken_as_it_ends(server: Server) -> None:
    server.length = False
    assert download.fetch(f"{server.url}/shard.json.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_size_that_is_never_reached(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.boast = 1000
    server.ranges = ranges
    with pytest.raises(UserError, match=r"cannot download http://127.*shard\.json\.gz: .*run the same command again"):
        download.fetch(f"{server.url}/shard.json.gz")
    assert len(server.asked) < 15
    assert not list((tmp_path / "cache").rglob("shard.json.gz"))


def test_passing_faults_are_retried(server: Server) -> None:
    server.statuses = [503, 429, 500]
    assert download.fetch(f"{server.url}/shard.json.gz").read_bytes() == CONTENT


def test_refusals_are_final(server: Server) -> None:
    server.statuses = [404]
    with pytest.raises(UserError, match=r"gone\.json\.gz: the server answers 404 Not Found; check the address"):
        download.fetch(f"{server.url}/gone.json.gz")
    assert len(server.asked) == 1


def test_python_itself_would_be_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "USER_AGENT", "Python-urllib/3.11")
    with pytest.raises(UserError, match="403"):
        download.fetch(f"{server.url}/shard.json.gz")


def test_no_network(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match=r"cannot download http://127.*: no network, or the server does not answer"):
        download.fetch(f"{server.url}/shard.json.gz")


@pytest.mark.parametrize("good_syncs", [0, 2])
def test_no_room(server: Server, monkeypatch: pytest.MonkeyPatch, good_syncs: int) -> None:
    syncs = iter(range(good_syncs))

    def full(_: int) -> None:
        if next(syncs, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"[Nn]o space left on"):
        download.fetch(f"{server.url}/shard.json.gz")


def test_cache_that_cannot_be_written(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OLMOSCOPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set OLMOSCOPE_CACHE to another folder"):
        download.fetch(f"{server.url}/shard.json.gz")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OLMOSCOPE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert download.cache_folder() == tmp_path / "olmoscope"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert download.cache_folder() == Path("/home/someone/.cache/olmoscope")


def _start(url: str) -> subprocess.Popen[str]:
    code = "import sys; from olmoscope.text.download import fetch; print(fetch(sys.argv[1]))"
    return subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            text=True)


def test_killed_download_resumes(server: Server, tmp_path: Path) -> None:
    server.pause = 0.05
    process = _start(f"{server.url}/shard.json.gz")
    deadline = time.monotonic() + 20
    while not any(part.stat().st_size > 200_000 for part in _parts(tmp_path / "cache")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.pause = 0.0
    assert download.fetch(f"{server.url}/shard.json.gz").read_bytes() == CONTENT
    _, asked = server.asked[-1]
    assert asked is not None
    assert int(asked.removeprefix("bytes=").removesuffix("-")) >= 200_000


def test_two_processes_share_one_download(server: Server) -> None:
    server.pause = 0.03
    processes = [_start(f"{server.url}/shard.json.gz") for _ in range(3)]
    paths = {process.communicate(timeout=30)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert Path(paths.pop()).read_bytes() == CONTENT
    assert not paths
    assert len(server.asked) == 1


def test_hub_files(hub_endpoint: HubEndpoint, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for name in ("data/train-1.parquet", "data/train-0.parquet", "README.md", "urls/list.txt"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(f"content of {name}")
    hub_endpoint.add("dataset", "someone/chats", repository)
    code = """
import json
from olmoscope.errors import UserError
from olmoscope.text import hub_files
from olmoscope.text.download import fetch

def trouble(action, *arguments):
    try:
        action(*arguments)
    except UserError as error:
        return str(error)

base = "hf://datasets/someone/chats"
print(json.dumps([
    hub_files.matching("someone/chats", None, "data/*.parquet"),
    [fetch(f"{base}/urls/list.txt").read_text(), fetch(f"{base}@main/urls/list.txt").read_text()],
    trouble(fetch, f"{base}/absent.txt"),
    trouble(fetch, f"{base}@v9/README.md"),
    trouble(fetch, "hf://datasets/someone/nothing/README.md"),
    trouble(hub_files.matching, "someone/nothing", None, "*"),
    trouble(fetch, "hf://someone/chats/README.md"),
    trouble(hub_files.matching, "some one/chats", None, "*"),
]))
"""
    environment = hub_endpoint.environment(tmp_path / "hf") | {"OLMOSCOPE_CACHE": str(tmp_path / "cache")}
    done = run_forked(environment=environment, hub=True, code=code)
    assert done.returncode == 0, done.stderr
    listed, contents, no_file, no_revision, no_repository, no_listing, no_kind, no_name = json.loads(done.stdout)
    assert listed == [f"hf://datasets/someone/chats/data/train-{i}.parquet" for i in (0, 1)]
    assert contents == ["content of urls/list.txt"] * 2
    assert "absent.txt: someone/chats has no file absent.txt" in no_file
    assert "someone/chats has no revision 'v9'" in no_revision
    assert "the hub has no such dataset" in no_repository
    assert "the hub has no such dataset" in no_listing
    assert "is not of the form hf://datasets/OWNER/NAME/FILE" in no_kind
    assert "some one/chats" in no_name

    offline = environment | {"HF_HUB_OFFLINE": "1"}
    code = """
from olmoscope.text.download import fetch
from olmoscope.text.hub_files import matching
print(fetch("hf://datasets/someone/chats/urls/list.txt").read_text())
print(len(matching("someone/chats", None, "data/*.parquet")))  # as the hub said when it was asked
fetch("hf://datasets/someone/chats/README.md")
"""
    done = run_forked(environment=offline, hub=True, code=code)
    assert done.stdout == "content of urls/list.txt\n2\n"
    assert "UserError: hf://datasets/someone/chats/README.md: it is not in the hub's cache" in done.stderr


def test_hub_that_does_not_answer() -> None:
    from huggingface_hub import errors

    no_answer = errors.HfHubHTTPError.__bases__[0]
    with pytest.raises(UserError, match="the address: no network: "), hub_files.explained("the address", "a/b", None):
        raise no_answer("[Errno 111] Connection refused")
