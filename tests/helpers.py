"""Shared by several tests: a small corpus, a recipe for it, and small random models of several architectures."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from olmoscope.model.capture import read_sites
from olmoscope.model.sites import Place
from olmoscope.recipe.schema import Recipe
from olmoscope.site import Site

ARCHITECTURES = ("Olmo3", "GPT2", "Llama", "Qwen3", "Gemma3")


def write_documents(folder: Path, count: int = 60, words: int = 60) -> Path:
    """A Dolma shard of `count` documents with different words; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "shard.json.gz"
    with gzip.open(path, "wt") as file:
        for number in range(count):
            text = " ".join(f"word{(number * 31 + place * place) % 997} is" for place in range(words))
            file.write(json.dumps({"id": f"document-{number}", "text": text}) + "\n")
    return path


def recipe(corpus: Path, **changes: Any) -> Recipe:
    """A recipe for the tiny model over `write_documents`, which takes about a second; `a__b=1` sets a.b."""
    tree: dict[str, Any] = {
        "name": "test",
        "device": "cpu",
        "text": {"sources": [{"kind": "dolma", "name": "web", "paths": [str(corpus / "*.json.gz")]}],
                 "mixture": {"web": 1.0}, "held_out_share": 0.2},
        "tokens": {"count": 3000, "held_out": 500, "chunk_lengths": [(16, 40), (100, 128)], "segment_rows": 700,
                   "batch_tokens": 256},
        "model": {"name": "tiny", "dtype": "float32"},  # the same on every machine
        "activations": {"layers": [1, 7]},
        "saes": [{"layer": 1, "d_sae": 512, "k": 8}, {"layer": 7, "d_sae": 512, "k": 8, "normalize": "layer_norm"}],
        "train": {"batch": 128, "dead_window": 1000, "checkpoint_every": 5, "log_every": 2},
        "release": {"name": "test-saes", "repo_id": "someone/test-saes"},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = tree
        for key in parents:
            node = node[key]
        node[last] = value
    return Recipe.model_validate(tree)


def checkpoint_contents(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, except for durations: it must be the same however often a run was killed."""
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["olmoscope"])
        assert metadata["loop"].pop("seconds") >= 0
        digests = {}
        for name in file.keys():  # noqa: SIM118  (the file is no mapping)
            tensor = file.get_tensor(name)
            content = tensor.flatten().view(torch.uint8).numpy().tobytes()
            digests[name] = (str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest())
    return {"metadata": metadata, "tensors": digests}


def small_model(architecture: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random causal LM of an architecture: 4 layers, width 32, 4096 tokens, float32."""
    torch.manual_seed(seed)
    common = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8}
    sliding = {"sliding_window": 16,
               "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]}
    config = {
        "Olmo3": lambda: transformers.Olmo3Config(**common, **sliding, pad_token_id=1, eos_token_id=0),
        "GPT2": lambda: transformers.GPT2Config(vocab_size=4096, n_embd=32, n_layer=4, n_head=4, n_positions=256),
        "Llama": lambda: transformers.LlamaConfig(**common),
        "Qwen3": lambda: transformers.Qwen3Config(**common),
        "Gemma3": lambda: transformers.Gemma3TextConfig(**common, **sliding),
    }[architecture]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # initial weights are nearly zero: documents would hardly see each other
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def save_small_model(architecture: str, folder: Path) -> Path:
    """`small_model` in a folder, with the tiny model's tokenizer."""
    small_model(architecture).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save the tiny model's tokenizer."""
    from importlib import resources

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(resources.files("olmoscope") / "model" / "tiny"))
    tokenizer.save_pretrained(folder)


def put_bos_first(folder: Path, token: str = "<|im_start|>") -> int:
    """Make a saved tokenizer one that puts BOS before a text by itself, as Llama's and Gemma's do; returns its id."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    number = next(int(added["id"]) for added in tree["added_tokens"] if added["content"] == token)
    start, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tree["post_processor"] = {
        "type": "TemplateProcessing", "single": [start, text],
        "pair": [start, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}}}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": token, "add_bos_token": True}))
    return number


def streams(layers: torch.nn.ModuleList, numbers: list[int]) -> list[Place]:
    """Where the residual streams after some layers are."""
    return [Place(Site(number), "output", layers[number]) for number in numbers]


def read_streams(module: torch.nn.Module, layers: torch.nn.ModuleList, numbers: list[int], token_ids_BT: torch.Tensor,
                 positions_BT: torch.Tensor | None = None) -> dict[int, torch.Tensor]:
    """The residual streams after some layers, by layer."""
    found = read_sites(module, streams(layers, numbers), token_ids_BT, positions_BT)
    return {site.layer: x_BTD for site, x_BTD in found.items()}
