"""The model card: README.md of a release, as the hub shows it.

Everything that comes from a recipe (names of models, sources, repositories) is escaped: it is text, not markdown.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from olmoscope.release.export import dataset_repo, module_of
from olmoscope.release.finished_run import FinishedRun
from olmoscope.release.usage import reading, usage
from olmoscope.sae.io.saelens_places import hook_names
from olmoscope.site import Site
from olmoscope.train.derived import Settled, rate_of, settled

CARD = "README.md"

TESTED_WIDTHS, TESTED_TOKENS = (192, 576), (300_000, 1_000_000)
"""Ranges of d_model and of training tokens in which the rules for open settings were tested (docs/recipe-study.md)."""


def model_card(runs: Sequence[FinishedRun]) -> str:
    """The whole card: markdown below the hub's YAML front matter.

    Args:
        runs: the finished runs of one recipe, all evaluated.
    """
    parts = [_head(runs), _introduction(runs), _table(runs)]
    if not _all_residual(runs):
        parts.append(_sites(runs))
    parts += [_figures(runs), usage(runs), reading(runs)]
    if any(site.is_layer_output for run in runs for site in run.sae.sites):
        parts.append(_last_layer(runs))
    return "\n\n".join([*parts, _how_made(runs), _limits(runs)]) + "\n"


def escape(text: object) -> str:
    """Text for markdown: one line, without characters that would start a link, a tag, a table cell or emphasis."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", one_line).replace("&", "&amp;")


def code(text: object) -> str:
    """Text in a code span that is safe in a table cell."""
    one_line = " ".join(str(text).split()).replace("|", "\\|")
    ticks = "`" * (max((len(run) for run in re.findall("`+", one_line)), default=0) + 1)
    pad = " " if one_line.startswith("`") or one_line.endswith("`") else ""
    return f"{ticks}{pad}{one_line}{pad}{ticks}"


def _all_residual(runs: Sequence[FinishedRun]) -> bool:
    """Whether all are SAEs of layer outputs."""
    return all(run.sae.writes is None and run.sae.site.is_layer_output for run in runs)


def _head(runs: Sequence[FinishedRun]) -> str:
    recipe, model = runs[0].recipe, runs[0].done.store.model
    head: dict[str, Any] = {"library_name": "saelens", "tags": ["sparse-autoencoder", "sae", "saelens",
                                                               "mechanistic-interpretability", "olmoscope"]}
    if model.on_hub:
        head["base_model"] = model.name
    datasets = [repo for repo in map(dataset_repo, recipe.text.sources) if repo is not None]
    if datasets:
        head["datasets"] = datasets
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


_FORMS = {
    "topk": "TopK: `z = ReLU(TopK_k(p))`",
    "batchtopk": "JumpReLU with one threshold `θ` for all latents, trained as BatchTopK with k active latents per row "
                 "on average: `z = p` where `p > θ`, else 0",
    "jumprelu": "JumpReLU with a learned threshold `θ` for each latent: `z = p` where `p > θ`, else 0"}


def _introduction(runs: Sequence[FinishedRun]) -> str:
    recipe, model = runs[0].recipe, runs[0].done.store.model
    revision = f", revision {code(model.revision)}" if model.revision else ""
    what, reads = f"{_saes(len(runs))} on the residual stream of", "Each reads the output of one decoder layer."
    if not _all_residual(runs):
        transcoders = sum(run.sae.writes is not None for run in runs)
        counts = [_saes(len(runs) - transcoders)] if transcoders < len(runs) else []
        what = " and ".join(counts + ([_count(transcoders, "transcoder")] if transcoders else [])) + " for"
        reads = "Their sites are listed below."
    written = " A transcoder writes `ŷ = z W + d`." if any(run.sae.writes for run in runs) else ""
    return f"""\
# {escape(recipe.release.name)}

{what} {code(model.shown)}
({escape(model.architecture)}, {model.num_layers} layers, d_model {model.d_model}{revision}), in
[SAELens](https://github.com/decoderesearch/SAELens) format. {reads} The rows of the
decoder `W` have unit norm. An SAE computes latent activations `z` from pre-activations `p`, and reconstructs
`x̂ = z W + b`.{written} The formulas of `p` and `z`:
{_forms(runs)}

Made with Olmoscope."""


