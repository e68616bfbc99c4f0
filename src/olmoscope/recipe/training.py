"""How SAEs are trained: frozen models for the recipe's key `train`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from olmoscope.recipe.sources import Count, Frozen, Share


class Filter(Frozen):
    """Which rows training leaves out. The store holds all rows; the share left out is reported.

    By default, nothing is left out: on the tiny model, no norm is over 1.6 times the median, and leaving out special
    tokens made ordinary tokens no better (held-out NMSE 0.146 against 0.143) and special tokens worse (0.28 against
    0.10). The filter is for models with attention sinks of huge norm.
    """

    special_tokens: bool = False
    """Leave out tokens that the tokenizer calls special."""
    first_positions: Annotated[int, Field(ge=0)] = 0
    """Leave out this many positions at the start of each sequence."""
    max_norm: Annotated[float, Field(gt=1)] | None = None
    """Leave out rows whose norm is over this many times the median norm of the site, at any site of the store (so
    all SAEs see the same tokens). Needs a store."""


class Live(Frozen):
    """Training straight from the model, without a store of activations."""

    rows: Count = 2**18
    """Rows of each site held and mixed: each round mixes the contexts of about twice as many rows."""
    buffer: Literal["ram", "device"] = "ram"
    """Where the rows are held: in memory, or on the device that trains."""


class Auxiliary(Frozen):
    """The auxiliary loss by which dead latents learn what the others miss (train/auxiliary.py)."""

    weight: Annotated[float, Field(ge=0)] | None = None
    """The weight of this loss beside the main loss; it is the NMSE left if the dead latents added their part. 0: only
    `lift`. null: 1/8, or 0 if weights are tied, which the loss harms (docs/recipe-study.md)."""
    k: Count | None = None
    """Dead latents active in a row; null: the SAE's k. The loss costs as much as the step's sparse part would with
    this k."""
    dead_window: Count | None = None
    """A latent takes part if it has not fired in this many tokens; null: derived from width and k
    (train/derived.py)."""
    lift: Annotated[float, Field(ge=0)] = 0.1
    """Over `dead_window` tokens, the bias of a dead latent rises by this times the mean activation, until it fires. If
    `dead_window` is null and the derived one is short, the lift is smaller (train/derived.py)."""


MOST_MARGIN = 448
"""The largest margin of candidates: more candidates cost more than the exact product."""


class Candidates(Frozen):
    """The encoder's product in int8 proposes latents, and their exact scores decide (train/candidates.py)."""

    margin: Annotated[int, Field(ge=0, le=MOST_MARGIN)] = 16
    """The initial number of candidates per row beyond k; it grows if they miss more than 0.01 % of the top k, which is
    measured during training."""


class Finish(Frozen):
    """The last part of training also uses the language model's own loss (train/finish.py)."""

    kl: Annotated[float, Field(gt=0)] = 1.0
    """The weight of the divergence of the model's predictions, relative to the reconstruction error."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of the steps, at the end of training, that use this loss."""


class Every(Frozen):
    """Which checkpoints to keep, by step."""

    every: Count
    """Keep those whose step is a multiple of this."""


