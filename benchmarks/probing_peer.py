"""sae-probes on tables and rows that probing_peers.py wrote; that script starts it with the peers' Python.

    PYTHON probing_peer.py '{"work": ..., "sae": ..., "hook": ..., "ks": [1, 5, 16], "model": ..., "tables": {NAME: TRAIN}}'

WORK/data holds the tables, which replace those in the package; WORK/cache holds the activations or, if empty, the model
runs in TransformerLens. The last line of the output is JSON. It imports nothing from Olmoscope.
"""  # noqa: E501

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

wanted = json.loads(sys.argv[1])
work = Path(wanted["work"])

package = importlib.util.find_spec("sae_probes")
assert package is not None and package.submodule_search_locations
spec = importlib.util.spec_from_file_location("sae_probes.constants",
                                              Path(package.submodule_search_locations[0]) / "constants.py")
assert spec is not None and spec.loader is not None
constants = importlib.util.module_from_spec(spec)
spec.loader.exec_module(constants)
constants.DATA_PATH = work / "data"  # before the package reads which tables there are
sys.modules["sae_probes.constants"] = constants

from sae_lens import SAE  # noqa: E402
from sae_probes.generate_model_activations import ensure_dataset_activations  # noqa: E402
from sae_probes.run_baselines import run_all_baseline_normal  # noqa: E402
from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization, run_sae_evals  # noqa: E402
from sae_probes.utils_data import get_xvals, get_yvals  # noqa: E402
from sae_probes.utils_training import find_best_reg  # noqa: E402

Figures = dict[str, list[dict[str, Any]]]
KS = wanted["ks"]


def main() -> None:
    """Print figures on its own split with either penalty, and on our split."""
    tables, hook, cache = list(wanted["tables"]), wanted["hook"], work / "cache"
    sae = SAE.load_from_disk(wanted["sae"], device="cpu")
    if not cache.exists():
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_transformers(wanted["model"], dtype=torch.float32, device="cpu")
        ensure_dataset_activations("model", tables, [hook], cache, device="cpu", model=model)
    common = {"model_name": "model", "hook_name": hook, "model_cache_path": cache, "datasets": tables, "device": "cpu"}
    run_all_baseline_normal(results_path=work / "results", **common)
    found: dict[str, Figures] = {}
    latents, baseline = (work / f"results/{what}_model/normal_setting" for what in ("sae_probes", "baseline_results"))
    for penalty in ("l2", "l1"):
        run_sae_evals(sae, reg_type=penalty, setting="normal", ks=KS, results_path=work / "results", **common)
        found[f"sae-probes, its split, {penalty}"] = {
            **{str(k): [figures_of(latents / f"{name}_{hook}_{penalty}.json", k) for name in tables] for k in KS},
            "activations": [figures_of(baseline / f"{name}_{hook}_logreg.json") for name in tables]}
    found["our split, l2"] = on_split(sae, hook, cache)
    sys.__stdout__.write("\n" + json.dumps(found) + "\n")


def figures_of(path: Path, k: int | None = None) -> dict[str, Any]:
    """The figures in one line of a results file."""
    one = next(line for line in json.loads(path.read_text()) if k is None or line["k"] == k)
    return {"auc": one["test_auc"], "accuracy": one["test_acc"], "latents": one.get("indices")}


def on_split(sae: Any, hook: str, cache: Path) -> Figures:
    """Its selection of latents and its probes, trained and tested on our training and test rows."""
    found: Figures = {**{str(k): [] for k in KS}, "activations": []}
    for name, train in wanted["tables"].items():
        x_ND = get_xvals(name, hook, "model", cache)
        y_N = get_yvals(name)
        with torch.inference_mode():
            z_NF = sae.encode(x_ND).float()
        order = get_sorted_indices(z_NF[:train], torch.from_numpy(y_N[:train]), mean_act_normalization)
        parts = {str(k): z_NF[:, order[:k]] for k in KS} | {"activations": x_ND}
        for key, part in parts.items():
            metrics = find_best_reg(part[:train].numpy(), y_N[:train], part[train:].numpy(), y_N[train:],
                                    seed=42).metrics
            latents = order[: int(key)].tolist() if key != "activations" else None
            found[key].append({"auc": metrics.test_auc, "accuracy": metrics.test_acc, "latents": latents})
    return found


with contextlib.redirect_stdout(sys.stderr):
    main()
