"""Counts, examples and preferences from a feature's firings, on a CPU: feature by feature, in one pass.

Shapes: C features of a part, P firings, T places, V vocabulary, X sources, L bins of positions, H bins of the
histogram, I intervals, A candidates kept.

A *score* n · ln(lift) orders preferred tokens and companions: they were seen together n times, which is lift times as
often as by chance. (It is the main term of the log-likelihood ratio; lift alone would prefer what was seen once.)
"""

import math

import numpy as np
from numba import prange

from olmoscope.kernels.compile import compiled

_NEVER = np.uint64(0xFFFFFFFFFFFFFFFF)


@compiled(parallel=True)
def count_features(pieces, first_feature, seed, offsets_C1, places_P, values_P, facts_T4, rows_V, rows, lowest_exponent,
                   max_C, sum_C, histogram_CH, interval_rows_CI, sources_CX, positions_CL, top_CA, interval_CIA,
                   random_CA, token_CA, token_rows_CA, token_lift_CA, token_mean_CA):
    """Fill all counts; examples are numbers of the feature's firings, or -1 if there are no more.

    Args:
        pieces: bounds of the pieces of work, in features.
        facts_T4: for each place its token, passage, bin of position, and source: side by side, so that a firing costs
            one access to memory.
        rows_V: rows of each token; `rows` in total.
        lowest_exponent: biased exponent of the histogram's first octave.
    """
    for piece in prange(len(pieces) - 1):
        _count_piece(pieces[piece], pieces[piece + 1], first_feature, seed, offsets_C1, places_P, values_P, facts_T4,
                     rows_V, rows, lowest_exponent, max_C, sum_C, histogram_CH, interval_rows_CI, sources_CX,
                     positions_CL, top_CA, interval_CIA, random_CA, token_CA, token_rows_CA, token_lift_CA,
                     token_mean_CA)


@compiled()
def _count_piece(first, stop, first_feature, seed, offsets_C1, places_P, values_P, facts_T4, rows_V, rows,
                 lowest_exponent, max_C, sum_C, histogram_CH, interval_rows_CI, sources_CX, positions_CL, top_CA,
                 interval_CIA, random_CA, token_CA, token_rows_CA, token_lift_CA, token_mean_CA):
    longest = 0
    for feature in range(first, stop):
        longest = max(longest, offsets_C1[feature + 1] - offsets_C1[feature])
    peaks = np.empty(longest, np.int32)
    token_rows = np.zeros(len(rows_V), np.int32)
    token_sums = np.zeros(len(rows_V), np.float64)
    touched = np.empty(min(longest, len(rows_V)), np.int32)
    keys = np.empty(max(top_CA.shape[1], token_CA.shape[1]), np.float64)
    hashes = np.empty(random_CA.shape[1], np.uint64)
    drawn_IA = np.empty(interval_CIA.shape[1:], np.uint64)
    for feature in range(first, stop):
        start, end = offsets_C1[feature], offsets_C1[feature + 1]
        places, values = places_P[start:end], values_P[start:end]
        if len(places) == 0:
            continue
        state = _mix(np.uint64(seed) ^ _mix(np.uint64(first_feature + feature)))
        _figures(values, lowest_exponent, feature, max_C, sum_C, histogram_CH, interval_rows_CI)
        found, tokens = _sweep(places, values, facts_T4, sources_CX[feature], positions_CL[feature], peaks, token_rows,
                               token_sums, touched)
        _strongest(values, peaks[:found], keys, top_CA[feature])
        _draw(places, values, max_C[feature], state, hashes, drawn_IA, interval_CIA[feature], random_CA[feature])
        _prefer(touched[:tokens], token_rows, token_sums, rows_V, len(places), rows, keys, token_CA[feature],
                token_rows_CA[feature], token_lift_CA[feature], token_mean_CA[feature])