class Train(Frozen):
    """How the SAEs of the recipe are trained; an SAE may override any key. Keys that are null are derived from width, k
    and tokens (train/derived.py)."""

    seed: Annotated[int, Field(ge=0)] | None = None
    """The seed of what training draws, an SAE's initialisation; null: the recipe's `seed`. The text, the store and the
    order of the rows depend only on the recipe's seed."""
    batch: Count | None = None
    """Rows in a step."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """The learning rate of the encoder, or of tied weights."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.8
    """The share of the steps, at the end, over which the learning rate falls linearly to 0; 0 keeps it constant."""
    decoder_rate: Annotated[float, Field(gt=0)] | None = None
    """The learning rate of an untied decoder, as a multiple of `lr`; tied weights have one rate."""
    scale_biases: bool = True
    """The learning rate of the biases is `lr` times the RMS of the activations (centred, over their channels), so that
    the result does not depend on the unit of the activations. False: plain `lr`."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of Adam's first and second moments, per step."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of Adam's second moment."""
    adam: Literal["exact", "touched"] = "touched"
    """Adam on every row of the dictionary at every step, or only on rows with an active latent in the batch. The latter
    is cheaper if the batch is small, and rows without a gradient do not drift with their momentum, which kills latents
    at high learning rates."""
    axes: Literal["channels", "principal"] = "channels"
    """The axes along which Adam scales its steps: the channels, or the principal axes of the rows (train/axes.py).
    The latter give less error for the same tokens (docs/recipe-study.md); each step then multiplies its rows by a
    `[d_model, d_model]` matrix. For SAEs of one site, without layer norm."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """The dtype of Adam's moments for the dictionary: bfloat16 (rounded stochastically) halves memory and traffic."""
    order: Literal["shuffled", "reading"] = "shuffled"
    """Rows mixed over the whole store, or in the order in which the model read them."""
    epochs: Count = 1
    """How often training reads the store."""
    filter: Filter = Filter()
    """Rows that training leaves out."""
    live: Live | None = None
    """Read the model itself, not a store (`olmoscope train --live`)."""
    together: Count | Literal["fit"] = "fit"
    """How many SAEs are trained at once on one pass over the rows: a number, or as many as fit in the free memory of
    the device. Each becomes the same as if trained alone."""
    candidates: Candidates | None = None
    """Find the top k from a product in 8 bits, faster and nearly always the same; null: the exact product. The first
    steps time both ways, and the faster one is used."""
    auxiliary: Auxiliary | None = Auxiliary()
    """The loss that keeps latents from staying dead; null: no such loss."""
    sinks: Literal["auto", "off"] = "auto"
    """Latents for attention sinks, rows of huge norm along a direction of their own (sae/sinks.py): one of the d_sae
    latents for each such direction of the site, in nearly all models one or none. They are found before training and
    stay fixed. For SAEs of one site, without layer norm or groups."""
    orthogonal: Annotated[float, Field(ge=0)] = 0.0
    """How strongly similar rows of an untied decoder are moved apart (train/orthogonal.py); 0: not at all. With 2,
    fewer features absorb others, for about 2% more error (docs/recipe-study.md). With `shards`, only rows of the same
    shard are compared."""
    finish: Finish | None = None
    """In the last steps, the language model reads sequences with reconstructions in them, and the effect on its
    predictions enters the loss; null: training does not change at the end. This costs passes of the whole model over as
    many tokens as these steps have rows."""
    shards: Count = 1
    """The number of parts in which the latents are trained; up to that many processes share them (`olmoscope train
    --ranks`). It decides the order of sums, and so the weights' last bits and where latents start; the number of
    processes changes nothing."""
    dead_window: Count = 500_000
    """A latent is counted as dead if it did not fire in this many tokens."""
    checkpoint_every: Count = 1000
    """Steps between checkpoints."""
    checkpoints: Every | Literal["last", "all"] = "last"
    """Which checkpoints a run keeps: the last, all, or (`every: N`) the last and those after every N steps, which are
    then written whatever `checkpoint_every` is."""
    log_every: Count = 50
    """Steps between lines of metrics.jsonl."""

    @field_validator("sinks", mode="before")
    @classmethod
    def _yaml_off(cls, value: object) -> object:
        """YAML 1.1 reads `off` as a boolean."""
        return "off" if value is False else value

    @field_validator("checkpoints", mode="before")
    @classmethod
    def _which_checkpoints(cls, value: object) -> object:
        """Check the value here, so that there is one message for all its forms."""
        steps = value.get("every") if isinstance(value, dict) and list(value) == ["every"] else None
        if value in ("last", "all") or isinstance(value, Every) or (isinstance(steps, int) and steps >= 1):
            return value
        raise ValueError("must be last, all, or {every: STEPS}")

    @model_validator(mode="after")
    def _live_can_do_it(self) -> "Train":
        if self.live and self.filter.max_norm is not None:
            raise ValueError("filter.max_norm needs the norms of a whole store, which a live stream does not have: "
                             "leave out one of live and filter.max_norm")
        if self.live and self.order == "reading":
            raise ValueError("a live stream is always shuffled: leave out one of live and order: reading")
        return self

    @model_validator(mode="after")
    def _finish_can_do_it(self) -> "Train":
        if self.finish and self.filter != Filter():
            raise ValueError("finish trains on whole sequences: leave out one of finish and filter")
        return self
