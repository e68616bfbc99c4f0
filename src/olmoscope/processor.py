"""What this machine's processor can do."""

import os


def has(feature: str) -> bool:
    """Whether the processor has an instruction set, by LLVM's name: `avx2`, `avx512vnni`, `avx512bf16`.

    `NUMBA_CPU_FEATURES` (`+avx2,-avx512f`), which tells numba what to compile for in place of this processor, decides
    here too, so that one machine can stand in for another.
    """
    if (wanted := os.environ.get("NUMBA_CPU_FEATURES")) is not None:
        return f"+{feature}" in wanted.split(",")
    import llvmlite.binding

    return bool(llvmlite.binding.get_host_cpu_features().get(feature))
