"""Stability: how far SAEs that differ only in the seed of training have the same latents.

Two SAEs of one setting are compared by the directions of their latents. Paulo and Belrose (arXiv:2501.16615) match the
latents one to one by the assignment that maximises the sum of cosines, and call a latent shared if the cosine with its
match is over 0.7 in decoder and encoder. An assignment needs all F² cosines at once (69 GB for 131,072 latents) and
time that grows as F³, so here two latents match if each is the other's nearest. This is one to one as well, and it
needs only a chunk of the cosines at a time. It differs from the assignment only in the pairs that the assignment makes
of leftovers: latents whose nearest latent is taken. Hardly any of these pairs has a cosine over 0.7 (docs/metrics.md
says how many).

Shapes: D width, A and B latents of two SAEs, C latents of a chunk.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.files import read_json, write_json
from olmoscope.progress import nobody
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.directions import unit_directions

STABILITY = "stability.json"
FIGURES = ("matched_share", "matched_share_decoder", "mmcs")
"""The figures that `compare_latents` returns."""
SHARED = 0.7
"""The cosines of a shared latent are over this."""
_ELEMENTS_AT_ONCE = 2**25


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SeedPair(_Frozen):
    """The comparison of two runs of a setting."""

    runs: tuple[str, str]
    hashes: tuple[str, str]
    """The `run_hash` of each: a run that was trained again is compared again."""
    latents: tuple[int, int]
    """How many latents of each were compared: those alive at the end of training."""
    matched_share: FiniteFloat | None
    """None, like the other figures, if one of the two has no latent alive."""
    matched_share_decoder: FiniteFloat | None
    mmcs: FiniteFloat | None


class _File(_Frozen):
    format: Literal["olmoscope stability"] = "olmoscope stability"
    version: Literal[1] = 1
    pairs: list[SeedPair]


@torch.no_grad()
def compare_latents(first: SparseCoder, second: SparseCoder, alive_first: Tensor, alive_second: Tensor,
                    advance: Callable[[int], None] = nobody) -> dict[str, float | None]:
    """How far two dictionaries of the same width have the same latents.

    Args:
        alive_first, alive_second: bool `[d_sae]` each: which latents take part.
        advance: called with the number of latents of `first` in each finished chunk.

    Returns:
        `matched_share_decoder`: the share of latents, over both SAEs, whose match has a decoder cosine over 0.7.
        `matched_share`: the same, but the encoder cosine must be over 0.7 as well (with tied weights it is the same
            cosine). `mmcs`: the mean over latents, over both SAEs, of the largest cosine with a decoder direction of
            the other SAE (mean max cosine similarity, Cunningham et al., arXiv:2309.08600). All are None if a
            dictionary has no latent alive.
    """
    (decoder_AD, encoder_AD), (decoder_BD, encoder_BD) = (
        [unit_directions(W_FD[alive_F.to(W_FD.device)]) for W_FD in (sae.W_dec, sae.W_enc)]
        for sae, alive_F in ((first, alive_first), (second, alive_second)))
    if not len(decoder_AD) or not len(decoder_BD):
        return dict.fromkeys(FIGURES)
    cosine_A, match_A, cosine_B, match_B = _nearest(decoder_AD, decoder_BD, advance)
    matched_A = (match_B[match_A] == torch.arange(len(match_A), device=match_A.device)) & (cosine_A > SHARED)
    shared_A = matched_A & (torch.einsum("ad,ad->a", encoder_AD, encoder_BD[match_A]) > SHARED)
    latents = len(cosine_A) + len(cosine_B)
    return {"matched_share": 2 * int(shared_A.sum()) / latents,
            "matched_share_decoder": 2 * int(matched_A.sum()) / latents,
            "mmcs": float(cosine_A.double().sum() + cosine_B.double().sum()) / latents}


def _nearest(first_AD: Tensor, second_BD: Tensor, advance: Callable[[int], None]) -> tuple[Tensor, ...]:
    """For each row, the largest cosine with a row of the other matrix, and the index of that row (the first among
    equals); both directions in one pass over the cosines."""
    cosine_B = torch.full((len(second_BD),), -torch.inf, device=second_BD.device)
    match_B = torch.zeros(len(second_BD), dtype=torch.int64, device=second_BD.device)
    nearest_C, start = [], 0
    for chunk_CD in torch.split(first_AD, max(1, _ELEMENTS_AT_ONCE // len(second_BD))):
        cosines_CB = chunk_CD @ second_BD.T
        nearest_C.append(cosines_CB.max(dim=1))
        column = cosines_CB.max(dim=0)
        nearer_B = column.values > cosine_B
        match_B = torch.where(nearer_B, column.indices + start, match_B)
        cosine_B = torch.where(nearer_B, column.values, cosine_B)
        start += len(chunk_CD)
        advance(len(chunk_CD))
    cosine_A, match_A = (torch.cat(parts) for parts in zip(*nearest_C, strict=True))
    return cosine_A.clamp(-1, 1), match_A, cosine_B.clamp(-1, 1), match_B


def read_stability(out: Path, hashes: Mapping[str, str | None]) -> dict[frozenset[str], SeedPair]:
    """The pairs in an output folder's stability.json whose runs are still the same; none if there is no such file.

    Args:
        hashes: the `run_hash` of each run, by id.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    path = out / STABILITY
    if not path.exists():
        return {}
    try:
        pairs = _File.model_validate(read_json(path)).pairs
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; delete it and run `olmoscope "
                        f"evaluate {out} --stability` again") from error
    return {frozenset(pair.runs): pair for pair in pairs
            if all(hashes.get(run) == known for run, known in zip(pair.runs, pair.hashes, strict=True))}


def write_stability(out: Path, pairs: Iterable[SeedPair]) -> None:
    """Write stability.json, atomically."""
    write_json(out / STABILITY, _File(pairs=list(pairs)).model_dump(mode="json"))
