"""Every file that the project writes has the mode that the umask gives, whatever library made it."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from commands import run_forked
from olmoscope.files import atomic_path, clean_temporary

EVERYTHING = """
import os, sys
from pathlib import Path
os.umask(int(sys.argv[1], 8))
from feature_index import small_out
from olmoscope.browse.collection import open_collection
from olmoscope.browse.export import export_site
from olmoscope.features.rows_of import index_sae
from olmoscope.pipeline import report_saes
from olmoscope.release.build import build_release
from olmoscope.text.standard_library import write_corpus
recipe, out = small_out(Path(sys.argv[2]))
report_saes(recipe, out)
build_release(out)
index = index_sae(str(out / "runs" / recipe.saes[0].id), device="cpu").folder
collection = open_collection(index, None)
next(iter(collection.values())).labels.write(0, "a label", "")
export_site(collection, out / "site")
"""


@pytest.mark.parametrize("umask", ["022", "077"])
def test_all_files_of_an_output_folder(tmp_path, umask):
    done = run_forked(umask, tmp_path, timeout=600, code=EVERYTHING)
    assert done.returncode == 0, done.stderr
    paths = [path for path in (tmp_path / "out").rglob("*") if not path.is_symlink()]
    suffixes = {path.suffix for path in paths if path.is_file()}
    assert {".safetensors", ".json", ".jsonl", ".log", ".npy", ".parquet", ".yaml", ".html", ".md", ".gz", ".js",
            ".sqlite"} <= suffixes
    wrong = {str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777) for path in paths
             if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~int(umask, 8)}
    assert not wrong


@pytest.mark.parametrize("umask", ["000", "002", "027"])
def test_a_file_that_a_library_writes(tmp_path, umask):
    script = ("import os, sys, numpy; os.umask(int(sys.argv[1], 8)); from pathlib import Path; "
              "from safetensors.numpy import save_file; from olmoscope.files import atomic_path\n"
              "from olmoscope.features.labels import Labels\n"
              "with atomic_path(Path(sys.argv[2]) / 'x') as path: save_file({'x': numpy.zeros(3)}, path)\n"
              "Labels(Path(sys.argv[2]) / 'y', 5)")
    done = run_forked(umask, tmp_path, code=script)
    assert done.returncode == 0, done.stderr
    for name in ("x", "y"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~int(umask, 8)


def test_leftovers_of_a_killed_process_decide_nothing(tmp_path):
    """A temporary file of the same name, from a process of the same number, had another mode."""
    left = tmp_path / f".x.{os.getpid()}.tmp"
    left.touch(0o600)
    with atomic_path(tmp_path / "x") as path:
        save_file({"x": np.zeros(3)}, path)
    (tmp_path / "new").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_kill_leaves_nothing_that_is_not_cleared_away(tmp_path):
    """safetensors writes a temporary file of its own, `.tmpXXXXXX`, beside the file that it was told to write."""
    script = ("import os, sys; from pathlib import Path; from olmoscope.files import atomic_path\n"
              "with atomic_path(Path(sys.argv[1]) / 'a' / 'x') as path:\n"
              "    path.write_bytes(b'half')\n"
              "    (path.parent / '.tmpFahwOx').write_bytes(b'half')\n"
              "    os._exit(9)")
    assert run_forked(tmp_path, code=script).returncode == 9
    (tmp_path / "a" / ".y.99.tmp").touch()  # left by an earlier version: a file
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3
    clean_temporary(tmp_path, "x.*")
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".y.99.tmp"]
    clean_temporary(tmp_path)
    assert not list((tmp_path / "a").iterdir())
