"""Sorting on the CPU: firings by latent, then by place; and merging of the sorted firings.

Shapes: R rows of a segment, P firings, F latents, G segments, C latents of a part.
"""

from numba import prange

from olmoscope.kernels.compile import compiled


@compiled()
def sort_firings(starts_R1, latents_P, values_P, row_at_T, first_place, offsets_F1, places_P, sorted_P):
    """Counting sort of a segment's firings; it is stable, so each latent's firings are in the order of places.

    Args:
        starts_R1: the firings of encoded row r are `starts_R1[r]` to `starts_R1[r + 1]`.
        row_at_T: the encoded row at each place of the segment; -1 if the filter left it out.
        first_place: the segment's first place in the corpus.
        offsets_F1: zeros; filled with the offsets at which each latent's firings start.
        places_P, sorted_P: filled with the sorted places and values.
    """
    latents = len(offsets_F1) - 1
    for latent in latents_P:
        offsets_F1[latent + 1] += 1
    for latent in range(latents):
        offsets_F1[latent + 1] += offsets_F1[latent]
    following = offsets_F1[:-1].copy()
    for local in range(len(row_at_T)):
        row = row_at_T[local]
        if row < 0:
            continue
        for firing in range(starts_R1[row], starts_R1[row + 1]):
            latent = latents_P[firing]
            at = following[latent]
            following[latent] = at + 1
            places_P[at] = first_place + local
            sorted_P[at] = values_P[firing]


@compiled(parallel=True)
def merge_firings(begins_G, offsets_GC1, places_Q, values_Q, starts_C1, places_P, values_P):
    """Join the firings of some latents from all segments: latent by latent, with the segments in their order.

    Args:
        begins_G: where each segment's firings of these latents begin in `places_Q`, `values_Q`.
        offsets_GC1: for each segment, where each latent's firings start, relative to that beginning.
        starts_C1: where each latent's firings start in the result.
        places_P, values_P: filled with the result.
    """
    for latent in prange(len(starts_C1) - 1):
        _merge_latent(latent, begins_G, offsets_GC1, places_Q, values_Q, starts_C1[latent], places_P, values_P)


@compiled()
def _merge_latent(latent, begins_G, offsets_GC1, places_Q, values_Q, at, places_P, values_P):
    for run in range(len(begins_G)):
        for firing in range(begins_G[run] + offsets_GC1[run, latent], begins_G[run] + offsets_GC1[run, latent + 1]):
            places_P[at] = places_Q[firing]
            values_P[at] = values_Q[firing]
            at += 1


@compiled()
def transpose(starts_R1, latents_P, offsets_F1, rows_P):
    """The rows on which each latent fires, from the latents of each row.

    Args:
        offsets_F1: zeros; filled with the offsets at which each latent's rows start in `rows_P`, which is filled with
            ascending rows.
    """
    for latent in latents_P:
        offsets_F1[latent + 1] += 1
    for latent in range(len(offsets_F1) - 1):
        offsets_F1[latent + 1] += offsets_F1[latent]
    following = offsets_F1[:-1].copy()
    for row in range(len(starts_R1) - 1):
        for firing in range(starts_R1[row], starts_R1[row + 1]):
            latent = latents_P[firing]
            rows_P[following[latent]] = row
            following[latent] += 1
