"""Feature absorption in first letters: a letter's latents stay silent on some words, whose own latents carry the
letter.

Definition: SAEBench (arXiv 2503.09532), after arXiv 2409.14507. A ground-truth probe gives the direction p of a letter.
The letter's latents are those that a k-sparse probe needs. A word that starts with the letter and that the probe
recognises is absorbed to the extent that other latents carry its projection on p. Shapes: N words, F latents, K places
of a code, L letters, D width.
"""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from olmoscope.evaluate import bootstrap
from olmoscope.evaluate.behaviour_results import Absorption, LetterAbsorption
from olmoscope.evaluate.first_letter import LETTERS, Task
from olmoscope.evaluate.logistic import Probe, fit
from olmoscope.evaluate.probing import values_of
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.io.opened import Opened

METHOD = 1
"""Incremented when the same SAE would get different figures."""
PROBE_DECAY = 1e-4
"""Weight of ‖w‖²/2 beside the mean loss of a ground-truth probe."""
SPARSE_DECAY, STEPS, RATES = 0.01, 500, (1e-2, 1e-5)
"""The probe that ranks a letter's latents: weight of ‖w‖₁ beside its mean loss; Adam's steps, first and last rate."""
MOST_LATENTS, JUMP = 10, 0.03
"""A letter's latents: the best ones, added as long as each raises the F1 of the probe that reads them by over 0.03; at
most 10."""
PROBE_F1, LEAST_LETTERS = 0.6, 20
"""A letter counts if its ground-truth probe has a higher F1; with fewer letters there is no figure."""
SILENT = 1e-8
ALIGNED_FULL, ALIGNED, SHARE, ABSORBING = 0.025, 0.1, 0.4, 3
"""The least cosine with p at which a latent can absorb (fully; in part), and the share of a word's projection that it
(or the ABSORBING largest) must carry."""


def absorption_identity(subject: Opened, reader: str) -> str:
    """What the figures depend on.

    Args:
        reader: identifies the model and how it reads texts.
    """
    parts = [METHOD, subject.identity, *map(str, subject.reads), reader]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def truth_probes(x_ND: Tensor, task: Task) -> list[Probe | None]:
    """A probe for each letter, trained on the rows of the task's words with balanced classes; None for a letter with
    which no training word begins."""
    letter_M = _letters(task, x_ND.device)[: task.train]
    probes: list[Probe | None] = []
    for letter in range(len(LETTERS)):
        y_M = letter_M == letter
        others = int((~y_M).sum())
        probes.append(fit(x_ND[: task.train], y_M, 2 * others / (PROBE_DECAY * task.train**2), balanced=True)
                      if 0 < others < task.train else None)
    return probes


def _letters(task: Task, device: torch.device) -> Tensor:
    return torch.tensor([word.letter for word in task.words], device=device)


def measure_absorption(sae: SparseCoder, x_ND: Tensor, task: Task, probes: Sequence[Probe | None],
                       identity: str) -> Absorption:
    """Absorption of an SAE.

    Args:
        x_ND: rows of the task's words.
        probes: `truth_probes` of these rows.
    """
    letter_N = _letters(task, x_ND.device)
    codes = sae.encode(x_ND)
    rank_LF = latents_by_letter(codes, letter_N, task.train)
    letters = [_letter(number, sae, x_ND, codes, letter_N == number, task.train, probe, rank_LF[number])
               for number, probe in enumerate(probes)]
    counted = [(one.fraction, one.full, len(one.split)) for one in letters
               if one.fraction is not None and one.full is not None]
    figures = ("fraction", "full", "latents")
    if len(counted) < LEAST_LETTERS:
        return Absorption(identity=identity, words=len(task.words), left_out=task.left_out, letters=letters,
                          counted=len(counted), **dict.fromkeys(figures), intervals={})
    table_GQ = torch.tensor([[1.0, *each] for each in counted], dtype=torch.float64)
    means = dict(zip(figures, (table_GQ.sum(0) / len(counted)).tolist()[1:], strict=True))
    intervals = bootstrap.intervals(table_GQ, ("letters", *figures),
                                    lambda sums: {name: sums[name] / sums["letters"] for name in figures})
    return Absorption(identity=identity, words=len(task.words), left_out=task.left_out, letters=letters,
                      counted=len(counted), **means, intervals=intervals)


def latents_by_letter(codes: SparseCodes, letter_N: Tensor, train: int) -> Tensor:
    """Latents `[L, F]` ranked by the weight that an L1-penalised probe for each letter gives them, largest first."""
    values_NK, indices_NK = codes.values[:train].float(), codes.indices[:train]
    rows_NK = torch.arange(train, device=values_NK.device)[:, None].expand_as(indices_NK)
    z_NF = torch.sparse_coo_tensor(torch.stack([rows_NK.flatten(), indices_NK.flatten()]), values_NK.flatten(),
                                   (train, codes.d_sae), check_invariants=False).coalesce()
    y_NL = torch.nn.functional.one_hot(letter_N[:train], len(LETTERS)).float()
    positive_L = y_NL.sum(0)
    weight_L = (train - positive_L) / positive_L.clamp_min(1)
    W_FL = torch.zeros(codes.d_sae, len(LETTERS), device=values_NK.device, requires_grad=True)
    b_L = torch.zeros(len(LETTERS), device=values_NK.device, requires_grad=True)
    optimizer = torch.optim.Adam([W_FL, b_L], lr=RATES[0])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (RATES[1] / RATES[0]) ** (1 / STEPS))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.sparse.mm(z_NF, W_FL) + b_L, y_NL,
                                                                    pos_weight=weight_L)
        torch.autograd.backward(loss + SPARSE_DECAY * W_FL.abs().sum(0).mean())
        optimizer.step()
        schedule.step()
    return W_FL.detach().T.argsort(dim=1, descending=True, stable=True)


