"""The command line uploads a release to a hub on this machine and downloads it again."""

import json
import subprocess
import sys

import pytest
import yaml

from hub_endpoint import HubEndpoint, Trouble
from olmoscope.release.on_hub import local_paths
from release_runs import LAYER_NORM, RAW, edit_json

CODE = """
import json, sys
from olmoscope.cli import main
import contextlib, io

told = []
for arguments in json.loads(sys.argv[1]):
    out, sys.argv = io.StringIO(), ["olmoscope", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code
    told.append((status or 0, out.getvalue()))
print(json.dumps(told))
"""
REPO = "some/saes"


def run(hub: HubEndpoint, cache, *commands: list[str], token: str | None = "hf_secret",
        **more: str) -> list[tuple[int, str]]:
    """Run commands one after another in a process; gives their exit statuses and what they printed."""
    environment = hub.environment(cache) | {"COLUMNS": "200"} | ({"HF_TOKEN": token} if token else {}) | more
    result = subprocess.run([sys.executable, "-c", CODE, json.dumps(commands)], env=environment, timeout=240,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_there_and_back(out, hub_endpoint, tmp_path):
    release, here = str(out), str(tmp_path / "pulled")
    hub_endpoint.troubles.append(Trouble("^/objects/", after=1000, times=1))  # the connection is cut amid weights
    told = run(hub_endpoint, tmp_path / "hf",
               ["release", release, "--push", REPO, "--dry-run"], ["release", release, "--check", REPO],
               ["release", release, "--push", REPO], ["release", release, "--push", REPO],
               ["release", release, "--check", REPO], ["pull", REPO, here], ["pull", REPO, here, "--only", "nobody"],
               ["pull", "no/release", here + "2"])
    (dry, first_check, pushed, again, check, pulled, unknown, absent) = told
    assert dry[0] == 0, told
    assert "there is no such repository yet" in dry[1] and "to send: 14" in dry[1]
    assert first_check[0] == 1
    assert pushed[0] == 0 and "sent 14 of 14 files; all have the same checksums there; tag release-" in pushed[1]
    assert again[0] == 0 and "sent 0 of 14 files" in again[1]
    assert check[0] == 0 and "to send: 0" in check[1]
    assert pulled[0] == 0 and "2 of 2 SAEs" in pulled[1]
    assert unknown == [1, f"error: {REPO} has no SAE nobody; it has {RAW}, {LAYER_NORM}\n"]
    assert absent[0] == 1
    assert "cannot get a release from hub repository no/release: the hub has no such model" in absent[1]
    for path in (out / "release").rglob("*"):
        if path.is_file():
            assert (tmp_path / "pulled" / path.relative_to(out / "release")).read_bytes() == path.read_bytes()
    assert sum(request.startswith("PUT") for request in hub_endpoint.requests) == 3  # two weights, one of them twice
    assert not any(b"hf_secret" in path.read_bytes() for path in out.rglob("*") if path.is_file())

    repository = hub_endpoint.repositories["models", REPO]
    tag = repository.tags.pop()
    assert repository.references[tag] == repository.references["main"]
    card = yaml.safe_load((out / "release" / "README.md").read_text().split("---")[1])
    assert card["library_name"] == "saelens" and "sae" in card["tags"]
    assert REPO in (out / "release" / "README.md").read_text()
    request = (out / "announce" / "saelens-pull-request.md").read_text()
    entry = yaml.safe_load(request.split("```yaml")[1].split("```")[0])
    assert entry["olmoscope-tiny-saes"]["repo_id"] == REPO and tag in request
    assert repository.references["main"] in (out / "announce" / "neuronpedia.md").read_text()


def test_what_is_refused(out, hub_endpoint, tmp_path):
    release = str(out)
    (tagged, other, no_revision) = run(
        hub_endpoint, tmp_path / "hf", ["release", release, "--push", REPO, "--tag", "v1"],
        ["release", release, "--push", "some/other", "--tag", "v1"], ["release", release, "--check", f"{REPO}@v2"])
    assert tagged[0] == other[0] == 0, tagged
    assert no_revision == [1, f"{out / 'release'}: 2 SAEs written\nerror: cannot look at hub repository {REPO}: {REPO} "
                              f"has no revision 'v2': see https://huggingface.co/{REPO}/tree/main for its branches and "
                              "tags\n"]
    # Another release: the tag does not move, a file that no longer exists is deleted, somebody's notes stay.
    main = hub_endpoint.repositories["models", REPO].references["main"]
    folder = hub_endpoint.repositories["models", REPO].folders[main]
    (folder / "notes.txt").write_text("mine\n")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "old").mkdir()
    (folder / "old" / "plot.txt").write_text("old\n")
    manifest["files"]["old/plot.txt"] = {"sha256": "0" * 64, "bytes": 4}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (same_tag, moved) = run(hub_endpoint, tmp_path / "hf2", ["release", release, "--push", REPO, "--tag", "v1"],
                            ["release", release, "--push", REPO, "--tag", "v3"])
    assert same_tag == [1, f"{out / 'release'}: 2 SAEs already there, unchanged\nerror: {REPO} has a tag 'v1' of "
                           "another release: give this release another tag with --tag\n"]
    assert moved[0] == 0 and "sent 1 of 14 files" in moved[1]
    repository = hub_endpoint.repositories["models", REPO]
    now = repository.folders[repository.references["main"]]
    assert (now / "notes.txt").exists() and not (now / "old" / "plot.txt").exists()
    # Nobody may write without a token, and half a release is recognised as such.
    (no_token,) = run(hub_endpoint, tmp_path / "hf3", ["release", release, "--push", "some/third"], token=None)
    assert no_token[0] == 1
    assert "cannot upload to hub repository some/third: the hub refuses access (status 401)" in no_token[1]
    (now / RAW / "training.log").write_text("half\n")
    (check, pull) = run(hub_endpoint, tmp_path / "hf4", ["release", release, "--check", REPO],
                        ["pull", REPO, str(tmp_path / "half")])
    assert check[0] == 1 and "differs" in check[1]
    assert pull[0] == 1 and (f"{REPO} does not match its own manifest: {RAW}/training.log differ or are missing there"
                             in pull[1])


