"""Let Delphi read a cache that `olmoscope export INDEX --to delphi --folder ROOT` wrote, and compare it with the index.

    python tests/foreign/read_delphi.py expected INDEX ROOT    in the project's environment: what the index has
    python tests/foreign/read_delphi.py ROOT TOKENIZER         in one with eai-delphi 0.1.3

The second loads every latent with Delphi's own buffers, compares places and activations with the output of the first,
then lets `LatentDataset` build its examples.
"""

import itertools
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

WINDOW = 32


def expected(folder, root):
    """All firings of an index that are in complete windows: latents, places and activations; and where windows
    start."""
    from olmoscope.features.read import FeatureIndex

    index = FeatureIndex(Path(folder))
    bounds = index.corpus.sequences_S1.tolist()
    starts = np.array([start for first, last in itertools.pairwise(bounds)
                       for start in range(first, last - WINDOW + 1, WINDOW)])
    inside_T = np.zeros(index.info.tokens, bool)
    for start in starts:
        inside_T[start : start + WINDOW] = True
    latents, places, values = [], [], []
    for latent in range(index.info.sae.d_sae):
        at, activations = index.firing_values(latent)
        places.append(at[inside_T[at]].astype(np.int64))
        values.append(activations[inside_T[at]])
        latents.append(np.full(len(places[-1]), latent))
    save_file({"starts": starts, "latents": np.concatenate(latents), "places": np.concatenate(places),
               "values": np.concatenate(values)}, Path(root) / "expected.safetensors")


def compare(root, tokenizer):
    """Print whether Delphi sees the same."""
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset
    from transformers import AutoTokenizer

    wanted = load_file(Path(root) / "expected.safetensors")
    data = LatentDataset(Path(root) / "latents", SamplerConfig(), ConstructorConfig(min_examples=50),
                         tokenizer=AutoTokenizer.from_pretrained(tokenizer))
    found = 0
    for buffer in data.buffers:
        for latent in buffer:
            windows, positions = latent.activation_data.locations[:, 0], latent.activation_data.locations[:, 1]
            places = wanted["starts"][windows.numpy()] + positions.numpy()
            mine = wanted["latents"] == latent.latent.latent_index
            order = np.argsort(places)
            assert (places[order] == wanted["places"][mine]).all(), latent.latent
            values = latent.activation_data.activations.float().numpy()[order]
            assert (values == wanted["values"][mine].astype(np.float16)).all(), latent.latent
            found += len(places)
    assert found == len(wanted["places"]), (found, len(wanted["places"]))
    latents = len(np.unique(wanted["latents"]))
    print(f"eai-delphi {version('eai-delphi')}: {found:,} firings of {latents:,} latents, all equal", flush=True)
    records = [record for record in data if record is not None]
    print(f"{len(records):,} records with {sum(len(record.examples) for record in records):,} examples")


if __name__ == "__main__":
    expected(*sys.argv[2:]) if sys.argv[1] == "expected" else compare(*sys.argv[1:])
