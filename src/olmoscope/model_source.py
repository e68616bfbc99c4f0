"""Where a recipe's `model.name` leads: the model in the package, a local folder, or the hub."""

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.recipe import Model


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


def revision_of(model: Model, commit: str | None) -> str:
    """What identifies the weights: the hub's commit, or a hash of a local folder's safetensors and config.

    Args:
        commit: the commit that transformers resolved (`config._commit_hash`), None for a local folder.
    """
    if commit is not None:
        return commit
    folder = Path(locate(model)["pretrained_model_name_or_path"])
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return "sha256:" + hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()[:32]
