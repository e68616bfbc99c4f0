"""Who labels a feature: rules learned from the text (rule_labels.py), or a language model (model_labels.py)."""

from dataclasses import dataclass
from typing import Any, Protocol

from olmoscope.labelling.examples import FeatureExamples
from olmoscope.labelling.scores import Scores


@dataclass(frozen=True)
class Labelled:
    """A label, and how well it predicts the feature on held-out text.

    Attributes:
        rule: what it says in a form that a program can apply, as JSON; None: it is words alone.
    """

    label: str
    scores: Scores
    rule: dict[str, Any] | None = None


@dataclass(frozen=True)
class NotLabelled:
    """Why a feature has no label from a labeller.

    Attributes:
        lasting: whether asking again would give the same; a failure that may pass is not kept, and a later run tries
        again.
    """

    reason: str
    lasting: bool = True


class Labeller(Protocol):
    """Labels features and scores the labels."""

    @property
    def name(self) -> str:
        """Who it is, with all that decides its labels: kept with each of them, and what a later run knows them by."""

    def label(self, examples: FeatureExamples) -> Labelled | NotLabelled:
        """The label of a feature."""
