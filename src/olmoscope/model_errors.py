"""Why the files of a model, tokenizer or SAE cannot be loaded: found in the files themselves, explained in one line."""

import json
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a git-LFS pointer begins."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def damage(path: Path) -> str | None:
    """What is wrong with a safetensors or JSON file, or None."""
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        return (f"{path} is a git-LFS pointer, not the file itself: run `git lfs pull` in its folder, or download it "
                "again")
    return _weights_damage(path) if path.suffix == ".safetensors" else _json_damage(path)


def _weights_damage(path: Path) -> str | None:
    """What is wrong with a safetensors file: 8 bytes with the length of its header, a JSON header, the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(min(length, size))
    if len(start) == 8 and length > 100_000_000:  # the library's own bound
        return f"{path} is damaged: it is not a safetensors file (it begins with {start!r}): download it again"
    if size < 8 + length:
        return f"{path} is cut off in its header, after {size} bytes: download it again"
    try:
        entries = json.loads(header)
        end = 8 + length + max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"),
                               default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"{path} is damaged (its header cannot be read): download it again"
    if size < end:
        return f"{path} is cut off: it has {size} of {end} bytes; download it again"
    if size > end:
        return f"{path} is damaged: it has {size} bytes, but its header says {end}; download it again"
    return None


def _json_damage(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        return f"{path} is damaged (not JSON: {error}): download it again"
    return None


def folder_reason(folder: Path, error: BaseException) -> str | None:
    """Why the model in a folder cannot be loaded; None if its files do not say.

    Args:
        error: what transformers raised.
    """
    if found := _config(folder):
        return found
    config = json.loads((folder / "config.json").read_bytes())
    return (_unknown_architecture(folder, config, error) or _quantised(config, error) or _weights(folder)
            or _tokenizer(folder))


def _config(folder: Path) -> str | None:
    path = folder / "config.json"
    if not path.is_file():
        return without_config(folder)
    if (found := damage(path)) is None and not isinstance(json.loads(path.read_bytes()), dict):
        return f"{path} is damaged: it does not hold a mapping"
    return found


def without_config(folder: Path) -> str:
    """What is wrong with a folder that has no config.json."""
    if any(folder.glob("*.gguf")):
        return f"{folder} holds GGUF files, which cannot be read: use the model's weights as safetensors"
    return (f"{folder} has no config.json: a model is a folder with config.json, model.safetensors and the tokenizer's "
            "files")


def _unknown_architecture(folder: Path, config: dict[str, Any], error: BaseException) -> str | None:
    from transformers import CONFIG_MAPPING, __version__

    kind = config.get("model_type")
    known = kind in CONFIG_MAPPING
    if "auto_map" in config and (not known or "Unrecognized configuration class" in str(error)
                                 or "custom code" in str(error)):
        return (f"it needs its own code (auto_map in config.json), and downloaded code is never run; transformers "
                f"{__version__} itself does not know the architecture (model_type {kind!r})")
    if kind is None:
        return f"{folder / 'config.json'} does not name the model's architecture (model_type)"
    if not known:
        return (f"transformers {__version__} does not know its architecture (model_type {kind!r}): update transformers "
                "(`pip install -U transformers`), or check config.json")
    if "Unrecognized configuration class" in str(error):
        return f"it is not a causal language model (model_type {kind!r})"
    return None


def _quantised(config: dict[str, Any], error: BaseException) -> str | None:
    if not isinstance(config.get("quantization_config"), dict) or isinstance(error, OSError):
        return None
    method = config["quantization_config"].get("quant_method", "by an unnamed method")
    needs = "needs a package that is not installed" if isinstance(error, ImportError) else "cannot be read here"
    return f"its weights are quantised ({method}), which {needs}: {first_line(error)}"


def _weights(folder: Path) -> str | None:
    """Which file of the weights is missing or damaged."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        if found := damage(index):
            return found
        names = sorted(set(json.loads(index.read_bytes()).get("weight_map", {}).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            return f"{folder} lacks {missing[0]}, one of {len(names)} files of its weights: download it again"
        files = [folder / name for name in names]
    for file in files:
        if found := damage(file):
            return found
    if not files and (others := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.gguf")])):
        return (f"{folder} has its weights as {others[0].name}; only safetensors files are read: convert them (load "
                "the model with transformers, then save_pretrained)")
    if not files:
        return f"{folder} has no weights as safetensors (model.safetensors), the only format that is read"
    return None


def _tokenizer(folder: Path) -> str | None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (found := damage(folder / name)):
            return found
    return None


def tokenizer_reason(folder: Path, error: BaseException) -> str | None:
    """Why the tokenizer in a folder cannot be loaded; None if its files do not say."""
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    if found := (None if is_adapter else _config(folder)) or _tokenizer(folder):
        return found
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return f"{folder} has no tokenizer (tokenizer.json): copy the tokenizer files of its base model there"
    if type(error) is Exception:  # what the tokenizers library raises
        return f"{folder / 'tokenizer.json'} is damaged, or made by a newer tokenizers library ({first_line(error)})"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
