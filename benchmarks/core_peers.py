"""SAEBench's core evaluation of an exported SAE, by its own code, beside `olmoscope evaluate` on the same tokens.

    python benchmarks/core_peers.py SAE --model FOLDER --text TEXT --peers peers/bin/python [--tokens 4096]

SAE is a folder in SAELens' format, for a residual stream, its sequences without BOS. The peers have sae-bench.
SAEBench streams its text from the hub; here it gets the tokens of our evaluation. The language model, in float32, is
TransformerLens' bridge to transformers there, and transformers itself here.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import olmoscope
from olmoscope.evaluate.sequences import read_sequences
from olmoscope.recipe.schema import Model
from olmoscope.sae.io.open import open_sae
from olmoscope.tokens.tokenizer import load_tokenizer


def main() -> None:
    """Read the arguments, evaluate, pass the tokens on, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--peers", type=Path, required=True, help="Python of the peers' environment")
    arguments = parser.parse_args()
    subject = open_sae(arguments.sae)
    tokenizer = load_tokenizer(Model(name=arguments.model), subject.bos)
    assert not tokenizer.begin and subject.context_size, "an SAE of sequences of one length without BOS"
    tokens = arguments.tokens // subject.context_size * subject.context_size
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        [ours] = olmoscope.evaluate(arguments.sae, text=arguments.text, model=arguments.model, dtype="float32",
                                    tokens=tokens, out=out)
        [folder] = (out / "text").glob("*/*")
        sequences = read_sequences(folder, tokenizer, apart=False, stored=tokenizer.begin).first(tokens)
        tokens_ST = torch.from_numpy(sequences.token_ids).long().view(-1, subject.context_size)
        save_file({"tokens": tokens_ST}, Path(scratch) / "tokens.safetensors")
        wanted = {"tokens": str(Path(scratch) / "tokens.safetensors"), "sae": str(arguments.sae),
                  "model": str(Path(arguments.model).resolve()), "layer": subject.site.layer}
        done = subprocess.run([arguments.peers, Path(__file__).with_name("core_peer.py"), json.dumps(wanted)],
                              check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    language = ours.language
    assert language is not None
    rows = [("L0", ours.l0.mean, found["l0"]), ("CE without SAE", language.ce_clean, found["ce_loss_without_sae"]),
            ("CE with SAE", language.ce_spliced, found["ce_loss_with_sae"]),
            ("CE with zeros", language.ce_zero, found["ce_loss_with_ablation"]),
            ("loss recovered (ce_loss_score)", language.loss_recovered_zero, found["ce_loss_score"]),
            ("KL with SAE", language.kl, found["kl_div_with_sae"]),
            ("KL with zeros", language.kl_zero, found["kl_div_with_ablation"]),
            ("cosine", ours.cosine, found["cossim"]), ("L2 ratio", ours.l2_ratio, found["l2_ratio"]),
            ("relative reconstruction bias", ours.relative_reconstruction_bias, found["relative_reconstruction_bias"]),
            ("explained variance", ours.explained_variance, found["explained_variance"]),
            ("explained variance, its older formula", None, found["explained_variance_legacy"]),
            ("explained variance, our formula on its rows", ours.explained_variance, found["by our formula"])]
    print(f"\n{ours.rows:,} tokens in {len(tokens_ST)} sequences\n\n| | olmoscope | SAEBench | relative difference |"
          "\n|---|--:|--:|--:|")
    for name, mine, its in rows:
        apart = "" if mine is None else f"{abs(mine - its) / abs(mine):.1e}"
        print(f"| {name} | {'' if mine is None else f'{mine:.6f}'} | {its:.6f} | {apart} |")
    print(f"\nIts mse, times the tokens of a sequence: {found['mse'] * tokens_ST.shape[1]:.6f}; the mean of its rows' "
          f"squared errors: {found['squared error']:.6f}")


if __name__ == "__main__":
    main()