def test_a_hub_without_xet(out, hub_endpoint, tmp_path):
    """If hf_xet is installed, huggingface_hub uses it without asking whether the hub has Xet storage."""
    pytest.importorskip("hf_xet")
    (refused,) = run(hub_endpoint, tmp_path / "hf", ["release", str(out), "--push", REPO], HF_HUB_DISABLE_XET="0")
    assert refused[0] == 1 and refused[1].endswith(
        f"error: cannot upload to hub repository {REPO}: {hub_endpoint.url} answers hf_xet with status 404, as a hub "
        "without Xet storage does: set HF_HUB_DISABLE_XET=1 to send large files by LFS, and run the same command "
        "again\n")
    assert any(request.startswith(f"GET /api/models/{REPO}/xet-write-token/") for request in hub_endpoint.requests)


@pytest.mark.parametrize(("arguments", "told"), [
    (["--push", "saes"], "'saes' is not a hub repository: write OWNER/NAME, or OWNER/NAME@REVISION"),
    (["--push", "some/saes@v1"], "an upload goes to the main branch: give --push some/saes, and --tag v1 to name it"),
    (["--push", "a/b", "--check", "a/b"], "--push already checks what it sent: leave out --check"),
    (["--dry-run"], "--dry-run is for an upload: give --push OWNER/NAME as well"),
])
def test_options(arguments, told, out, capsys, monkeypatch):
    from olmoscope.cli import main

    monkeypatch.setattr(sys, "argv", ["olmoscope", "release", str(out), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and capsys.readouterr().err == f"error: {told}\n"


def test_paths_of_this_machine_are_named(copy):
    assert local_paths(copy / "release") == []
    edit_json(copy / "release" / "manifest.json", lambda tree: (
        tree["model"].update(name="/home/me/model"), tree["recipe"].update(files=["/home/me/text", "tiny", "a/b"])))
    assert local_paths(copy / "release") == ["/home/me/model", "/home/me/text"]
