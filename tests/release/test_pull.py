"""A pull that fails says why in one line, and leaves nothing but what the next one need not fetch again."""

import json
import re
import shutil
from pathlib import Path

import pytest
from test_push import run

from hub_endpoint import HubEndpoint, Trouble
from olmoscope.errors import UserError
from olmoscope.files import make_folder
from olmoscope.release.push import checked_tag
from release_runs import LAYER_NORM, RAW

GET = "cannot get a release from hub repository"


@pytest.fixture(scope="module")
def told(built, tmp_path_factory):
    """The folder of all pulls; what was said; what the last one said; what was there before; the hub's requests."""
    root = tmp_path_factory.mktemp("pulls")
    release = built / "release"
    for name in ("no-manifest", "other", "damaged"):
        shutil.copytree(release, root / name)
    (root / "no-manifest" / "manifest.json").unlink()
    (root / "other" / "manifest.json").write_text(json.dumps({"format": "another tool's"}))
    (root / "damaged" / RAW / "training.log").write_text("half")
    (root / "mine").mkdir()
    (root / "mine" / "notes.md").write_text("mine")
    (root / "file").write_text("a file")
    shutil.copytree(release, root / "had")
    pulls = [("no/release", "a/b/new"), ("no/release", "mine"), ("no/release", "had"), ("some/saes@v9", "had"),
             ("some/gated", "new"), ("some/forbidden", "new"), ("some/no-manifest", "new"), ("some/other", "mine"),
             ("some/saes", "file"), ("some/saes", "file/new"), ("some/damaged", "half"), ("some/stops", "new"),
             ("some/cut", "cut"), ("some/cut", "cut")]
    with HubEndpoint() as hub:
        for name in ("saes", "gated", "forbidden", "stops", "cut"):
            hub.add("model", f"some/{name}", release)
        for name in ("no-manifest", "other", "damaged"):
            hub.add("model", f"some/{name}", root / name)
        hub.close("model", "some/gated", "gated")
        hub.troubles += [Trouble("some/forbidden/resolve", status=403),
                         Trouble("some/stops/resolve/[^/]*/(?!manifest)", status=403), Trouble(
                             f"some/cut/resolve.*/{RAW}/sae_weights", status=403, times=1)]
        before = _files(root)
        said = run(hub, root / "hf", *(["pull", repo, str(root / folder)] for repo, folder in pulls), token=None)
        requests = list(hub.requests)
    assert all("Traceback" not in text for _, text in said)
    return root, dict(zip(pulls[:-1], said[:-1], strict=True)), said[-1], before, requests


def _files(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_relative_to(root / "hf")}


@pytest.mark.parametrize(("repo", "folder", "message"), [
    ("no/release", "a/b/new", f"{GET} no/release: the hub has no such model, or it is private"),
    ("no/release", "mine", f"{GET} no/release: the hub has no such model, or it is private"),
    ("no/release", "had", f"{GET} no/release: the hub has no such model, or it is private"),
    ("some/saes@v9", "had", f"{GET} some/saes: some/saes has no revision 'v9': see https://"),
    ("some/gated", "new", f"{GET} some/gated: it is gated: accept its licence at https://"),
    ("some/forbidden", "new", f"{GET} some/forbidden: the hub refuses access (status 403): log in with `hf auth "),
    ("some/no-manifest", "new", "some/no-manifest is not an Olmoscope release: it has no manifest.json; `olmoscope "),
    ("some/other", "mine", "some/other is not an Olmoscope release: its manifest.json is another tool's; `olmoscope "),
    ("some/saes", "file", "{root}/file is a file, not a folder; choose another folder"),
    ("some/saes", "file/new", "{root}/file is a file, so there can be no folder {root}/file/new; choose another "),
    ("some/stops", "new", f"{GET} some/stops: the hub refuses access (status 403): log in with `hf auth login`"),
])
def test_what_cannot_be_had_leaves_nothing(told, repo, folder, message):
    """A folder that has a release already is no excuse: huggingface_hub would give that one for any other."""
    root, said, _, before, _ = told
    status, text = said[repo, folder]
    (line,) = [line for line in text.splitlines() if "%|" not in line and line.strip()]
    assert status == 1 and line.startswith(f"error: {message.format(root=root)}"), text
    now = _files(root)
    assert before <= now and not {path for path in now - before if not path.startswith(("cut", "half"))}


def test_files_that_are_whole_stay_and_are_not_fetched_again(told):
    root, said, again, _, requests = told
    status, text = said["some/cut", "cut"]
    assert status == 1 and re.search(rf"; the files that have arrived whole \(\d+\) stay in {root / 'cut'}, and", text)
    assert again[0] == 0 and "2 of 2 SAEs; all files match the manifest" in again[1]
    fetched = [one for one in requests if one.startswith("GET ") and "/some/cut/resolve/" in one]
    for name in (f"{RAW}/training.log", f"{LAYER_NORM}/training.log", f"{LAYER_NORM}/sae_weights.safetensors"):
        assert sum(one.endswith(name) for one in fetched) == 1


def test_files_that_differ_on_the_hub_do_not_stay(told):
    root, said, *_ = told
    status, text = said["some/damaged", "half"]
    assert status == 1
    assert f"some/damaged does not match its own manifest: {RAW}/training.log differ or are missing there; an" in text
    assert "the files that have arrived whole (12) stay in" in text
    there = _files(root / "half")
    assert f"{RAW}/cfg.json" in there and f"{RAW}/training.log" not in there and "manifest.json" not in there


@pytest.mark.parametrize("tag", ["", "a b", "-v", "v..1", "v^", "v.lock", ".v", "a//b", "v/", "@", "v@{1}", "v:1"])
def test_tags_that_git_refuses(tag):
    with pytest.raises(UserError, match="is not a name for a tag: use letters, digits"):
        checked_tag(tag)
    assert checked_tag("release/v1.0-a_b@c") == "release/v1.0-a_b@c"


def test_a_folder_that_cannot_be_made():
    with pytest.raises(UserError, match=r"cannot make the folder /proc/x/y: .*; choose another one"):
        make_folder(Path("/proc/x/y"))
