"""GPU day: the time of the training step at full size, compared with that of the product it needs; and its memory.

For each size, one contestant after another (from train_step.py): two products alone; our step with exact Adam, on
touched rows, with bfloat16 moments, with candidates; then untied weights and the auxiliary loss. *Torch product* is
only `torch.mm` in bfloat16; *our product* also converts the rows to bfloat16, adds the bias and keeps float32. A step's
share is the product's time divided by its own. Its peak of memory is the allocator's, starting before its parameters
exist, plus one batch of rows.
"""

from typing import Any

from common import Shape
from gpu_part import Part, Peak, faults, first_line, median_and_quartiles
from peers import batches
from train_step import contestants

PRODUCTS = ("torch product", "our product")
PASSES = [(*PRODUCTS, "step", "step, touched rows", "step, bf16 moments", "step, candidates"),
          ("step, untied", "step, auxiliary")]
"""All sizes are measured with the first group before any is measured with the second."""


def main() -> None:
    part = Part("step", __doc__)
    found: dict[str, dict[str, Any]] = {}
    for names in PASSES:
        for shape in part.shapes():
            measure(part, shape, names, found.setdefault(shape.name, {}), found)
    failed = [f"{shape}: {name}" for shape, one in found.items() for name in one if "failed" in one[name]]
    if failed:
        raise SystemExit(f"{len(failed)} did not run: {'; '.join(failed)}")


def measure(part: Part, shape: Shape, names: tuple[str, ...], one: dict[str, Any], found: dict[str, Any]) -> None:
    """Time the contestants of a size; only one is in memory at a time."""
    rows = batches(shape.d_model, shape.batch, shape.device)
    makers = contestants(shape, rows)
    for name in names:
        try:
            peak = Peak(part)
            times = part.time_blocks(makers[name]())
        except faults() as error:
            one[name] = {"failed": first_line(error)}
            part.keep(f"{shape.name:12} {name:19} {one[name]['failed']}", shapes=found)
            continue
        figures = median_and_quartiles(times)
        rate = shape.batch / figures["ms"] * 1e3
        figures |= {"rows_per_s": rate, "tflops_of_product": 2 * shape.d_sae * shape.d_model * rate / 1e12,
                    "peak_bytes": peak.bytes() + rows[0].nbytes}
        one[name] = figures
        text = (f"{shape.name:12} {name:19} {figures['ms']:8.2f} ms {rate:11,.0f} rows/s "
                f"{figures['tflops_of_product']:6.1f} TFLOP/s {figures['peak_bytes'] / 1e9:6.2f} GB")
        if name not in PRODUCTS:
            for product in PRODUCTS:
                if "ms" in one.get(product, {}):
                    share = figures[f"share_of_{product.replace(' ', '_')}"] = one[product]["ms"] / figures["ms"]
                    text += f" {share:5.2f} of {product}"
            text += verdict(shape, name, figures)
        part.keep(text, shapes=found)


def verdict(shape: Shape, name: str, figures: dict[str, Any]) -> str:
    """Whether a bar was met, if there is one."""
    if name in shape.rates:
        figures["bar_met"] = figures["rows_per_s"] >= shape.rates[name]
        return f"; bar {shape.rates[name]:,.0f} rows/s {'met' if figures['bar_met'] else 'NOT MET'}"
    if name == "step" and "our product" in shape.bars:
        bar = 1 / shape.bars["our product"]
        figures["bar_met"] = figures.get("share_of_our_product", 0) >= bar
        return f"; bar {bar:.2f} of our product {'met' if figures['bar_met'] else 'NOT MET'}"
    return ""


if __name__ == "__main__":
    main()
