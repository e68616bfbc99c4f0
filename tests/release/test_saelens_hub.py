"""`SAE.from_pretrained` against a hub on this machine, and the model card's own example, word for word."""

import json
import re
import shlex
import subprocess
import sys

import yaml
from safetensors.torch import load_file

from commands import run_forked
from olmoscope.release.build import build_release
from release_runs import RAW, make_out, recipe_for_tests

BY_REPOSITORY_AND_BY_RELEASE = """
import json, sys
from sae_lens import SAE
from sae_lens.loading import pretrained_saes_directory as directory

by_repository = SAE.from_pretrained(sys.argv[1], sys.argv[3])
# The entry of the release, where SAELens' own list would have it.
directory.files = lambda package: __import__("pathlib").Path(sys.argv[4])
directory.get_pretrained_saes_directory.cache_clear()
lookup = directory.get_pretrained_saes_directory()[sys.argv[2]]
by_release = SAE.from_pretrained(sys.argv[2], sys.argv[3])
same = all((a == b).all() for a, b in zip(by_repository.parameters(), by_release.parameters()))
cfg = by_repository.cfg
print(json.dumps({"k": cfg.k, "bias": cfg.apply_b_dec_to_input, "normalize": cfg.normalize_activations,
                  "metadata": cfg.metadata.to_dict(), "same": bool(same), "dtype": str(by_repository.W_dec.dtype),
                  "b_dec": by_repository.b_dec.tolist(), "l0": lookup.expected_l0,
                  "ve": lookup.expected_var_explained}))
"""


def run_python(code: str, *arguments: str, env: dict[str, str]) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_pretrained(built, hub_endpoint, tmp_path):
    release = built / "release"
    hub_endpoint.add("model", "your-name/olmoscope-tiny-saes", release)
    entry = tmp_path / "list" / "pretrained_saes.yaml"
    entry.parent.mkdir()
    entry.write_text((release / "saelens_pretrained_saes.yaml").read_text())
    config = json.loads((release / RAW / "cfg.json").read_text())
    printed = run_python(BY_REPOSITORY_AND_BY_RELEASE, "your-name/olmoscope-tiny-saes", "olmoscope-tiny-saes", RAW,
                         str(entry.parent), env=hub_endpoint.environment(tmp_path / "hf"))
    told = json.loads(printed.splitlines()[-1])
    assert (told["k"], told["bias"], told["normalize"], told["dtype"]) == (4, True, "none", "torch.float32")
    assert told["metadata"] == config["metadata"]
    assert told["same"]
    (sae,) = [sae for sae in yaml.safe_load(entry.read_text())["olmoscope-tiny-saes"]["saes"] if sae["id"] == RAW]
    assert (told["l0"][RAW], told["ve"][RAW]) == (sae["l0"], sae["variance_explained"])
    assert told["b_dec"] == load_file(release / RAW / "sae_weights.safetensors")["b_dec"].tolist()


def test_the_cards_example_runs(hub_endpoint, tmp_path):
    """With the model of the package, whose width the SAEs must have."""
    recipe = recipe_for_tests("[{layer: 7, d_sae: 512, k: 8, normalize: layer_norm}]")
    out = make_out(tmp_path / "out", recipe, d_model=256)
    build_release(out)
    hub_endpoint.add("model", "your-name/olmoscope-tiny-saes", out / "release")
    by_name, from_disk = re.findall(r"```python\n(.*?)```", (out / "release" / "README.md").read_text(), flags=re.S)
    check = """
from sae_lens import SAE as Loaded
last = model(input_ids=tokens["input_ids"], output_hidden_states=True, use_cache=False).hidden_states[-1]
assert not torch.allclose(seen["x"], last), "layer 7 is the last: hidden_states must differ"
assert reconstruction.shape == seen["x"].shape and features.shape == (*seen["x"].shape[:2], 512)
assert 0 < features.count_nonzero(dim=-1).max() <= 8
assert torch.isfinite(reconstruction).all()
"""
    from_disk = from_disk.replace("PATH", str(out / "release"))
    run_python(f"{by_name}\n{check}\n{from_disk}\nassert sae.cfg.k == 8", env=hub_endpoint.environment(tmp_path / "hf"))
    command, = re.findall(r"^olmoscope (index .*)$", (out / "release" / "README.md").read_text(), flags=re.M)
    (tmp_path / "text.txt").write_text("def main():\n    return 1\n" * 50)
    arguments = command.replace("FILE", str(tmp_path / "text.txt")).replace("features", str(tmp_path / "features"))
    indexed = run_forked(*shlex.split(arguments), environment=hub_endpoint.environment(tmp_path / "hf"), hub=True)
    assert indexed.returncode == 0 and "512 features" in indexed.stdout, indexed.stderr