def _forms(runs: Sequence[FinishedRun]) -> str:
    """The formulas of each kind of SAE in the release, as a list."""
    weights = {run.sae.weights for run in runs}
    lines = ["- tied weights: `p = (x − b) Wᵀ + c`; one matrix encodes and decodes"] if "tied" in weights else []
    lines += ["- untied weights: `p = (x − b) Eᵀ + c`, with an encoder `E`"] if "untied" in weights else []
    lines += [f"- {_FORMS[kind]}" for kind in _FORMS if kind in {run.sae.activation for run in runs}]
    if any(run.sae.matryoshka for run in runs):
        lines.append("- Matryoshka: the first latents form smaller SAEs of their own; `manifest.json` gives their "
                     "shares of the width")
    if any(run.sae.writes for run in runs):
        lines.append("- transcoders: in their files `b` is folded into `c`, so `p = x Eᵀ + c`")
    if any(run.sae.skip for run in runs):
        lines.append("- transcoders with a skip connection `S` add `x Sᵀ` to their output")
    return "\n" + "\n".join(lines)


def _table(runs: Sequence[FinishedRun]) -> str:
    rows = ["| SAE | site | width | k | input | NMSE | explained variance | ΔCE | loss recovered | KL | L0 | dead | "
            "training NMSE | canonical |", "|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"]
    for run in runs:
        sae, held_out = run.sae, run.evaluation()
        language = held_out.language
        recovered = language.loss_recovered_zero
        place = " → ".join(map(str, [sae.reads[0], *(sae.writes or [])]))
        cells = (code(sae.id), place, sae.d_sae, sae.k, sae.normalize.replace("_", " "),
                 _said(held_out.usual.nmse, ".6f"), _said(held_out.usual.explained_variance, ".4f"),
                 f"{language.delta_ce:.4f}", "" if recovered is None else f"{recovered:.2%}",
                 f"{language.kl:.4f}", f"{held_out.l0.mean:.2f}",
                 f"{held_out.dead.share:.2%}",
                 f"{run.done.nmse:.6f}", "yes" if sae.canonical else "")
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "## The SAEs\n\n" + "\n".join(rows)


def _sites(runs: Sequence[FinishedRun]) -> str:
    """The modules of the model at which the SAEs read and write."""
    rows = ["| site | in transformers | in TransformerLens |", "|---|---|---|"]
    for site, module in sorted({site: module_of(run, site) for run in runs for site in run.sae.sites}.items()):
        times = "" if module.scale == 1 else f"{module.scale:g} times "
        rows.append(f"| {site} | {times}the {module.end} of {code(module.path)} | {code(site.transformer_lens)} |")
    table = "\n".join(rows)
    return f"""\
## Sites

{table}

If the model has a norm after attention or the MLP, the outputs of these are taken after that norm.
The names of TransformerLens are those in its `TransformerBridge`. Its `attn.hook_z` keeps the heads apart; the SAE
reads them concatenated."""


def _figures(runs: Sequence[FinishedRun]) -> str:
    counts = _numbers({run.evaluation().rows for run in runs})
    windows = _numbers({run.evaluation().dead.window for run in runs})
    read = _numbers({run.evaluation().language.rows for run in runs})
    clean = runs[0].evaluation().language.ce_clean
    zeros = _numbers({rows for run in runs if (rows := run.evaluation().zero_rows)})
    transcoders = ("""
- **transcoders**: x is the model's own activation at the site where the transcoder writes, and x̂ is the transcoder's
  output."""
                   if any(run.sae.writes for run in runs) else "")
    normalised = ("""\
- **input**: `layer norm` SAEs centre each row and divide it by its standard deviation before they encode it. They undo
  this after decoding. SAELens does both.
""" if any(run.sae.normalize == "layer_norm" for run in runs) else "")
    left_out = f" It leaves out {zeros} rows of zeros, whose NMSE is undefined." if zeros else ""
    return f"""\
The columns:

- **NMSE, explained variance, L0, dead** are measured on {counts} held-out rows, from documents that were not used for
  training. A row is the activation vector of one token. NMSE is the mean over rows of ‖x − x̂‖² / ‖x‖² (x is not
  centred).{left_out} Explained variance is 1 − Σ‖x − x̂‖² / Σ‖x − μ‖², where μ is the mean of all these rows. L0 is the
  mean number of active latents per row. Dead is the share of latents that did not fire in a window of {windows}
  tokens.{_outliers(runs)}
- **ΔCE, loss recovered, KL** say how the model's predictions change when x̂ replaces x, on {read} held-out tokens. ΔCE
  is the rise in cross-entropy, in nats (without an SAE, the cross-entropy is {clean:.4f}). Loss recovered is 100 % if
  cross-entropy does not rise, and 0 % if it rises as much as when zeros replace x. KL is the mean KL divergence
  KL(without ‖ with x̂) between the model's predictions without and with x̂.{transcoders}
- **training NMSE** is the mean of the loss over the whole training run, from the first step. It is not measured on
  held-out data. Use it only to compare with releases that report this mean as their final NMSE.
{normalised}- **canonical** marks the recommended SAE for its layer.

`manifest.json` has more digits and 95 % intervals, the checksum of every file, and the provenance of each SAE.
`evaluation.json` in each SAE's folder has all figures. [report.html](report.html) shows them on one page, with all
SAEs side by side; each SAE's folder has a report of its own. Download a report and open it in a browser."""


