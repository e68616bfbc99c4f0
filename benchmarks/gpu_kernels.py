"""GPU day: whether the kernels are right on this device, compared with float64 in three ways, the fastest first.

Each operation at full size (d 4096, 131,072 latents; block sizes that small tests never reach); the check that
benchmarks/train_step.py makes before timing; and the project's own tests of values and gradients.
"""

import contextlib
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import Shape
from gpu_part import Part, faults, first_line
from olmoscope.kernels import reference
from olmoscope.kernels.dispatch import kernels_for
from olmoscope.kernels.interface import AdamStep, Kernels, Moments, SortedPairs

TESTS = Path(__file__).parents[1] / "tests"
SMALL_TESTS = ["-k", "k_one or several_chunks or zeros or beyond"]
RESULTS = [re.compile(r"^\[gw\d+\] \[ *\d+%\] (?P<outcome>[A-Z]+) (?P<name>\S.*)$"),  # side by side
           re.compile(r"^(?P<name>\S+::.*?) (?P<outcome>[A-Z]+)\b.*$"),
           re.compile(r"^_+ (?P<outcome>ERROR) (?P<name>collecting \S+)")]
"""How pytest reports a test."""
WORKERS = min(12, os.cpu_count() or 1)
"""Test processes, if pytest-xdist is installed: most of their time is compilation on the CPU."""
ROWS = 512
HOT = 7
"""A latent that is active in all rows, which are more than the kernels sum in one piece."""
ADAM = AdamStep(lr=1e-3, beta1=0.0, beta2=0.999, eps=1e-8, count=1)
"""With β₁ = 0 the first moment is the gradient."""


def main() -> None:
    part = Part("kernels", __doc__)
    wrong = [*full_size(part), *whole_step(part)]
    with contextlib.suppress(*faults()):  # an earlier fault is raised again here
        torch.cuda.empty_cache()  # for the processes of the tests
    wrong += tests(part)
    if wrong:
        raise SystemExit(f"{len(wrong)} wrong: {', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}")


def full_size(part: Part) -> list[str]:
    """Compare each operation at full size, float32 with float64; returns the names of those that are off."""
    shape = part.shapes()[0]
    bench = Bench(part, shape)
    found: dict[str, Any] = {}
    for operation in (bench.encode, bench.encode_candidates, bench.decode_and_residual, bench.update,
                      bench.update_touched, bench.update_bfloat16):
        name = operation.__name__
        try:
            errors = operation()
        except faults() as error:
            found[name] = {"failed": first_line(error), "ok": False}
            part.keep(f"full size: {name:20} {found[name]['failed']}", full_size=found)
            continue
        found[name] = {"errors": {what: value if math.isfinite(value) else None for what, (value, _) in errors.items()},
                       "bars": {what: bar for what, (_, bar) in errors.items()},
                       "ok": all(value <= bar for value, bar in errors.values())}  # NaN is not
        text = ", ".join(f"{what} {value:.1e}" for what, (value, _) in errors.items())
        part.keep(f"full size: {name:20} {'ok   ' if found[name]['ok'] else 'WRONG'} {text}", full_size=found)
    return [f"{name} at full size" for name, one in found.items() if not one["ok"]]


Errors = dict[str, tuple[float, float]]
"""For each quantity: how far it is off, and how far it may be."""


