"""A release's layout: its files, and the checks on the release as a whole.

    README.md                        the model card
    manifest.json                    described in manifest.py
    saelens_pretrained_saes.yaml     the entry for SAELens' own list of releases
    report.html                      all figures of all SAEs on one page
    <sae id>/cfg.json, sae_weights.safetensors, training.log, evaluation.json, report.html

The reports are made from evaluation.json. Releases by older versions, which made no reports, are valid without them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from olmoscope.files import sha256
from olmoscope.release.card import CARD
from olmoscope.release.manifest import MANIFEST, ManifestRead, release_files
from olmoscope.release.registry import REGISTRY
from olmoscope.sae.io.saelens_settings import CONFIG
from olmoscope.sae.io.saelens_tensors import WEIGHTS

SAE_FILES = (CONFIG, WEIGHTS, "training.log", "evaluation.json")
ROOT_FILES = (CARD, MANIFEST, REGISTRY)


def check_root(folder: Path, manifest: ManifestRead) -> Iterator[tuple[str, bool, str]]:
    """The checks of a release that do not concern a single SAE: name, verdict, figure."""
    absent = [name for name in ROOT_FILES if not (folder / name).is_file()]
    yield "root files", not absent, f"absent: {', '.join(absent)}" if absent else ", ".join(ROOT_FILES)

    sums = manifest.files
    wrong = differing_files(folder, manifest, sums)
    yield "checksums", not wrong, f"differ or absent: {', '.join(wrong)}" if wrong else f"{len(sums)} files"

    unlisted = sorted(set(release_files(folder)) - set(sums) - {MANIFEST})
    yield "nothing unlisted", not unlisted, f"not in the manifest: {', '.join(unlisted)}" if unlisted else "nothing"

    mistake = _registry_mistake(folder / REGISTRY, manifest)
    yield "registry entry", not mistake, mistake or f"{len(manifest.saes)} SAEs"


def differing_files(folder: Path, manifest: ManifestRead, names: Iterable[str]) -> list[str]:
    """Those of these files that are absent or differ from the checksum in the manifest."""
    return [name for name in names
            if not (folder / name).is_file() or sha256(folder / name) != manifest.files[name].sha256]


def _registry_mistake(path: Path, manifest: ManifestRead) -> str:
    """What is wrong with the keys that SAELens needs in the entry for its list; empty if nothing is."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        entry = entries[manifest.name]
        paths = {sae["id"]: sae["path"] for sae in entry["saes"]}
        found = (entry["repo_id"], entry["model"], entry["conversion_func"], paths)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        return f"{path.name} cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
    ids = {sae.id: sae.id for sae in manifest.saes}
    wanted = (manifest.repo_id, manifest.model.name, None, ids)
    return "" if found == wanted else f"{path.name} says {found}, the manifest {wanted}"
