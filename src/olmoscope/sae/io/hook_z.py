"""Attention SAEs by Connor Kissane and Rob Krzyzanowski: ReLU, on the heads of a layer side by side.

    NAME.pt          W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D]
    NAME_cfg.json    act_name (blocks.3.attn.hook_z), act_size, dict_size, model_name

b_dec is subtracted. Source: sae-lens 6.54.12, `connor_rob_hook_z_huggingface_loader`.
"""

from olmoscope.errors import UserError
from olmoscope.sae.io.assemble import opened
from olmoscope.sae.io.layout import Layout, holds, load, sizes
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading, site_from, stated
from olmoscope.sae.io.site_names import of_hook
from olmoscope.site import Site

NAME = "an attention SAE by Kissane and Krzyzanowski"
MARK = "NAME_cfg.json beside NAME.pt"
SEARCH: str | None = None

_LAYOUT: Layout = {"W_enc": ("W_enc", "DF"), "b_enc": ("b_enc", "F"), "W_dec": ("W_dec", "FD"), "b_dec": ("b_dec", "D")}


def detect(place: Place) -> bool:
    """Whether it is a torch file with these tensors, and its settings are beside it."""
    file = place.only(".pt")
    return file is not None and place.has(_config(file)) and holds(place, file, *_LAYOUT)


def look(place: Place, site: Site | None = None) -> Reading:
    """How it is read.

    Raises:
        UserError: tensors that do not fit together or to the settings, another site than `site`.
    """
    file = str(place.only(".pt"))
    config, found = place.mapping(_config(file)), sizes(place, file, _LAYOUT, NAME)
    for key, letter in (("act_size", "D"), ("dict_size", "F")):
        if config.get(key, found[letter]) != found[letter]:
            raise UserError(f"{place.where(file)}: {key} is {found[letter]}; {_config(file)} says {config[key]}: they "
                            "are not of one SAE; download both again")
    hook = config.get("act_name")
    said = None if hook is None else of_hook(str(hook))
    if hook is not None and said is None:
        raise UserError(f"{place.where(_config(file))}: act_name {hook!r} is not a known site")
    sites = site_from(place.where(), said and said[0], site)
    return Reading(
        NAME, "relu", found["D"], found["D"], found["F"], (file, _config(file)), sites, sites, config.get("model_name"),
        bos="yes", context_size=config.get("seq_len"), dtype=place.header(file).dtype, stated=stated(place),
        metadata=config)


def read(place: Place, site: Site | None = None) -> Opened:
    """Read it.

    Raises:
        UserError: as `look`; NaN; an unknown site.
    """
    reading = look(place, site)
    return opened(place, reading, load(place, reading.files[0], _LAYOUT))


def _config(file: str) -> str:
    return f"{file.removesuffix('.pt')}_cfg.json"
