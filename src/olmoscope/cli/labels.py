"""The command that labels features."""

from pathlib import Path
from typing import Annotated

import typer

from olmoscope.errors import UserError
from olmoscope.terminal import say


def label(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help=(
        "A feature index, or a folder with several below it."))],
    features: Annotated[str | None, typer.Option(metavar="LIST", help=(
        "Only these features: numbers and ranges, such as 7,12,100-199."))] = None,
    most: Annotated[int | None, typer.Option("--most", min=1, metavar="N", help=(
        "Only the N most important features: strong ones that are rare come first."))] = None,
    export: Annotated[Path | None, typer.Option("--export", metavar="FILE", help=(
        "Write all proposed labels as JSON lines instead of labelling."))] = None,
    read: Annotated[Path | None, typer.Option("--import", metavar="FILE", help=(
        "Read proposed labels from JSON lines instead of labelling."))] = None,
) -> None:
    """Label features by rules, and score each label on held-out text."""
    from olmoscope.cli import label_tables
    from olmoscope.features.read import FeatureIndex, find_indexes
    from olmoscope.files import write_text
    from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposals
    from olmoscope.labelling.rule_labels import RuleLabeller
    from olmoscope.labelling.run import label_features, most_important, parse_features
    from olmoscope.labelling.text_blocks import TextBlocks

    if features is not None and most is not None:
        raise UserError("--features and --most both say which features: give one of them")
    if export is not None and read is not None:
        raise UserError("--export and --import cannot be given together")
    paths = find_indexes(index)
    if (export is not None or read is not None) and len(paths) > 1:
        raise UserError(f"{index} holds {len(paths)} indexes; give the folder of one: {', '.join(map(str, paths))}")
    for path in paths:
        opened = FeatureIndex(path)
        d_sae = opened.info.sae.d_sae
        proposals = Proposals(path / PROPOSALS_FILE, d_sae)
        if export is not None:
            write_text(export, "".join(proposals.export()))
            say(f"{export}: written")
        elif read is not None:
            say(f"{path / PROPOSALS_FILE}: {proposals.import_lines(_lines(read))} new labels")
        else:
            blocks = TextBlocks(opened)
            labeller = RuleLabeller(blocks)
            chosen = most_important(opened, most) if features is None else parse_features(features, d_sae)
            run = label_features(blocks, labeller, chosen, proposals)
            label_tables.show_labels(opened.info.sae.name, run, [
                one for one in proposals.by(labeller.name, blocks.identity) if one.feature in set(chosen)])
    if export is None and read is None:
        say(f"Read them with `olmoscope browse {index}`.")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
