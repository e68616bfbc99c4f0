"""Imports go one way: a stage imports only stages above it, and no modules import each other in a circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "olmoscope"

STAGES = ("recipe", "shared", "text", "tokens", "model", "kernels", "distributed", "sae", "sae/io", "activations/store",
          "activations/collect", "activations/stream", "train", "cost", "evaluate", "features", "labelling", "browse",
          "release", "pipeline", "api", "cli")
"""Each may import those before it, and itself. The small modules beside the folders are `shared`."""

OUTERMOST = ("__init__", "__main__")
"""The package's front door, which leads everywhere."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def stage_of(module: str) -> str:
    """`sae/io` of `sae.io.open`; `shared` of `files`."""
    *folders, name = module.split(".")
    return "/".join(folders) or (name if name in STAGES else "shared")


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            while parts and not SOURCE.joinpath(*parts).with_suffix(".py").exists():
                parts.pop()  # a name in the module, or a package
            if package == "olmoscope" and parts:
                yield ".".join(parts)


MODULES = {module_of(path): set(imports(path)) for path in sorted(SOURCE.rglob("*.py")) if path.stem not in OUTERMOST}


def test_every_folder_is_a_stage():
    unknown = {stage_of(module) for module in MODULES} - set(STAGES)
    assert not unknown, f"{unknown}: say in STAGES which stages it may import, and in AGENTS.md what it does"
    assert set(STAGES) == {stage_of(module) for module in MODULES}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_what_is_above_it(stage):
    allowed = STAGES[: STAGES.index(stage) + 1]
    if stage == "recipe":
        allowed = ("recipe", "shared")  # its mistakes are UserErrors; that nothing goes round is the next test
    wrong = [f"{module} imports {other}" for module, others in MODULES.items() if stage_of(module) == stage
             for other in sorted(others) if stage_of(other) not in allowed]
    assert not wrong, "\n".join(wrong)


def test_no_circles():
    try:
        list(TopologicalSorter(MODULES).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(reversed(error.args[1]))}")
