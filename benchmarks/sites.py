"""Which sites inside layers olmoscope finds in transformers' causal LM families, and whether they are right.

    python benchmarks/sites.py [--only llama,gpt2] [--json FILE]

In a small random model of each family (small_models.py), the script asks for every site of every layer separately. It
tests from outside whether each site that is found is what its name says: a change d at a site must move the stream by
d.

    attn.out + d    moves mid by d, or in a parallel layer the layer's output
    mlp.out + d     moves the layer's output by d
    mid + d         moves the layer's output, less mlp.out, by d
    attn.z          the projection maps it to attention's own output
    each site       replaced by itself changes no logit; by zeros it changes them

`wrong` must be 0. Shapes: T positions, D d_model, V vocabulary.
"""

import argparse
import gc
import json
import os
import signal
import sys
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from olmoscope.errors import UserError
from olmoscope.model.capture import captured, replaced
from olmoscope.model.layers import find_layers
from olmoscope.model.sites import Place
from olmoscope.model.splice import CausalLM, try_causal_lm
from olmoscope.site import PARTS, Site
from small_model_sizes import LEFT_OUT, MUST_REFUSE
from small_models import families, small_config

INNER = tuple(part for part in PARTS if part)
TOKENS = 24
CLOSE = 2e-4
"""Largest ‖difference‖ / ‖change‖ that counts as float32 rounding."""


@dataclass
class Found:
    """The result for a family."""

    given: dict[str, list[int]] = field(default_factory=dict)
    """The layers that have each part."""
    refused: dict[str, list[str]] = field(default_factory=dict)
    """The parts that layers lack, by the reason."""
    wrong: list[str] = field(default_factory=list)
    parallel: bool = False
    layers: int = 0

    @property
    def state(self) -> str:
        """`right`: all sites of all layers (parallel layers have no mid); `in part`, `refused`, `wrong`."""
        if self.wrong:
            return "wrong"
        wanted = [part for part in INNER if not (part == "mid" and self.parallel)]
        if self.given and all(len(self.given.get(part, [])) == self.layers for part in wanted):
            return "right"
        return "in part" if self.given else "refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="families, separated by commas")
    parser.add_argument("--json", type=Path, help="where all findings go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    names = arguments.only.split(",") if arguments.only else families()
    found = {}
    for name in (name for name in names if name not in LEFT_OUT):
        found[name] = look_at(name)
        show(name, found[name])
        gc.collect()
    if arguments.json:
        arguments.json.write_text(json.dumps({name: {"state": one.state, **asdict(one)} for name, one in found.items()},
                                             indent=1) + "\n")
    counts = Counter(one.state for one in found.values())
    print(f"transformers {transformers.__version__}:",
          ", ".join(f"{counts[state]} {state}" for state in ("right", "in part", "refused", "wrong")))
    sys.exit(1 if counts["wrong"] else 0)


def show(name: str, found: Found) -> None:
    print(f"{name}: {found.state}{', parallel' if found.parallel else ''}", flush=True)
    for line in found.wrong[:4]:
        print(f"    wrong: {line}")
    for reason, sites in found.refused.items():
        print(f"    {len(sites)} refused ({', '.join(sites[:3])}): {reason}", flush=True)


def look_at(family: str) -> Found:
    found = Found()
    try:
        model = make(family)
    except UserError as error:
        found.refused["the model: " + str(error)] = ["all"]
        return found
    except Exception as error:  # noqa: BLE001  (transformers cannot make or run it)
        found.wrong.append(f"the model itself: {line_of(error)}")
        return found
    signal.alarm(120)
    try:
        for site in [Site(layer, part) for layer in range(len(model.layers)) for part in INNER]:
            check_site(model, site, found)
    except Exception as error:  # noqa: BLE001  (any error is a finding)
        found.wrong.append(line_of(error))
    signal.alarm(0)
    return found


def line_of(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(where.filename).name}:{where.lineno})"


