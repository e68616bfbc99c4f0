"""What a recipe's `model.name` refers to: the model in the package, a local folder, or a hub model at one commit."""

import contextlib
import errno
import hashlib
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.hub_errors import hub_exceptions, hub_reason, is_unreachable
from olmoscope.hub_reach import asking_hub
from olmoscope.model_adapter import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    PAIR,
    WHOLE_WEIGHTS,
    has_peft,
    read_base,
    whole_too,
    without_peft,
)
from olmoscope.model_errors import TOKENIZER_FILES, first_line, folder_reason, tokenizer_reason, without_config
from olmoscope.recipe.schema import Model

COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG = "config.json"
FETCHED = {"SmolLM2-135M-Instruct": "smollm2"}
"""The folders that `olmoscope fetch-model` makes by default, and the model in each."""


def is_local(model: Model) -> bool:
    """Whether it is the model in the package or a folder, not one on the hub."""
    return model.name == "tiny" or Path(model.name).is_dir()


def pinned(model: Model) -> Model:
    """The model at the commit that its revision points to now, so that everything loaded later is of one version.

    This asks the hub; if the hub cannot be reached, or must not be (`HF_HUB_OFFLINE`), its cache gives the last known
    commit. A model that is not on the hub is returned as it is. An adapter is pinned with its base (see `PAIR`).

    Raises:
        UserError: neither the hub nor its cache has it, it is not a model, or it is an adapter that cannot be merged
            here.
    """
    return _pinned(model, is_base=False)


def _pinned(model: Model, is_base: bool) -> Model:
    if model.name == "tiny":
        return model
    if is_local(model):
        if (base := base_of(model)) is not None:
            return _pinned_pair(model, "", base, is_base)
        if not (Path(model.name) / CONFIG).is_file():
            raise UserError(f"cannot load model {model.name!r}: {without_config(Path(model.name))}")
        return model
    refuse_path(model)
    own = alone(model)
    with loading(own):
        config, adapter = _config_or_adapter(own)
        file = config or adapter
        if file is None:
            raise UserError(f"cannot load model {model.name!r}: {model.name} has no config.json, so transformers "
                            "cannot load it as a model")
        # huggingface_hub documents the layout of its cache (snapshots/COMMIT/FILE) as stable.
        own = own.model_copy(update={"revision": file.parent.name})
        if config is not None and not _has(own, ADAPTER):
            return own
        if config is not None and any(_has(own, weights) for weights in WHOLE_WEIGHTS):
            raise UserError(f"cannot load model {model.name!r}: {whole_too(model.name)}")
    pair = PAIR.fullmatch(model.revision or "")
    model = model.model_copy(update={"revision": f"{own.revision}+{pair[2] if pair else ''}"})
    base = base_of(model)
    assert base is not None, "its adapter_config.json is in the cache"
    return _pinned_pair(model, str(own.revision), base, is_base)


def _config_or_adapter(model: Model) -> tuple[Path | None, Path | None]:
    """config.json of a hub model or, if it has none, adapter_config.json."""
    from huggingface_hub import errors

    try:
        config = _downloaded(model, CONFIG)
    except errors.LocalEntryNotFoundError:
        if (adapter := _adapter_config(model)) is None:
            raise
        return None, adapter  # the hub cannot be asked, and the cache has an adapter
    return config, None if config is not None else _downloaded(model, ADAPTER)


def _pinned_pair(model: Model, commit: str, base: Model, is_base: bool) -> Model:
    """An adapter at its commit (empty for a folder) and the current commit of its base."""
    if is_base:
        raise UserError(f"{model.name} is itself an adapter: merge it first, and give the merged folder as the base")
    require_peft(model)
    with naming_base(model, base):
        of_base = _pinned(base, is_base=True).revision or ""
    return model.model_copy(update={"revision": f"{commit}+{of_base}" if commit or of_base else None})


def require_peft(model: Model) -> None:
    """
    Raises:
        UserError: it is an adapter, and peft, which merges it, is not installed.
    """
    if (path := _adapter_config(model)) is not None and not has_peft():
        raise UserError(f"cannot load model {model.name!r}: {without_peft(path)}")


