"""Let other tools' own classes read the files of tests/export_cases.py, and compare their results with ours.

    python tests/foreign/read_back.py FOLDER

in an environment that has the tools (eai-sparsify 1.3.3, dictionary-learning 0.1.0; without a GPU with
SPARSIFY_DISABLE_TRITON=1). Prints the largest difference of codes and reconstructions, relative to a row's size or 1,
on the rows where the same latents are active: if latents tie for the last place, no rule says which is chosen.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file


def sparsify(folder):
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder, device="cpu")

    def compute(x_BD):
        values_BK, indices_BK, _ = coder.encode(x_BD)
        codes_BF = torch.zeros(len(x_BD), coder.num_latents).scatter_add_(1, indices_BK, values_BK)
        return codes_BF, coder(x_BD).sae_out

    return compute


def dictionary_learning(folder):
    from dictionary_learning.utils import load_dictionary

    coder, _ = load_dictionary(str(folder), "cpu")
    return lambda x_BD: (coder.encode(x_BD), coder(x_BD))


READERS = {"sparsify": ("eai-sparsify", sparsify), "dictionary-learning": ("dictionary-learning", dictionary_learning)}


def main(root):
    for path in sorted(root.rglob("expected.safetensors")):
        folder, expected = path.parent, load_file(path)
        if folder.relative_to(root).parts[0] not in READERS:
            continue  # read_circuit_tracer.py reads those
        package, reader = READERS[folder.relative_to(root).parts[0]]
        x_BD = expected["x"]
        with torch.no_grad():
            codes_BF, out_BD = reader(folder)(x_BD)
        same_B = (codes_BF != 0).eq(expected["codes"] != 0).all(dim=1)
        size_B1 = torch.cat([expected["out"], x_BD], dim=1).abs().amax(dim=1, keepdim=True).clamp_min(1)
        apart = max(float(((found - wanted) / size_B1)[same_B].abs().max())
                    for found, wanted in ((codes_BF, expected["codes"]), (out_BD, expected["out"])))
        verdict = "equal" if apart < 1e-6 and int(same_B.sum()) >= len(x_BD) - 3 else "NOT EQUAL"
        print(f"{folder.relative_to(root)}: {package} {version(package)}: {int(same_B.sum())} of {len(x_BD)} rows, "
              f"largest difference {apart:.1e}: {verdict}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
