"""What is collected (text, tokens, models, sites), and what identifies the resulting tokens and store."""

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from olmoscope.errors import UserError
from olmoscope.recipe.coders import SiteName
from olmoscope.recipe.sources import ADDED_KEYS, Count, Frozen, Share, Source
from olmoscope.site import MODEL_NAME, Site, wildcard

Bos = Literal["auto", "yes", "no"]
ModelDtype = Literal["auto", "bfloat16", "float32"]
Split = Literal["train", "held_out"]
Wanted = dict[Split, int]
"""How many tokens of each split a recipe asks for."""
SPLITS: tuple[Split, ...] = ("train", "held_out")
COUNT_KEYS: dict[Split, str] = {"train": "count", "held_out": "held_out"}
"""The key in a recipe's `tokens` for each split."""
StoreDtype = Literal["bfloat16", "float32", "float16", "float8_e4m3"]


class Text(Frozen):
    """Where documents come from and how they are mixed."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """Where documents come from."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] | Literal["shards"]
    """A weight for every source: documents are drawn one by one in these proportions (of documents). Or `shards`, the
    reference recipe's way: all shards of all sources in one shuffled order, each read to its end."""
    content: str | None = None
    """A hash of the sources' content, which replaces their paths in the text's identity; `evaluate` and `index` set it
    for a text given by --text. null: the recipe's own description identifies the sources."""
    held_out_share: Share = 0.01
    """Share of the documents kept out of training, for evaluation."""
    max_bad_share: Share = 0.01
    """Malformed lines or rows are skipped and counted; more than this share of them stops the run."""

    @model_validator(mode="after")
    def _weights_match_sources(self) -> "Text":
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources have the same name: {sorted(names)}")
        if isinstance(self.mixture, dict) and set(self.mixture) != set(names):
            raise ValueError(f"mixture has weights for {sorted(self.mixture)}, but the sources are {sorted(names)}")
        return self


class Tokens(Frozen):
    """How documents become sequences, and sequences become segments of the store."""

    count: Count
    """Training tokens."""
    held_out: Count
    """Held-out tokens, for evaluation."""
    chunk_lengths: list[tuple[Count, Count]] = Field([(512, 2048), (3500, 5000), (7000, 8192)], min_length=1)
    """Buckets (shortest, longest): each sequence's length is uniform in a bucket chosen at random."""
    documents: Literal["share", "apart"] = "share"
    """Whether the documents in one sequence attend to each other, or each is seen as if alone."""
    bos: Bos = "auto"
    """Whether each sequence begins with BOS (and each document in it, if documents are `apart`). `auto`: whatever the
    model's tokenizer does by itself. BOS counts as a token in `count` and in `chunk_lengths`."""
    segment_rows: Count = 65536
    """Rows (tokens) of a store segment, the unit of work that a crash can lose."""
    batch_tokens: Count = 16384
    """Token budget of one forward pass."""
    max_padding: Share = 0.03
    """Largest share of padding in a batch."""

    @field_validator("bos", mode="before")
    @classmethod
    def _yaml_yes_and_no(cls, value: object) -> object:
        """YAML 1.1 reads `yes` and `no` as booleans."""
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value

    @field_validator("chunk_lengths")
    @classmethod
    def _ascending(cls, buckets: list[tuple[int, int]]) -> list[tuple[int, int]]:
        for low, high in buckets:
            if low > high:
                raise ValueError(f"bucket ({low}, {high}) is empty: its shortest length is over its longest")
        return buckets

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Tokens":
        longest = max(high for _, high in self.chunk_lengths)
        if longest > min(self.segment_rows, self.batch_tokens):
            raise ValueError(f"segment_rows ({self.segment_rows}) and batch_tokens ({self.batch_tokens}) must hold "
                             f"the longest chunk, {longest} tokens")
        return self


class Model(Frozen):
    """The language model whose residual stream is read."""

    name: str
    """A hub repository, a local folder, or `tiny`, the model inside the package."""
    revision: str | None = None
    """A branch, tag or commit of the hub repository; null: its main branch."""
    d_model: Count | None = None
    """The width of the residual stream."""
    num_layers: Count | None = None
    """Its number of layers. Both this and `d_model` are checked against the model when it is loaded; given here, a plan
    needs no network."""
    dtype: ModelDtype = "auto"
    """The dtype in which it computes; `auto`: bfloat16 if the hardware multiplies it natively, else float32
    (model/dtype.py)."""
    attention: Literal["sdpa", "flash_attention_2", "flex_attention", "eager"] = "sdpa"
    """How transformers computes attention; the results differ in their last bits."""
    compile: bool = False
    """Compile each layer with torch.compile: faster once it runs (1.7 times on a CPU, 1.4 times for 7B
    parameters on an H200), half a minute to start; the results differ in their last bits."""
    modules: dict[Literal["attention", "mlp"], str] = Field(default_factory=dict)
    """A decoder layer's names for its attention and its MLP, if olmoscope does not know them; only sites inside a layer
    need this (model/sites.py)."""


