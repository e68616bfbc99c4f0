"""saelens_pretrained_saes.yaml: the entry for this release in SAELens' own list of releases.

Source: SAELens 6.54.12, `sae_lens/loading/pretrained_saes_directory.py`: `repo_id`, `model` and `saes` with `id` and
`path` are required; `conversion_func: null` means SAELens' own format; `l0` and `variance_explained` are expected
figures.
"""

from collections.abc import Sequence

import yaml

from olmoscope.release.finished_run import FinishedRun

REGISTRY = "saelens_pretrained_saes.yaml"


def registry_yaml(runs: Sequence[FinishedRun]) -> str:
    """The entry, as YAML, with the figures on held-out rows."""
    release, model = runs[0].recipe.release, runs[0].done.store.model.name
    links = {"publication": f"https://huggingface.co/{release.repo_id}"}
    if runs[0].done.store.model.on_hub:
        links["model"] = f"https://huggingface.co/{model}"
    saes = []
    for run in runs:
        held_out = run.evaluation()
        saes.append({"id": run.sae.id, "path": run.sae.id, "l0": round(held_out.l0.mean, 3),
                     "variance_explained": _rounded(held_out.usual.explained_variance), "neuronpedia": None})
    entry = {"conversion_func": None, "links": links, "model": model, "repo_id": release.repo_id, "saes": saes}
    return yaml.safe_dump({release.name: entry}, sort_keys=False, allow_unicode=True)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
