"""Whether the settings of a study have too few active latents, or too many, as far as their dictionaries tell.

With too small an L0 an SAE mixes features that occur together in one latent, with too large an L0 it finds other
mixtures; in both cases its decoder directions are more alike than they need be. So c, the mean |cosine| of pairs of
them, is smallest near the right L0 (Chanin & Garriga-Alonso 2025, arXiv:2508.16560, whose c_dec it is). The paper shows
this on toy models, and that on language models the minimum is near the best sparse probing. In a toy model of ours
(the test) too small an L0 is seen, too large a one is not.

Compared are settings of one site that differ in k alone, three or more. The seeds say how sure it is: settings whose c
is within two standard deviations of the smallest cannot be told from it.
"""

import json
import math
from collections.abc import Sequence

from olmoscope.evaluate.figures import DECODER_COSINE, L0
from olmoscope.evaluate.study import Setting

K = "sae.k"
FEWEST = 3
"""Settings that it takes to see a minimum."""


def l0_advice(settings: Sequence[Setting]) -> list[str]:
    """A sentence or two for each site and kind of SAE of which a study has several k."""
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
    sure = ("one seed each, so how sure that is is not known" if sd is None
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
    """The site, and what the settings have in common."""
    others = [str(value) for key, value in group[0].varies.items() if key not in (K, "sae.layer", "sae.site") and value]
    return ", ".join([str(group[0].site), *others])