class Activations(Frozen):
    """What the store keeps."""

    sites: Annotated[list[SiteName], Field(min_length=1)]
    """Where activations are taken (site.py lists the names): `layers.7`, `layers.7.mlp.out`. `layers: [7]` in a recipe
    is short for `sites: [layers.7]`; `layers.*.mlp.out` names a place in every layer, and needs `model.num_layers`."""
    dtype: StoreDtype = "bfloat16"
    """float16 is refused if values could overflow or do; float8_e4m3 (with a scale for each row) takes half the disk
    space and adds an error, which is measured."""

    @model_validator(mode="before")
    @classmethod
    def _layers_are_sites(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "layers" not in value:
            return value
        if "sites" in value:
            raise ValueError("layers is short for sites: leave one of them out")
        layers = value["layers"]
        if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise ValueError(f"layers must be a list of layer numbers from 0, not {layers!r}")
        return {key: part for key, part in value.items() if key != "layers"} | {"sites": layers}

    @field_validator("sites")
    @classmethod
    def _sorted_and_distinct(cls, sites: list[Site]) -> list[Site]:
        if sorted(set(sites)) != sites:
            raise ValueError(f"sites must be in the order of the model, without repeats: "
                             f"{', '.join(map(str, sorted(set(sites))))}")
        return sites

    def row_bytes(self, width: int) -> int:
        """Bytes of one site's row on disk."""
        return {"bfloat16": 2 * width, "float16": 2 * width, "float32": 4 * width,
                "float8_e4m3": width + 4}[self.dtype]


class TokensRecipe(Frozen):
    """What decides the tokens of a store."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Decides every draw: the order of text and rows, the lengths of sequences and, unless `train.seed` says otherwise,
    how SAEs start."""
    text: Text
    """The text that the model reads."""
    tokens: Tokens
    """How much of it, and how it is cut."""
    model: Model
    """The language model."""

    def with_bos(self, bos: Bos) -> Self:
        """The same recipe with another `tokens.bos`."""
        return self.model_copy(update={"tokens": self.tokens.model_copy(update={"bos": bos})})

    def with_wanted(self, wanted: Wanted) -> Self:
        """The same recipe with other numbers of tokens."""
        return self.model_copy(update={"tokens": self.tokens.model_copy(
            update={"count": wanted["train"], "held_out": wanted["held_out"]})})

    @property
    def wanted(self) -> Wanted:
        """Tokens of each split."""
        return {"train": self.tokens.count, "held_out": self.tokens.held_out}

    def tokens_hash(self) -> str:
        """Identifies what decides the token stage's bytes."""
        return hash_of(self.tokens_identity())

    def tokens_identity(self) -> dict[str, Any]:
        """What decides the token stage's bytes."""
        return {"model": self.model.model_dump(mode="json", include={"name", "revision"})} | self._tokens_identity()

    def _tokens_identity(self) -> dict[str, Any]:
        """What decides the tokens, except the model. A newer key is left out if its value means the old behaviour, so
        that hashes of older stores stay the same. (`bos: auto` is from an older or unsettled recipe: no BOS.)"""
        tree = self.model_dump(mode="json", include={"seed", "text", "tokens"})
        if self.tokens.bos != "yes":
            del tree["tokens"]["bos"]
        text = tree["text"]
        if text.pop("content") is not None:
            text["sources"] = self.text.content
        else:
            for source in text["sources"]:
                for key, plain in ADDED_KEYS.get(source["kind"], {}).items():
                    if source[key] == plain:
                        del source[key]
        return tree


class StoreRecipe(TokensRecipe):
    """What decides an activation store, and the device that makes it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where model and training run; `auto`: on a GPU if there is one."""
    models: dict[str, Model] = Field({})
    """Other models that read the same tokens, by name: `base:layers.7` is a site of the model called `base`. This is
    for crosscoders over several models, or revisions of a model; their vocabularies must be the same."""
    activations: Activations
    """Which activations are stored, and how."""

    @model_validator(mode="before")
    @classmethod
    def _wildcards(cls, value: Any) -> Any:
        """Replace `layers.*.mlp.out` with the sites that it names."""
        activations = value.get("activations") if isinstance(value, dict) else None
        sites = activations.get("sites") if isinstance(activations, dict) else None
        if not isinstance(activations, dict) or not isinstance(sites, list) or not any("*" in str(site)
                                                                                      for site in sites):
            return value

        def layers(pattern: str) -> int:
            of, colon, _ = pattern.partition(":")
            tree = (value.get("models") or {}).get(of) if colon else value.get("model")
            found = tree.get("num_layers") if isinstance(tree, dict) else None
            if not isinstance(found, int):
                where = f"models.{of}" if colon else "model"
                raise ValueError("activations.sites: * names all layers, but the recipe does not say how many there "
                                 f"are: set {where}.num_layers")
            return found

        try:
            found = {site for one in sites for site in (
                wildcard(one, layers(one)) if isinstance(one, str) and "*" in one else [Site.parse(one)])}
        except UserError as error:
            raise ValueError(f"activations.sites: {error}") from error
        return value | {"activations": activations | {"sites": sorted(found)}}

    @model_validator(mode="after")
    def _models_agree(self) -> Self:
        sites = self.activations.sites
        for name in self.models:
            if not re.fullmatch(MODEL_NAME, name):
                raise ValueError(f"models: {name!r} cannot name a model: use letters, digits, - and _, a letter first")
            if not any(site.model == name for site in sites):
                raise ValueError(f"models.{name}: no site of it is collected; name one in activations.sites, such as "
                                 f"{name}:{sites[0].of('')}, or leave the model out")
        if sites[0].model:
            raise ValueError("activations.sites: name a site of the recipe's own model too: the tokens are its tokens")
        for site in sites:
            if site.model and site.model not in self.models:
                raise ValueError(f"activations.sites: {site} is in a model that the recipe does not know; define it in "
                                 f"models.{site.model}")
            layers = self.model_of(site.model).num_layers
            if layers is not None and site.layer >= layers:
                raise ValueError(f"activations.sites: {site} is out of range; the model has layers 0 to {layers - 1}")
        return self

    def model_of(self, name: str) -> Model:
        """The model of this name, which sites refer to; an empty name means the recipe's own model."""
        return self.models[name] if name else self.model

    def of_model(self, name: str) -> Self:
        """What is collected from one model: the recipe with that model as its own, and only its sites. An empty
        name means the recipe's own model."""
        sites = [site.of("") for site in self.activations.sites if site.model == name]
        return self.model_copy(update={"model": self.model_of(name), "models": {}}).with_sites(sites)

    def in_dtype(self, dtype: ModelDtype) -> Self:
        """The same recipe with this dtype for those of its models whose dtype is `auto`."""
        def settled(model: Model) -> Model:
            return model.model_copy(update={"dtype": dtype}) if model.dtype == "auto" else model

        return self.model_copy(update={"model": settled(self.model),
                                       "models": {name: settled(model) for name, model in self.models.items()}})

    def with_sites(self, sites: list[Site]) -> Self:
        """The same recipe with other sites collected."""
        return self.model_copy(update={"activations": self.activations.model_copy(update={"sites": sites})})

    def store_hash(self) -> str:
        """Identifies what decides the bytes of the activation store; `model.dtype` must be settled."""
        assert self.model.dtype != "auto", "settle the recipe first (pipeline.py)"
        return hash_of(self.store_identity())

    def store_identity(self) -> dict[str, Any]:
        """What decides the bytes of the activation store."""
        others = {name: _model_identity(model) for name, model in self.models.items()
                  if any(site.model == name for site in self.activations.sites)}
        return {"model": _model_identity(self.model), **({"models": others} if others else {}),
                "activations": _activations_identity(self.activations)} | self._tokens_identity()


def _model_identity(model: Model) -> dict[str, Any]:
    """What identifies a model. A newer key is left out if its value means the old behaviour, so that older hashes stay
    the same."""
    tree = model.model_dump(mode="json")
    if not tree["modules"]:
        del tree["modules"]
    return tree


def _activations_identity(activations: Activations) -> dict[str, Any]:
    """What identifies a store's content. If all sites are residual streams, they are named by layer, as before sites
    existed."""
    tree = activations.model_dump(mode="json")
    if all(site.is_layer_output for site in activations.sites):
        del tree["sites"]
        tree["layers"] = [site.layer for site in activations.sites]
    return tree


STORE_KEYS = {"text", "tokens", "model", "activations",
              *(key for part in (Text, Tokens, Model, Activations) for key in part.model_fields)}
"""Keys that decide a recipe's store."""


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
