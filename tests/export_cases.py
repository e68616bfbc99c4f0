"""Our SAEs in other tools' formats, for foreign/read_back.py and foreign/read_circuit_tracer.py, which read them with
those tools.

    python tests/export_cases.py FOLDER

Beside each is `expected.safetensors`: `x` [rows, D], and `codes` and `out` as ours computes them from the written
files. Rows: ordinary ones, zeros, one that is b_dec itself, outliers; latents 0 and 1 tie on all of them.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from coders import coder_of, parameters
from olmoscope.release.convert import WRITERS
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io import circuit_tracer
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.io.opened import Opened
from olmoscope.site import Site

D, F, ROWS = 16, 40, 24
CASES = {
    "sparsify/topk": ("topk", "same", "layers.3"), "sparsify/tied": ("topk", "tied", "layers.3.mlp.out"),
    "sparsify/groupmax": ("groupmax", "same", "layers.3.attn.out"),
    "sparsify/transcoder": ("topk", "other", "layers.3.mlp.out"), "sparsify/skip": ("topk", "skip", "layers.3.mlp.out"),
    "dictionary-learning/topk": ("topk", "same", "layers.3"),
    "dictionary-learning/tied": ("topk", "tied", "layers.3.attn.out"),
    "dictionary-learning/jumprelu": ("jumprelu", "same", "layers.3.mlp.in"),
    "circuit-tracer/topk": ("topk", "other", "layers.3.mlp.out"),
    "circuit-tracer/jumprelu": ("jumprelu", "other", "layers.3.mlp.out"),
    "circuit-tracer/skip": ("jumprelu", "skip", "layers.3.mlp.out")}
"""Kind, ends and the site to state."""


def coder(kind: str, ends: str, site: str, normalize: str = "none") -> SparseCoder:
    """A random coder whose latents 0 and 1 have the same encoder."""
    is_tied, ends = ends == "tied", "same" if ends == "tied" else ends
    state = parameters(kind, D, D, F, ends=ends, tied=is_tied, dtype=torch.float32)
    for name in ("W", "W_enc", "b_latent", "threshold"):
        if name in state:
            state[name][1] = state[name][0]
    made, writes = coder_of(kind, state, normalize, ends), Site.parse(site)
    return made.at((writes,) if ends == "same" else (Site(writes.layer, "mlp.in"),), (writes,))


def opened(made: SparseCoder) -> Opened:
    """The same, in the form of an opened SAE."""
    return Opened(made, "an-sae", "some/model", None, "topk", Path(), "folder", "sha256:0", "no", 128, torch.float32,
                  {})


def write(tool: str, made: Opened, folder: Path) -> Path:
    """Write it for a tool; gives what `open_sae` opens."""
    if tool != "circuit-tracer":
        return WRITERS[tool](made, folder)
    path = circuit_tracer.write_layer(made, folder)
    circuit_tracer.write_config(folder, circuit_tracer.config_of(made, folder))
    return path


def rows(b_D: Tensor) -> Tensor:
    """Rows of all kinds."""
    x_BD = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 3, D) + 0.5
    x_BD[3], x_BD[4] = 0, b_D
    x_BD[5:8] *= 1000
    return x_BD


def main(folder: Path) -> None:
    """Write all cases."""
    for name, (kind, ends, site) in CASES.items():
        made = coder(kind, ends, site)
        there = write(name.partition("/")[0], opened(made), folder / name)
        x_BD = rows(made.b_out)
        out_BD, codes = open_sae(there, made.writes[0]).sae.reconstruct(x_BD)
        beside = there if there.is_dir() else there.parent
        save_file({"x": x_BD, "codes": codes.to_dense(), "out": out_BD}, beside / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
