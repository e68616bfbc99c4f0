"""cfg.json of an SAE in SAELens' format: every setting that affects what the SAE computes or reads is applied or
refused.

Source: sae-lens 6.54.12, `sae_lens/saes/sae.py` (the settings), `sae_lens/loading/pretrained_sae_loaders.py` (the
layout before version 6), `sae_lens/load_model.py` and TransformerLens' `HookedTransformer.from_pretrained` (how the
language model was loaded). SAELens itself silently drops settings that it does not know.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from olmoscope.errors import UserError
from olmoscope.model_errors import damage
from olmoscope.sae.io.registered import Registered
from olmoscope.sae.normalize import Normalize
from olmoscope.site import Site

CONFIG = "cfg.json"

DTYPES = {f"{prefix}{name}": getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")
          for prefix in ("", "torch.")}
"""Possible values of `dtype`."""

_SETTINGS = {"architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
             "reshape_activations", "metadata", "k", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor",
             "activation_fn", "activation_fn_kwargs", "sae_lens_version", "sae_lens_training_version"}
"""Settings that are applied or refused here or in saelens_tensors.py."""

_HOOK = {f"{key}{suffix}" for key in ("hook_name", "hook_layer", "hook_head_index", "hf_hook_name")
         for suffix in ("", "_out")}
"""Settings that say which activations the SAE reads or writes; they are metadata, but some files have them among the
others."""

_TRAINING = {"decoder_init_norm", "use_sparse_activations", "aux_loss_coefficient", "topk_threshold_lr",
             "matryoshka_widths", "use_matryoshka_aux_loss", "l1_coefficient", "lp_norm", "l1_warm_up_steps",
             "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "l0_coefficient",
             "l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_tanh_scale", "jumprelu_ste_to_input",
             "target_l0", "model_name", "model_class_name", "hook_eval", "dataset_path", "dataset_trust_remote_code",
             "streaming", "is_dataset_tokenized", "use_chat_formatting", "context_size", "use_cached_activations",
             "cached_activations_path", "from_pretrained_path", "n_batches_in_buffer", "training_tokens",
             "store_batch_size_prompts", "seqpos_slice", "disable_concat_sequences", "sequence_separator_token",
             "activations_mixing_fraction", "llm_device", "act_store_device", "prefetch_llm_batches", "seed",
             "prepend_bos", "autocast", "autocast_lm", "compile_llm", "llm_compilation_mode", "compile_sae",
             "sae_compilation_mode", "train_batch_size_tokens", "adam_beta1", "adam_beta2", "lr", "lr_scheduler_name",
             "lr_warm_up_steps", "lr_end", "lr_decay_steps", "n_restart_cycles", "dead_feature_window",
             "feature_sampling_window", "dead_feature_threshold", "n_eval_batches", "eval_batch_size_prompts",
             "logger", "n_checkpoints", "checkpoint_path", "save_final_checkpoint", "output_path",
             "resume_from_checkpoint", "verbose", "model_kwargs", "model_from_pretrained_kwargs",
             "exclude_special_tokens", "n_batches_for_norm_estimate", "neuronpedia_id"}
"""Settings of a training run, which do not change what the trained SAE computes."""

_METADATA = {"model_name", "hook_name", "dataset_path", "model_from_pretrained_kwargs", "neuronpedia_id"}
"""Settings in the registry that are metadata since version 6."""

_HARMLESS_LOADING = {"fold_ln", "fold_value_biases", "center_unembed", "refactor_factored_attn_matrices", "device",
                     "device_map", "n_devices", "move_to_device", "dtype", "torch_dtype", "trust_remote_code",
                     "cache_dir", "token", "local_files_only", "attn_implementation", "low_cpu_mem_usage",
                     "use_safetensors", "default_prepend_bos", "default_padding_side", "first_n_layers"}
"""Options for loading the language model that do not change its residual stream."""

_CHANGES_INSIDE = {"fold_ln": ("attn.in", "mlp.in"), "fold_value_biases": ("attn.z",),
                   "refactor_factored_attn_matrices": ("attn.z",)}
"""Those of them that change the input of attention or the MLP, and the sites concerned."""

_MODEL_CLASSES = (None, "HookedTransformer", "AutoModelForCausalLM")


def raw_settings(folder: Path) -> Any:
    """The content of a folder's cfg.json.

    Raises:
        OSError, ValueError: missing, or not JSON.
    """
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def read_settings(folder: Path, overrides: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in version 6's terms, and the metadata; settings that are not understood are refused.

    Args:
        overrides: settings in SAELens' registry that replace those in the file.

    Raises:
        UserError: the file is missing or damaged, or a setting changes the SAE's meaning in a way that is not known
            here.
    """
    path = folder / CONFIG
    try:
        config = raw_settings(folder)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {path.parent} is not an SAE in SAELens' format") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(damage(path) or f"{path} is damaged (not JSON: {error})") from error
    metadata = config.get("metadata") or {} if isinstance(config, dict) else None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is damaged: it does not hold a mapping; download it again")
    config |= {key: value for key, value in (overrides or {}).items() if key not in _METADATA}
    metadata |= {key: value for key, value in (overrides or {}).items() if key in _METADATA}
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    if re.match(r"\d+", str(version or "")) and int(str(version).split(".")[0]) >= 6:
        config.setdefault("architecture", None)
        _refuse_unknown(config, path)
        metadata = {key: config[key] for key in _TRAINING | _HOOK if key in config} | metadata
    else:
        config, metadata = _modern(config, metadata, path)
    _refuse_other_rows(metadata, path)
    return config, metadata


