"""What to train: an entry of a recipe's `saes`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from olmoscope.errors import UserError
from olmoscope.recipe.names import check_name
from olmoscope.recipe.sources import Count, Frozen
from olmoscope.recipe.training import Train
from olmoscope.site import Site

Activation = Literal["topk", "batchtopk", "jumprelu", "groupmax"]


def _site(value: object) -> Site:
    try:
        return Site.parse(value)
    except UserError as error:
        raise ValueError(str(error)) from error


SiteName = Annotated[Site, BeforeValidator(_site), PlainSerializer(str, return_type=str)]
"""A site, as its text in YAML and JSON."""

_NORMALIZE_NAMES = {"none": "raw", "layer_norm": "layernorm"}
DECIDES_THE_STORE = "decides the store, which all SAEs of a recipe share; change it at the top of the recipe"


class CoderConfig(Frozen):
    """One sparse coder to train, a run: an SAE, a transcoder, or a crosscoder.

    `site: layers.7` (or `layer: 7`) is short for an SAE that reads and writes that site.
    """

    name: str | None = None
    """The run's name and its folder in `runs/`: letters, digits, `-`, `_`, `.`; parts may be joined by `/`. null:
    `default_id`."""
    reads: Annotated[list[SiteName], Field(min_length=1)]
    """The sites whose activations it encodes; several make a crosscoder."""
    writes: Annotated[list[SiteName], Field(min_length=1)] | None = None
    """The sites that it reconstructs; null: those that it reads. A coder that writes another site is a transcoder."""
    skip: bool = False
    """For a transcoder: add a linear map from what it reads to what it writes."""
    d_sae: Count
    """The number of latents."""
    k: Count
    """Active latents in a row: exactly, at most or on average, as `activation` says."""
    activation: Activation = "topk"
    """Which latents are active: the k largest of each row (`topk`); on average over a batch, the k largest per row
    (`batchtopk`); those over their own learned threshold, on average k per row (`jumprelu`); the largest of each of k
    groups (`groupmax`; SAELens has no such SAE, so it cannot be exported)."""
    matryoshka: list[Annotated[float, Field(gt=0, lt=1)]] = Field([])
    """Shares of the latents, ascending, such as [0.0625, 0.25]: the first latents up to each share are trained to be an
    SAE by themselves, and so are all latents together."""
    normalize: Literal["none", "layer_norm"] = "none"
    """`layer_norm` centres each row and divides it by its standard deviation before it is encoded."""
    weights: Literal["tied", "untied"] = "tied"
    """Whether encoder and decoder are one matrix, or two that start equal."""
    canonical: bool = False
    """Whether the model card recommends this SAE for its layer."""
    train: dict[str, Any] = Field({})
    """Keys of the recipe's `train` that differ for this SAE. (`Recipe` checks them, since it knows the other keys.)"""

    @field_validator("name")
    @classmethod
    def _usable_name(cls, name: str | None) -> str | None:
        return name if name is None else check_name(name)

    @model_validator(mode="before")
    @classmethod
    def _keys_in_their_places(cls, tree: object) -> object:
        """Refuse keys that belong elsewhere with a message that says where, so that they do not look like typos."""
        for key in tree if isinstance(tree, dict) else ():
            if key in ("text", "tokens", "model", "activations", "seed"):
                instead = "; the seed of training is train: {seed: ...}" if key == "seed" else ""
                raise ValueError(f"{key} {DECIDES_THE_STORE}{instead}")
            if key in Train.model_fields and key not in cls.model_fields:
                raise ValueError(f"{key} is a key of train: write train: {{{key}: ...}}")
        return tree

    @model_validator(mode="before")
    @classmethod
    def _one_site(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        said = [key for key in ("layer", "site", "reads") if key in value]
        if len(said) > 1:
            raise ValueError(f"{said[0]} and {said[1]} both name what is read: leave one of them out")
        if said and said[0] != "reads":
            if "writes" in value:
                raise ValueError(f"{said[0]} is for an SAE, which writes what it reads; a transcoder has reads and "
                                 "writes")
            value = {key: part for key, part in value.items() if key != said[0]} | {"reads": [value[said[0]]]}
        for key in ("reads", "writes"):
            if isinstance(value.get(key), str | int):
                value = value | {key: [value[key]]}
        return value

    @model_validator(mode="after")
    def _ends_make_sense(self) -> Self:
        for key, sites in (("reads", self.reads), ("writes", self.writes or [])):
            if len(set(sites)) < len(sites):
                raise ValueError(f"{key} names a site twice: {', '.join(map(str, sites))}")
        if self.writes == self.reads:
            raise ValueError("writes: leave it out if it is the same as what is read")
        if self.writes is not None and len(self.reads) + len(self.writes) > 2:
            raise ValueError("a transcoder reads one site and writes one; a crosscoder reads several and leaves "
                             "writes out")
        if self.writes is not None and max(self.reads) > max(self.writes):
            raise ValueError(f"it reads {self.reads[0]} but writes {self.writes[0]}, which the model reaches earlier; "
                             "name a later site in writes")
        if any(site.model for site in self.sites) and (len(self.reads) == 1 or all(site.model for site in self.reads)):
            raise ValueError("sites of other models are for crosscoders that read the recipe's own model too; for an "
                             "SAE or a transcoder of another model, write a recipe for that model")
        if self.normalize != "none" and len(self.sites) > 1:
            raise ValueError(f"normalize: {self.normalize} is for SAEs of one site; leave it out")
        if self.skip and self.writes is None:
            raise ValueError("skip is for a transcoder: name what it writes, or leave skip out")
        if self.writes is not None and self.weights == "tied":
            raise ValueError("a transcoder's encoder and decoder are two matrices: set weights: untied")
        return self

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k ({self.k}) is over d_sae ({self.d_sae})")
        return self

    @model_validator(mode="after")
    def _variant_makes_sense(self) -> Self:
        if self.activation == "groupmax" and self.d_sae % self.k:
            raise ValueError(f"activation: groupmax needs k groups of equal size; d_sae ({self.d_sae}) is not a "
                             f"multiple of k ({self.k})")
        if self.activation == "groupmax" and self.matryoshka:
            raise ValueError("matryoshka: the first latents of a groupmax SAE are whole groups, not an SAE; "
                             "leave out one of activation: groupmax and matryoshka")
        ends = [max(1, round(share * self.d_sae)) for share in self.matryoshka] + [self.d_sae]
        if sorted(set(ends)) != ends:
            raise ValueError(f"matryoshka: the shares {self.matryoshka} must ascend; of {self.d_sae} latents they are "
                             f"{ends[:-1]}")
        return self

    @property
    def id(self) -> str:
        """The run's name: the one that the recipe gives, else `default_id`."""
        return self.name or self.default_id

    @property
    def default_id(self) -> str:
        """An id made from the SAE's own settings, e.g. `layer_07/width_131k/topk_64_raw`. It seeds the initialisation,
        so that a name changes nothing, and runs that differ only in their training start alike."""
        width = f"{self.d_sae // 1000}k" if self.d_sae >= 10_000 else str(self.d_sae)
        nested = "matryoshka-" if self.matryoshka else ""
        untied = "_untied" if self.weights == "untied" else ""
        skip = "_skip" if self.skip else ""
        variant = f"{nested}{self.activation}_{self.k}_{_NORMALIZE_NAMES[self.normalize]}{untied}{skip}"
        place = "-".join(site.folder for site in self.reads)
        if len(self.reads) > 1 and all(site.is_layer_output for site in self.reads):
            place = "layers_" + "-".join(f"{site.layer:02d}" for site in self.reads)
        if self.writes is not None:
            place = f"{place}-to-{self.writes[0].folder.removeprefix(Site(self.reads[0].layer).folder + '_')}"
        return f"{place}/width_{width}/{variant}"

    @property
    def site(self) -> Site:
        """The site whose activations it reconstructs; for a crosscoder, the first."""
        return (self.writes or self.reads)[0]

    @property
    def sites(self) -> list[Site]:
        """All sites that training needs, in the order of the model."""
        return sorted({*self.reads, *(self.writes or [])})

    def parameters(self, d_in: int, d_out: int | None = None) -> int:
        """The number of trained parameters.

        Args:
            d_in: width of all sites read.
            d_out: width of the site that a transcoder writes; None for the same as `d_in`.
        """
        matrices = 2 if self.weights == "untied" else 1
        thresholds = self.d_sae if self.activation == "jumprelu" else 0
        if self.writes is None:
            return matrices * self.d_sae * d_in + self.d_sae + d_in + thresholds
        d_out = d_in if d_out is None else d_out
        skip = d_in * d_out if self.skip else 0
        return self.d_sae * (d_in + d_out) + self.d_sae + d_in + d_out + thresholds + skip

    def identity(self) -> dict[str, Any]:
        """What is trained, without the settings of training. An SAE of the residual stream is named by its layer, as
        before sites existed, so that hashes of older runs stay the same."""
        tree = self.model_dump(mode="json", exclude={"canonical", "name", "train"})
        if self.writes is None:
            del tree["writes"], tree["skip"]
            if len(self.reads) == 1 and self.reads[0].is_layer_output:
                del tree["reads"]
                tree["layer"] = self.reads[0].layer
        return tree