class Bench:
    """Random rows, a dictionary and codes, and the float64 results for them."""

    def __init__(self, part: Part, shape: Shape) -> None:
        self.kernels: Kernels = kernels_for(part.device)
        self.k, self.d_sae = shape.k, shape.d_sae
        rows = min(ROWS, shape.batch)
        generator = torch.Generator(part.device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=part.device)

        self.W_FD = randn(shape.d_sae, shape.d_model)
        self.W_FD /= self.W_FD.norm(dim=1, keepdim=True)
        self.b_F, self.b_D = 0.01 * randn(shape.d_sae), 0.1 * randn(shape.d_model)
        self.u_BD = randn(rows, shape.d_model)
        self.x_BD = self.u_BD + self.b_D
        # On a GPU the product is in bfloat16: its rounding, and how far a chosen latent may fall short because of it.
        self.rounding, self.short = (5e-3, 0.03) if part.cuda else (1e-5, 1e-4)
        # The codes and gradients for all operations, from the reference's exact product.
        self.z_BK, self.indices_BK = reference.encode_topk(self.u_BD, self.W_FD, self.b_F, self.k)
        is_hot_BK = self.indices_BK == HOT
        self.indices_BK[:, 0] = torch.where(is_hot_BK.any(dim=1), self.indices_BK[:, 0], HOT)
        self.dz_BK = randn(rows, self.k) * (self.z_BK > 0)
        self.e_BD = randn(rows, shape.d_model)

    def pre(self) -> Tensor:
        """The product in float64, `[B, F]`."""
        return self.u_BD.double() @ self.W_FD.double().T + self.b_F

    def encode(self) -> Errors:
        got = [self.kernels.encode_topk(self.u_BD, self.W_FD, self.b_F, self.k) for _ in range(2)]
        pre_BF, (values_BK, indices_BK) = self.pre(), got[0]
        chosen_BK = pre_BF.gather(1, indices_BK)
        short = (pre_BF.topk(self.k).values - chosen_BK).amax() / pre_BF.std()
        return {"values": (relative(values_BK, chosen_BK.relu()), self.rounding),
                "short of the best": (float(short), self.short), "doubles": (twice(indices_BK), 0),
                "differs when repeated": (differ(*got), 0)}

    def encode_candidates(self) -> Errors:
        quantized = self.kernels.quantize(self.W_FD)
        values_BK, indices_BK = self.kernels.encode_candidates(self.u_BD, self.W_FD, self.b_F, quantized, self.k, 16)
        pre_BF = self.pre()
        best_BK = pre_BF.topk(self.k).indices
        missed = 1 - float((best_BK.unsqueeze(2) == indices_BK.unsqueeze(1)).any(2).double().mean())
        return {"values": (relative(values_BK, pre_BF.gather(1, indices_BK).relu()), 1e-5), "missed": (missed, 0.01),
                "doubles": (twice(indices_BK), 0)}

    def decode_and_residual(self) -> Errors:
        got = self.kernels.residual(self.x_BD, self.z_BK, self.indices_BK, self.W_FD, self.b_D, None, None)
        z_BF, W_FD, x_BD = self.dense(self.z_BK), self.W_FD.double(), self.x_BD.double()
        decoded_BD = z_BF @ W_FD
        error_BD, power_B1 = decoded_BD + self.b_D - x_BD, x_BD.square().sum(1, keepdim=True)
        e_BD = error_BD * 2 / (len(x_BD) * power_B1)
        dz_BK = (e_BD @ W_FD.T).gather(1, self.indices_BK) * (self.z_BK > 0)
        return {"decoded": (relative(self.kernels.decode(self.z_BK, self.indices_BK, self.W_FD), decoded_BD), 1e-5),
                "loss": (relative(got.loss_B, error_BD.square().sum(1) / power_B1.squeeze(1)), 1e-5),
                "e": (relative(got.e_BD, e_BD), 1e-5), "dz": (relative(got.dz_BK, dz_BK), 1e-5)}

    def update(self) -> Errors:
        return self._update(touched=False, dtype=torch.float32, bar=1e-5)

    def update_touched(self) -> Errors:
        return self._update(touched=True, dtype=torch.float32, bar=1e-5)

    def update_bfloat16(self) -> Errors:
        return self._update(touched=False, dtype=torch.bfloat16, bar=5e-3)

    def _update(self, touched: bool, dtype: torch.dtype, bar: float) -> Errors:
        """One step with tied rows; compares its gradient, the rows, and the biases' gradients."""
        pairs = self.kernels.sort_pairs(self.z_BK, self.dz_BK, self.indices_BK, self.d_sae)
        first, second = (self._updated(pairs, touched, dtype) for _ in range(2))
        W_FD, moments, db_F, pull_D = first
        dz_BF = self.dense(self.dz_BK)
        want_FD = self.dense(self.z_BK).T @ self.e_BD.double() + dz_BF.T @ self.u_BD.double()
        before_FD = self.W_FD.double()
        want_FD -= (want_FD * before_FD).sum(1, keepdim=True) * before_FD
        errors = {"gradient": (relative(moments.first, want_FD), bar), "db": (relative(db_F, dz_BF.sum(0)), 1e-5),
                  "pull": (relative(pull_D, dz_BF.sum(0) @ before_FD), 1e-4),
                  "differs when repeated": (differ(first, second), 0)}
        # At the first step Adam moves each element by lr against its gradient, and √(second moment) is the gradient's
        # size.
        step_FD = ADAM.lr * want_FD.div_(want_FD.abs().add_(ADAM.eps))
        after_FD = before_FD - step_FD
        after_FD /= after_FD.norm(dim=1, keepdim=True)
        moved = float((W_FD - after_FD).norm() / (after_FD - before_FD).norm())
        return errors | {"step": (moved, 0.01)}

    def _updated(self, pairs: SortedPairs, touched: bool, dtype: torch.dtype) -> tuple[Tensor, Moments, Tensor, Tensor]:
        W_FD = self.W_FD.clone()
        updated_F = torch.zeros(self.d_sae, dtype=torch.int32, device=W_FD.device) if touched else None
        moments = Moments(torch.zeros_like(W_FD, dtype=dtype), torch.zeros_like(W_FD, dtype=dtype), updated_F)
        return W_FD, moments, *self.kernels.update_tied(W_FD, moments, pairs, self.e_BD, self.u_BD, ADAM)

    def dense(self, codes_BK: Tensor) -> Tensor:
        """Codes as `[B, F]` in float64."""
        dense_BF = torch.zeros(len(codes_BK), self.d_sae, dtype=torch.float64, device=codes_BK.device)
        return dense_BF.scatter_(1, self.indices_BK, codes_BK.double())


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    return float((got - want).norm() / want.norm())