def row_scale(config: Mapping[str, Any], path: Path, registered: Registered | None) -> float:
    """The factor on rows before encoding, by which the reconstruction is divided. With `expected_average_only_in` it
    gives the training rows a mean norm of √D; only SAELens' registry states it.

    Raises:
        UserError: the SAE needs a factor that is not stated. (SAELens then warns and uses 1.)
    """
    if config.get("normalize_activations") != "expected_average_only_in":
        return 1.0
    if registered is None or registered.scale is None:
        raise UserError(f"{path}: normalize_activations 'expected_average_only_in' needs a scale that is not in the "
                        "folder: open it as saelens:RELEASE/ID if SAELens' registry has its norm_scaling_factor, or "
                        "fold the scale into the weights with SAELens and save it again")
    return registered.scale


def row_normalisation(config: dict[str, Any], metadata: dict[str, Any], path: Path, reads: Site | None,
                      transcoder: bool = False) -> Normalize:
    """The normalisation of rows, apart from `row_scale`.

    `center_writing_weights` of TransformerLens subtracts the mean from every row of the residual stream, exactly: each
    matrix and bias that writes into the stream is centred. An SAE of this stream reads centred rows. The inputs of
    attention and the MLP do not change: the norm before them subtracts the mean anyway.

    Args:
        reads: the site; None if it is not stated, which counts as the residual stream.

    Raises:
        UserError: the normalisation is unknown, or needs statistics that are not in the folder (SAELens silently uses
            none); or only a model that is loaded in another way has the rows.
    """
    wanted = config.get("normalize_activations") or "none"
    if wanted == "expected_average_only_in":
        wanted = "none"
    reshape = config.get("reshape_activations") or "none"
    if reshape not in ("none", "hook_z") or (
            reshape == "hook_z" and reads is not None and reads.part != "attn.z"):
        raise UserError(f"{path}: reshape_activations {reshape!r} is not supported for an SAE that reads {reads}; "
                        "supported is hook_z, for attn.hook_z")
    if wanted == "covariance_whitening":
        raise UserError(f"{path}: normalize_activations {wanted!r} needs statistics that are not in the folder: "
                        "SAELens' trainer folds them into the weights when it ends; use the SAE that it writes then")
    if wanted not in ("none", "layer_norm", "constant_norm_rescale"):
        raise UserError(f"{path}: normalize_activations {wanted!r} is unknown")
    if transcoder and wanted != "none" and not config["architecture"].endswith("transcoder"):
        raise UserError(f"{path}: normalize_activations {wanted!r}: SAELens undoes it in this transcoder's output, as "
                        "in an SAE, which makes no sense at another place")
    loading = _loading(metadata)
    for key, parts in _CHANGES_INSIDE.items():
        if loading.get(key) and reads is not None and reads.part in parts:
            raise UserError(f"{path}: model_from_pretrained_kwargs.{key}: it changes the rows at {reads}, so those of "
                            "the published model are different")
    if not loading.get("center_writing_weights"):
        return cast(Normalize, wanted)
    if transcoder:
        raise UserError(f"{path}: center_writing_weights: this transcoder writes rows without their mean, but the "
                        "published model's rows have it")
    inside = reads is not None and not reads.in_stream
    if wanted == "layer_norm" or inside:  # layer_norm centres rows anyway; inside a layer the rows do not change
        return cast(Normalize, wanted)
    if wanted != "none":
        raise UserError(f"{path}: normalize_activations {wanted!r} together with center_writing_weights is not "
                        "supported")
    return "centred"


