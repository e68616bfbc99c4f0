"""The way from the residual stream to logits: a model's final norm and unembedding, without its layers.

Shapes: D d_model, V vocabulary, C directions.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from olmoscope.errors import UserError
from olmoscope.model.config import cut_config, read_config
from olmoscope.model_source import explain, locate, revision_of
from olmoscope.recipe import Model


class NoUnembedding(UserError):
    """The model's way to logits is not one that promoted tokens can be computed by; the text says why."""


@dataclass(frozen=True)
class Unembedding:
    """What a small change of the last residual stream does to the logits, up to a factor.

    The final norm divides a row by its size (RMS norm) or by its standard deviation after centring it (layer norm),
    then multiplies each channel with a weight. That divisor is the row's own: for a direction without a row it is not
    known, and left out; it is positive and the same for all tokens. So is what the direction changes of the divisor.
    """

    weight_D: Tensor
    """The norm's, float32."""
    centres: bool
    """Whether the norm takes off the row's mean (a layer norm)."""
    U_VD: Tensor
    """A token's unembedding vector a row, float32."""
    tied: bool
    """Whether it is the embedding matrix."""
    revision: str

    def through_norm(self, directions_CD: Tensor) -> Tensor:
        """weight ⊙ direction, `[C, D]` float32, whose product with U is what a direction does to the logits; it is
        centred first where the norm centres."""
        directions_CD = directions_CD.float()
        if self.centres:
            directions_CD = directions_CD - directions_CD.mean(dim=1, keepdim=True)
        return directions_CD * self.weight_D

    def of_first(self, tokens: int) -> "Unembedding":
        """Only the first tokens: some models pad the matrix with rows that no token has."""
        return replace(self, U_VD=self.U_VD[:tokens])

    def __str__(self) -> str:
        return (f"{'tied' if self.tied else 'untied'} unembedding, final {'layer' if self.centres else 'RMS'} norm's "
                "weight folded in; without the norm's divisor of each row, and without later layers")


def load_unembedding(model: Model, device: torch.device) -> Unembedding:
    """Load the final norm and the unembedding of a causal LM; of its layers only the first is read on the way.

    Raises:
        NoUnembedding: not built as usual (one final norm, then a matrix).
        UserError: not to be found.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = read_config(model)
    revision = revision_of(model, getattr(config, "_commit_hash", None))
    cut_config(config, 0)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would list every weight of the layers that we leave out
    logging.disable_progress_bar()
    try:
        causal, info = AutoModelForCausalLM.from_pretrained(
            **locate(model), config=config, dtype=getattr(torch, model.dtype), use_safetensors=True,
            output_loading_info=True)
    except (OSError, ValueError) as error:
        raise explain(error, model) from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model {model.name!r} lacks weights: {missing[0]}; its files do not fit its config.json")
    head = causal.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise NoUnembedding(f"{model.name!r} has no unembedding matrix ({type(causal).__name__}): promoted "
                            "tokens cannot be computed")
    norm = final_norm(causal, config.get_text_config().hidden_size)
    weight_D, centres = _weight(norm, head.in_features)
    embedding = causal.get_input_embeddings()
    tied = embedding is not None and embedding.weight.data_ptr() == head.weight.data_ptr()
    return Unembedding(weight_D.to(device), centres, head.weight.detach().float().to(device), tied, revision)


def final_norm(causal: nn.Module, d_model: int) -> nn.Module:
    """The norm between the last layer and the unembedding: the only one beside the list of layers.

    Raises:
        NoUnembedding: there is none, or several.
    """
    found: list[tuple[str, nn.Module]] = [(name, module) for name, module in causal.named_modules()
             if "norm" in type(module).__name__.lower() and not any(part.isdigit() for part in name.split("."))
             and isinstance(getattr(module, "weight", None), Tensor) and module.weight.shape == (d_model,)]
    if len(found) != 1:
        raise NoUnembedding(f"cannot tell which module of {type(causal).__name__} is its final norm (candidates: "
                            f"{', '.join(name for name, _ in found) or 'none'})")
    return found[0][1]


@torch.no_grad()
def _weight(norm: nn.Module, d_model: int) -> tuple[Tensor, bool]:
    """A norm's weight, and whether it centres. An RMS norm's is what it makes of a row of ones, whose RMS is 1:
    some architectures store it less 1."""
    if isinstance(norm, nn.LayerNorm):
        return norm.weight.detach().float(), True
    weight_D: Tensor = norm.float()(torch.ones(1, d_model))[0]
    return weight_D.float(), False
