"""What a user installs works: the wheel, built from the sdist, in a new environment, used from another folder.

The environment holds the wheel and what its metadata asks for, linked from the environment of the tests: nothing is
downloaded, and no tool of the developers' can stand in for a requirement that was forgotten.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from browse_server import ask, installed_browse_server
from helpers import write_documents
from olmoscope import __version__
from olmoscope.files import read_json

ROOT = Path(__file__).parents[2]
SMALL = {"text.mixture": "{web: 1.0}", "tokens.count": 3000, "tokens.held_out": 500, "tokens.segment_rows": 2000,
         "tokens.chunk_lengths": "[[16, 40], [100, 128]]", "tokens.batch_tokens": 256, "activations.layers": "[7]",
         "saes": "[{layer: 7, d_sae: 512, k: 8}]", "train.batch": 256, "evaluate.tokens": 256}


def source_files(*folders: str) -> list[str]:
    """What git would commit of some folders or files."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).exists())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the source: a build in the checkout could pick up what an earlier one left there."""
    copy, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in source_files("src", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, copy],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    assert sdist.name == f"olmoscope-{__version__}.tar.gz" and wheel.name.startswith(f"olmoscope-{__version__}-")
    return wheel


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    packed = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(packed) == [name.removeprefix("src/") for name in source_files("src")]


class Installed:
    """A new environment with the wheel in it."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-index",
                        "--no-deps", "--disable-pip-version-check", wheel], check=True, env=self.environment)
        self._take_compiled_kernels()
        [ours] = metadata.distributions(path=[str(self.site)])
        self._link_requirements(ours, {"browse"}, set())

    def _link_requirements(self, of: metadata.Distribution, extras: set[str], linked: set[str]) -> None:
        """Link the requirements of a distribution with some extras, and their requirements."""
        for requirement in map(Requirement, of.requires or []):
            if requirement.marker and not any(requirement.marker.evaluate({"extra": each}) for each in extras | {""}):
                continue
            required = metadata.distribution(requirement.name)
            assert requirement.specifier.contains(required.version, prereleases=True), (of.name, str(requirement))
            if requirement.name in linked:
                continue
            linked.add(requirement.name)
            for name in {file.parts[0] for file in required.files or []} - {"..", "__pycache__"}:
                if not (self.site / name).exists():
                    (self.site / name).symlink_to(required.locate_file(name))
            self._link_requirements(required, requirement.extras, linked)

    def _take_compiled_kernels(self) -> None:
        """Kernels that were compiled beside the source are those of the same files here; compiling them anew, which
        tests/kernels/test_prepare.py does, takes half a minute. numba knows a file by its time and size."""
        for compiled in (ROOT / "src").rglob("__pycache__/*"):
            if compiled.suffix in (".nbi", ".nbc", ".compiled"):
                copy = self.site / compiled.relative_to(ROOT / "src")
                copy.parent.mkdir(exist_ok=True)
                shutil.copy2(compiled, copy)
        for name in source_files("src"):
            shutil.copystat(ROOT / name, self.site / Path(name).relative_to("src"))

    def run(self, *command: object) -> str:
        """Standard output of a command of the environment, which must succeed, run in its folder."""
        program, *arguments = map(str, command)
        done = subprocess.run([self.python.parent / program, *arguments], capture_output=True, text=True,
                              cwd=self.site, env=self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_the_command(installed: Installed) -> None:
    where = installed.run("python", "-c", "import olmoscope; print(olmoscope.__file__)")
    assert Path(where.strip()) == installed.site / "olmoscope" / "__init__.py"
    for command in [["olmoscope"], ["python", "-m", "olmoscope"]]:
        assert installed.run(*command, "--version") == f"olmoscope {__version__}\n"
        assert " Usage: olmoscope [OPTIONS] COMMAND" in installed.run(*command, "--help")


def test_text_to_features_on_a_page(installed: Installed, tmp_path: Path) -> None:
    out, site = tmp_path / "out", tmp_path / "site"
    text = write_documents(tmp_path / "corpus", count=90)
    keys = SMALL | {"text.sources": f"[{{kind: dolma, name: web, paths: ['{text}']}}]"}
    installed.run("olmoscope", "collect", "tiny", "-o", out, *(f"--set={key}={value}" for key, value in keys.items()))
    for command in ("train", "evaluate", "index"):
        installed.run("olmoscope", command, out)
    [report] = out.rglob("report.html")
    assert "<svg" in report.read_text()
    made_by = read_json(out / "store" / "train" / "manifest.json")["provenance"]
    assert made_by["olmoscope"] == __version__ and made_by["commit"] is None

    installed.run("olmoscope", "browse", out, "--export", site)
    static = [Path(name).name for name in source_files("src/olmoscope/browse/static")]
    assert {"index.html", "main.js"} < set(static)
    with installed_browse_server(out, installed.python, installed.environment) as port:
        for name in static:
            assert (site / name).read_bytes(), name
            status, content, _ = ask(port, "GET", f"/{name}")
            assert status == 200 and content == (ROOT / "src/olmoscope/browse/static" / name).read_text(), name
        assert ask(port, "GET", "/")[0] == 200
