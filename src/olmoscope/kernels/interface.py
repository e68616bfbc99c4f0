"""What every set of kernels offers, and the plain data that passes between them.

Shapes: B rows, D d_model, F latents, K active latents per row, P active (row, latent) pairs. A backend is a module with
the functions of `Kernels`: reference.py (torch, any device; defines the results), cpu.py (numba), cuda.py (Triton).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Residual:
    """The error of each row's reconstruction, and its gradients."""

    loss_B: Tensor
    """‖x̂ − x‖² / ‖x‖² of each row, float64; 0 for a row of zeros, which has no such loss and no gradient."""
    e_BD: Tensor
    """dL/d(z W + b_pre) for L = mean of `loss_B`; in a layer-norm SAE, it includes the row's std."""
    dz_BK: Tensor
    """dL/dz of the active latents: e · W_j, and 0 where the ReLU is inactive."""


@dataclass(frozen=True)
class SortedPairs:
    """The active (row, latent) pairs of a batch, sorted by latent: compressed sparse rows, one row per latent."""

    offsets: Tensor
    """`[F + 1]` int64: the pairs of latent f are `offsets[f]` to `offsets[f + 1]`. Beyond `offsets[F]` are places whose
    ReLU is inactive; they are never read."""
    rows: Tensor
    """`[P]`, any integer type: the row of each pair, ascending for each latent."""
    values: Tensor
    """`[P]`: z of each pair."""
    gradients: Tensor
    """`[P]`: dL/dz of each pair."""


@dataclass(frozen=True)
class AdamStep:
    """The numbers of one step of Adam (Kingma & Ba 2015, arXiv:1412.6980)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    count: int
    """The number of the step, from 1."""
    shard: int = 0
    """The shard of the dictionary: each draws its own random bits for bfloat16 moments."""

    @property
    def rate(self) -> float:
        """The learning rate, including the bias correction of the first moment."""
        return self.lr / (1 - self.beta1**self.count)

    @property
    def root_scale(self) -> float:
        """The factor of √(second moment): its bias correction."""
        return float((1 - self.beta2**self.count) ** -0.5)


@dataclass(frozen=True)
class Moments:
    """Adam's running means of the gradient and of its square.

    bfloat16 moments are rounded stochastically: β₂ = 0.999 changes the second moment by 0.1% per step, less than half
    of bfloat16's spacing (0.4 to 0.8%), so rounding to nearest would never change it. The random bits are a hash of
    (step, shard, element): they need no state, and are the same on every device.
    """

    first: Tensor
    second: Tensor
    updated: Tensor | None = None
    """`[F]` int32, Adam on touched rows only: the step at which each row was last updated."""


@dataclass(frozen=True)
class Quantized:
    """A dictionary in 8 bits or fewer; the layout is the backend's own."""

    weights: Tensor
    """int8."""
    scales_F: Tensor
    """float32, for each latent: the value of an int8 weight of 1."""
    start: Tensor | None = None
    """The initial values of sums of products, if inputs are unsigned."""


