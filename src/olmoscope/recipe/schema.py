"""What a run is: frozen models, with every rule that a recipe must keep (recipe/load.py reads one from YAML)."""

from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from olmoscope.recipe.coders import DECIDES_THE_STORE
from olmoscope.recipe.coders import Activation as Activation
from olmoscope.recipe.coders import CoderConfig as CoderConfig
from olmoscope.recipe.coders import SiteName as SiteName
from olmoscope.recipe.mistakes import first_mistake
from olmoscope.recipe.names import refuse_colliding_names
from olmoscope.recipe.sources import Count, Frozen
from olmoscope.recipe.store import COUNT_KEYS as COUNT_KEYS  # everything of a recipe can be imported from here
from olmoscope.recipe.store import SPLITS as SPLITS
from olmoscope.recipe.store import STORE_KEYS, hash_of
from olmoscope.recipe.store import Activations as Activations
from olmoscope.recipe.store import Bos as Bos
from olmoscope.recipe.store import Model as Model
from olmoscope.recipe.store import Split as Split
from olmoscope.recipe.store import StoreDtype as StoreDtype
from olmoscope.recipe.store import StoreRecipe as StoreRecipe
from olmoscope.recipe.store import Text as Text
from olmoscope.recipe.store import Tokens as Tokens
from olmoscope.recipe.store import TokensRecipe as TokensRecipe
from olmoscope.recipe.store import Wanted as Wanted
from olmoscope.recipe.training import MOST_MARGIN as MOST_MARGIN
from olmoscope.recipe.training import Auxiliary as Auxiliary
from olmoscope.recipe.training import Candidates as Candidates
from olmoscope.recipe.training import Every as Every
from olmoscope.recipe.training import Filter as Filter
from olmoscope.recipe.training import Finish as Finish
from olmoscope.recipe.training import Live as Live
from olmoscope.recipe.training import Train as Train
from olmoscope.recipe.tree import merge
from olmoscope.site import Site


class Evaluate(Frozen):
    """How finished SAEs are measured. No weights depend on it."""

    tokens: Count = 100_000
    """Held-out tokens that the language model reads for cross-entropy and KL: once unchanged, and once with each
    reconstruction and ablation. Figures of reconstruction are over all held-out rows."""


class Release(Frozen):
    """The names of the release."""

    name: str
    """The title of its model card."""
    repo_id: str
    """The hub repository that users will load from, `OWNER/NAME`."""


