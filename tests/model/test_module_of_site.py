"""The module that a site is at, by its path in the whole model: a hook there sees what is collected."""

import pytest
import torch

from helpers import save_tokenizer
from olmoscope.model.capture import read_sites
from olmoscope.model.load import load_model
from olmoscope.recipe.schema import Model
from olmoscope.site import EMBED, Site
from site_models import TOKENS_BT, causal_lm, parts_of


@pytest.mark.parametrize("family", ["olmo3", "llama", "gemma2", "granite", "gpt2", "gpt_neox", "bloom"])
def test_a_hook_at_the_path_sees_the_site(family, tmp_path):
    whole = causal_lm(family).module
    whole.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    sites = sorted([EMBED, *(Site(layer, part) for layer in (0, 2) for part in parts_of(family))])
    loaded = load_model(Model(name=str(tmp_path), dtype="float32"), sites, torch.device("cpu"))
    wanted = read_sites(loaded.module, list(loaded.sites.places.values()), TOKENS_BT)
    found, handles = {}, []

    def hook(site, module):
        def keep(_, arguments, settings, output=None):
            rows = output if module.end == "output" else arguments[0] if arguments else settings["hidden_states"]
            rows = rows[0] if isinstance(rows, tuple) else rows
            found[site] = module.scale * rows.clone()
        return keep

    for site in sites:
        module = loaded.module_of(site)
        place = whole.get_submodule(module.path)
        assert module.path.startswith(f"{loaded.layers_path}.{max(site.layer, 0)}")
        register = place.register_forward_hook if module.end == "output" else place.register_forward_pre_hook
        handles.append(register(hook(site, module), with_kwargs=True))
    with torch.no_grad():
        whole(input_ids=TOKENS_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    for site in sites:
        torch.testing.assert_close(found[site].reshape(wanted[site].shape), wanted[site], msg=f"{family} {site}")
