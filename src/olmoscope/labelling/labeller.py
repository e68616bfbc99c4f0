"""Who labels a feature: rules learned from the text (rule_labels.py), or a language model (model_labels.py)."""

from dataclasses import dataclass
from typing import Any, Protocol

from olmoscope.labelling.examples import FeatureExamples
from olmoscope.labelling.scores import Scores


@dataclass(frozen=True)
class Labelled:
    """A label, and how well it predicts the feature on held-out text.

    Attributes:
        rule: the label in a form that a program can apply, as JSON; None if it is only words.
    """

    label: str
    scores: Scores
    rule: dict[str, Any] | None = None


@dataclass(frozen=True)
class NotLabelled:
    """Why a feature has no label from a labeller.

    Attributes:
        lasting: whether another attempt would give the same. A temporary failure is not kept, and a later run tries
            again.
    """

    reason: str
    lasting: bool = True


class Labeller(Protocol):
    """Labels features and scores the labels."""

    @property
    def name(self) -> str:
        """Its name, with everything that decides its labels. Each label records it; a later run finds labels by it."""

    def label(self, examples: FeatureExamples) -> Labelled | NotLabelled:
        """The label of a feature."""
