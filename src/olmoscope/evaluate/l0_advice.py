"""Whether the settings of a study have too few or too many active latents, judged by their dictionaries.

If L0 is too small, an SAE mixes features that occur together into one latent; if it is too large, the SAE finds other
mixtures. In both cases its decoder directions are more alike than they need be. So c, the mean |cosine| of pairs of
them, is smallest near the right L0 (c_dec of Chanin & Garriga-Alonso 2025, arXiv:2508.16560). The paper shows this on
toy models; on language models it shows that the minimum is near the best sparse probing. In our toy model (see the
test) c reveals an L0 that is too small, but not one that is too large.

The comparison needs three or more settings of one site that differ only in k. The seeds give the uncertainty: a setting
whose c is within two standard deviations of the smallest cannot be distinguished from it.
"""

import json
import math
from collections.abc import Sequence

from olmoscope.evaluate.figures import DECODER_COSINE, L0
from olmoscope.evaluate.study import Setting

K = "sae.k"
FEWEST = 3
"""Fewest settings that can show a minimum."""


def l0_advice(settings: Sequence[Setting]) -> list[str]:
    """One or two sentences for each site and kind of SAE for which a study has at least FEWEST values of k."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        others = {key: value for key, value in setting.varies.items() if key != K}
        groups.setdefault(json.dumps([str(setting.site), others], sort_keys=True), []).append(setting)
    return [said for group in groups.values() if len(group) >= FEWEST and (said := _advice(group)) is not None]


def _advice(group: list[Setting]) -> str | None:
    known = [(l0, c, setting.figures[DECODER_COSINE.key].sd) for setting in group
             if (l0 := setting.figures[L0.key].mean) is not None
             and (c := setting.figures[DECODER_COSINE.key].mean) is not None]
    if len(known) < len(group):
        return None
    known.sort()
    spreads = [sd for _, _, sd in known if sd is not None]
    sd = math.sqrt(sum(one * one for one in spreads) / len(spreads)) if spreads else None
    best = min(range(len(known)), key=lambda number: known[number][1])
    near = [l0 for l0, c, _ in known if c <= known[best][1] + 2 * (sd or 0.0)]
    listed = ", ".join(f"{c:.4f} at L0 {l0:.3g}" for l0, c, _ in known)
    sure = ("one seed each, so the uncertainty is unknown" if sd is None
            else f"±{sd:.4f} over seeds, so L0 {near[0]:.3g} to {near[-1]:.3g} cannot be told apart" if len(near) > 1
            else f"±{sd:.4f} over seeds")
    if best == len(known) - 1:
        says = f"falls up to the largest L0 tried ({known[best][0]:.3g}): k may be too low, try a larger one"
    elif best == 0:
        says = f"is smallest at the smallest L0 tried ({known[best][0]:.3g}): k may be too high, try a smaller one"
    else:
        says = f"is smallest at L0 {known[best][0]:.3g}: fewer active latents may mix features, and so may more"
    return (f"{_common(group)}: the mean |cosine| of decoder directions {says}. It is {listed} ({sure}; "
            "arXiv:2508.16560).")


def _common(group: list[Setting]) -> str:
    """The site, and the other settings that the group has in common."""
    others = [str(value) for key, value in group[0].varies.items() if key not in (K, "sae.layer", "sae.site") and value]
    return ", ".join([str(group[0].site), *others])