@contextlib.contextmanager
def naming_base(model: Model, base: Model) -> Iterator[None]:
    """Make an error about a base in the block say which adapter the base belongs to."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{model.name} is an adapter of {base.name} (base_model_name_or_path in its {ADAPTER}): "
                        f"{error}") from error


def base_of(model: Model) -> Model | None:
    """The base of an adapter, at the commit that it is pinned to; None for a whole model.

    Nothing is downloaded, so this is None too for an adapter on the hub that was not pinned here before.

    Raises:
        UserError: its adapter_config.json is damaged or names no base, or it is a whole model too.
    """
    path = _adapter_config(model)
    if path is None:
        return None
    if is_local(model):
        if model.revision is not None and not PAIR.fullmatch(model.revision):
            locate(model)
        if (path.parent / CONFIG).is_file() and any((path.parent / file).is_file() for file in WHOLE_WEIGHTS):
            raise UserError(f"cannot load model {model.name!r}: {whole_too(model.name)}")
    try:
        said = read_base(path, hub=not is_local(model))
    except UserError as error:
        raise UserError(f"cannot load model {model.name!r}: {error}") from error
    pair = PAIR.fullmatch(model.revision or "")
    base = model.model_copy(update={"name": said.name, "revision": said.revision})
    if pair is None or is_local(base):
        return base
    return base.model_copy(update={"revision": pair[2] or said.revision})


def alone(model: Model) -> Model:
    """The model at its own revision: for an adapter, without the revision of its base."""
    pair = PAIR.fullmatch(model.revision or "")
    return model if pair is None else model.model_copy(update={"revision": pair[1] or None})


def _adapter_config(model: Model) -> Path | None:
    """The path of adapter_config.json in a local folder or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if is_local(model):
        path = Path(model.name) / ADAPTER
        return path if model.name != "tiny" and path.is_file() else None
    refuse_path(model)
    own = alone(model)
    with loading(own):
        found = try_to_load_from_cache(own.name, ADAPTER, revision=own.revision)
    return Path(found) if isinstance(found, str) else None


def adapter_folder(model: Model) -> Path:
    """The folder of a pinned adapter, with its weights.

    Raises:
        UserError: it has no weights, or they cannot be downloaded.
    """
    if is_local(model):
        return Path(model.name)
    own = alone(model)
    with loading(own):
        found = _downloaded(own, ADAPTER_WEIGHTS)
    if found is None:
        raise UserError(f"cannot load model {model.name!r}: {model.name} has no file {ADAPTER_WEIGHTS}, the only one "
                        "that an adapter's weights are read from")
    return found.parent


def _downloaded(model: Model, file: str) -> Path | None:
    """A file of a hub model, in the cache; None if the hub does not have it."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(model.name, file, revision=model.revision))
    except errors.LocalEntryNotFoundError:
        raise
    except errors.EntryNotFoundError:
        return None


def _has(model: Model, file: str) -> bool:
    """Whether a hub model at a commit has a file. If the hub cannot be reached, its cache decides: a file that was
    never requested counts as missing."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    known = try_to_load_from_cache(model.name, file, revision=model.revision)
    if known is not None:
        return isinstance(known, str)
    try:
        if file not in WHOLE_WEIGHTS:  # small, and the cache remembers what the hub does not have
            return _downloaded(model, file) is not None
        get_hf_file_metadata(hf_hub_url(model.name, file, revision=model.revision))
    except errors.EntryNotFoundError:
        return False
    except hub_exceptions() as error:
        if not is_unreachable(error):
            raise
        return False
    return True


def read_tokenizer(model: Model) -> Any:
    """The tokenizer of a pinned model, as transformers loads it; for an adapter without one, its base's.

    Raises:
        UserError: it cannot be downloaded or read.
    """
    from transformers import AutoTokenizer

    base = base_of(model)
    source = alone(model) if base is None or has_own_tokenizer(model) else base
    with loading(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(**locate(source))


def has_own_tokenizer(model: Model) -> bool:
    """Whether an adapter has a tokenizer beside its weights."""
    if is_local(model):
        return any((Path(model.name) / file).is_file() for file in TOKENIZER_FILES)
    with loading(alone(model), "tokenizer"):
        return any(_has(alone(model), file) for file in TOKENIZER_FILES)


def refuse_path(model: Model) -> None:
    """Refuse a path that leads to no folder, instead of looking for it on the hub.

    Raises:
        UserError: the model's name is such a path.
    """
    path = Path(model.name)
    if path.exists():
        raise UserError(f"cannot load model {model.name!r}: it is a file; give the folder that it is in")
    if to_fetch := not_fetched(model):
        raise UserError(f"cannot load model {model.name!r}: {to_fetch}")
    if model.name.startswith((".", "/", "~")) or model.name.endswith("/") or model.name.count("/") > 1:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"cannot load model {model.name!r}: there is no such folder{where}; give its full path")


def not_fetched(model: Model) -> str | None:
    """What to do about a model that `olmoscope fetch-model` makes and has not made yet; None for any other model."""
    if model.name not in FETCHED or Path(model.name).is_dir():
        return None
    return (f"there is no such folder in {Path.cwd()}; make it with `olmoscope fetch-model {FETCHED[model.name]}`, or "
            "say where it is: --set model.name=FOLDER")


def at_revision(model: Model, revision: str | None) -> Model:
    """The model at the commit that a store or SAE names; a model that is not on the hub is returned as it is.

    Args:
        revision: the hub's commit, else `sha256:...` or None; for an adapter, a `PAIR` of them.
    """
    if pair := PAIR.fullmatch(revision or ""):
        own, of_base = (one if COMMIT.fullmatch(one) else "" for one in pair.groups())
        return model.model_copy(update={"revision": f"{own}+{of_base}"}) if own or of_base else model
    if is_local(model) or not COMMIT.fullmatch(revision or ""):
        return model
    return model.model_copy(update={"revision": revision})