def twice(indices_BK: Tensor) -> float:
    """Share of places with a latent that the row has already."""
    return float((indices_BK.sort(dim=1).values.diff(dim=1) == 0).double().mean())


def differ(first: tuple[Any, ...], second: tuple[Any, ...]) -> float:
    """How many tensors of two results are not equal bit for bit."""
    return sum(differ((a.first, a.second), (b.first, b.second)) if isinstance(a, Moments)
               else float(not torch.equal(a, b)) for a, b in zip(first, second, strict=True))


def whole_step(part: Part) -> list[str]:
    """Run train_step.py's check of a whole step."""
    try:
        from train_step import check

        check(part.device.type)
    except ModuleNotFoundError as error:
        part.keep(f"whole step: not run, lacks {error.name}", whole_step={"lacks": error.name})
        return []
    except SystemExit as error:
        part.keep(f"whole step: WRONG: {error}", whole_step=str(error))
    except faults() as error:
        part.keep(f"whole step: {first_line(error)}", whole_step=first_line(error))
    else:
        part.keep("whole step: ok", whole_step="ok")
        return []
    return ["the whole step"]


def tests(part: Part) -> list[str]:
    """Run the tests that work with any kernels; after each, the results so far are on the disk."""
    lacking = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if lacking:
        part.keep(f"tests: not run, lacks {' and '.join(lacking)}", tests={"lacks": lacking})
        return []
    backend = kernels_for(part.device).__name__.rpartition(".")[2]
    environment = os.environ | {"KERNELS_UNDER_TEST": backend, "KERNELS_UNDER_TEST_DEVICE": part.device.type}
    sys.path.insert(0, str(TESTS))
    from kernel_backends import TESTS as FILES

    side_by_side = importlib.util.find_spec("xdist") is not None and not part.small
    # Without the project's own options and fixtures: they name plug-ins, a browser and a time limit.
    command = [sys.executable, "-m", "pytest", "--noconftest", "-o", "addopts=", "-p", "no:cacheprovider", "-v", "-rN",
               "--continue-on-collection-errors",
               *(["-n", str(WORKERS)] if side_by_side else []),
               *([*SMALL_TESTS, str(FILES[0])] if part.small else ["-k", backend, *map(str, FILES)])]
    process = subprocess.Popen(command, cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    for line in process.stdout:
        print(line, end="", flush=True)
        match = next(filter(None, (result.match(line) for result in RESULTS)), None)
        if match and match["outcome"] in found:
            found[match["outcome"]].append(match["name"].strip())
            counts = {name.lower(): len(names) for name, names in found.items()}
            part.so_far(f"tests, so far: {len(found['PASSED'])} passed", tests=counts | {
                "wrong": found["FAILED"] + found["ERROR"]})
    wrong = found["FAILED"] + found["ERROR"]
    if process.wait() not in (0, 1):
        wrong.append(f"pytest ends with {process.returncode}")
    part.keep(f"tests: {len(found['PASSED'])} passed, {len(wrong)} failed, {len(found['SKIPPED'])} skipped")
    for name in wrong:
        part.keep(f"tests: FAILED {name}")
    return wrong


if __name__ == "__main__":
    main()
