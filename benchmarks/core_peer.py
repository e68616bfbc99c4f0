"""SAEBench's core evaluation on tokens that core_peers.py wrote; that script starts it with the peers' Python.

    PYTHON core_peer.py '{"tokens": ..., "sae": ..., "model": ..., "layer": ...}'

The last line of the output is JSON. It imports nothing from Olmoscope.
"""

import contextlib
import json
import sys
from typing import Any

import torch
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_lens import SAE
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge

wanted = json.loads(sys.argv[1])
NO_TOKEN = -1
"""A token to ignore that does not occur."""


class Tokens:
    """Stands in for SAELens' store, which would stream a text: gives one sequence after another."""

    store_batch_size_prompts = 1

    def __init__(self, tokens_ST: torch.Tensor) -> None:
        self.tokens_ST, self.context_size = tokens_ST, tokens_ST.shape[1]
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        self._left = iter(self.tokens_ST)

    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        return torch.stack([next(self._left) for _ in range(batch_size)])


def main() -> None:
    """Print SAEBench's figures, and explained variance by our formula on its rows."""
    tokens_ST = load_file(wanted["tokens"])["tokens"]
    model = TransformerBridge.boot_transformers(wanted["model"], dtype=torch.float32, device="cpu")
    sae = SAE.load_from_disk(wanted["sae"], device="cpu")
    hook = sae.cfg.metadata.hook_name
    for name, value in {"hook_name": hook, "hook_layer": wanted["layer"], "hook_head_index": None}.items():
        setattr(sae.cfg, name, value)  # where SAEBench looks for them
    config = CoreEvalConfig(batch_size_prompts=1, n_eval_reconstruction_batches=len(tokens_ST),
                            n_eval_sparsity_variance_batches=len(tokens_ST), compute_kl=True, compute_ce_loss=True,
                            compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True)
    metrics, _ = run_evals(sae, Tokens(tokens_ST), model, config, ignore_tokens={NO_TOKEN})
    found: dict[str, Any] = {name: value for group in metrics.values() for name, value in group.items()}
    with torch.no_grad():
        x_ND = torch.cat([model.run_with_cache(row_T[None], prepend_bos=False, names_filter=[hook],
                                               stop_at_layer=wanted["layer"] + 1)[1][hook][0] for row_T in tokens_ST])
        error_N = (x_ND - sae.decode(sae.encode(x_ND))).double().square().sum(dim=1)
        spread_N = (x_ND.double() - x_ND.double().mean(dim=0)).square().sum(dim=1)
    found |= {"squared error": float(error_N.mean()), "by our formula": 1 - float(error_N.sum() / spread_N.sum())}
    sys.__stdout__.write("\n" + json.dumps(found) + "\n")


with contextlib.redirect_stdout(sys.stderr):
    main()