def _letter(number: int, sae: SparseCoder, x_ND: Tensor, codes: SparseCodes, y_N: Tensor, train: int,
            probe: Probe | None, rank_F: Tensor) -> LetterAbsorption:
    if probe is None:
        return LetterAbsorption(letter=LETTERS[number], words=int(y_N.sum()), probe_f1=None, recognised=0, split=[],
                                fraction=None, full=None)
    score_N = probe(x_ND[train:])
    probe_f1 = f1(score_N, y_N[train:])
    recognised = train + torch.nonzero(y_N[train:] & (score_N > 0)).flatten()
    known = probe_f1 is not None and probe_f1 > PROBE_F1 and len(recognised) > 0
    split = split_latents(codes, rank_F, y_N, train) if known else []
    fraction_R, full_R = absorbed(sae, x_ND[recognised], _rows(codes, recognised), probe.w_P, split)
    return LetterAbsorption(letter=LETTERS[number], words=int(y_N.sum()), probe_f1=probe_f1, recognised=len(recognised),
                            split=split, fraction=float(fraction_R.mean()) if known else None,
                            full=float(full_R.double().mean()) if known else None)


def f1(score_N: Tensor, y_N: Tensor) -> float | None:
    """2 · true positives / (positives + predicted positives); None if there are neither."""
    taken_N = score_N > 0
    either = int(taken_N.sum()) + int(y_N.sum())
    return 2 * int((taken_N & y_N).sum()) / either if either else None


def split_latents(codes: SparseCodes, rank_F: Tensor, y_N: Tensor, train: int) -> list[int]:
    """The latents that represent a class: the first, and further ones as long as each raises F1 by enough."""
    best, kept = -1.0, 0
    z_NK = values_of(codes, rank_F[:MOST_LATENTS])
    for k in range(1, MOST_LATENTS + 1):
        probe = fit(z_NK[:train, :k], y_N[:train], 1.0, balanced=True)
        found = f1(probe(z_NK[train:, :k]), y_N[train:])
        if found is None or found <= best + JUMP:
            break
        best, kept = found, k
    return [int(latent) for latent in rank_F[:kept]]


def absorbed(sae: SparseCoder, x_RD: Tensor, codes: SparseCodes, direction_D: Tensor,
             split: Sequence[int]) -> tuple[Tensor, Tensor]:
    """How far each word is absorbed, 0 to 1, and which are fully absorbed: by one latent while the letter's are silent.

    Args:
        codes: of these rows.
        direction_D: of the letter's probe.
        split: the letter's latents.

    Returns:
        fraction_R float64, full_R bool.
    """
    p_D = direction_D.double() / direction_D.double().norm()
    projection_R = x_RD.double() @ p_D
    along_F = sae.W_dec.double() @ p_D
    cosine_F = along_F / sae.W_dec.double().norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    part_RK = codes.values.double() * along_F[codes.indices]
    if codes._statistics is not None:  # from the units of the normalised row to those of the row itself
        part_RK = part_RK * codes._statistics.std_B1.double()
    cosine_RK = cosine_F[codes.indices]
    main_RK = torch.isin(codes.indices, torch.tensor(list(split), device=codes.indices.device))
    main_R = (part_RK * main_RK).sum(1)
    candidate_RK = torch.where(~main_RK & (cosine_RK >= ALIGNED) & (part_RK > 0), part_RK, 0)
    others_R = candidate_RK.topk(min(ABSORBING, candidate_RK.shape[1]), dim=1).values.sum(1)
    none_R = (main_R >= projection_R) | (others_R / projection_R < SHARE)
    taken_R = torch.minimum(others_R, projection_R - main_R)
    fraction_R = torch.where(main_R <= 0, 1.0, (taken_R / (taken_R + main_R)).clamp(0, 1))
    top_R1 = part_RK.argmax(1, keepdim=True)
    largest_R, aligned_R = part_RK.gather(1, top_R1)[:, 0], cosine_RK.gather(1, top_R1)[:, 0] >= ALIGNED_FULL
    silent_R = ((codes.values * main_RK) < SILENT).all(1)
    full_R = silent_R & aligned_R & (projection_R > 0) & (largest_R >= SHARE * projection_R)
    return torch.where(none_R, 0.0, fraction_R), full_R


def _rows(codes: SparseCodes, rows_R: Tensor) -> SparseCodes:
    statistics = codes._statistics
    return SparseCodes(codes.values[rows_R], codes.indices[rows_R], codes.d_sae, None if statistics is None else type(
        statistics)(statistics.mean_B1[rows_R], statistics.std_B1[rows_R]))
