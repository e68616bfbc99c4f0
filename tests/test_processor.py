"""The processor's real features, and pretended ones."""

from pathlib import Path

import pytest

from olmoscope.processor import has


def test_it_agrees_with_the_kernel(monkeypatch):
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    if "avx" not in flags:
        pytest.skip("no x86 processor under Linux")
    for ours, linux in (("avx2", "avx2"), ("avx512f", "avx512f"), ("avx512vnni", "avx512_vnni"),
                        ("avx512bf16", "avx512_bf16"), ("amx-bf16", "amx_bf16")):
        assert has(ours) == (linux in flags), ours


def test_what_numba_compiles_for_decides(monkeypatch):
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx2,-avx512vnni,+fma")
    assert has("avx2") and has("fma") and not has("avx512vnni") and not has("avx512f")