class Kernels(Protocol):
    """The hot operations of a TopK SAE, tied or untied."""

    __name__: str
    """The module's name."""

    def encode_topk(self, u_BD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """ReLU(TopK_k(u Wᵀ + b)), without the zeros.

        Args:
            u_BD: centred input rows.
            W_enc_FD: the encoder, one row per latent.
            b_latent_F: bias of each latent.
            k: how many latents to keep in each row, at most F.

        Returns:
            values_BK, not negative and descending in each row, and indices_BK (int64). A value is 0 where the
            pre-activation was not positive: the ReLU comes after the top-k, so fewer than k may be active.
        """

    def quantize(self, W_enc_FD: Tensor, into: Quantized | None = None) -> Quantized:
        """An encoder in 8 bits.

        Args:
            into: an earlier result for an encoder of the same shape, to overwrite.
        """

    def encode_candidates(self, u_BD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor, quantized: Quantized, k: int,
                          margin: int) -> tuple[Tensor, Tensor]:
        """The same as `encode_topk` if the top k + margin of the product in 8 bits contain the top k.

        The rows are quantised too, each with its own scale. The exact scores of the candidates decide which k of them
        are returned, and are the values.

        Args:
            quantized: the current `W_enc_FD`, quantised.
            margin: how many candidates beyond k, 0 or more.
        """

    def rows_at_once(self, d_sae: int) -> int:
        """Rows of one chunk of `encode_topk`: no larger `[rows, F]` tensor is ever made."""

    def workspace_bytes(self, rows: int, d_model: int, d_sae: int, places: int, margin: int | None = None) -> int:
        """The most bytes that one of these functions holds at a time in a training step with float32 parameters, beside
        its arguments and its result. What a library keeps for itself is unknown, and not counted.

        Args:
            rows: rows of a batch.
            places: places in a row's codes, those of all losses together.
            margin: the margin of `encode_candidates`; None if candidates are not used.
        """

    def product(self, u_CD: Tensor, W_enc_FD: Tensor, b_latent_F: Tensor) -> Tensor:
        """The one dense product, u Wᵀ + b, `[C, F]`, of a chunk."""

    def decode(self, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
        """Σ_k values · W[indices], `[B, D]`: the rows of the decoder, weighted and summed."""

    def residual(self, x_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, b_pre_D: Tensor,
                 mean_B1: Tensor | None, std_B1: Tensor | None) -> Residual:
        """Decode, compare with the rows, and compute the gradient of the codes: `decode`, `error` and `code_gradient`
        in one pass,

            loss_B, e_BD = error(x_BD, decode(values_BK, indices_BK, W_dec_FD) + b_pre_D, len(x_BD), mean_B1, std_B1)
            dz_BK = code_gradient(e_BD, values_BK, indices_BK, W_dec_FD)

        up to rounding: sums may be taken in another order.

        Args:
            x_BD: the rows in raw space, in the parameters' dtype.
            mean_B1: with std_B1, what a layer norm removed from the rows (None: nothing).
        """

    def error(self, x_BD: Tensor, xhat_BD: Tensor, rows: int, mean_B1: Tensor | None,
              std_B1: Tensor | None) -> tuple[Tensor, Tensor]:
        """The error of a reconstruction that was made elsewhere: as the sum of several parts, or for another site.

        Args:
            x_BD: the target rows, in raw space, in the parameters' dtype.
            xhat_BD: their reconstruction, biases included, before a layer norm is undone; it is not changed.
            rows: over how many rows the loss is a mean: B, or more if these rows are part of a batch.
            mean_B1: with std_B1, what the layer norm removed from the rows (None: nothing).

        Returns:
            loss_B (float64) and e_BD, as `Residual` has them.
        """

    def code_gradient(self, e_BD: Tensor, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
        """dL/dz `[B, K]` of active latents, e · W_j, from e = dL/d(z W); 0 where the value is 0.

        Args:
            values_BK: they only say which places are active: all that are not 0, NaN included, so that a fault is seen.
            indices_BK: row numbers in W_dec_FD, which may be a part of a dictionary.
        """

    def sort_pairs(self, values_BK: Tensor, dz_BK: Tensor, indices_BK: Tensor, d_sae: int,
                   rows_P: Tensor | None = None) -> SortedPairs:
        """Sort active pairs by latent; stable, so that sums are always taken in the same order. A pair is active if its
        value is not 0.

        Args:
            rows_P: int32, the row of each pair, ascending; then the other tensors are `[P]` too. None: they are
                `[B, K]`, with one row per batch row.
        """

    def update_tied(self, W_FD: Tensor, moments: Moments, pairs: SortedPairs, e_BD: Tensor, u_BD: Tensor,
                    adam: AdamStep) -> tuple[Tensor, Tensor]:
        """One step of tied rows, in place: gradient, projection, Adam, unit norm.

        The gradient of row j is Σ_b z_bj e_b + dz_bj u_b (the first term is the decoder's, the second the encoder's;
        W is both), minus its component along the row, which the renormalisation would undo.

        Args:
            moments: the moments of W; updated in place. With `updated`, only rows that have a pair are touched; their
                moments first decay by the number of steps that passed, so the only part of Adam that such a row misses
                is to drift with its momentum while it has no gradient.
            e_BD: `Residual.e_BD`.
            u_BD: centred input rows, as given to `encode_topk`.

        Returns:
            The gradient of the latents' bias, Σ_b dz_bj `[F]`; and Σ_j of it times W_j before the step, `[D]`, which
            the encoder's −b_pre subtracts from the gradient of b_pre.
        """

    def update_encoder(self, W_enc_FD: Tensor, moments: Moments, pairs: SortedPairs, u_BD: Tensor,
                       adam: AdamStep) -> tuple[Tensor, Tensor]:
        """One step of an untied encoder's rows, in place: gradient Σ_b dz_bj u_b, Adam; else like `update_tied`."""

    def update_decoder(self, W_dec_FD: Tensor, moments: Moments, pairs: SortedPairs, e_BD: Tensor,
                       adam: AdamStep) -> None:
        """One step of an untied decoder's rows, in place: gradient Σ_b z_bj e_b, projection, Adam, unit norm.
        Otherwise like `update_tied`."""
