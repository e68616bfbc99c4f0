"""A Hugging Face hub on this machine, for tests: folders served as model and dataset repositories.

    with HubEndpoint() as hub:
        hub.add("model", "someone/some-saes", folder)
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path / "hf"), check=True)

or, with the fixture of conftest.py, `def test_x(hub_endpoint, tmp_path): hub_endpoint.add(...)`.

The libraries read `HF_ENDPOINT` when they are imported, so code that talks to the endpoint runs in a process of its
own, started with `environment(cache)`: the endpoint's address, a cache folder of its own, no token, no telemetry.

Like the real hub, it serves repository information, file trees, `paths-info`, and files (HEAD and GET with `Range`) at
`/[datasets/]OWNER/NAME/resolve/REVISION/FILE`, with the headers that the libraries rely on (`ETag`, `X-Repo-Commit`,
`X-Linked-Size` and `X-Linked-ETag`, `X-Error-Code` and `X-Error-Message`). Large kinds of files (`LFS`) are redirected
to another path. Files may be added to a folder while it is served. A client with a token may make repositories, upload
and tag (hub_uploads.py). `hub.requests` lists the requests, as `METHOD /path`. Further:

    hub.add("model", name, other, commit=NEXT)      the branch `main` moves to another commit; the old one stays
    hub.add("model", name, folder, revision="v1")   a tag or another branch
    hub.close("model", name, "gated")               401 without a token, 403 with one; also "private" and "disabled"
    hub.troubles.append(Trouble("model.safetensors", after=100))    see `Trouble`
"""

import hashlib
import json
import os
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_uploads import Uploads

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEXT = "89abcdef0123456789abcdef0123456789abcdef"
Kind = Literal["model", "dataset"]
Closed = Literal["gated", "private", "disabled"]
LFS = (".safetensors", ".parquet", ".bin")
"""Suffixes of files that the hub stores elsewhere."""


@dataclass
class Trouble:
    """A fault for files whose path matches.

    Attributes:
        path: a regular expression, searched for in the requested path.
        after: bytes of an answer after which the connection is cut; None: it is not cut.
        seconds: seconds to wait before each answer.
        status: the status to answer with, instead of the file.
        times: how often it happens before all is well again.
    """

    path: str
    after: int | None = None
    seconds: float = 0.0
    status: int | None = None
    times: int = 1_000_000


@dataclass
class Repository:
    """A repository: the content of each commit, and where branches and tags point."""

    folders: dict[str, Path] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    closed: Closed | None = None


