"""Inspecting, verifying and repairing stores: every kind of damage is found, named, and repaired or refused."""

import fcntl
import json
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.format import VERSION
from olmoscope.activations.store.inspect import describe, find_stores
from olmoscope.activations.store.repair import repair_stores
from olmoscope.activations.store.verify import verify_stores
from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.pipeline import collect_stores, store_folder
from olmoscope.tokens.pack import pack
from olmoscope.tokens.segments import read_token_segment
from olmoscope.tokens.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=90)
    return recipe(folder / "corpus", tokens__count=2000)


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """An output folder with both stores, finished; tests copy it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    collect_stores(job, out)
    return out


@pytest.fixture
def out(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


@pytest.fixture
def train(out):
    return store_folder(out, "train")


def files(store):
    """Every file except locks and the manifest, whose date may differ."""
    return {str(path.relative_to(store)): sha256(path) for path in sorted(store.rglob("*"))
            if path.is_file() and path.name != "manifest.json" and not path.name.startswith(".lock")}


def found(path):
    """Problems as `{relative path: what}`."""
    return {problem.path.relative_to(one.store).as_posix(): problem.what
            for one in verify_stores(path) for problem in one.problems}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path, place=-3):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def delete(path):
    path.unlink()


def garbage(path):
    path.write_text("{")


def half_write(folder):
    """A kill leaves our half-written file, and the one that safetensors was writing beside it."""
    folder.mkdir()
    (folder / "half-written").touch()
    (folder / ".tmpFahwOx").write_bytes(b"half")


def test_a_sound_folder_has_no_problem(job, whole):
    verified = verify_stores(whole)
    assert [(one.store.name, one.problems, one.live) for one in verified] == [
        ("train", [], False), ("held_out", [], False)]
    for one in verified:
        assert one.segments == one.done == len(list((one.store / "tokens").glob("segment-*")))
        kept = [path for path in one.store.rglob("segment-*.safetensors")]
        assert one.bytes == sum(path.stat().st_size for path in kept)


def test_info_of_a_finished_store(whole):
    info = describe(store_folder(whole, "train"))
    assert (info.live, info.packed, info.missing, info.manifest.rows) == (False, True, [], 2000)
    assert info.segments == info.token_segments == info.manifest.segments
    assert list(info.bytes) == ["tokens", "rows", "layer_01", "layer_07"]
    assert 2000 * 256 * 2 < info.bytes["layer_01"] < 2000 * 256 * 2 + 200 * info.segments


@pytest.mark.parametrize(("file", "hurt", "what"), [
    ("layer_01/segment-000001.safetensors", truncate, "truncated or overwritten"),
    ("layer_07/segment-000002.safetensors", flip, "its content differs from its checksum"),
    ("layer_07/segment-000000.safetensors", delete, "missing"),
    ("rows/segment-000001.safetensors", flip, "its content differs from its checksum"),
    ("checksums/segment-000001.json", delete, "missing: segment 1 has no activations"),
    ("checksums/segment-000001.json", garbage, "damaged"),
    ("tokens/segment-000000.safetensors", flip, "its content differs from its checksum"),
    ("tokens/segment-000001.safetensors", truncate, "truncated or overwritten"),
    ("tokens/segment-000002.safetensors", delete, "missing"),
    ("checksums/tokens-000001.json", delete, "missing"),
    ("checksums/tokens-000001.json", garbage, "damaged"),
    ("tokens/index.json", garbage, "damaged"),
    ("tokens/index.json", delete, "missing"),
    ("tokens/recipe.json", delete, "missing"),
    ("tokens/recipe.json", garbage, "damaged"),
    ("statistics/segment-000001.safetensors", flip, "its content differs from its checksum"),
    ("statistics.safetensors", flip, "not what the segments' sums add up to"),
    ("statistics.json", garbage, "not what the segments' sums add up to"),
    ("statistics.json", delete, "missing"),
    ("layer_01/.segment-000001.safetensors.99.tmp", half_write, "left half-written by a killed process"),
    ("layer_01/.segment-000002.safetensors.99.tmp", lambda path: path.write_bytes(b"of an earlier version"),
     "left half-written by a killed process"),
])
def test_damage_is_found_named_and_mended(job, whole, out, train, file, hurt, what):
    hurt(train / file)
    problems = found(train)
    assert list(problems) == [file]
    assert problems[file].startswith(what)

    dry = repair_stores(train, dry_run=True)[0]
    assert found(train) == problems
    repaired = repair_stores(train, dry_run=False)[0]
    assert repaired.delete == dry.delete
    assert not any(path.exists() for path in repaired.delete)
    collect(job, "train", train)
    assert files(train) == files(store_folder(whole, "train"))
    assert found(out) == {}


def test_all_at_once(job, whole, out, train):
    """Damage of every kind in both stores; sound files are not made again."""
    hurt = {"layer_01/segment-000001.safetensors": truncate, "rows/segment-000001.safetensors": flip,
            "tokens/segment-000001.safetensors": flip, "tokens/index.json": garbage, "manifest.json": garbage}
    for file, damage in hurt.items():
        damage(train / file)
    (store_folder(out, "held_out") / "layer_07" / "segment-000000.safetensors").unlink()
    assert set(found(out)) == {*hurt, "layer_07/segment-000000.safetensors"}
    repair_stores(out, dry_run=False)
    left = sorted(path.name for path in (train / "layer_07").iterdir())
    assert left == ["segment-000000.safetensors", *(f"segment-{n:06d}.safetensors" for n in range(2, len(left) + 1))]
    made = collect_stores(job, out)
    assert [one.segments_made for one in made] == [1, 1]
    for split in ("train", "held_out"):
        assert files(store_folder(out, split)) == files(store_folder(whole, split))
    assert found(out) == {}


@pytest.mark.parametrize("segment", [0, 1, -1])
def test_damaged_tokens_are_packed_anew_to_the_same_bytes(job, whole, train, segment):
    """A first, a middle and the last token segment: it and all later ones go, and come back equal."""
    last = describe(train).segments - 1
    segment = segment % (last + 1)
    path = train / "tokens" / f"segment-{segment:06d}.safetensors"
    flip(path)
    with pytest.raises(UserError, match=rf"{path} is damaged .its checksum differs.; run `olmoscope store repair"):
        read_token_segment(train, segment)
    gone = repair_stores(train, dry_run=False)[0].delete
    assert gone[:3] == [train / "tokens" / "index.json", train / "checksums" / f"tokens-{segment:06d}.json", path]
    assert len(gone) == 1 + 2 * (last + 1 - segment)
    pack(job, load_tokenizer(job.model), "train", train)
    assert files(train) == files(store_folder(whole, "train"))


def test_packing_does_not_go_on_from_a_damaged_segment(job, train):
    """Without repair: a flipped bit in the state from which packing would resume is not read silently."""
    (train / "tokens" / "index.json").unlink()
    flip(train / "tokens" / f"segment-{describe(train).token_segments - 1:06d}.safetensors")
    with pytest.raises(UserError, match="its checksum differs"):
        pack(job, load_tokenizer(job.model), "train", train)


def test_rows_of_other_tokens_are_found(train, job, whole):
    """Sound checksums, but the rows of another segment: only the comparison with the tokens can tell."""
    rows = load_file(train / "rows" / "segment-000001.safetensors")
    rows["token_id"] = rows["token_id"][::-1].copy()
    save_file(rows, train / "rows" / "segment-000001.safetensors")
    path = train / "checksums" / "segment-000001.json"
    sums = json.loads(path.read_text())
    sums["sha256"]["rows/segment-000001.safetensors"] = sha256(train / "rows" / "segment-000001.safetensors")
    path.write_text(json.dumps(sums))
    assert found(train) == {"rows/segment-000001.safetensors": "its rows are not those of the segment's tokens"}
    repair_stores(train, dry_run=False)
    collect(job, "train", train)
    assert files(train) == files(store_folder(whole, "train"))


def test_checksums_of_blocks_are_checked(job, train, whole):
    """Readers of slices rely on them: a flipped digit would make a sound file unreadable."""
    path = train / "checksums" / "segment-000001.json"
    sums = json.loads(path.read_text())
    blocks = sums["blocks"]["layer_07/segment-000001.safetensors"]["activations"]
    blocks[1] = f"{int(blocks[1], 16) ^ 1:016x}"
    path.write_text(json.dumps(sums))
    assert found(train) == {"checksums/segment-000001.json":
                            "its checksums of blocks are not those of layer_07/segment-000001.safetensors"}
    repair_stores(train, dry_run=False)
    collect(job, "train", train)
    assert files(train) == files(store_folder(whole, "train"))


def test_too_few_rows_are_found(train):
    path = train / "layer_01" / "segment-000001.safetensors"
    with safe_open(path, "pt") as file:
        rows = file.get_tensor("activations")
    from safetensors.torch import save_file as save_tensors

    save_tensors({"activations": rows[:-1].clone()}, path)
    listed = train / "checksums" / "segment-000001.json"
    sums = json.loads(listed.read_text())
    sums["sha256"]["layer_01/segment-000001.safetensors"] = sha256(path)
    listed.write_text(json.dumps(sums))
    assert found(train) == {"layer_01/segment-000001.safetensors":
                            f"holds activations [{len(rows) - 1}, 256], not [{len(rows)}, 256]"}


@pytest.mark.parametrize(("change", "what"), [
    ({"version": VERSION + 1}, f"has store format {VERSION + 1}"),
    ({"format": "another"}, "is not the manifest of an activation store"),
])
def test_another_format_is_refused(train, change, what):
    path = train / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (train / "stray").write_text("kept")
    problems = found(train)
    assert list(problems) == ["manifest.json"] and what in problems["manifest.json"]
    before = files(train)
    repaired = repair_stores(train, dry_run=False)[0]
    assert repaired.delete == [] and not repaired.problems[0].mends
    assert files(train) == before


def test_a_manifest_of_another_revision_is_named_and_refused(job, out, train):
    path = train / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["revision"] = "sha256:0"
    manifest["finished"] = False
    path.write_text(json.dumps(manifest))
    assert "at revision sha256:0, but the recipe's model is sha256:" in found(train)["manifest.json"]
    problems = [problem for one in verify_stores(out) for problem in one.problems]
    assert {problem.path.parent.name for problem in problems} == {"train", "held_out"}
    assert any("its model is tiny at sha256:" in problem.what for problem in problems)
    repair_stores(out, dry_run=False)
    assert path.exists()
    (train / "checksums" / "segment-000001.json").unlink()  # there is something to make
    with pytest.raises(UserError, match="was begun with tiny at revision sha256:0"):
        collect(job, "train", train)


def test_a_store_of_another_recipe_is_named(job, out):
    (out / "recipe.yaml").write_text(job.model_copy(update={"seed": 5}).to_yaml())
    assert all("belongs to another recipe" in what for what in found(out).values())
    assert set(found(out)) == {"manifest.json", "tokens/recipe.json"}  # of both


def test_manifest_that_counts_otherwise(train):
    path = train / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": 1999}))
    assert "says 1999 rows" in found(train)["manifest.json"]


def test_foreign_and_extra_files_are_named_and_left(train):
    strangers = ["notes.txt", "layer_03/segment-000000.safetensors", "layer_01/segment-000099.safetensors",
                 "checksums/segment-000099.json", "layer_01/segment-000000.safetensors.bak"]
    for name in strangers:
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_text("mine")
    assert set(found(train)) == set(strangers)
    assert repair_stores(train, dry_run=False)[0].delete == []
    assert all((train / name).read_text() == "mine" for name in strangers)


def test_what_is_not_finished_is_no_damage(job, train):
    """Killed in mid-collection: some segments have no activations yet, one is half-way."""
    manifest = train / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"finished": False}))
    (train / "checksums" / "segment-000001.json").unlink()
    assert found(train) == {}
    assert describe(train).missing == [1]
    assert verify_stores(train)[0].done == describe(train).segments - 1


def test_what_is_not_packed_is_no_damage(job, train):
    """Killed in mid-packing, between a token segment and its checksum."""
    for name in ("rows", "layer_01", "layer_07"):
        shutil.rmtree(train / name)
    for path in (train / "checksums").glob("segment-*"):
        path.unlink()
    (train / "manifest.json").unlink()
    (train / "tokens" / "index.json").unlink()
    (train / "checksums" / f"tokens-{describe(train).token_segments - 1:06d}.json").unlink()
    assert found(train) == {}
    info = describe(train)
    assert (info.manifest, info.packed) == (None, False)
    assert not describe(train).live


def test_a_live_store_is_looked_at_but_not_repaired(train):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys\nfile = open(sys.argv[1], 'a')\n"
         "fcntl.flock(file, fcntl.LOCK_EX)\nprint('held', flush=True)\nsys.stdin.read()",
         str(train / ".lock-worker-0-of-1")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        (train / "layer_01" / ".segment-000001.safetensors.99.tmp").write_bytes(b"half")
        assert describe(train).live
        verified = verify_stores(train)[0]
        assert verified.live and verified.problems == []
        with pytest.raises(UserError, match="another process is writing"):
            repair_stores(train, dry_run=False)
    finally:
        holder.communicate("")
    assert not describe(train).live
    assert len(verify_stores(train)[0].problems) == 1


def test_repair_holds_the_store(train):
    """Inspecting a store takes no lock; repairing it does."""
    with (train / ".lock-tokens").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="another process is writing"):
            repair_stores(train, dry_run=False)


def test_no_store_is_one_line(tmp_path, whole):
    with pytest.raises(UserError, match="does not exist"):
        find_stores(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no activation store"):
        find_stores(tmp_path)
    assert find_stores(whole) == find_stores(whole / "store")
    assert find_stores(store_folder(whole, "train")) == [store_folder(whole, "train")]
