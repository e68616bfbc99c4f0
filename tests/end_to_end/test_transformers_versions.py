"""The oldest and the newest transformers that pyproject.toml allows, against a hub on this machine.

Each is installed into a folder of its own that comes first on PYTHONPATH, with those of its requirements for which the
environment has another version. So this takes seconds and leaves the environment unchanged.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import recipe, save_small_model, write_documents
from hub_endpoint import COMMIT
from olmoscope.activations.store.format import read_manifest
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.features.format import read_info
from run_commands import run_commands

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def install(folder, *wanted):
    """Install packages into a folder, without their dependencies; skip the test if the registry does not have them."""
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                           "--no-deps", "--no-compile", "--upgrade", "--retries", "1", "--timeout", "10", "--target",
                           str(folder), *wanted], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it gives no reason"])[-1]
        pytest.skip(f"pip cannot have {', '.join(wanted)}: {reason}")


def unfulfilled(folder):
    """The requirements of a folder's packages that neither the folder nor the environment satisfies."""
    there = {canonicalize_name(one.metadata["Name"]): one
             for one in importlib.metadata.distributions(path=[str(folder)])}
    for one in there.values():
        for requirement in map(Requirement, one.requires or []):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            name = canonicalize_name(requirement.name)
            try:
                version = there[name].version if name in there else importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                yield f"{requirement.name}{requirement.specifier}"
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                yield f"{requirement.name}{requirement.specifier}"


@pytest.fixture(params=["oldest", "newest"])
def version(request, tmp_path_factory):
    """A folder with a version of transformers, and that version."""
    allowed = next(Requirement(one) for one in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
                   if Requirement(one).name == "transformers")
    oldest = re.fullmatch(r">=([\d.]+)", str(allowed.specifier))
    assert oldest is not None, "pyproject.toml gives another kind of bound now; read it here"
    folder = tmp_path_factory.mktemp("transformers")
    install(folder, f"transformers=={oldest[1]}" if request.param == "oldest" else str(allowed))
    for _ in range(3):
        if missing := list(unfulfilled(folder)):
            install(folder, *missing)
    (installed,) = [one.version for one in importlib.metadata.distributions(path=[str(folder)])
                    if one.metadata["Name"] == "transformers"]
    if installed == importlib.metadata.version("transformers"):
        pytest.skip(f"transformers {installed} is what all other tests run with")
    return folder, installed


def test_from_hub_ids(version, hub_endpoint, tmp_path):
    folder, installed = version
    hub_endpoint.add("model", "lab/base", save_small_model("Llama", tmp_path / "model"))
    write_documents(tmp_path / "corpus")
    job = tmp_path / "job.yaml"
    job.write_text(recipe(tmp_path / "corpus", model__name="lab/base", activations__layers=[1], tokens__count=1500,
                          saes=[{"layer": 1, "d_sae": 64, "k": 4}]).to_yaml())
    out, environment = tmp_path / "out", hub_endpoint.environment(tmp_path / "hf")
    before = environment.get("PYTHONPATH") or str(PYPROJECT.parent / "src")
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), before])}
    run = out / "runs" / "layer_01" / "width_64" / "topk_4_raw"
    run_commands([("collect", job, "-o", out), ("train", out), ("evaluate", out), ("index", run)], environment,
                 fresh=True)
    manifest = read_manifest(out / "store" / "train")
    assert manifest.model.revision == COMMIT
    assert manifest.provenance["libraries"]["transformers"] == installed
    assert read_evaluation(run / EVALUATION).model_revision == COMMIT == read_info(run / "index").model.revision
    before_offline = len(hub_endpoint.requests)
    run_commands([("collect", job, "-o", tmp_path / "offline")], environment | {"HF_HUB_OFFLINE": "1"}, fresh=True)
    assert read_manifest(tmp_path / "offline" / "store" / "train").model.revision == COMMIT
    assert len(hub_endpoint.requests) == before_offline