class HubEndpoint:
    """The server; a context manager. `url` is its address."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.troubles: list[Trouble] = []
        self.uploads = Uploads()
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
        self.uploads.close()

    def add(self, kind: Kind, name: str, folder: Path, *, revision: str = "main", commit: str = COMMIT) -> None:
        """Serve `folder` as a commit of the repository `name` (`OWNER/NAME`), and let `revision` point to it."""
        repository = self.repositories.setdefault((f"{kind}s", name), Repository())
        repository.folders[commit] = folder
        repository.references[revision] = commit

    def close(self, kind: Kind, name: str, how: Closed | None) -> None:
        """Close a repository to all readers or (None) open it again."""
        self.repositories[f"{kind}s", name].closed = how

    def environment(self, cache: Path) -> dict[str, str]:
        """The environment of a process that takes this server for the hub and `cache` for its Hugging Face home."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return inherited | {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1",
                            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class _Handler(BaseHTTPRequestHandler):
    hub: HubEndpoint
    protocol_version = "HTTP/1.1"
    commit: str | None = None
    cut_after: int | None = None

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `hub.requests` is the log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        """A large file, sent to the address from the batch request."""
        self.hub.requests.append(f"{self.command} {self.path}")
        self.cut_after = None
        path = urlsplit(self.path).path
        if self._trouble(path):
            return
        if self.cut_after is not None:  # the connection ends before everything is read
            self.rfile.read(self.cut_after)
            self.connection.close()
            self.close_connection = True
            return
        self.hub.uploads.objects[path.rpartition("/")[2]] = self._body()
        self._json({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, body: bytes = b"") -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        self.commit = self.cut_after = None
        path = unquote(urlsplit(self.path).path)
        if self._trouble(path):
            return
        parts = path.strip("/").split("/")
        if self.command == "POST" and (parts[-1] in ("create", "validate-yaml", "batch")
                                       or parts[4:5] in (["preupload"], ["commit"], ["tag"])):
            return self._take(parts, body)
        is_api, is_elsewhere = parts[0] == "api", parts[0] == "elsewhere"
        parts = parts[1:] if is_api or is_elsewhere else parts
        kind = parts.pop(0) if parts[0] in ("datasets", "models") else "models"
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get((kind, name))
        if repository is None or repository.closed == "private":
            # The hub's answer to clients without access, so that they do not learn whether it exists.
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        action, revision = (rest[0], rest[1]) if len(rest) > 1 else ("refs" if rest == ["refs"] else "revision", "main")
        if repository.closed == "disabled":
            return self._refuse(403, None, "Access to this resource is disabled.")
        if repository.closed == "gated" and not is_api:
            return self._gated(name)
        commit = repository.references.get(revision, revision)
        if commit not in repository.folders:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        self.commit, folder, path = commit, repository.folders[commit], "/".join(rest[2:])
        if is_elsewhere:
            return self._file(folder, path)
        if not is_api:
            return self._resolve(folder, path, f"/elsewhere/{kind}/{name}/{action}/{commit}/{quote(path)}")
        if action == "revision":
            return self._json(_info(folder, name, commit))
        if action == "tree":
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            if path and not (folder / path).is_dir():
                return self._no_entry()
            found = (folder / path).rglob("*") if recursive else (folder / path).iterdir()
            return self._json([_entry(folder, entry) for entry in sorted(found)])
        if action == "refs":
            references = [{"name": name, "ref": f"refs/{name}", "targetCommit": to}
                          for name, to in repository.references.items()]
            tags = [one for one in references if one["name"] in repository.tags]
            return self._json({"branches": [one for one in references if one not in tags], "tags": tags,
                               "converts": []})
        if action == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return self._json([_entry(folder, folder / each) for each in wanted if each and (folder / each).exists()])
        self._no_entry()

    def _take(self, parts: list[str], body: bytes) -> None:
        """Handle an upload."""
        if "Authorization" not in self.headers:
            return self._refuse(401, None, "Invalid username or password.")
        if parts[-1] == "validate-yaml":  # of a card
            return self._json({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            commit, folder = self.hub.uploads.empty()
            self.hub.add("model", name, folder, commit=commit)
            return self._json({"url": f"{self.hub.url}/{name}"})
        if parts[-1] == "batch":
            return self._json(self.hub.uploads.batch(body, f"{self.hub.url}/objects"))
        name, action, revision = "/".join(parts[2:4]), parts[4], parts[5]
        repository = self.hub.repositories["models", name]
        parent = repository.references.get(revision, revision)
        if action == "preupload":
            return self._json({"files": [{"path": file["path"], "shouldIgnore": False,
                                          "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular"}
                                         for file in json.loads(body)["files"]]})
        if action == "tag":
            tag = json.loads(body)["tag"]
            repository.tags.add(tag)
            repository.references[tag] = parent
            return self._json({})
        commit, folder = self.hub.uploads.commit(body, repository.folders[parent])
        self.hub.add("model", name, folder, commit=commit)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def _trouble(self, path: str) -> bool:
        """Wait, or note that this answer is to be cut; True if it was answered already."""
        for trouble in self.hub.troubles:
            if trouble.times > 0 and re.search(trouble.path, path):
                trouble.times -= 1
                time.sleep(trouble.seconds)
                self.cut_after = trouble.after
                if trouble.status is not None:
                    self._refuse(trouble.status, None, "trouble")
                    return True
        return False

    def _resolve(self, folder: Path, path: str, elsewhere: str) -> None:
        file = (folder / path).resolve()
        if not file.is_relative_to(folder.resolve()) or not file.is_file():
            return self._no_entry()
        if not path.endswith(LFS):
            return self._file(folder, path)
        self.send_response(302)
        self.send_header("Location", self.hub.url + elsewhere)
        self.send_header("X-Repo-Commit", str(self.commit))
        self.send_header("X-Linked-Size", str(file.stat().st_size))
        self.send_header("X-Linked-ETag", f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"')
        self._finish(b"Found. Redirecting", "text/plain")

    def _file(self, folder: Path, path: str) -> None:
        content = (folder / path).read_bytes()
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
        self.send_header("X-Repo-Commit", str(self.commit))
        self.send_header("Accept-Ranges", "bytes")
        self._finish(content[start:stop], "application/octet-stream")

    def _json(self, value: Any) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", str(self.commit))
        self._finish(json.dumps(value).encode(), "application/json")

    def _gated(self, name: str) -> None:
        where = f"Access to model {name} is restricted"
        if "Authorization" in self.headers:
            self._refuse(403, "GatedRepo", f"{where} and you are not in the authorized list.")
        else:
            self._refuse(401, "GatedRepo", f"{where}. You must have access to it and be authenticated to access it.")

    def _no_entry(self) -> None:
        self._refuse(404, "EntryNotFound", "Entry not found")

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if self.commit is not None:
            self.send_header("X-Repo-Commit", self.commit)
        self._finish(json.dumps({"error": message}).encode(), "application/json")

    def _finish(self, body: bytes, content_type: str) -> None:
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:self.cut_after])
            if self.cut_after is not None and self.cut_after < len(body):
                self.close_connection = True


def _info(folder: Path, name: str, commit: str) -> dict[str, Any]:
    siblings = [{"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
                for entry in (_entry(folder, path) for path in sorted(folder.rglob("*")))
                if entry["type"] == "file"]
    return {"_id": "0" * 24, "id": name, "modelId": name, "author": name.split("/")[0], "sha": commit,
            "createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z", "private": False,
            "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it
    entry = {"type": "file", "path": name, "oid": blob, "size": len(content)}
    if name.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
