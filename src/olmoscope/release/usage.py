"""The parts of the model card that show how to use an SAE and how to read its features. Their code and commands run as
they are."""

import shlex
from collections.abc import Sequence

from olmoscope.model.layer_pass import ROWS
from olmoscope.model_source import COMMIT, FETCHED
from olmoscope.release.export import module_of
from olmoscope.release.finished_run import FinishedRun
from olmoscope.sae.io.saelens_places import INPUT
from olmoscope.site import Site, SiteModule

TINY = "tiny"
"""The recipe's name for the model in the package."""


def usage(runs: Sequence[FinishedRun]) -> str:
    """How to use the canonical SAE, or the first if none is canonical."""
    recipe, model = runs[0].recipe, runs[0].done.store.model
    run = _shown(runs)
    revision = f", revision={model.revision!r}" if model.on_hub else ""
    name = repr(model.shown)
    if model.shown in FETCHED:
        name += f"  # the folder that `olmoscope fetch-model {FETCHED[model.shown]}` makes"
    elif model.shown != model.name:
        name += "  # the model's folder"
    packages = "sae-lens transformers"
    if model.name == TINY:
        packages = f"olmoscope {packages}"
        name = 'str(importlib.resources.files("olmoscope") / "model" / "tiny")  # the model inside the package'
    load = f"model = AutoModelForCausalLM.from_pretrained(name{revision}, dtype=torch.{recipe.model.dtype})"
    tokenizer, imports = f"name{revision}", ""
    if model.base is not None:
        own, of_base = (f", revision={part!r}" if COMMIT.fullmatch(part) else ""
                        for part in str(model.revision).split("+"))
        tokenizer, packages = f"{model.base!r}{of_base}", f"{packages} peft"
        imports = "from peft import PeftModel\n"
        load = (f"# {model.name} is an adapter; if it has a tokenizer of its own, use that one.\n"
                f"base = AutoModelForCausalLM.from_pretrained({model.base!r}{of_base}, "
                f"dtype=torch.{recipe.model.dtype})\n"
                f"model = PeftModel.from_pretrained(base, name{own}).merge_and_unload()")
    standard_library = "import importlib.resources\n\n" if model.name == TINY else ""
    definitions, hooks, removal = _hooks(run)
    return f"""\
## Use

Install the packages with `pip install {packages}`. Then run:

```python
{standard_library}import torch
{imports}from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
{load}
sae = SAE.from_pretrained({recipe.release.repo_id!r}, {run.sae.id!r})

seen = {{}}


{definitions}


{hooks}
tokens = tokenizer({_example_text(recipe.tokens.bos)}, return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    model(input_ids=tokens["input_ids"], use_cache=False)
{removal}

with torch.no_grad():
    features = sae.encode(seen["x"])  # [1, tokens, d_sae]; {_active(run)} are not 0 for each token
    {_written(run)}
```

To load an SAE from a folder on disk, where PATH is the folder of this release:

```python
from sae_lens import SAE

sae = SAE.load_from_disk({f"PATH/{run.sae.id}"!r})
```"""


def reading(runs: Sequence[FinishedRun]) -> str:
    """How to open the page of features for the SAE that `usage` shows."""
    model, address = runs[0].done.store.model, f"{runs[0].recipe.release.repo_id}:{_shown(runs).sae.id}"
    elsewhere = " --model PATH" if not model.on_hub and model.name != TINY else ""
    place = " PATH is the folder of the language model." if elsewhere else ""
    return f"""\
## Read its features

Olmoscope shows in the browser what each feature fires on. Install it with `pip install 'olmoscope[browse]'`. FILE is a
text file: `olmoscope index` runs the language model on it and records where each feature fires.{place}

```bash
olmoscope index {shlex.quote(address)} --text FILE --out features{elsewhere}
olmoscope browse features
```"""


def _shown(runs: Sequence[FinishedRun]) -> FinishedRun:
    return next((run for run in runs if run.sae.canonical), runs[0])


def _hooks(run: FinishedRun) -> tuple[str, str, str]:
    """Code that defines the hooks, registers them, and removes them: one for the input and, for a transcoder, one for
    the output."""
    read = run.sae.reads[0]
    if run.sae.writes is None:
        return (_function("keep", "x", read, module_of(run, read)), _placed("hook", "keep", run, read, ""),
                "hook.remove()")
    written = run.sae.writes[0]
    functions = (_function("keep_read", "x", read, module_of(run, read)),
                 _function("keep_written", "y", written, module_of(run, written)))
    placed = (_placed("read", "keep_read", run, read, ""), _placed("written", "keep_written", run, written, "_out"))
    return "\n\n\n".join(functions), "\n".join(placed), "read.remove()\nwritten.remove()"


def _function(name: str, key: str, site: Site, module: SiteModule) -> str:
    """A hook that keeps a module's activations. Inside a layer it copies them: some models modify the rows in place
    later."""
    copy = "" if site.layer_or_none is None or site.is_layer_output else ".clone()"
    if module.end == "input":
        return (f"def {name}(module, arguments, settings):\n"
                f"    given = [*arguments, *(settings[key] for key in {ROWS} if key in settings)]\n"
                f'    seen["{key}"] = given[0]{copy}')
    value = "output[0] if isinstance(output, tuple) else output"
    value = f"({value}){copy}" if copy else value
    if module.scale != 1:
        value = f"{module.scale!r} * {value}"
    return f'def {name}(module, inputs, output):\n    seen["{key}"] = {value}'


def _placed(handle: str, function: str, run: FinishedRun, site: Site, suffix: str) -> str:
    """Code that registers the hook on the module that the SAE's settings name."""
    module, said = module_of(run, site), f"sae.cfg.metadata.hf_hook_name{suffix}"
    variable = "layer" if site.is_layer_output else "place"
    if module.end == "input":
        return (f"{variable} = model.get_submodule({said}.removesuffix({INPUT!r}))  # {module.path}\n"
                f"{handle} = {variable}.register_forward_pre_hook({function}, with_kwargs=True)")
    return (f"{variable} = model.get_submodule({said})  # {module.path}\n"
            f"{handle} = {variable}.register_forward_hook({function})")


def _written(run: FinishedRun) -> str:
    if run.sae.writes is not None:
        return f'written = sae(seen["x"].float())  # [1, tokens, d_out]; for seen["y"], at {run.sae.writes[0]}'
    width = "d_model" if run.sae.site.is_layer_output else "d_in"
    return f"reconstruction = sae.decode(features)  # [1, tokens, {width}]"


def _example_text(bos: str) -> str:
    """The example's text, which begins as the texts in training do."""
    return ("tokenizer.bos_token + " if bos == "yes" else "") + '"The cat sat on the mat."'


def _active(run: FinishedRun) -> str:
    return f"at most {run.sae.k}" if run.sae.activation == "topk" else f"about {run.sae.k}"
