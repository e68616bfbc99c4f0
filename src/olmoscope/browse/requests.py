"""Checked requests: the list that an address describes, and the bodies that the page sends."""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from olmoscope.browse.collection import Listing
from olmoscope.errors import UserError
from olmoscope.features.labels import LONGEST
from olmoscope.features.table import Filters, Sort

PAGE = 50
"""Lines per page of the list, if the address does not say."""


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


B = TypeVar("B", bound=_Body)


class LabelBody(_Body):
    """A label and a note to write."""

    label: Annotated[str, Field(max_length=LONGEST)]
    note: Annotated[str, Field(max_length=LONGEST)] = ""
    author: Annotated[str, Field(max_length=200)] = ""


class ImportBody(_Body):
    """Exported labels."""

    lines: str


class PromptBody(_Body):
    """A text to read."""

    text: Annotated[str, Field(max_length=100_000)]


class EditBody(_Body):
    """A feature to steer by."""

    feature: Annotated[int, Field(ge=0)]
    mode: Literal["add", "clamp"]
    strength: Annotated[float, Field(ge=-1000, le=1000)]
    """In units of the feature's typical activation: its mean where it fires."""


class SteerBody(_Body):
    """A text to continue, with and without edits."""

    text: Annotated[str, Field(max_length=100_000)]
    edits: Annotated[list[EditBody], Field(max_length=20)]
    tokens: Annotated[int, Field(ge=1, le=512)] = 60
    temperature: Annotated[float, Field(ge=0, le=5)] = 0.8
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class VerdictBody(_Body):
    """A person's verdict on a proposed label; null withdraws it."""

    verdict: Literal["accepted", "rejected"] | None


class ListQuery(BaseModel):
    """The part of an address that describes a list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sort: Sort = "telling"
    descending: bool = True
    search: Annotated[str, Field(max_length=4000)] = ""
    min_density: float | None = None
    max_density: float | None = None
    min_max: float | None = None
    max_max: float | None = None
    dead: bool | None = None
    labelled: bool | None = None
    min_score: float | None = None
    token: Annotated[str, Field(max_length=4000)] | None = None
    promoted: Annotated[str, Field(max_length=4000)] | None = None
    source: str | None = None
    offset: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=1, le=500)] = PAGE

    def listing(self) -> Listing:
        """The list itself, without the choice of a page."""
        filters = Filters(min_density=self.min_density, max_density=self.max_density,
                          min_max=self.min_max, max_max=self.max_max, dead=self.dead, token=self.token,
                          promoted=self.promoted, source=self.source)
        return Listing(self.sort, self.descending, filters, self.search.strip(), self.labelled, self.min_score)


def parse_query(query: Mapping[str, str]) -> ListQuery:
    """Raises UserError: an unknown key, or a value that is not of its kind."""
    try:
        return ListQuery.model_validate(dict(query))
    except ValidationError as error:
        raise UserError(f"the address is wrong: {explain(error)}") from error


def parse_body(kind: type[B], body: bytes) -> B:
    """Raises UserError: the body is not JSON, or not of the expected kind."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise UserError(f"the request is wrong: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """The first mistake, in one line."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])
