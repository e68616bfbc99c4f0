"""Let circuit-tracer read what `olmoscope export ... --to circuit-tracer --folder FOLDER` wrote.

    python tests/foreign/read_circuit_tracer.py FOLDER...

in an environment that has circuit-tracer 0.4.1 (from decoderesearch/circuit-tracer; its name on the package index is
another's). Where `expected.safetensors` stands in a folder (tests/export_cases.py writes it), codes and reconstructions
are compared with ours. Feature pages are fetched from its own server, as its viewer does, and checked by its schema.
"""

import gzip
import itertools
import json
import sys
import urllib.request
import zlib
from pathlib import Path

import torch
import yaml
from circuit_tracer.frontend.feature_models import Model
from circuit_tracer.frontend.local_server import serve
from circuit_tracer.utils.hf_utils import load_transcoders
from safetensors.torch import load_file

PORT = 8041


def transcoders(folder):
    """Print how a set reads."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    files = sorted(folder.glob("layer_*.safetensors"), key=lambda path: int(path.stem[6:]))
    loaded = load_transcoders(config | {"transcoders": [str(path) for path in files], "scan": str(folder),
                                        "repo_id": ""}, device=torch.device("cpu"), dtype=torch.float32)
    print(f"{folder.name}: circuit-tracer reads {len(files)} layers of {loaded[0].d_transcoder} latents, "
          f"{loaded.feature_input_hook} to {loaded.feature_output_hook}")
    if not (folder / "expected.safetensors").exists():
        return
    expected, (one,) = load_file(folder / "expected.safetensors"), loaded.transcoders
    x_BD = expected["x"]
    with torch.no_grad():
        codes_BF = one.encode(x_BD)
        out_BD = one.decode(codes_BF, x_BD)
    same_B = (codes_BF != 0).eq(expected["codes"] != 0).all(dim=1)
    size_B1 = torch.cat([expected["out"], x_BD], dim=1).abs().amax(dim=1, keepdim=True).clamp_min(1)
    apart = max(float(((found - wanted) / size_B1)[same_B].abs().max())
                for found, wanted in ((codes_BF, expected["codes"]), (out_BD, expected["out"])))
    print(f"{folder.name}: {int(same_B.sum())} of {len(x_BD)} rows, largest difference {apart:.1e}: "
          f"{'equal' if apart < 1e-6 and int(same_B.sum()) >= len(x_BD) - 3 else 'NOT EQUAL'}")


def pages(folder):
    """Fetch every feature's page by byte range, and let circuit-tracer's model of it read it."""
    features = folder / "features"
    server = serve(data_dir=str(folder), features_dir=str(features), port=PORT)
    try:
        def get(path, first=None, last=None):
            headers = {} if first is None else {"Range": f"bytes={first}-{last}"}
            request = urllib.request.Request(f"http://localhost:{PORT}/features/{path}", headers=headers)
            with urllib.request.urlopen(request) as answer:
                return answer.read()

        read = examples = 0
        for entry in json.loads(gzip.decompress(get("index.json.gz"))).values():
            offsets = entry["offsets"]
            for number, (first, last) in enumerate(itertools.pairwise(offsets)):
                content = get(entry["filename"], first, last)
                page = json.loads(zlib.decompress(content[4 : 4 + int.from_bytes(content[:4], "little")]))
                found = Model.model_validate(page, strict=True, extra="forbid")
                assert found.index == number
                read += 1
                examples += sum(len(group.examples) for group in found.examples_quantiles)
        print(f"{folder.name}: circuit-tracer's model of a page takes {read:,} features with {examples:,} examples")
    finally:
        server.stop()


for name in sys.argv[1:]:
    if (Path(name) / "config.yaml").exists():
        transcoders(Path(name))
    if (Path(name) / "features").exists():
        pages(Path(name))