def weights_dtype(config: Mapping[str, Any], path: Path) -> torch.dtype:
    """The dtype in which SAELens keeps the weights, whatever the file's dtype is.

    Raises:
        UserError: SAELens has no such dtype.
    """
    name = config.get("dtype") or "float32"
    if name not in DTYPES:
        raise UserError(f"{path}: dtype {name!r} is unknown; known are {', '.join(DTYPES)}")
    return cast(torch.dtype, DTYPES[name])


def _refuse_unknown(config: dict[str, Any], path: Path) -> None:
    known = _SETTINGS | _HOOK | _TRAINING | ({"d_out"} if str(config["architecture"]).endswith("transcoder") else set())
    unknown = [key for key, value in config.items()
               if key not in known and value not in (None, False, "none", "", [], {})]
    if unknown:
        raise UserError(f"{path}: {unknown[0]} ({config[unknown[0]]!r}) is not a known setting, and it may change what "
                        "the SAE computes; if it does not, remove it or move it into metadata")


def _modern(config: dict[str, Any], metadata: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert settings of a version before 6, which had the activation function and the metadata among them."""
    names = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index",
             "activation_fn_str": "activation_fn"}
    config = {names.get(key, key): value for key, value in config.items()}
    metadata = config | metadata
    metadata.setdefault("prepend_bos", True)
    function, arguments = config.get("activation_fn") or "relu", config.get("activation_fn_kwargs") or {}
    if function not in ("topk", "relu"):
        raise UserError(f"{path}: activation_fn {function!r} is not supported; SAELens itself dropped it in version 6")
    if others := sorted(arguments.keys() - ({"k"} if function == "topk" else set())):
        raise UserError(f"{path}: activation_fn_kwargs.{others[0]} ({arguments[others[0]]!r}) is not supported; "
                        "SAELens itself dropped it in version 6")
    config.setdefault("architecture", "standard")
    if function == "topk":
        config |= {"architecture": "topk", "k": arguments.get("k", config.get("k"))}
    normalize = config.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        config["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    return config, metadata


def _loading(metadata: dict[str, Any]) -> dict[str, Any]:
    """How the language model was loaded."""
    return cast(dict[str, Any], metadata.get("model_from_pretrained_kwargs") or {})


def _refuse_other_rows(metadata: dict[str, Any], path: Path) -> None:
    """Refuse SAEs of anything but whole rows of the published model."""
    for key in ("hook_head_index", "hook_head_index_out"):
        if metadata.get(key) is not None:
            raise UserError(f"{path}: {key} {metadata[key]!r}: an SAE of one attention head is not supported")
    if metadata.get("model_class_name") not in _MODEL_CLASSES:
        raise UserError(f"{path}: model_class_name {metadata['model_class_name']!r}: only decoder-only models of "
                        "transformers are supported")
    loading = _loading(metadata)
    for key, value in loading.items():
        if key not in _HARMLESS_LOADING | {"center_writing_weights", "revision"} and value not in (None, False):
            raise UserError(f"{path}: model_from_pretrained_kwargs.{key} ({value!r}): the SAE was trained on a model "
                            "that was loaded in another way than here, so its rows were different")
    revision = loading.get("revision")
    if revision and metadata.setdefault("model_revision", revision) != revision:
        raise UserError(f"{path}: model_revision says {metadata['model_revision']!r}, "
                        f"model_from_pretrained_kwargs.revision {revision!r}; correct the wrong one")