def locate(model: Model) -> dict[str, Any]:
    """The arguments with which every `from_pretrained` of transformers finds the model. They forbid running its code.

    Raises:
        UserError: a local folder is given a revision, which only the hub has; or a path is not a folder.
    """
    found: dict[str, Any] = {"pretrained_model_name_or_path": model.name, "trust_remote_code": False}
    if model.name == "tiny":
        return found | {"pretrained_model_name_or_path": str(resources.files("olmoscope") / "model" / "tiny")}
    if Path(model.name).is_dir():
        if model.revision is not None:
            raise UserError(f"model.revision: {model.name} is a local folder, and only hub repositories have "
                            "revisions; leave the key out")
        return found
    refuse_path(model)
    return found | {"revision": model.revision}


@contextlib.contextmanager
def loading(model: Model, what: Literal["model", "tokenizer"] = "model") -> Iterator[None]:
    """Turn whatever the libraries raise in the block, which downloads and reads a model's files, into a `UserError`.

    An error of a class that they do not raise for bad files stays as it is, unless the files show its cause
    (tokenizers raises a plain `Exception` for a damaged file, and a wrong value in a config can raise anything).
    """
    from safetensors import SafetensorError

    expected: tuple[type[Exception], ...] = (*hub_exceptions(), ValueError, ImportError, SafetensorError)
    with asking_hub():
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            full_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if full_disk or not (isinstance(error, expected) or _reason(error, model, what)):
                raise
            raise explain(error, model, what) from error


def explain(error: Exception, model: Model, what: Literal["model", "tokenizer"] = "model") -> UserError:
    """What to tell the user if the model or its tokenizer cannot be loaded: the true cause, in one line."""
    reason = _reason(error, model, what)
    if reason is None and not isinstance(error, OSError) and (
            isinstance(error, ImportError) or model.attention in str(error).lower().replace(" ", "_")):
        return UserError(f"model.attention: {model.attention} does not work for {model.name!r} here: "
                         f"{first_line(error)}")
    called = f"the tokenizer of model {model.name!r}" if what == "tokenizer" else f"model {model.name!r}"
    return UserError(f"cannot load {called}: {reason or first_line(error)}")


def _reason(error: Exception, model: Model, what: Literal["model", "tokenizer"]) -> str | None:
    if not is_local(model) and (reason := hub_reason(error, model.name, revision=model.revision)
                                or _not_fetched(model, what)):
        return reason + (f"; nor is there a folder {model.name} in {Path.cwd()}" if "no such model" in reason else "")
    folder = _folder(model)
    if folder is None:
        return None
    return tokenizer_reason(folder, error) if what == "tokenizer" else folder_reason(folder, error)


def _not_fetched(model: Model, what: Literal["model", "tokenizer"]) -> str | None:
    """Why a file that the hub may have is not in the cache; transformers treats such a file as missing. None if it is
    in the cache, or if the hub does not have it."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    files = ("tokenizer.json",) if what == "tokenizer" else ("model.safetensors", "model.safetensors.index.json")
    known = {file: try_to_load_from_cache(model.name, file, revision=model.revision) for file in files}
    if any(isinstance(path, str) for path in known.values()):
        return None
    for file in (file for file, path in known.items() if path is None):
        try:
            get_hf_file_metadata(hf_hub_url(model.name, file, revision=model.revision))
        except errors.EntryNotFoundError:
            continue
        except hub_exceptions() as error:
            return hub_reason(error, model.name, revision=model.revision)
    return None


def _folder(model: Model) -> Path | None:
    """Where the model's files are: its folder, or the folder of its commit in the hub's cache."""
    if is_local(model):
        return Path(str(locate(model)["pretrained_model_name_or_path"]))
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(model.name, file, revision=model.revision) for file in (CONFIG, ADAPTER))
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def revision_of(model: Model) -> str:
    """What identifies the weights: a hub model's commit, or a hash of a local folder's safetensors and config; for an
    adapter, its own and its base's (`PAIR`).

    Args:
        model: a model; one on the hub must be at a commit (see `pinned`).
    """
    revision = revision_here(model)
    assert revision is not None, "pin the model first"
    return revision


def revision_here(model: Model) -> str | None:
    """`revision_of`, without asking the hub; None if it is unknown."""
    base = base_of(model)
    if base is not None:
        parts = (_own_hash(alone(model), ADAPTER), revision_here(base))
        return None if None in parts else "+".join(map(str, parts))
    return _own_hash(model, CONFIG)


def _own_hash(model: Model, config: str) -> str | None:
    """A hub model's commit, or a hash of a folder's safetensors and config."""
    if not is_local(model):
        return model.revision if COMMIT.fullmatch(model.revision or "") else None
    folder = Path(locate(model)["pretrained_model_name_or_path"])
    files = sorted([*folder.glob("*.safetensors"), folder / config])
    return "sha256:" + hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()[:32]
