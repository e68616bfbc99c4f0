"""What olmoscope finds in a model, and what works with it: the screen of `olmoscope model ID`."""

from dataclasses import dataclass
from typing import Any

import torch

from olmoscope.errors import UserError
from olmoscope.model.config import read_config, width_and_depth
from olmoscope.model.cut import cut_config
from olmoscope.model.dtype import settle_model
from olmoscope.model.load import LoadedModel, load_model
from olmoscope.model.sites import inner_sites
from olmoscope.model.splice import CausalLM, load_causal_lm
from olmoscope.model.unembed import NoUnembedding, unembedding_of
from olmoscope.model_source import base_of, pinned, read_tokenizer
from olmoscope.recipe.schema import Model
from olmoscope.site import PARTS, Site


@dataclass(frozen=True)
class Described:
    """A model: what it is, and which of our commands work with it."""

    facts: list[tuple[str, str]]
    """The name of each fact, and its value for this model."""
    works: list[tuple[str, str]]
    """A command or an option, and `yes` or why not."""


def describe_model(model: Model, device: torch.device) -> Described:
    """Load a whole model and test what our commands need from it.

    Raises:
        UserError: it cannot be loaded or its rows cannot be read.
    """
    model = pinned(settle_model(model, device))
    config = read_config(model)
    _, num_layers = width_and_depth(config, model)
    read: CausalLM | LoadedModel
    refusal = None
    try:
        read = load_causal_lm(model, device)
    except UserError as error:  # its rows may still be read
        read, refusal = load_model(model, [Site(num_layers - 1)], device), str(error)
    facts = _facts(model, config, read)
    works = [("collect, train", "yes"), ("sites inside a layer", _inner_sites(model, read, num_layers)),
             ("tokens.documents: apart", "yes" if read.probe.documents_apart else "no: documents see each other")]
    if not isinstance(read, CausalLM):
        return Described(facts, [*works, ("evaluate, browse", f"no: {refusal}"),
                                 ("promoted tokens of index", "unknown")])
    works.append(("evaluate, browse", "yes" if read.skips else "yes; the whole model runs for each replaced layer"))
    try:
        unembedding = unembedding_of(read.module, read.layers, read.d_model, read.revision)
    except NoUnembedding as error:
        return Described(facts, [*works, ("promoted tokens of index", f"no: {error}")])
    return Described([*facts, ("head", str(unembedding))], [*works, ("promoted tokens of index", "yes")])


def _inner_sites(model: Model, read: CausalLM | LoadedModel, num_layers: int) -> str:
    """The sites that all layers have, or why there are none; layers may be of several kinds."""
    module = read.body if isinstance(read, CausalLM) else read.module
    try:
        seen = inner_sites(module, read.layers, range(num_layers), model.name, read.vocabulary, model.modules)
    except UserError as error:
        return f"no: {error}"
    parts = [part for part in PARTS if all(Site(layer, part) in seen.places for layer in range(num_layers))]
    reason = "; no mid: attention and MLP are added at once" if seen.parallel and "mid" not in parts else ""
    return (", ".join(parts) or "no: no kind of site is in all layers") + reason


def _facts(model: Model, config: Any, read: CausalLM | LoadedModel) -> list[tuple[str, str]]:
    text = config.get_text_config()
    body = read.body if isinstance(read, CausalLM) else read.module
    base = base_of(model)
    above = "are not loaded"
    if base is not None:
        above = "are loaded: an adapter is merged into a whole model"
    elif text.num_hidden_layers <= 2 or cut_config(config, 0) is config:
        above = "are loaded: this model cannot be cut"
    return [
        ("architecture", (config.architectures or [type(config).__name__])[0]),
        ("revision", read.revision),
        *([] if base is None else [("adapter of", base.name)]),
        ("decoder layers", f"{text.num_hidden_layers}, {read.layers_path}"),
        ("d_model", f"{read.d_model}"),
        ("attention heads", _heads(text)),
        ("parameters without the head", f"{sum(one.numel() for one in body.parameters()):,}"),
        ("layers above those wanted", above),
        ("weights stored in", str(getattr(config, "dtype", None) or "unknown").removeprefix("torch.")),
        ("computes in", model.dtype),
        ("positions", _positions(text)),
        *_tokenizer(model, read.vocabulary)]


def _heads(text: Any) -> str:
    heads, kv_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads is None:
        return "unknown"
    return f"{heads}" if kv_heads in (None, heads) else f"{heads}, {kv_heads} for keys and values"


def _positions(text: Any) -> str:
    most = getattr(text, "max_position_embeddings", None)
    window = getattr(text, "sliding_window", None)
    return ("no limit stated" if most is None else f"{most:,}") + (f", sliding window {window:,}" if window else "")


def _tokenizer(model: Model, vocabulary: int) -> list[tuple[str, str]]:
    """Facts about its tokenizer."""
    tokenizer = read_tokenizer(model)
    special = [f"{name} {token!r}" for name in ("bos", "eos", "pad")
               if (token := getattr(tokenizer, f"{name}_token")) is not None]
    return [("vocabulary", f"{vocabulary:,}, the tokenizer has {len(tokenizer):,}"),
            ("special tokens", ", ".join(special) or "none"),
            ("chat template", "yes" if tokenizer.chat_template else "no")]
