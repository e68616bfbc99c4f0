"""Where a recipe's `model.name` leads: the model in the package, a local folder, or the hub, at one commit."""

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
from olmoscope.hub_errors import hub_exceptions, hub_reason
from olmoscope.model_errors import adapter_reason, first_line, folder_reason, tokenizer_reason, without_config
from olmoscope.recipe.schema import Model

COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG, ADAPTER = "config.json", "adapter_config.json"


def is_local(model: Model) -> bool:
    """Whether it is the model in the package or a folder, not one of the hub."""
    return model.name == "tiny" or Path(model.name).is_dir()


def pinned(model: Model) -> Model:
    """The model at the commit that its revision is now: what is loaded after that is all of one version.

    The hub is asked; where it cannot be reached, or must not be (`HF_HUB_OFFLINE`), its cache says what it was last.
    A model that is not of the hub is given back as it is, and so is one at a commit.

    Raises:
        UserError: neither the hub nor its cache has it, or it is no whole model.
    """
    if model.name == "tiny":
        return model
    if is_local(model):
        if not (Path(model.name) / CONFIG).is_file():
            raise UserError(f"cannot load model {model.name!r}: {without_config(Path(model.name))}")
        return model
    refuse_path(model)
    if COMMIT.fullmatch(model.revision or ""):
        return model
    # Of the cache's layout (snapshots/COMMIT/FILE) huggingface_hub's documentation says that it stays.
    return model.model_copy(update={"revision": _downloaded(model, CONFIG).parent.name})


def _downloaded(model: Model, file: str) -> Path:
    """A file of a hub model, in the cache."""
    from huggingface_hub import errors, hf_hub_download

    with loading(model):
        try:
            return Path(hf_hub_download(model.name, file, revision=model.revision))
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError as error:
            if file == CONFIG:
                raise UserError(f"cannot load model {model.name!r}: {_without_config(model)}") from error
            raise


def _without_config(model: Model) -> str:
    """What a hub repository without config.json is."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return adapter_reason(Path(hf_hub_download(model.name, ADAPTER, revision=model.revision)))
    except errors.EntryNotFoundError:
        return f"{model.name} has no config.json: it is no model that transformers can load"


def refuse_path(model: Model) -> None:
    """What is written as a path, and leads to no folder, is not looked for on the hub.

    Raises:
        UserError: it is such a path.
    """
    path = Path(model.name)
    if path.exists():
        raise UserError(f"cannot load model {model.name!r}: it is a file; give the folder that it is in")
    if model.name.startswith((".", "/", "~")) or model.name.endswith("/") or model.name.count("/") > 1:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"cannot load model {model.name!r}: there is no such folder{where}; give its full path")


def at_revision(model: Model, revision: str | None) -> Model:
    """The model at the commit that a store or SAE names; one that is not of the hub is given back as it is.

    Args:
        revision: the hub's commit, else `sha256:...` or None.
    """
    if is_local(model) or not COMMIT.fullmatch(revision or ""):
        return model
    return model.model_copy(update={"revision": revision})


def locate(model: Model) -> dict[str, Any]:
    """The arguments with which every `from_pretrained` of transformers finds the model. Code in it is never run.

    Raises:
        UserError: a local folder with a revision, which only the hub has; or a path that is no folder.
    """
    found: dict[str, Any] = {"pretrained_model_name_or_path": model.name, "trust_remote_code": False}
    if model.name == "tiny":
        return found | {"pretrained_model_name_or_path": str(resources.files("olmoscope") / "model" / "tiny")}
    if Path(model.name).is_dir():
        if model.revision is not None:
            raise UserError(f"model.revision: {model.name} is a local folder, only hub repositories have revisions")
        return found
    refuse_path(model)
    return found | {"revision": model.revision}


@contextlib.contextmanager
def loading(model: Model, what: Literal["model", "tokenizer"] = "model") -> Iterator[None]:
    """Turn whatever the libraries raise in the block, where files of a model are had and read, into a `UserError`.

    An error of another class than those that they raise for bad files stays what it is, unless the files say its cause
    (tokenizers raises a plain `Exception` for a damaged file, and a config with a wrong value anything at all).
    """
    from safetensors import SafetensorError

    expected: tuple[type[Exception], ...] = (*hub_exceptions(), ValueError, ImportError, SafetensorError)
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
    """What to tell the user when something of the model could not be loaded: the true cause, in one line."""
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
    """Why a file that the hub may have is not in the cache; transformers takes such a one for missing. None: it is
    there, or the hub does not have it."""
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
    """Where the model's files are: its folder, or that of its commit in the hub's cache."""
    if is_local(model):
        return Path(str(locate(model)["pretrained_model_name_or_path"]))
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model.name, CONFIG, revision=model.revision)
    return Path(config).parent if isinstance(config, str) else None


def revision_of(model: Model) -> str:
    """What identifies the weights: a hub model's commit, or a hash of a local folder's safetensors and config.

    Args:
        model: if of the hub, at a commit (see `pinned`).
    """
    if not is_local(model):
        assert COMMIT.fullmatch(model.revision or ""), "pin the model first"
        return str(model.revision)
    folder = Path(locate(model)["pretrained_model_name_or_path"])
    files = sorted([*folder.glob("*.safetensors"), folder / CONFIG])
    return "sha256:" + hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()[:32]
