"""Wrong uses of the commands that share and measure SAEs: one line each, which says what, where and what to do.

Those of the hub are in test_pull.py, test_push.py and tests/test_hub_errors.py.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export_cases import coder, opened
from olmoscope.cli import app as cli
from olmoscope.sae.io import circuit_tracer
from release_runs import LAYER_NORM, RAW

FOREIGN = Path(__file__).parents[1] / "foreign"


@pytest.fixture(scope="module")
def place(evaluated, tmp_path_factory):
    """A folder of things that are wrong in one way each."""
    root = tmp_path_factory.mktemp("wrong")
    for name in ("out", "unfinished", "unmeasured", "gone", "nan", "released"):
        shutil.copytree(evaluated, root / name)
    (root / "unfinished" / "runs" / RAW / "done.json").unlink()
    (root / "unmeasured" / "runs" / RAW / "evaluation.json").unlink()
    checkpoint = f"runs/{RAW}/checkpoints/step-00000008.safetensors"
    (root / "gone" / checkpoint).unlink()
    with safe_open(root / "nan" / checkpoint, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(root / "nan" / checkpoint)
    tensors["W"][0, 0] = torch.nan
    save_file(tensors, root / "nan" / checkpoint, metadata)
    (root / "released" / "release").write_text("a file")
    index = root / "out" / "runs" / LAYER_NORM / "index"
    index.mkdir()
    (index / "manifest.json").write_text(json.dumps({"format": "olmoscope feature index"}))
    (root / "empty").mkdir()
    (root / "file").write_text("no SAE")
    shutil.copytree(FOREIGN / "one_site/saelens", root / "foreign")
    weights = load_file(root / "foreign" / "sae_weights.safetensors")
    weights["W_dec"][0, 0] = torch.inf
    save_file(weights, root / "foreign" / "sae_weights.safetensors")
    shutil.copytree(FOREIGN / "one_site/saelens", root / "more")
    save_file(load_file(root / "more" / "sae_weights.safetensors") | {"more": torch.zeros(2)},
              root / "more" / "sae_weights.safetensors")
    (root / "crosscoder").mkdir()
    save_file({"encoder.weight": torch.zeros(2, 16, 48), "decoder.weight": torch.zeros(2, 48, 16)},
              root / "crosscoder" / "model.safetensors")
    for name, kind, layer in (("a", "topk", 1), ("b", "jumprelu", 2)):
        made = opened(coder(kind, "other", f"layers.{layer}.mlp.out"))
        circuit_tracer.write_layer(made, root / "set" / name)
        circuit_tracer.write_config(root / "set" / name, circuit_tracer.config_of(made, root / "set" / name))
    return root


CASES = """
export AT/out --to gguf
    --to gguf: no such format; choose one of saelens, sparsify, ...
export AT/out/RUN --to sparsfy --folder AT/new
    --to sparsfy: no such format; ...; did you mean sparsify?
export AT/nowhere
    AT/nowhere is not an output folder: it has no recipe.yaml; give one, or --folder as well to write a single SAE ...
export AT/file --to sparsify
    AT/file is not an output folder: it has no recipe.yaml; give one, ...
export AT/out/RUN
    AT/out/RUN is the folder of one run; give its output folder, AT/out
export AT/nowhere --to sparsify --folder AT/new
    AT/nowhere does not exist, and is neither an address on the hub ...; give the SAE's folder or file, or one of ...
export AT/empty --to sparsify --folder AT/new
    AT/empty has an unknown format: it holds nothing; give the folder or file of one SAE; known formats are ...
export AT/out/RUN --to sparsify --folder AT/file
    AT/file is a file, not a folder; choose another folder, or move the file away
export AT/out/RUN --to saelens --folder AT/new
    SAELens' format, ..., is written only for Olmoscope runs: give their output folder, and leave out --folder
export AT/unfinished
    AT/unfinished/RUN is not finished (no done.json): train it to its end first, with `olmoscope train`
export AT/unfinished/RUN --to sparsify --folder AT/new
    AT/unfinished/RUN is not finished (no done.json): train it to its end first, with `olmoscope train`
export AT/gone
    AT/gone/RUN/checkpoints/step-00000008.safetensors is missing: copy it back, or delete the run's done.json and ...
export AT/nan --to sparsify
    AT/nan/RUN/checkpoints/step-00000008.safetensors: W holds NaN or inf, so the SAE cannot be used; train it again ...
export AT/foreign --to sparsify --folder AT/new
    AT/foreign/sae_weights.safetensors: W_dec holds NaN or inf, so the SAE cannot be used: download the file again, ...
