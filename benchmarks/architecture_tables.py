"""The table of architectures.py, for a terminal and for docs/models.md."""

import textwrap
from collections import Counter

import transformers

import olmoscope
from architecture_checks import COMMANDS, Finding

Findings = dict[str, dict[str, Finding]]
"""The finding for each of COMMANDS, by family."""


def overall(findings: dict[str, Finding]) -> str:
    """`right`, `in part` (some commands refuse the family), `refused` or `wrong`."""
    states = {finding.state for finding in findings.values()}
    if "wrong" in states:
        return "wrong"
    return states.pop() if len(states) == 1 else "in part"


def show(found: Findings) -> None:
    """Print a line for each family and, below it, why it is not right."""
    width = max(map(len, found), default=0)
    print("family".ljust(width), *(command.ljust(13) for command in COMMANDS))
    for family, findings in found.items():
        print(family.ljust(width), *(findings[command].state.ljust(13) for command in COMMANDS))
        for reason, commands in _by_reason(findings).items():
            print(" " * width, f"{', '.join(commands)}: {reason}")


ADAPTERS = (
    "Every command also takes an adapter of such a model in PEFT's format (LoRA and the like): a folder or a hub "
    "repository with `adapter_config.json` and `adapter_model.safetensors`. It merges the adapter into its base as it "
    "loads it, and records the revisions of both. This needs peft (`pip install olmoscope[peft]`), and loads the whole "
    "base. An adapter is refused in one line if it cannot be merged (prompt tuning and the like), does not fit its "
    "base, or computes something else once merged.")


def markdown(found: Findings, left_out: dict[str, str]) -> str:
    """docs/models.md."""
    counts = Counter(overall(findings) for findings in found.values())
    lines = [
        "# Which models work",
        "",
        textwrap.fill(
            f"This page lists every causal LM family of transformers {transformers.__version__}, tried with olmoscope "
            f"{olmoscope.__version__}. For each family, a small random model goes through collection (with documents "
            "that share attention, and with documents apart), evaluation and indexing, and its rows and figures are "
            "compared with those of plain transformers. `benchmarks/architectures.py --markdown docs/models.md` writes "
            "this page. In the messages, MODEL stands for the model's name.", 120, break_long_words=False,
            break_on_hyphens=False),
        "",
        textwrap.fill(ADAPTERS, 120, break_long_words=False, break_on_hyphens=False),
        "",
        f"Of {len(found)} families, {counts['right']} work, {counts['in part']} work in part, and {counts['refused']} "
        "are refused, in one line and before anything starts.",
        "",
        "| family | collect | documents apart | evaluate | index |",
        "|---|---|---|---|---|",
        *(f"| `{family}` | " + " | ".join(_cell(findings[command]) for command in COMMANDS) + " |"
          for family, findings in found.items()),
        "",
        "## What is refused, and why",
        "",
        *(f"- {', '.join(commands)}: {reason}\n  {', '.join(f'`{family}`' for family in same)}"
          for (reason, commands), same in _same_reason(found).items()),
        "",
        "## Not tried",
        "",
        *(f"- `{family}`: {reason}." for family, reason in left_out.items()),
    ]
    return "\n".join(lines) + "\n"


def _cell(finding: Finding) -> str:
    return {"right": "yes", "refused": "refused", "wrong": "**wrong**"}[finding.state]


def _same_reason(found: Findings) -> dict[tuple[str, tuple[str, ...]], list[str]]:
    """The families of each reason and the commands that give it."""
    same: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for family, findings in found.items():
        for reason, commands in _by_reason(findings).items():
            same.setdefault((reason, tuple(commands)), []).append(family)
    return same


def _by_reason(findings: dict[str, Finding]) -> dict[str, list[str]]:
    """The commands that give each reason."""
    found: dict[str, list[str]] = {}
    for command, finding in findings.items():
        if finding.reason:
            found.setdefault(finding.reason, []).append(command)
    return found
