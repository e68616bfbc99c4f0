"""A Hugging Face hub on this machine, for tests: folders served as model and dataset repositories.

    with HubEndpoint() as hub:
        hub.add("model", "someone/some-saes", folder)
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path / "hf"), check=True)

or, with the fixture of conftest.py, `def test_x(hub_endpoint, tmp_path): hub_endpoint.add(...)`.

The libraries read `HF_ENDPOINT` when they are imported, so what talks to the endpoint runs in a process of its own,
started with `environment(cache)`: the endpoint's address, a cache folder of its own, no token, no telemetry.

Served: repository information, file trees, `paths-info`, and files (HEAD and GET with `Range`) at
`/[datasets/]OWNER/NAME/resolve/REVISION/FILE`, with the headers that the libraries rely on (`ETag`, `X-Repo-Commit`,
and `X-Error-Code` on a 404). The one revision is `main`, whose commit is `COMMIT`. Files may be added to a folder
while it is served. `hub.requests` lists what was asked for, as `METHOD /path`.
"""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Kind = Literal["model", "dataset"]


class HubEndpoint:
    """The server; a context manager. `url` is its address."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.repositories: dict[tuple[str, str], Path] = {}
        endpoint = self

        class Handler(_Handler):
            hub = endpoint

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubEndpoint":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, kind: Kind, name: str, folder: Path) -> None:
        """Serve `folder` as the repository `name` (`OWNER/NAME`)."""
        self.repositories[f"{kind}s", name] = folder

    def environment(self, cache: Path) -> dict[str, str]:
        """The environment of a process that takes this server for the hub and `cache` for its Hugging Face home."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return inherited | {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1",
                            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class _Handler(BaseHTTPRequestHandler):
    hub: HubEndpoint
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `hub.requests` is the log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind = parts.pop(0) if parts[0] in ("datasets", "models") else "models"
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.hub.repositories.get((kind, name))
        if folder is None:
            return self._missing("RepoNotFound")
        action, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        path = "/".join(rest[2:])
        if revision not in ("main", COMMIT):
            return self._missing("RevisionNotFound")
        if not is_api:
            return self._file(folder, path) if action in ("resolve", "raw") else self._missing("EntryNotFound")
        if action == "revision":
            return self._json(_info(folder, name))
        if action == "tree":
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            if path and not (folder / path).is_dir():
                return self._missing("EntryNotFound")
            found = (folder / path).rglob("*") if recursive else (folder / path).iterdir()
            return self._json([_entry(folder, entry) for entry in sorted(found)])
        if action == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return self._json([_entry(folder, folder / each) for each in wanted if each and (folder / each).exists()])
        self._missing("EntryNotFound")

    def _file(self, folder: Path, path: str) -> None:
        file = (folder / path).resolve()
        if not file.is_relative_to(folder.resolve()) or not file.is_file():
            return self._missing("EntryNotFound")
        content = file.read_bytes()
        start, stop, status = 0, len(content), 200
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(content) - int(last))
            stop = min(len(content), int(last) + 1) if first and last else len(content)
            status = 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self._finish(content[start:stop], "application/octet-stream")

    def _json(self, value: Any) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self._finish(json.dumps(value).encode(), "application/json")

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        if code == "EntryNotFound":
            self.send_header("X-Repo-Commit", COMMIT)
        self._finish(json.dumps({"error": code}).encode(), "application/json")

    def _finish(self, body: bytes, content_type: str) -> None:
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _info(folder: Path, name: str) -> dict[str, Any]:
    siblings = [{"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
                for entry in (_entry(folder, path) for path in sorted(folder.rglob("*")))
                if entry["type"] == "file"]
    return {"_id": "0" * 24, "id": name, "modelId": name, "author": name.split("/")[0], "sha": COMMIT,
            "createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z", "private": False,
            "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    content = path.read_bytes()
    return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
