"""The half of the hub on this machine (hub_endpoint.py) that accepts uploads: new repositories, commits, tags.

As the real hub does for clients without Xet: a client asks which files are large (`preupload`), sends those by the LFS
batch interface (an object that is there is not asked for again), and posts a commit of lines of JSON.
"""

import base64
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any


class Uploads:
    """The uploads: objects by their SHA-256, and a folder for each commit."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self.objects: dict[str, bytes] = {}

    def close(self) -> None:
        """Remove the commits' folders."""
        self._scratch.cleanup()

    def empty(self) -> tuple[str, Path]:
        """The first commit of a new repository, as the hub makes it."""
        folder = Path(tempfile.mkdtemp(dir=self._scratch.name))
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        return _commit_of(folder), folder

    def batch(self, body: bytes, address: str) -> dict[str, Any]:
        """Where to send each object that is not there yet."""
        objects = []
        for wanted in json.loads(body)["objects"]:
            there = wanted["oid"] in self.objects
            objects.append(wanted | ({} if there else {"actions": {"upload": {"href": f"{address}/{wanted['oid']}"}}}))
        return {"transfer": "basic", "objects": objects}

    def commit(self, body: bytes, parent: Path) -> tuple[str, Path]:
        """A copy of the parent with the operations of a commit applied."""
        folder = Path(tempfile.mkdtemp(dir=self._scratch.name)) / "commit"
        shutil.copytree(parent, folder)
        for line in body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                continue
            path = folder / value["path"]
            if kind == "deletedFile":
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(value["content"]) if kind == "file" else self.objects[value["oid"]])
        return _commit_of(folder), folder


def _commit_of(folder: Path) -> str:
    """A name of 40 digits: no two commits have the same folder."""
    return hashlib.sha1(str(folder).encode()).hexdigest()
