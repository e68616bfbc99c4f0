"""Where the text of a recipe comes from: a frozen model for each kind of source."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
ChatFormat = Literal["plain", "chatml", "template"]
"""How messages become text: `role: content` paragraphs, ChatML (`<|im_start|>role`, `<|im_end|>`), or the chat template
of the recipe's model."""


class Frozen(BaseModel):
    """Part of a recipe: it cannot be changed, and an unknown key is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DolmaSource(Frozen):
    """Text in Dolma's format: one JSON object per line with `text` (and `id`), `.json.gz`, `.jsonl` or `.zst`."""

    kind: Literal["dolma"]
    """Which kind of source this is."""
    name: str
    """What the mixture, the store and its figures call this source."""
    paths: list[str] = []
    """Local files or globs."""
    url_list: str | None = None
    """A list of shard addresses, one per line: a local file, an http(s) address or `hf://datasets/OWNER/NAME/FILE`."""


class _Tables(Frozen):
    """Files of rows: parquet, or JSON lines (`.jsonl` and the other suffixes of Dolma's files)."""

    kind: str
    """Which kind of source this is."""
    name: str
    """What the mixture, the store and its figures call this source."""
    paths: list[str] = []
    """Local files or globs."""
    repo: str | None = None
    """A hub dataset repository, `OWNER/NAME`, whose files match `files`."""
    revision: str | None = None
    """A branch, tag or commit of the repository."""
    files: str = "data/*.parquet"
    """A glob over the files of `repo`."""
    format: ChatFormat = "plain"
    """How messages become text."""


class ChatSource(_Tables):
    """Chats: a column of lists of messages, `{role, content}` or ShareGPT's `{from, value}`, possibly as JSON."""

    kind: Literal["chat"]
    """Which kind of source this is."""
    column: str | None = None
    """null: `messages` or, if there is no such column, `conversations` or `conversation`."""


class TableSource(_Tables):
    """A column of texts (`format` says how any chats in it become text)."""

    kind: Literal["table"]
    """Which kind of source this is."""
    column: str = "text"
    """The column of texts."""


class HubSource(Frozen):
    """Any dataset on the hub, streamed through the `datasets` library."""

    kind: Literal["hub"]
    """Which kind of source this is."""
    name: str
    """What the mixture, the store and its figures call this source."""
    repo: str
    """The dataset, `OWNER/NAME`."""
    config: str | None = None
    """Its configuration, if it has several."""
    split: str = "train"
    """Its split."""
    revision: str | None = None
    """A branch, tag or commit of the repository."""
    column: str | None = "text"
    """null: `text` or, if there is no such column, a column of chats."""
    format: ChatFormat = "plain"
    """How messages become text, if the column holds chats."""


class FilesSource(Frozen):
    """Plain text files, one document each."""

    kind: Literal["files"]
    """Which kind of source this is."""
    name: str
    """What the mixture, the store and its figures call this source."""
    paths: list[str]
    """Local files or globs."""


Source = Annotated[DolmaSource | ChatSource | TableSource | HubSource | FilesSource, Field(discriminator="kind")]

ADDED_KEYS: dict[str, dict[str, Any]] = {"chat": {"column": None}, "hub": {"format": "plain"}}
"""Keys that are newer than the first stores with their kind of source, and the values that mean the old behaviour."""