@compiled()
def _figures(values, lowest_exponent, feature, max_C, sum_C, histogram_CH, interval_rows_CI):
    """The largest activation and the sum; rows by logarithmic bin and by interval."""
    largest = np.float32(0)
    total = 0.0
    for value in values:
        largest = max(largest, value)
        total += value
    max_C[feature], sum_C[feature] = largest, total
    bins = histogram_CH.shape[1]
    intervals = interval_rows_CI.shape[1]
    bits = values.view(np.int32)
    for firing in range(len(values)):
        fraction = bits[firing] & 0x7FFFFF
        quarter = int(fraction >= 0x1837F0) + int(fraction >= 0x3504F3) + int(fraction >= 0x5744FD)
        place = 4 * ((bits[firing] >> 23) - lowest_exponent) + quarter
        histogram_CH[feature, min(max(place, 0), bins - 1)] += 1
        interval_rows_CI[feature, _interval(values[firing], largest, intervals)] += 1


@compiled()
def _interval(value, largest, intervals):
    """Interval i holds i · largest / intervals < value <= (i + 1) · largest / intervals."""
    return min(max(math.ceil(np.float64(value) * intervals / np.float64(largest)) - 1, 0), intervals - 1)


@compiled()
def _sweep(places, values, facts_T4, sources, positions, peaks, token_rows, token_sums, touched):
    """Count tokens, sources and positions; find the strongest firing of each passage, the first among equals.

    Returns how many passages and how many different tokens there are.
    """
    found = tokens = 0
    passage = -1
    for firing in range(len(places)):
        facts = facts_T4[places[firing]]
        token = facts[0]
        if token_rows[token] == 0:
            touched[tokens] = token
            tokens += 1
        token_rows[token] += 1
        token_sums[token] += values[firing]
        positions[facts[2]] += 1
        sources[facts[3]] += 1
        if facts[1] != passage:
            passage = facts[1]
            peaks[found] = firing
            found += 1
        elif values[firing] > values[peaks[found - 1]]:
            peaks[found - 1] = firing
    return found, tokens


@compiled()
def _strongest(values, peaks, keys, chosen):
    """The firings with the largest values, largest first; the first among equals."""
    kept = 0
    for peak in peaks:
        kept = _insert(np.float64(values[peak]), peak, kept, keys, chosen)


@compiled()
def _draw(places, values, largest, state, hashes, drawn_IA, interval_IA, chosen):
    """Random samples without repetition: from all firings, those whose places have the lowest hashes; from each
    interval, those with the highest."""
    intervals = len(interval_IA)
    hashes[: len(chosen)] = _NEVER
    drawn_IA[:] = _NEVER
    for firing in range(len(places)):
        number = _mix(state ^ np.uint64(places[firing]))
        _keep_low(number, firing, hashes[: len(chosen)], chosen)
        interval = _interval(values[firing], largest, intervals)
        _keep_low(~number, firing, drawn_IA[interval], interval_IA[interval])
    _ascending(chosen)
    for interval in range(intervals):
        _ascending(interval_IA[interval])


@compiled()
def _keep_low(number, item, drawn, chosen):
    """Put an item into a list of the lowest numbers, ascending."""
    at = len(drawn) - 1
    if at < 0 or number >= drawn[at]:
        return
    while at > 0 and number < drawn[at - 1]:
        drawn[at], chosen[at] = drawn[at - 1], chosen[at - 1]
        at -= 1
    drawn[at], chosen[at] = number, item


@compiled()
def _ascending(chosen):
    """Sort what is chosen; -1, for nothing, stays at the end."""
    count = 0
    while count < len(chosen) and chosen[count] >= 0:
        count += 1
    chosen[:count].sort()