export AT/more --to sparsify --folder AT/new
    AT/more/sae_weights.safetensors holds W_dec, ..., more; a topk SAE has ...: correct architecture in cfg.json, or ...
export AT/out/INDEXED/index --to sparsify --folder AT/new
    AT/out/INDEXED/index is a feature index, which has no weights: give the SAE, or for the index choose --to ...
export AT/out --to circuit-tracer
    AT/out/export/circuit-tracer: ... circuit-tracer replaces MLPs by transcoders ...; write an SAE for SAELens (...)
export AT/set --to circuit-tracer --folder AT/new
    AT/new: the transcoders of a set must agree in activation; layer_1... has topk, layer_2... has none: leave ...
export AT/out --to TOOL
    AT/out/RUN has no feature index, which --to TOOL needs; `olmoscope index AT/out/RUN` makes it
export AT/out/INDEXED --to TOOL --folder AT/new
    AT/out/INDEXED is a run: --to TOOL needs its feature index, AT/out/INDEXED/index
export AT/nowhere --to TOOL --folder AT/new
    AT/nowhere does not exist: --to TOOL needs a feature index, which `olmoscope index` makes of an SAE
release AT/nowhere
    no recipe 'AT/nowhere': neither a file or folder nor ...; give one of these, or the path of a ... output folder
release AT/empty
    AT/empty has no recipe.yaml, so it is not an output folder; give one that `olmoscope collect` or `olmoscope ...
release AT/out/RUN
    AT/out/RUN is the folder of one run; give its output folder, AT/out
release AT/unfinished
    not trained to the end: RAW; run `olmoscope train AT/unfinished` first
release AT/unfinished --push someone/name --tag v..1
    --tag 'v..1' is not a name for a tag: use letters, digits, dots, - and _, for example v1.0
release AT/unmeasured
    not evaluated: RAW; run `olmoscope evaluate AT/unmeasured` first
release AT/released
    AT/released/release is a file, not a folder; choose another folder, or move the file away
validate AT/empty
    AT/empty is neither a release ... nor an SAE folder (no cfg.json); give a release, an output folder with one ...
inspect AT/nowhere
    AT/nowhere does not exist, and is neither an address on the hub ...; give the SAE's folder or file, or one of ...
inspect AT/file
    AT/file is damaged or not a file of safetensors, numpy or torch (...): download it again, or give the SAE's own file
inspect AT/unfinished/RUN
    AT/unfinished/RUN is not finished (no done.json): train it to its end first, with `olmoscope train`
inspect AT/gone/RUN
    AT/gone/RUN/checkpoints/step-00000008.safetensors is missing: copy it back, or delete the run's done.json and ...
inspect AT/crosscoder
    AT/crosscoder: its encoder is [2, 16, 48]: it is a crosscoder, ...; use the tool that wrote it, or train one ...
inspect saelens:no-such
    saelens:no-such: SAELens' registry has no release 'no-such'; its ... releases are listed in ...
audit AT/nan/RUN --text AT/file --out AT/new
    AT/nan/RUN/checkpoints/step-00000008.safetensors: W holds NaN or inf, so the SAE cannot be used; train it again ...
evaluate AT/foreign --text AT/file --out AT/new
    AT/foreign/sae_weights.safetensors: W_dec holds NaN or inf, so the SAE cannot be used: download the file again, ...
evaluate AT/foreign --site layers.x --text AT/file
    'layers.x' is not a site; a site is embed, layers.L, or layers.L followed by one of .attn.in, ...
evaluate AT/unfinished/RUN
    AT/unfinished/RUN is the folder of one run; give its output folder, AT/unfinished
"""
"""A command, and below it the whole line that it prints; `...` is any text."""


def cases():
    lines = CASES.strip().splitlines()
    for command, message in zip(lines[::2], lines[1::2], strict=True):
        for tool in ("delphi", "neuronpedia", "documents", "labels") if "TOOL" in command else ("",):
            yield tuple(text.strip().replace("RUN", f"runs/{RAW}").replace("RAW", RAW).replace(
                "INDEXED", f"runs/{LAYER_NORM}").replace("TOOL", tool) for text in (command, message))


@pytest.mark.parametrize(("command", "message"), cases())
def test_one_line_says_what_to_do(place, command, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["olmoscope", *command.replace("AT", str(place)).split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err.replace(str(place), "AT")
    wanted = ".*".join(re.escape(part) for part in message.split("..."))
    assert ended.value.code == 1 and re.fullmatch(f"error: {wanted}\n", error), error
    assert not (place / "new").exists()