class Recipe(StoreRecipe):
    """Everything that decides the result of a run, and the device that it runs on."""

    name: str
    """The recipe's name, which is that of its output folder unless `--out` names another."""
    form: str = "default"
    """Which of the recipe's forms this is (`--form`)."""
    saes: Annotated[list[CoderConfig], Field(min_length=1)]
    """What to train. A list in place of a single value makes a study."""
    train: Train
    """How all of them are trained."""
    evaluate: Evaluate = Evaluate()
    """How they are measured."""
    release: Release
    """What their release is called."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        sites = self.activations.sites
        for number, sae in enumerate(self.saes):
            for site in sae.sites:
                if site not in sites:
                    raise ValueError(f"saes.{number}: {site} is not collected (activations.sites: "
                                     f"{', '.join(map(str, sites))})")
            train = self._checked_train(f"saes.{number}.train", sae)
            if train.finish and (len(sae.reads) > 1 or sae.sites[0].model):
                raise ValueError(f"saes.{number}: train.finish is for coders that write one site of the recipe's main "
                                 "model; set train: {finish: null} for this one")
            if train.shards > 1 and (refused := _not_in_shards(sae, train)):
                raise ValueError(f"saes.{number}: train.shards is {train.shards}, {refused}; set train: {{shards: 1}} "
                                 "for this one")
            if train.axes == "principal" and (len(sae.sites) > 1 or sae.normalize != "none"):
                raise ValueError(f"saes.{number}: train.axes: principal is for SAEs of one site that do not normalise "
                                 "rows; set train: {axes: channels} for this one")
            if train.orthogonal and sae.weights == "tied":
                raise ValueError(f"saes.{number}: train.orthogonal is for decoders that are not tied to the encoder; "
                                 "set weights: untied or train: {orthogonal: 0} for this one")
            if sae.activation == "groupmax" and train.candidates:
                raise ValueError(f"saes.{number}.activation: groupmax needs all pre-activations; leave out one of "
                                 "activation: groupmax and train.candidates")
        if self.train.decoder_rate is not None and all(sae.weights == "tied" for sae in self.saes):
            raise ValueError("train.decoder_rate: all SAEs have tied weights, which have one rate; leave it out")
        if self.train.live and self.models:
            raise ValueError("train.live: one model is read live, not several; leave out one of train.live and models")
        refuse_colliding_names([sae.id for sae in self.saes])
        return self

    def _checked_train(self, where: str, sae: CoderConfig) -> Train:
        for key in sae.train:
            if key not in Train.model_fields and key in STORE_KEYS:
                raise ValueError(f"{where}.{key}: {DECIDES_THE_STORE}")
        if sae.weights == "tied" and sae.train.get("decoder_rate") is not None:
            raise ValueError(f"{where}.decoder_rate: tied weights have one rate; leave it out")
        try:
            return self.train_of(sae)
        except ValidationError as error:
            raise ValueError(f"{where}.{first_mistake(error)}") from error

    def train_of(self, sae: CoderConfig) -> Train:
        """How one SAE of the recipe is trained: the recipe's `train`, with the SAE's own keys in place of the recipe's.
        """
        return Train.model_validate(merge(self.train.model_dump(), sae.train)) if sae.train else self.train

    def sites_for(self, sae: CoderConfig) -> list[Site]:
        """The sites that decide the weights of one SAE: its own or, if rows are filtered by their norms, all sites of
        the recipe."""
        return self.activations.sites if self.train_of(sae).filter.max_norm is not None else sae.sites

    def alone(self, sae: CoderConfig) -> Self:
        """The recipe without what one SAE's weights do not depend on: other sites, held-out tokens. So a store may
        grow, and the runs that were trained on it remain valid."""
        return self.with_sites(self.sites_for(sae)).with_wanted(self.wanted | {"held_out": 1})

    def run_hash(self, sae: CoderConfig) -> str:
        """Identifies what decides the weights of one SAE."""
        return hash_of({"store": self.store_hash()} | self.run_identity(sae))

    def run_identity(self, sae: CoderConfig) -> dict[str, Any]:
        """What decides the weights of one SAE besides the store. A newer key is left out if its value means the old
        behaviour, so that hashes of older runs stay the same."""
        train = self.train_of(sae)
        tree = train.model_dump(mode="json", exclude={
            "checkpoint_every": True, "checkpoints": True, "log_every": True, "together": True, "live": {"buffer"}})
        if train.seed in (None, self.seed):
            del tree["seed"]
        if train.sinks == "auto":  # left out although older runs have no sinks: they stay valid as they are
            del tree["sinks"]
        if train.finish is None:
            del tree["finish"]
        if train.axes == "channels":
            del tree["axes"]
        if train.orthogonal == 0:
            del tree["orthogonal"]
        if train.shards == 1:
            del tree["shards"]
        return {"sae": sae.identity(), "train": tree}

    def to_yaml(self) -> str:
        """The resolved recipe; reading it back gives an equal one."""
        tree = self.model_dump(mode="json")
        first = {key: tree[key] for key in ("name", "form", "seed", "device")}
        return yaml.safe_dump(first | tree, sort_keys=False, allow_unicode=True)


def _not_in_shards(sae: CoderConfig, train: Train) -> str | None:
    """Why an SAE cannot be trained in several shards; None if it can."""
    if train.shards > sae.d_sae:
        return f"which is over its d_sae ({sae.d_sae})"
    if sae.activation == "groupmax" and sae.k % train.shards:
        return f"which does not divide the {sae.k} groups of a groupmax SAE (saes.k)"
    return None
