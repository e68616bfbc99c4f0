"""Sequences of one segment, grouped into batches of nearly equal length."""

import numpy as np


def plan_batches(lengths: np.ndarray, batch_tokens: int, max_padding: float) -> list[np.ndarray]:
    """Group sequences, longest first, so that no batch has more padding than allowed.

    Padding of a batch = 1 − tokens / (sequences × longest). A batch of one has none, so the bound always holds.

    Args:
        lengths: `[S]` tokens of each sequence.
        batch_tokens: the upper bound of sequences × longest.
        max_padding: the upper bound of each batch's padding.

    Returns:
        The sequences of each batch, as indices into `lengths`.
    """
    batches: list[np.ndarray] = []
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        sizes = np.arange(1, len(order) + 1) * lengths[order[0]]
        fits = (sizes <= batch_tokens) & (1 - np.cumsum(lengths[order]) / sizes <= max_padding)
        size = max(1, len(fits) if fits.all() else int(np.argmin(fits)))
        batches.append(order[:size])
        order = order[size:]
    return batches