def _last_layer(runs: Sequence[FinishedRun]) -> str:
    model = runs[0].done.store.model
    last = model.num_layers - 1
    path = hook_names(model.layers_path, Site(last))["hf_hook_name"]
    mine = [code(run.sae.id) for run in runs if run.sae.site == Site(last)]
    concerned = f" Here this concerns {', '.join(mine)}." if mine else ""
    return f"""\
## Take activations with a hook, not from `hidden_states`

In transformers, `hidden_states[L + 1]` equals the output of layer `L` for every layer **but the last**: the last
entry is the state after the model's final norm. For layer {last}, the output of {code(path)} and
`hidden_states[{last + 1}]` are different vectors. An SAE of that layer must read the former.{concerned} The hook above
is right for all layers."""


def _how_made(runs: Sequence[FinishedRun]) -> str:
    recipe, store = runs[0].recipe, runs[0].done.store
    tokens = recipe.tokens
    trains = [settled(run.recipe, run.sae) for run in runs]
    total = sum(source.tokens for source in store.sources.values())
    rows = ["| source | documents | tokens | share of tokens |", "|---|--:|--:|--:|"]
    for name, source in store.sources.items():
        share = source.tokens / total if total else 0.0
        rows.append(f"| {escape(name)} | {source.documents:,} | {source.tokens:,} | {share:.1%} |")
    lengths = " or ".join(f"{low} to {high}" for low, high in tokens.chunk_lengths)
    rate = _each(trains, lambda train: f"falls linearly to 0 over the last {train.decay:.0%} of the steps"
                 if train.decay else "is constant")
    documents = {"apart": "The model reads each document as if it were alone",
                 "share": "Documents in the same sequence attend to each other"}
    order = {"shuffled": "shuffled over all activations", "reading": "in the order in which the model read them"}
    begin = {"share": "with BOS at the start of each sequence",
             "apart": "with BOS at the start of each document and sequence"}[
        tokens.documents] if tokens.bos == "yes" else "without BOS"
    steps = _numbers({run.done.steps for run in runs})
    betas = _each(trains, lambda train: f"{train.betas[0]}, {train.betas[1]}")
    batches = _each(trains, lambda train: str(train.batch))
    orders = _each(trains, lambda train: order[train.order])
    epochs = _each(trains, lambda train: _count(train.epochs, "epoch"))
    seeds = _each(trains, lambda train: str(train.seed))
    own_seed = "" if seeds == str(recipe.seed) else f" (seed of training: {seeds})"
    table = "\n".join(rows)
    what = "the outputs of the decoder layers" if _all_residual(runs) else "those at the sites above"
    return f"""\
## How they were made

{table}

- **Text**: packed into sequences of {lengths} tokens, {begin} and with an end-of-text token
  after each document. {documents[tokens.documents]}.
- **Activations**: {what}, computed in {recipe.model.dtype} and stored as
  {recipe.activations.dtype}.
- **Training**: the loss is NMSE {_auxiliary(trains)}.
  The optimiser is Adam (betas {betas}). Its learning rate is {_rates(runs)};
  it {rate}. Batches have {batches} rows, {orders}.
  Training took {steps} steps ({epochs}). The decoder's rows are kept at unit norm.{_further(trains)}
- **Recipe**: {code(recipe.name)}, form {code(recipe.form)}, seed {recipe.seed}{own_seed}. `manifest.json` has it in
  full. The folder of each SAE has the log of its training."""


def _each(trains: Sequence[Settled], say: Callable[[Settled], str]) -> str:
    """The text that all SAEs share, or the different texts joined by "or"."""
    return " or ".join(dict.fromkeys(map(say, trains)))


