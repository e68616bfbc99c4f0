"""What this machine's processor can do."""

import os


def has(feature: str) -> bool:
    """Whether the processor has an instruction set, by LLVM's name: `avx2`, `avx512vnni`, `avx512bf16`.

    `NUMBA_CPU_FEATURES`, which says what numba compiles for in place of this processor (`+avx2,-avx512f`), decides here
    too: so one machine can be tried as another.
    """
    if (wanted := os.environ.get("NUMBA_CPU_FEATURES")) is not None:
        return f"+{feature}" in wanted.split(",")
    import llvmlite.binding

    return bool(llvmlite.binding.get_host_cpu_features().get(feature))
