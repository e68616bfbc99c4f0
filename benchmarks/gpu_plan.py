"""GPU day: the memory that `olmoscope plan` predicts for each training step, compared with the peak from part `step`.

On a CPU the prediction is for RAM without the process and the stream's rounds. The measured peak is resident memory,
which small sizes hardly change, so there the part only shows that the comparison runs.
"""

import tempfile
from pathlib import Path
from typing import Any

from common import Shape
from gpu_part import Part
from olmoscope.activations.stream.rounds import ROUND_ROWS
from olmoscope.cost.plan import PROCESS_BYTES, ROUNDS_HELD, plan
from olmoscope.recipe.schema import Recipe

CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "step": ({}, {}), "step, touched rows": ({}, {"adam": "touched"}),
    "step, bf16 moments": ({}, {"moments": "bfloat16"}), "step, candidates": ({}, {"candidates": {}}),
    "step, untied": ({"weights": "untied"}, {}),
    "step, auxiliary": ({}, {"auxiliary": {"weight": 0.125}})}
"""Each contestant of gpu_step.py as recipe keys: of its SAE, and of `train`."""


def main() -> None:
    part = Part("plan", __doc__)
    measured = part.earlier("step").get("shapes", {})
    found: dict[str, dict[str, Any]] = {}
    for shape in part.shapes():
        for name in CHANGES:
            predicted = predict(shape, name)
            peak = measured.get(shape.name, {}).get(name, {}).get("peak_bytes")
            ratio = peak / predicted if peak is not None else None
            found.setdefault(shape.name, {})[name] = {"predicted_bytes": predicted, "measured_bytes": peak,
                                                      "measured_over_predicted": ratio}
            seen = "not measured" if ratio is None else f"measured {peak / 1e9:6.2f} GB, {ratio:5.2f} of it"
            part.keep(f"{shape.name:12} {name:19} predicted {predicted / 1e9:6.2f} GB, {seen}", shapes=found)


def predict(shape: Shape, name: str) -> float:
    """Bytes that a plan predicts for the SAE's training on its device."""
    sae, train = CHANGES[name]
    recipe = Recipe.model_validate({
        "name": "gpu-day", "device": shape.device,
        "text": {"sources": [{"kind": "files", "name": "text", "paths": ["*.txt"]}], "mixture": {"text": 1.0}},
        "tokens": {"count": 20_000_000, "held_out": 1000},
        "model": {"name": "allenai/Olmo-3-7B-Think", "d_model": shape.d_model, "num_layers": 32},
        "activations": {"layers": [7]},
        "saes": [{"layer": 7, "d_sae": shape.d_sae, "k": shape.k} | sae],
        "train": {"batch": shape.batch, "auxiliary": None} | train,
        "release": {"name": "gpu-day", "repo_id": "nobody/gpu-day"}})
    memory = plan(recipe, Path(tempfile.gettempdir())).saes[0].memory
    if shape.device == "cuda":
        return memory.gpu
    rounds = min(ROUND_ROWS, recipe.tokens.count) * recipe.activations.row_bytes(shape.d_model) * ROUNDS_HELD
    return memory.ram - PROCESS_BYTES - rounds


if __name__ == "__main__":
    main()
