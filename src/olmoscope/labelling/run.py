"""Label features and keep each label as soon as it is scored, so that a killed run can continue where it stopped."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

from olmoscope.errors import UserError
from olmoscope.features.read import FeatureIndex
from olmoscope.labelling.budget import BudgetSpentError
from olmoscope.labelling.clamp import Clamping
from olmoscope.labelling.examples import FeatureExamples, TooFew, examples_of
from olmoscope.labelling.labeller import Labelled, Labeller, NotLabelled
from olmoscope.labelling.proposals import Proposals
from olmoscope.labelling.text_blocks import TextBlocks
from olmoscope.progress import bar


@dataclass(frozen=True)
class Run:
    """What a run of a labeller did.

    Attributes:
        labeller: its name.
        asked: the number of features requested.
        before: how many of these were done before.
        labelled: how many have a label now.
        without: features without one, by reason.
        out_of_budget: whether the budget ended the run before its last feature.
    """

    labeller: str
    asked: int
    before: int
    labelled: int
    without: dict[str, int]
    out_of_budget: bool = False


Room = Callable[[Sequence[FeatureExamples], FeatureExamples], bool]
"""Whether a budget has room for another feature beside those that are being labelled."""


def most_important(index: FeatureIndex, most: int | None = None) -> list[int]:
    """Features by importance, so that a small run labels what people look at: by the largest activation times −log
    density, as in the list of features (`Sort`: `telling`). Dead features are left out."""
    dead = index.info.dead
    order = index.order("telling")
    return [int(feature) for feature in order[: len(order) - dead][:most]]


def parse_features(text: str, d_sae: int) -> list[int]:
    """Numbers of features from a text such as `7,12,100-199`, in the order given.

    Raises:
        UserError: the text is not of this form, or there is no such feature.
    """
    features: list[int] = []
    for piece in text.split(","):
        first, _, last = piece.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise UserError(f"--features {text}: {piece.strip()!r} is not a feature; give numbers and ranges, such as "
                            "7,12,100-199")
        features += range(int(first), int(last or first) + 1)
    for feature in features:
        if feature >= d_sae:
            raise UserError(f"--features {text}: there is no feature {feature}: the SAE has features 0 to {d_sae - 1}")
    return list(dict.fromkeys(features))


def label_features(blocks: TextBlocks, labeller: Labeller, features: Sequence[int], proposals: Proposals, *,
                   at_once: int = 1, room: Room = lambda running, one: True, clamping: Clamping | None = None) -> Run:
    """Label features that the labeller has not done yet, in their order, and keep each label as soon as it is scored.

    Args:
        at_once: how many features to label at a time; more than one only if several threads may use the labeller.
        room: the run ends before a feature that does not fit into the budget even alone.
        clamping: also scores labels by what clamping the feature does; labels that were made without it are made again.
            None: not measured.

    Raises:
        UserError: from the labeller; finished labels are kept.
    """
    split = blocks.identity
    done = proposals.done(labeller.name, split, clamped=clamping is not None)
    left = [feature for feature in features if feature not in done]
    passing: Counter[str] = Counter()
    running: dict[Future[Labelled | NotLabelled], FeatureExamples] = {}
    out_of_budget = False

    def finish_some() -> bool:
        """Keep finished labels; return whether the budget is spent."""
        spent = False
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            feature = running.pop(future).feature.index
            try:
                found = future.result()
            except BudgetSpentError:
                spent = True
                continue
            if isinstance(found, Labelled):
                proposals.add(feature, found, labeller.name, split)
            elif found.lasting:
                proposals.add_reason(feature, found.reason, labeller.name, split)
            else:
                passing[found.reason] += 1
            advance(1)
        return spent

    with bar(f"labels by {labeller.name}"[:40], len(left), "features") as advance, _workers(at_once) as workers:
        for feature in left:
            examples = examples_of(blocks, feature, clamping)
            if isinstance(examples, TooFew):
                proposals.add_reason(feature, examples.reason, labeller.name, split)
                advance(1)
                continue
            while running and (len(running) >= at_once or not room([*running.values()], examples)):
                out_of_budget |= finish_some()
            if out_of_budget or not room([], examples):
                out_of_budget = True
                break
            running[workers.submit(labeller.label, examples)] = examples
        while running:
            out_of_budget |= finish_some()
    wanted = set(features)
    labelled = {one.feature for one in proposals.by(labeller.name, split)} & wanted
    kept = Counter(reason for feature, reason in proposals.reasons(labeller.name, split).items()
                   if feature in wanted - labelled)
    return Run(labeller.name, len(features), len(features) - len(left), len(labelled), dict(kept + passing),
               out_of_budget)


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that start nothing new once the block has ended in an error."""
    workers = ThreadPoolExecutor(count, thread_name_prefix="label")
    try:
        yield workers
    finally:
        workers.shutdown(wait=False, cancel_futures=True)