def make(family: str) -> CausalLM:
    """A random model whose attention and MLP outputs are as large as the stream."""
    torch.manual_seed(0)
    config = small_config(family)
    module = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1 and name.endswith(("weight", "bias")):  # norms without effect would hide faults
                parameter += 0.1 * torch.randn_like(parameter)
    if family in MUST_REFUSE:
        raise UserError(MUST_REFUSE[family])
    text = config.get_text_config()
    path, layers = find_layers(module, text.num_hidden_layers)
    return try_causal_lm(module, path, layers, family, "none", text.hidden_size,
                         module.get_input_embeddings().num_embeddings)


def check_site(model: CausalLM, site: Site, found: Found) -> None:
    """Ask for a site, and test it."""
    found.layers = len(model.layers)
    try:
        sites = model.find([site])
    except UserError as error:
        line = str(error)
        if "\n" in line:
            found.wrong.append(f"{site}: several lines: {line}")
        if "attention and MLP to the residual stream at once" in line:
            found.parallel = True
        reason = line.replace(f"layer {site.layer}", "layer L").replace(f"layers.{site.layer}", "layers.L")
        found.refused.setdefault(reason, []).append(str(site))
        return
    found.parallel |= sites.parallel
    found.given.setdefault(site.part, []).append(site.layer)
    place = sites.places[site]
    hooks = sum(count_hooks(model))
    for wrong in faults(model, place, sites.widths[site]):
        found.wrong.append(f"{site}: {wrong}")
    if sum(count_hooks(model)) != hooks:
        found.wrong.append(f"{site}: hooks stay behind")


def count_hooks(model: CausalLM) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.module.modules()]


def faults(model: CausalLM, place: Place, width: int) -> list[str]:
    """What is wrong with a site that was found."""
    site, layer = place.site, place.site.layer
    ids_1T = torch.randint(10, 2000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    stream = Place(Site(layer), "output", model.layers[layer])
    beside = [stream]
    for part in ("mid", "mlp.out"):
        try:
            beside.append(model.find([Site(layer, part)]).places[Site(layer, part)])
        except UserError:
            continue
    def run(change=None, at=place):
        with torch.no_grad(), captured([*beside, place]) as at_sites:
            if change is None:
                logits = model.module(input_ids=ids_1T, use_cache=False).logits
            else:
                with replaced(at, change):
                    logits = model.module(input_ids=ids_1T, use_cache=False).logits
        return dict(at_sites), logits

    clean, logits = run()
    wrong = []
    x_BTD = clean[site]
    if x_BTD.shape != (1, TOKENS, width):
        wrong.append(f"gives {list(x_BTD.shape)}, not [1, {TOKENS}, {width}]")
        return wrong
    _, same_logits = run(lambda x: x)
    if not torch.equal(same_logits, logits):
        wrong.append(f"replaced by itself changes logits by {float((same_logits - logits).abs().max()):.3g}")
    _, zero_logits = run(torch.zeros_like)
    if torch.equal(zero_logits, logits):
        wrong.append("replaced by zeros changes no logit")
    d_1TD = torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(2)) * x_BTD.norm() / x_BTD.numel() ** 0.5
    moved, _ = run(lambda x: x + d_1TD)

    def off(name: str, change: Tensor) -> None:
        size = float((change - d_1TD).norm() / d_1TD.norm())
        if not size < CLOSE:
            wrong.append(f"moves {name} by something else ({size:.2g})")

    mid, mlp = Site(layer, "mid"), Site(layer, "mlp.out")
    if site.part == "attn.out":
        if mid in clean:
            off("mid", moved[mid] - clean[mid])
        else:  # parallel: the MLP does not see it
            off("the layer's output", moved[Site(layer)] - clean[Site(layer)])
    if site.part == "mlp.out":
        off("the layer's output", moved[Site(layer)] - clean[Site(layer)])
    if site.part == "mid" and mlp in clean:
        off("the layer's output less mlp.out",
            moved[Site(layer)] - clean[Site(layer)] - moved[mlp] + clean[mlp])
    return wrong


if __name__ == "__main__":
    main()
