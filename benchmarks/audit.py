"""Whether `olmoscope audit` finds what is wrong with spoiled SAEs, without warnings for good ones.

    python benchmarks/audit.py --text TEXT --model MODEL --bad RUN... [--good RUN...] [--tokens 4096]

Each RUN of `--bad` is a finished run of ours. The script spoils it in each way of `SPOILED`, writes it in SAELens'
format, and audits it. It audits the runs themselves, and those of `--good`, unchanged. It prints a line for each SAE:
what is wrong with it, what the audit said, and for each cause the FVU of the best other reading over that of the SAE as
read. At the end it counts the spoiled SAEs whose fault was named and the good ones that got a warning.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from olmoscope.activations.store.place import store_folder
from olmoscope.activations.store.reader import open_store
from olmoscope.activations.store.statistics import OUTLIER
from olmoscope.evaluate.anywhere import Options
from olmoscope.evaluate.audit import Audit, audit
from olmoscope.evaluate.audit_variants import scaled
from olmoscope.files import read_json, write_json
from olmoscope.release.export import saelens_metadata
from olmoscope.release.finished_run import read_run
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io import saelens
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.site import Site

Spoil = Callable[[SparseCoder, Site, Tensor], tuple[SparseCoder, Site]]
"""Makes a spoiled SAE and its site from a good SAE, its site and some of its rows."""

CAUSES = ("site", "scale", "normalisation", "ReLU", "rule", "weights", "bias")
ROWS = 8192
"""Number of rows that spoiling may use."""


def _without_relu(coder: SparseCoder, x_ND: Tensor) -> SparseCoder:
    """The best linear autoencoder of the same rows, which consists of their principal directions: its latents have
    either sign."""
    W_DD = torch.linalg.eigh((x_ND - coder.b_in).T.double().cov()).eigenvectors.T.float().contiguous()
    return TopK(W_DD, W_DD, coder.b_in, "none", torch.zeros(len(W_DD)), coder.d_in // 4)


def _without_rule(coder: SparseCoder) -> SparseCoder:
    assert isinstance(coder, TopK | JumpReLU)
    return JumpReLU(coder.W_enc, coder.W_dec, coder.b_in, coder.normalize, coder.b_latent, torch.zeros(coder.d_sae))


SPOILED: dict[str, tuple[tuple[str, ...], Spoil]] = {
    "layer before": (("site",), lambda sae, site, x: (sae, Site(site.layer - 1, site.part))),
    "layer after": (("site",), lambda sae, site, x: (sae, Site(site.layer + 1, site.part))),
    "resid_mid for resid_post": (("site",), lambda sae, site, x: (sae, Site(site.layer, "mid"))),
    "mlp_out for resid_post": (("site",), lambda sae, site, x: (sae, Site(site.layer, "mlp.out"))),
    "scale not folded": (("scale",), lambda sae, site, x: (
        scaled(sae, float(x.norm(dim=1).median()) / sae.d_in**0.5), site)),
    "no ReLU in training": (("ReLU",), lambda sae, site, x: (_without_relu(sae, x), site)),
    "rule left out": (("rule", "dense"), lambda sae, site, x: (_without_rule(sae), site)),
    "decoder transposed": (("weights",), lambda sae, site, x: (
        replace(sae, W_dec=sae.W_dec.T.contiguous().view_as(sae.W_dec)), site)),
    "encoder transposed": (("weights",), lambda sae, site, x: (
        replace(sae, W_enc=sae.W_enc.T.contiguous().view_as(sae.W_enc)), site)),
    "decoder of another order": (("mismatch",), lambda sae, site, x: (
        replace(sae, W_dec=sae.W_dec.roll(1, 0)), site)),
    "b_dec not subtracted": (("bias",), lambda sae, site, x: (
        replace(sae, b_in=torch.zeros_like(sae.b_in), b_out=sae.b_out), site)),
}
"""By name: the warnings that identify the fault, and how to make the SAE."""


def spoil(run: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Write all spoiled forms of a run; yields the name and folder of each."""
    finished = read_run(run)
    metadata = saelens_metadata(finished)
    sae, site = finished.load(), finished.sae.site
    out = run.parents[len(run.parts) - run.parts.index("runs") - 1]
    x_ND = open_store(store_folder(out, "held_out")).read(site, 0, slice(0, ROWS)).float()
    x_ND = x_ND[x_ND.norm(dim=1) < OUTLIER * x_ND.norm(dim=1).median()]
    for number, (name, (_, make)) in enumerate(SPOILED.items()):
        bad, place = make(sae, site, x_ND)
        path = folder / f"{site.folder}_{finished.sae.d_sae}_{number:02d}"
        saelens.write(bad, path, metadata)
        config = read_json(path / saelens.CONFIG)
        config["metadata"] |= {"hook_name": place.transformer_lens, "hf_hook_name": None}
        write_json(path / saelens.CONFIG, config)
        yield name, path


def line(what: str, wanted: tuple[str, ...], one: Audit) -> bool:
    """Print a row of the table.

    Returns:
        Whether the audit said the right thing: one of `wanted`, or nothing if that is empty.
    """
    said = [warning.kind for warning in one.warnings]
    right = bool({*said} & {*wanted}) if wanted else not said
    best = {cause: min((other.fvu for other in one.tried if other.cause == cause and other.fvu is not None),
                       default=None) for cause in CAUSES}
    ratios = " | ".join("" if value is None or not one.fit else f"{value / one.fit:.2f}" for value in best.values())
    twins, fit = ("" if value is None else f"{value:.2f}" for value in (one.twins, one.fit))
    print(f"| {one.name} | {what} | {', '.join(said) or 'nothing'} | {'yes' if right else 'NO'} | {fit} | {ratios} "
          f"| {twins} |", flush=True)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model")
    parser.add_argument("--bad", type=Path, nargs="*", default=[], help="runs of SAEs of a residual stream")
    parser.add_argument("--good", type=Path, nargs="*", default=[], help="further runs, audited as they are")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = Options(Path(folder) / "out", arguments.text, arguments.tokens, arguments.model, batch_tokens=4096)
        runs = [*arguments.bad, *arguments.good]
        audits = audit([str(run) for run in runs], options)
        print(f"| SAE | what is wrong | the audit said | right | FVU | {' | '.join(CAUSES)} | cosine |")
        print(f"|---|---|---|---|--:|{'--:|' * len(CAUSES)}--:|")
        good = [line("nothing", (), one) for one in audits]
        bad = [(name, path) for run in arguments.bad for name, path in spoil(run, Path(folder) / "bad")]
        found = audit([str(path) for _, path in bad], options) if bad else []
        spoiled = [line(name, SPOILED[name][0], one) for (name, _), one in zip(bad, found, strict=True)]
    print(f"\n{spoiled.count(True)} of {len(spoiled)} spoiled SAEs were named, "
          f"{good.count(False)} of {len(good)} good ones got a warning.")


if __name__ == "__main__":
    main()
