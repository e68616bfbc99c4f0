"""An adapter on the disk (PEFT's format, such as LoRA): what its adapter_config.json says about it and its base."""

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.model_errors import damage

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WHOLE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""The files beside config.json that a whole model has and an adapter does not."""
_REVISION = r"([0-9a-f]{40}|sha256:[0-9a-f]{32}|)"
PAIR = re.compile(rf"{_REVISION}\+{_REVISION}")
"""The revision of an adapter and that of its base: commits on the hub, or hashes of local files. `model.revision` has
only the commits; a local folder leaves its side empty."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter changes, as its adapter_config.json names it."""

    name: str
    revision: str | None


def read_adapter(path: Path) -> dict[str, Any]:
    """What an adapter_config.json says.

    Raises:
        UserError: it is damaged.
    """
    found = damage(path)
    config = None if found else json.loads(path.read_bytes())
    if not isinstance(config, dict):
        raise UserError(found or f"{path} is damaged: it does not hold a mapping")
    return config


def read_base(path: Path, *, hub: bool) -> Base:
    """The base of an adapter. Its path may be relative to the adapter's folder or to the current one.

    Args:
        path: where adapter_config.json is.
        hub: whether the adapter is on the hub: then its base cannot be a folder beside it.

    Raises:
        UserError: the file is damaged, names no base, or names one that could be either of two folders.
    """
    config = read_adapter(path)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path} does not say which model it is an adapter of (base_model_name_or_path): write "
                        "it there")
    if revision is not None and not isinstance(revision, str):
        raise UserError(f"{path}: revision must be a string, not {revision!r}")
    beside = path.parent / name
    if hub or not beside.is_dir():
        return Base(name, revision)
    if Path(name).is_dir() and not beside.samefile(name):
        raise UserError(f"{path}: base_model_name_or_path {name!r} may be {beside.resolve()} or "
                        f"{Path(name).resolve()}: write the full path there")
    return Base(str(beside.resolve()), revision)


def without_peft(path: Path) -> str:
    """What to do with an adapter where peft is not installed.

    Args:
        path: where adapter_config.json is.
    """
    return (f"it is an adapter of {read_adapter(path).get('base_model_name_or_path') or 'an unnamed model'} "
            f"({ADAPTER}), not a whole model: install peft (`pip install peft`) to merge it on loading; or merge it "
            "yourself (AutoPeftModelForCausalLM.from_pretrained, merge_and_unload, save_pretrained; the tokenizer "
            "too), and give the merged folder")


def has_peft() -> bool:
    """Whether the package that merges adapters is installed."""
    return importlib.util.find_spec("peft") is not None


def whole_too(where: str) -> str:
    """Why a place that holds both a whole model and an adapter is refused: transformers loads one or the other,
    depending on whether peft is installed."""
    return (f"{where} holds both a whole model (config.json, model.safetensors) and an adapter ({ADAPTER}), so it is "
            "unclear which is meant: give a folder that has only one of them")
