"""An adapter on the disk (PEFT's format, such as LoRA): what its adapter_config.json says of it and of its base."""

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
"""What a whole model has beside its config.json, and an adapter has not."""
_REVISION = r"([0-9a-f]{40}|sha256:[0-9a-f]{32}|)"
PAIR = re.compile(rf"{_REVISION}\+{_REVISION}")
"""The revision of an adapter and that of its base: commits of the hub, or hashes of local files. In `model.revision`
only the commits stand; a local folder leaves its side empty."""


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
        raise UserError(found or f"{path} is damaged: it holds no mapping")
    return config


def read_base(path: Path, *, hub: bool) -> Base:
    """The base of an adapter. Its path may be relative to the adapter's folder, or to the current one.

    Args:
        path: of adapter_config.json.
        hub: whether the adapter is one of the hub: then no folder can lie beside it.

    Raises:
        UserError: the file is damaged, names no base, or names one that may be either of two folders.
    """
    config = read_adapter(path)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path} does not say which model it is an adapter of (base_model_name_or_path): write "
                        "it there")
    if revision is not None and not isinstance(revision, str):
        raise UserError(f"{path}: revision must be a text, not {revision!r}")
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
        path: of adapter_config.json.
    """
    return (f"it is an adapter of {read_adapter(path).get('base_model_name_or_path') or 'an unnamed model'} "
            f"({ADAPTER}), not a whole model: install peft (`pip install peft`), and it is merged as it is loaded; or "
            "merge it yourself (AutoPeftModelForCausalLM.from_pretrained, merge_and_unload, save_pretrained; the "
            "tokenizer too), and give the merged folder")


def has_peft() -> bool:
    """Whether the package that merges adapters is installed."""
    return importlib.util.find_spec("peft") is not None


def whole_too(where: str) -> str:
    """Why a place that holds a whole model and an adapter is refused: transformers takes one or the other, as peft is
    installed or not."""
    return (f"{where} holds both a whole model (config.json, model.safetensors) and an adapter ({ADAPTER}), and which "
            "is meant is not known: give a folder that has only one of them")
