"""Shows that Llamascopium's folding of the activation scale does not keep the active latents of a JumpReLU SAE.

    python tests/foreign/fold_llamascopium.py         in an environment with llamascopium 2.0.0b34
"""

import math
from pathlib import Path

import torch
from llamascopium.models.sae import SparseAutoEncoder
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "llamascopium" / "jumprelu"
HOOK = "blocks.4.hook_resid_post"


@torch.no_grad()
def main():
    x_BD = load_file(FOLDER / "expected.safetensors")["x"]
    plain = SparseAutoEncoder.from_pretrained(str(FOLDER))
    folded = SparseAutoEncoder.from_pretrained(str(FOLDER), fold_activation_scale=True)
    scale = math.sqrt(plain.cfg.d_model) / plain.dataset_average_activation_norm[HOOK]
    active_BF = plain.encode(plain.normalize_activations({HOOK: x_BD})[HOOK]) > 0
    folded_BF = folded.encode(x_BD) > 0
    folded.activation_function.log_jumprelu_threshold.sub_(math.log(scale))
    rescaled_BF = folded.encode(x_BD) > 0
    same = int((rescaled_BF & active_BF).sum())
    print(f"scale {scale:.3f}; positive codes as trained {int(active_BF.sum())}, folded {int(folded_BF.sum())}, "
          f"folded with thresholds / scale {int(rescaled_BF.sum())}, of these the same {same}")


if __name__ == "__main__":
    main()