@compiled()
def _mix(number):
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of the result depends on every bit."""
    number = np.uint64(number) + np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


@compiled()
def _prefer(touched, token_rows, token_sums, rows_V, fired, rows, keys, token, rows_A, lift_A, mean_A):
    """The tokens with the highest scores among those with lift over 1; this also resets the counters to zero."""
    kept = 0
    for one in touched:
        lift = np.float64(token_rows[one]) * rows / (np.float64(fired) * rows_V[one])
        if lift > 1:
            kept = _insert(token_rows[one] * math.log(lift), one, kept, keys, token)
    for place in range(kept):
        one = token[place]
        rows_A[place] = token_rows[one]
        lift_A[place] = np.float64(token_rows[one]) * rows / (np.float64(fired) * rows_V[one])
        mean_A[place] = token_sums[one] / token_rows[one]
    for one in touched:
        token_rows[one] = 0
        token_sums[one] = 0


@compiled(parallel=True)
def count_companions(pieces, first_feature, starts_R1, latents_P, offsets_F1, rows_P, companion_CA, rows_CA, lift_CA):
    """Which latents fire on the same rows of a sample: those with the highest scores, lift over 1, and at least two
    common rows.

    Args:
        pieces: bounds of the pieces of work, in features of this part.
        starts_R1, latents_P: the latents of each row, uint32 (a signed index costs a check for negative values).
        offsets_F1, rows_P: the rows of each latent, uint32.
    """
    for piece in prange(len(pieces) - 1):
        _companions_piece(pieces[piece], pieces[piece + 1], first_feature, starts_R1, latents_P, offsets_F1, rows_P,
                          companion_CA, rows_CA, lift_CA)


@compiled()
def _companions_piece(first, stop, first_feature, starts_R1, latents_P, offsets_F1, rows_P, companion_CA, rows_CA,
                      lift_CA):
    latents = len(offsets_F1) - 1
    weights = np.empty(latents, np.float64)
    for latent in range(latents):
        weights[latent] = np.float64(len(starts_R1) - 1) / max(1, offsets_F1[latent + 1] - offsets_F1[latent])
    together = np.zeros(latents, np.int32)
    touched = np.empty(latents, np.uint32)
    keys = np.empty(companion_CA.shape[1], np.float64)
    for feature in range(first, stop):
        own = first_feature + feature
        mine = rows_P[offsets_F1[own] : offsets_F1[own + 1]]
        chosen = companion_CA[feature]
        scale = 1.0 / max(1, len(mine))
        firings = 0
        for row in mine:
            firings += starts_R1[row + 1] - starts_R1[row]
        kept = 0
        if firings < latents // 4:
            count = _count_few(mine, starts_R1, latents_P, together, touched)
            together[own] = 0
            for other in touched[:count]:
                kept = _offer(other, together[other], weights[other] * scale, kept, keys, chosen)
        else:
            _count_many(mine, starts_R1, latents_P, together)
            together[own] = 0
            for other in range(latents):
                kept = _offer(other, together[other], weights[other] * scale, kept, keys, chosen)
        for place in range(kept):
            rows_CA[feature, place] = together[chosen[place]]
            lift_CA[feature, place] = together[chosen[place]] * (weights[chosen[place]] * scale)
        if firings < latents // 4:
            for other in touched[:count]:
                together[other] = 0
        else:
            together[:] = 0


@compiled()
def _count_few(mine, starts_R1, latents_P, together, touched):
    """Count the latents of some rows; return how many different ones are in `touched`."""
    count = 0
    for row in mine:
        for firing in range(starts_R1[row], starts_R1[row + 1]):
            other = latents_P[firing]
            if together[other] == 0:
                touched[count] = other
                count += 1
            together[other] += 1
    return count


@compiled()
def _count_many(mine, starts_R1, latents_P, together):
    """The same without the branch, which is hard to predict: cheaper if most latents occur."""
    for row in mine:
        for firing in range(starts_R1[row], starts_R1[row + 1]):
            together[latents_P[firing]] += 1


@compiled()
def _offer(other, both, weight, kept, keys, chosen):
    """Put a companion into the list if its score is high enough; return how many there are now.

    Args:
        weight: the lift is this times `both`.
    """
    excess = both * (both * weight - 1)  # an upper bound of the score, since ln(lift) < lift - 1, and cheap
    if both < 2 or excess <= 0 or (kept == len(keys) and (kept == 0 or excess < keys[kept - 1])):
        return kept
    return _insert(both * math.log(both * weight), other, kept, keys, chosen)


@compiled()
def _insert(key, item, kept, keys, chosen):
    """Put an item into a list with descending keys, for equal keys the lower item first; return how many there are."""
    size = len(chosen)
    if kept == size and (size == 0 or key < keys[size - 1] or (key == keys[size - 1] and item > chosen[size - 1])):
        return kept
    at = min(kept, size - 1)
    while at > 0 and (key > keys[at - 1] or (key == keys[at - 1] and item < chosen[at - 1])):
        keys[at], chosen[at] = keys[at - 1], chosen[at - 1]
        at -= 1
    keys[at], chosen[at] = key, item
    return min(kept + 1, size)
