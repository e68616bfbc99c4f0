"""The figures of `olmoscope evaluate OUT --stability` compared with those of the assignment in the paper.

    python benchmarks/stability.py OUT [--most 8192]

Paulo and Belrose (arXiv:2501.16615, and the notebook with it) match the decoders of two SAEs by the assignment with the
largest sum of cosines, match the encoders likewise, and count latents whose cosine is over 0.7 in both. Here scipy's
assignment does that for each pair of runs that differ only in the seed. Settings with more latents than `--most` are
left out: an assignment of F latents holds F² cosines.
"""

import argparse
import time
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment

from olmoscope.evaluate.stability import SHARED, compare_latents
from olmoscope.evaluate.study import study_of
from olmoscope.recipe.load import load_recipe
from olmoscope.sae.directions import unit_directions
from olmoscope.sae.io.checkpoint import read_alive
from olmoscope.sae.io.run_folder import read_run_folder
from olmoscope.train.derived import settled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an output folder with evaluated runs of several seeds")
    parser.add_argument("--most", type=int, default=8192, help="latents")
    arguments = parser.parse_args()
    print("| pair | matched, ours | paper's | by decoder, ours | assignment's | seconds, ours | assignment's |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for setting in study_of(load_recipe(str(arguments.out / "recipe.yaml")), arguments.out).settings:
        runs = {one.id: read_run_folder(arguments.out / "runs" / one.id) for one in setting.runs}
        if next(iter(runs.values())).sae.d_sae > arguments.most:
            continue
        for two in setting.pairs_of_runs():
            first, second = (runs[run].load() for run in two)
            alive = [read_alive(runs[run].checkpoint, settled(runs[run].recipe, runs[run].sae).dead_window)
                     for run in two]
            start = time.perf_counter()
            ours = compare_latents(first, second, *alive)
            middle = time.perf_counter()
            decoder_A, encoder_A = (matched(one, other, *alive) for one, other in (
                (first.W_dec, second.W_dec), (first.W_enc, second.W_enc)))
            seconds = middle - start, time.perf_counter() - middle
            latents = sum(int(one.sum()) for one in alive) / 2
            print(f"| {two[0]}, {two[1]} | {ours['matched_share']:.4f} "
                  f"| {int((decoder_A & encoder_A).sum()) / latents:.4f} | {ours['matched_share_decoder']:.4f} "
                  f"| {int(decoder_A.sum()) / latents:.4f} | {seconds[0]:.1f} | {seconds[1]:.1f} |", flush=True)


def matched(first_FD: torch.Tensor, second_FD: torch.Tensor, alive_first: torch.Tensor,
            alive_second: torch.Tensor) -> torch.Tensor:
    """Which live latents of the first SAE have a cosine over 0.7 with the latent that the assignment gives them,
    bool."""
    cosines_AB = unit_directions(first_FD[alive_first]) @ unit_directions(second_FD[alive_second]).T
    rows, columns = linear_sum_assignment(cosines_AB.numpy(), maximize=True)
    found_A = torch.zeros(len(cosines_AB), dtype=torch.bool)
    found_A[torch.from_numpy(rows)] = cosines_AB[rows, columns] > SHARED
    return found_A


if __name__ == "__main__":
    main()
