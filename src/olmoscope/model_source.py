"""Where a recipe's `model.name` leads: the model in the package, a local folder, or the hub."""

import hashlib
import re
from importlib import resources
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.recipe import Model

COMMIT = re.compile(r"[0-9a-f]{40}")


def is_local(model: Model) -> bool:
    """Whether it is the model in the package or a folder, not one of the hub."""
    return model.name == "tiny" or Path(model.name).is_dir()


def pinned(model: Model) -> Model:
    """The model at the commit that its revision is now: what is loaded after that is all of one version.

    The hub is asked; where it cannot be reached, or must not be (`HF_HUB_OFFLINE`), its cache says what it was last.
    A model that is not of the hub is given back as it is, and so is one at a commit.

    Raises:
        UserError: neither the hub nor its cache has it.
    """
    if is_local(model) or COMMIT.fullmatch(model.revision or ""):
        return model
    from huggingface_hub import hf_hub_download

    try:
        config = hf_hub_download(model.name, "config.json", revision=model.revision)
    except (OSError, ValueError) as error:
        raise explain(error, model) from error
    # Of the cache's layout (snapshots/COMMIT/FILE) huggingface_hub's documentation says that it stays.
    return model.model_copy(update={"revision": Path(config).parent.name})


def locate(model: Model) -> dict[str, Any]:
    """The arguments with which every `from_pretrained` of transformers finds the model.

    Raises:
        UserError: a local folder with a revision, which only the hub has.
    """
    if model.name == "tiny":
        return {"pretrained_model_name_or_path": str(resources.files("olmoscope") / "model" / "tiny")}
    if Path(model.name).is_dir():
        if model.revision is not None:
            raise UserError(f"model.revision: {model.name} is a local folder, only hub repositories have revisions")
        return {"pretrained_model_name_or_path": model.name}
    return {"pretrained_model_name_or_path": model.name, "revision": model.revision}


def explain(error: OSError | ValueError, model: Model) -> UserError:
    """What to tell the user when transformers could not load something of the model."""
    first_line = str(error).strip().split("\n")[0]
    return UserError(f"cannot load model {model.name!r}: {first_line} (a hub model needs the network or a filled "
                     "cache; a local one, a folder with config.json, model.safetensors and tokenizer.json)")


def revision_of(model: Model) -> str:
    """What identifies the weights: a hub model's commit, or a hash of a local folder's safetensors and config.

    Args:
        model: if of the hub, at a commit (see `pinned`).
    """
    if not is_local(model):
        assert COMMIT.fullmatch(model.revision or ""), "pin the model first"
        return str(model.revision)
    folder = Path(locate(model)["pretrained_model_name_or_path"])
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return "sha256:" + hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()[:32]
