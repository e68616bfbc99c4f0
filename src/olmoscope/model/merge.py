"""An adapter merged into its base by PEFT's own public calls, then compared with the unmerged adapter on its base.

The merged model must compute what the adapter was trained to compute. Some kinds of adapter cannot be merged, and some
merges change more than the adapter did (if one matrix serves as embedding and unembedding, and the adapter changes only
one of the two): these are refused. Shapes: T positions, V vocabulary.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olmoscope.errors import UserError
from olmoscope.model.probe import OTHER_SHAPE, REFUSALS, difference, does_not_run
from olmoscope.model_adapter import ADAPTER, ADAPTER_WEIGHTS, read_adapter
from olmoscope.model_errors import damage, first_line
from olmoscope.model_source import adapter_folder, has_own_tokenizer, read_tokenizer
from olmoscope.recipe.schema import Model

TRIED_TOKENS = 12
ROWS_FIRST, ROWS_SECOND = (".weight", ".base_layer.weight", ".modules_to_save.weight"), (".lora_embedding_A",)
"""The names, after the module's path, of an adapter's tensors that have a row (or a column) for each token."""


def adapter_to_merge(model: Model) -> Path:
    """The folder of an adapter, checked as far as it can be before its base is loaded.

    Raises:
        UserError: its files are missing or damaged, or it is of a kind that cannot be merged.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    folder = adapter_folder(model)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise _refused(model, f"{folder} has no {ADAPTER_WEIGHTS}, the only file that weights are read from")
    if found := damage(weights):
        raise _refused(model, found)
    config = read_adapter(folder / ADAPTER)
    kind = config.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise _refused(model, f"the installed peft does not know adapters of this kind (peft_type {kind!r} in "
                              f"{ADAPTER}): update peft (`pip install -U peft`)")
    assert isinstance(kind, str)
    known = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if known(task_type="CAUSAL_LM").is_prompt_learning or known(task_type="CAUSAL_LM").is_adaption_prompt:
        raise _unmergeable(model, kind, "it adds to what the model reads")
    if config.get("megatron_config"):  # PEFT would import the module that the file names
        raise _refused(model, f"it was trained with Megatron (megatron_config in {ADAPTER}), which is not supported")
    return folder


def merge_adapter(causal: Any, model: Model, folder: Path) -> Any:
    """Merge an adapter into its base, in place.

    Args:
        causal: the whole base.
        model: the adapter.
        folder: the result of `adapter_to_merge`.

    Raises:
        UserError: it does not fit the base, cannot be merged, or computes something else once merged.
    """
    from peft import PeftModel

    if getattr(causal.config, "quantization_config", None) is not None:
        raise _refused(model, "its base is quantised, so a merge would be rounded to the quantised values: give an "
                              "adapter whose base_model_name_or_path is the base before quantisation")
    kind = str(read_adapter(folder / ADAPTER)["peft_type"])
    _make_room(causal, model, folder)
    dtype, rows = next(causal.parameters()).dtype, causal.get_input_embeddings().num_embeddings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns about is checked below
            adapted = PeftModel.from_pretrained(causal, str(folder), torch_device="cpu").eval()
            # Load it again, since only this call reports the tensors that were missing or found no place.
            loaded = adapted.load_adapter(str(folder), "default", torch_device="cpu")
    except (*REFUSALS, ImportError) as error:
        raise _refused(model, f"it does not fit its base: {first_line(error)}") from error
    for what, names in (("has no place in its base for", loaded.unexpected_keys), ("lacks", loaded.missing_keys)):
        if names:
            raise _refused(model, f"it does not fit its base: it {what} {names[0]} and {len(names) - 1} more")
    ids_1T = torch.arange(TRIED_TOKENS)[None] * max(1, rows // (2 * TRIED_TOKENS)) % rows
    try:
        beside_TV = _logits(adapted, ids_1T)
    except REFUSALS as error:
        raise does_not_run(model.name, dtype, error) from error
    try:
        merged = adapted.merge_and_unload()
    except (*REFUSALS, NotImplementedError) as error:
        raise _unmergeable(model, kind, first_line(error)) from error
    far = float(difference(_logits(merged, ids_1T), beside_TV).median())
    if not far <= OTHER_SHAPE[dtype]:
        raise _refused(model, f"merged into its base it computes something else than unmerged (logits differ by "
                              f"{far:.1%}): it changes the embedding or the head of a model where both are one matrix")
    _refuse_unknown_tokens(merged, model)
    return merged


def _make_room(causal: Any, model: Model, folder: Path) -> None:
    """Give the base as many tokens as the adapter was trained with, if the adapter has the rows of all of them."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    paths = {id(module): path for path, module in causal.named_modules()}
    ends = [module for module in (causal.get_input_embeddings(), causal.get_output_embeddings()) if module is not None]
    rows, brought = {len(module.weight) for module in ends}, set()
    for module in ends:
        for name, shape in shapes.items():
            end = name.partition(f".{paths[id(module)]}.")[2]
            if f".{end}" in ROWS_FIRST:
                rows.add(shape[0])
                brought.add(id(module))
            elif f".{end}" in ROWS_SECOND:
                rows.add(shape[1])
    had = len(ends[0].weight)
    if rows == {had}:
        return
    tied = len(ends) == 2 and ends[0].weight is ends[1].weight
    if len(rows - {had}) > 1 or not (brought if tied else brought == {id(module) for module in ends}):
        raise _refused(model, f"it was trained with {max(rows)} tokens, its base has {had}, and it does not have the "
                              "rows of all of them: merge it yourself (resize_token_embeddings, merge_and_unload)")
    causal.resize_token_embeddings(max(rows - {had}), mean_resizing=False)


def _refuse_unknown_tokens(merged: Any, model: Model) -> None:
    """Refuse an adapter whose tokenizer has tokens for which the model has no rows."""
    if not has_own_tokenizer(model):
        return
    rows, tokens = merged.get_input_embeddings().num_embeddings, read_tokenizer(model).get_vocab()
    last = max(tokens.values(), default=0)
    if last >= rows:
        raise _refused(model, f"the tokenizer beside it has tokens up to {last}, but the model's embedding has only "
                              f"{rows} rows: the rows that training added are not in the adapter")


@torch.no_grad()
def _logits(module: nn.Module, ids_1T: Tensor) -> Tensor:
    """Logits, float32 `[T, V]`."""
    logits_TV: Tensor = module(input_ids=ids_1T, use_cache=False).logits[0].float()
    return logits_TV


def _unmergeable(model: Model, kind: str, why: str) -> UserError:
    return _refused(model, f"an adapter of this kind ({kind}) cannot be merged into its base ({why}), and only merged "
                           "adapters can be read")


def _refused(model: Model, why: str) -> UserError:
    return UserError(f"cannot load model {model.name!r}, an adapter: {why}")
