"""The principal axes of a site's rows, along which Adam may scale its steps (`train.axes: principal`).

Adam divides each entry of a gradient by the root of its mean square, and the entries depend on the choice of axes. Rows
of a language model vary far more along some directions than along others, and every channel is a mixture of directions.
So along channels, the directions of large variance determine the size of all steps, and the directions of small
variance are learned slowly. Along the principal axes, each direction has its own scale. SOAP (Vyas et al. 2024,
arXiv:2409.11321) does this for one side of a matrix; here the axes are computed once, from the rows instead of from the
gradients.

So training rotates the rows (train/ends.py), which changes neither losses nor codes. `fold_axes` of sae/axes.py gives
the weights for unrotated rows. Along axes with almost no variance, Adam's steps are noise, so training is worse on rows
that fill only a few dimensions.

Shapes: N rows, D width of the site.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from olmoscope.activations.stream.rounds import Rounds
from olmoscope.sae.sinks import Sinks
from olmoscope.site import Site

SAMPLE = 2**14
"""Rows of a site from which its axes are found; more if the site is wide (`PER_CHANNEL`)."""
PER_CHANNEL = 4


def axes_at(rounds: Rounds, site: Site, sinks: Sinks | None) -> Tensor:
    """The principal axes of a site, for an SAE that is about to be trained, `[D, D]` float32; see `principal_axes`.

    Args:
        sinks: the sinks to remove from the rows first; None if there are none.

    Raises:
        UserError: the rounds cannot be read.
    """
    rows_ND = rounds.sample(site, max(SAMPLE, PER_CHANNEL * rounds.manifest.width(site)))
    return principal_axes(rows_ND if sinks is None else sinks.split(rows_ND)[1])


def principal_axes(x_ND: Tensor) -> Tensor:
    """An orthogonal matrix whose columns are the principal axes of some rows, `[D, D]`, float32. It is the same with
    any number of threads, bit for bit."""
    with _one_thread():
        axes_DD: Tensor = torch.linalg.eigh(torch.cov(x_ND.double().T))[1]
    return axes_DD.float().contiguous()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread. The number of threads changes the last bits of sums, and each of several ranks has fewer
    threads than a single process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