def _said(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _outliers(runs: Sequence[FinishedRun]) -> str:
    """How the figures treat rows of outlier norm, and how these rows look; "" if there are none."""
    found = sorted({(run.sae.site, one.outliers_found.said()) for run in runs if (one := run.evaluation()).outliers})
    if not found:
        return ""
    lines = "\n".join(f"  - {site}: {said}" for site, said in found)
    text = f"""
- **Outliers** are rows whose norm is over 10 times the median. NMSE and explained variance leave them out, since a few
  such rows would dominate both. For ΔCE, loss recovered and KL, x̂ replaces every row, outliers included. The outliers
  at each site:
{lines}"""
    if sites := sorted({run.sae.site for run in runs if run.done.sinks}):
        text += f"""

  The first latents of the SAEs of {', '.join(map(str, sites))} are for such rows (attention sinks) and reconstruct them
  almost exactly; SAELens and other tools need no rule or setting for that."""
    return text


def _rates(runs: Sequence[FinishedRun]) -> str:
    trains = [settled(run.recipe, run.sae) for run in runs]
    found = {rate_of(run.recipe, run.sae, sum(run.done.store.width(site) for site in run.sae.reads)) for run in runs}
    lr = " or ".join(f"{rate:.3g}" for rate in sorted(found))
    decoder = " or ".join(f"{rate:g}" for rate in sorted({each.decoder_rate for each in trains}))
    others = ([f"{decoder} times as high for the decoder"] if decoder != "1" else []) + (
        ["multiplied by the RMS of the activations for the biases"] if trains[0].scale_biases else [])
    return f"{lr} ({'; '.join(others)})" if others else lr


def _auxiliary(trains: Sequence[Settled]) -> str:
    """The auxiliary loss. In one release, either all SAEs have one or none has."""
    settings = [train.auxiliary for train in trains if train.auxiliary and train.auxiliary.weight]
    if not settings:
        return "without an auxiliary loss"
    windows = _numbers({each.dead_window for each in settings})
    most = _numbers({each.k for each in settings})
    return (f"plus an auxiliary loss (weight {settings[0].weight:g}) on up to {most} latents per row that did not fire "
            f"in {windows} tokens")


def _further(trains: Sequence[Settled]) -> str:
    """What else training did: a sentence for each setting that an SAE has and the default has not."""
    finish = " or ".join(f"{share:.3g}%" for share in sorted({100 * one.finish.share for one in trains if one.finish}))
    sentences: tuple[tuple[str, Callable[[Settled], bool]], ...] = (
        (f"In the last {finish} of the steps, the loss also included the change in the language model's predictions "
         "when it gets reconstructions", lambda train: train.finish is not None),
        ("Adam worked along the principal axes of the activations", lambda train: train.axes == "principal"),
        ("Similar rows of the decoder were moved apart", lambda train: train.orthogonal > 0))
    lines = []
    for sentence, holds in sentences:
        if count := sum(map(holds, trains)):
            which = "" if count == len(trains) else f" ({count} of {_count(len(trains), 'SAE')})"
            lines.append(f"\n  {sentence}{which}.")
    return "".join(lines)


def _limits(runs: Sequence[FinishedRun]) -> str:
    layer_norm = """
- In SAELens, a layer-norm SAE keeps the statistics of the rows from `encode` until `decode`. Call `decode` right after
  you encode the same rows. `decode` fails on a code that you make by hand, such as a single latent; use `sae.W_dec`
  for directions."""
    return f"""\
## Limits

- An SAE fits the text that it was trained on (the table above). Expect a larger error on other text.
- The figures say how well the SAEs reconstruct rows and how well they preserve the model's predictions. They do not
  show that a latent stands for a concept.
- Dead latents remain in the files, so that latents keep their numbers.
- The SAEs are for {code(runs[0].done.store.model.shown)}. Another checkpoint of the same architecture needs its own.
{_tested(runs)}\
{layer_norm if any(run.sae.normalize == "layer_norm" for run in runs) else ""}"""


def _tested(runs: Sequence[FinishedRun]) -> str:
    """The sizes at which the rules for open settings were tested, and whether these SAEs are within them."""
    d_model = runs[0].done.store.model.d_model
    tokens = {run.recipe.tokens.count * settled(run.recipe, run.sae).epochs for run in runs}
    inside = TESTED_WIDTHS[0] <= d_model <= TESTED_WIDTHS[1] and all(
        TESTED_TOKENS[0] <= each <= TESTED_TOKENS[1] for each in tokens)
    return f"""\
- Rules choose the settings that the recipe leaves open (batch size, learning rates, auxiliary loss, latents for
  attention sinks). The rules were tested on SmolLM2-135M-Instruct (Llama architecture, d_model 576) with 300,000
  training tokens, and on two small models (Olmo 3 and Qwen 3 architectures, d_model 256 and 192) with 1,000,000;
  Olmoscope's `docs/recipe-study.md` has the figures.
  These SAEs ({escape(runs[0].done.store.model.architecture)}, d_model {d_model:,}, {_numbers(tokens)} tokens) are \
{"within these sizes" if inside else "outside these sizes, so the rules are extrapolated"}."""


def _numbers(values: set[int]) -> str:
    return " or ".join(f"{value:,}" for value in sorted(values))


def _saes(number: int) -> str:
    return f"{_count(number, 'sparse autoencoder')} ({'SAE' if number == 1 else 'SAEs'})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
