"""Small indexes of small SAEs on small texts, some with almost no content."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from helpers import save_small_model
from olmoscope.browse.app import build_app
from olmoscope.browse.collection import Listing, open_collection
from olmoscope.browse.export import export_site
from olmoscope.browse.payload import feature_payload
from olmoscope.features.read import FeatureIndex
from olmoscope.features.rows_of import index_sae
from olmoscope.features.table import Filters
from olmoscope.sae.io import saelens
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.train.initialize import initialize

D, F = 32, 24


def silent_sae() -> JumpReLU:
    """An SAE with thresholds that no pre-activation reaches."""
    like = initialize(D, F, 4, "none", torch.zeros(D), seed=0)
    return JumpReLU(like.W_enc, like.W_dec, like.b_in, "none", like.b_latent, torch.full((F,), 1e9))


def model_without_norm(folder: Path) -> Path:
    """OPT-350m made small: no final norm, and a head that is narrower than the residual stream."""
    save_small_model("Llama", folder)
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / file).unlink()
    torch.manual_seed(0)
    config = transformers.OPTConfig(vocab_size=4096, hidden_size=D, num_hidden_layers=4, num_attention_heads=4,
                                    ffn_dim=64, max_position_embeddings=256, word_embed_proj_dim=16,
                                    do_layer_norm_before=False, bos_token_id=None, eos_token_id=0)
    transformers.OPTForCausalLM(config).float().save_pretrained(folder)
    return folder


def made(sae: TopK | JumpReLU, model: Path, folder: Path, text: str = "A text of some words. " * 20,
         **settings: Any) -> FeatureIndex:
    """The index of an SAE of layer 1 on a text, in `folder / "index"`, and its site in `folder / "site"`; verified,
    with every feature read in every way."""
    metadata = {"model_name": str(model), "hook_name": "blocks.1.hook_resid_post", "hf_hook_name": None,
                "prepend_bos": False, "context_size": 40}
    saelens.write(sae, folder / "sae", metadata)
    (folder / "text.txt").write_text(text)

    def indexed() -> Any:
        return index_sae(str(folder / "sae"), text=str(folder / "text.txt"), out=folder / "index", device="cpu",
                         **settings)

    index = FeatureIndex(indexed().folder)
    index.verify()
    collection = open_collection(folder / "index", None)
    (shown,) = collection.values()
    for number in range(sae.d_sae):
        payload = feature_payload(index, number, {})
        json.dumps(payload, allow_nan=False)
        assert payload["rows"] == index.feature(number).rows == len(index.firing_values(number)[0])
    assert Listing("density", True, Filters(), "", None).page(shown, 0, 500).total == sae.d_sae
    assert Listing("promoted", True, Filters(promoted="e", dead=False), "e", None).page(shown, 0, 500).total >= 0
    assert export_site(collection, folder / "site").features == sae.d_sae
    assert build_app(collection, 8100)
    assert not indexed().fresh
    return index
