"""`--model` for an SAE that names its language model: a copy of that model is accepted, another model is not.

A copy has another name: a folder, a mirror on the hub, or TransformerLens' name. So architecture, depth and width must
agree as far as they are known, and so must the weights if both sides have comparable hashes.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.model.config import read_config, width_and_depth
from olmoscope.model_source import COMMIT, base_of, pinned, revision_of
from olmoscope.recipe.schema import Model
from olmoscope.sae.io.opened import Opened

_HEADS = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|Model|Config)$")


@dataclass(frozen=True)
class SaidModel:
    """The language model that an SAE names; a field is None if it is not known."""

    name: str
    revision: str | None
    architecture: str | None
    d_model: int | None
    num_layers: int | None


class GivenModel:
    """The language model that `--model` names."""

    def __init__(self, name: str) -> None:
        """
        Raises:
            UserError: it cannot be found.
        """
        self.name = name
        self._model = pinned(Model(name=name))
        self._config = read_config(self._model)

    def said(self) -> SaidModel:
        """Its description, from its config."""
        return _described(self.name, None, self._config)

    @cached_property
    def revision(self) -> str:
        """A hash of its weights if it is a local folder, else the hub's commit. The name of a folder in the hub's cache
        is the commit."""
        folder = Path(self.name)
        if folder.is_dir() and base_of(self._model) is None and COMMIT.fullmatch(folder.resolve().name):
            return folder.resolve().name
        return revision_of(self._model)


def said_by(subject: Opened) -> SaidModel | None:
    """The model of an SAE, from its run's record, else from a config on this machine."""
    if subject.model_name is None:
        return None
    said = SaidModel(subject.model_name, subject.model_revision, subject.model_architecture, subject.d_model,
                     subject.model_layers)
    if said.architecture is not None:
        return said
    try:
        config = read_config(Model(name=said.name), cached=True)
    except UserError:  # a name that only TransformerLens knows, or a model that is not on this machine
        return said
    return _described(said.name, said.revision, config)


def take_for_same(whose: str, said: SaidModel, given: GivenModel) -> str | None:
    """A note for a user who gave another name than the SAE's files; None if the names are the same.

    Args:
        whose: the SAE's name.

    Raises:
        UserError: it is another model.
    """
    if given.name == said.name:
        return None
    found = given.said()
    for what, one, other in (("of width {}", said.d_model, found.d_model),
                             ("of architecture {}", _family(said.architecture), _family(found.architecture)),
                             ("of {} layers", said.num_layers, found.num_layers)):
        if one is not None and one != other:
            raise UserError(f"--model {given.name}: {whose} was trained on {said.name}, {what.format(one)}, but this "
                            f"model is {what.format(other)}: it is another model; leave --model out, or give a copy of "
                            "that one")
    compared = said.revision is not None and _comparable(said.revision, given.revision)
    if compared and said.revision != given.revision:
        raise UserError(f"--model {given.name}: {whose} was trained on {said.name} at revision {said.revision}, and "
                        f"the weights here are of revision {given.revision}: it is another model; leave --model "
                        "out, or give a copy of that one")
    return (f"note: {whose} says that its model is {said.name}; {given.name} is taken to be the same model "
            f"({'its weights are the same' if compared else 'its weights cannot be compared'})")


def refuse_misfit(subject: Opened, model: Model, config: Any) -> None:
    """Refuse an SAE of rows that a language model does not have.

    Args:
        config: the model's.

    Raises:
        UserError: its layer is deeper than the model, or its rows have another width.
    """
    d_model, layers = width_and_depth(config, model)
    for does, sites in (("reads", subject.reads), ("writes", subject.writes)):
        if (last := max(sites)).layer >= layers:
            raise UserError(f"{subject.name} {does} {last}, but {model.name} has layers 0 to {layers - 1}: it is an "
                            "SAE of another model; give that one with --model")
    if subject.d_model not in (None, d_model):
        raise UserError(f"{subject.name} reads rows of {subject.d_model} values, those of {model.name} have {d_model}: "
                        "it is an SAE of another model; give that one with --model")


def refuse_uncentred(subject: Opened, model: Model) -> None:
    """Refuse an SAE of centred rows for a model with RMS norms: TransformerLens centres weights only if the norms
    centre too.

    Raises:
        UserError: the SAE reads centred rows, and the model has RMS norms.
    """
    if subject.sae.normalize == "centred" and hasattr(read_config(model).get_text_config(), "rms_norm_eps"):
        raise UserError(f"{subject.name} says that it reads rows without their mean (center_writing_weights), but "
                        f"{model.name} has RMS norms, and for such models TransformerLens keeps the mean; remove that "
                        "key from cfg.json if the rows were not centred")


def _described(name: str, revision: str | None, config: Any) -> SaidModel:
    architecture = (config.architectures or [type(config).__name__])[0]
    return SaidModel(name, revision, architecture, *width_and_depth(config, Model(name=name)))


def _family(architecture: str | None) -> str | None:
    """`Olmo3` from `Olmo3ForCausalLM` or `Olmo3Model`: copies are saved with and without the head."""
    return None if architecture is None else _HEADS.sub("", architecture)


def _comparable(one: str, other: str) -> bool:
    """Whether both are hashes of weights, or both are commits; for adapters, those of the bases too."""
    pairs = list(zip(one.split("+"), other.split("+"), strict=False)) if one.count("+") == other.count("+") else []
    return bool(pairs) and all(all(part.startswith("sha256:") for part in pair) or all(map(COMMIT.fullmatch, pair))
                               for pair in pairs)
