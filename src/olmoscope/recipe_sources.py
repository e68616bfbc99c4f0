"""Where the text of a recipe comes from: a frozen model for each kind of source."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """Part of a recipe: it cannot be changed, and an unknown key is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DolmaSource(Frozen):
    """Text in Dolma's format: one JSON object a line with `text` (and `id`), `.json.gz`, `.jsonl` or `.zst`."""

    kind: Literal["dolma"]
    name: str
    paths: list[str] = []
    """Local files or globs."""
    url_list: str | None = None
    """A list of shard addresses, one a line: a local file, an http(s) address or `hf://datasets/OWNER/NAME/FILE`."""


class ChatSource(Frozen):
    """Chats in parquet shards: a column `messages`, a list of `{role, content}`."""

    kind: Literal["chat"]
    name: str
    paths: list[str] = []
    """Local files or globs."""
    repo: str | None = None
    """A hub dataset repository, `OWNER/NAME`, whose files match `files`."""
    revision: str | None = None
    """A branch, tag or commit of the repository."""
    files: str = "data/*.parquet"
    format: Literal["plain", "chatml"] = "plain"
    """How messages become text: `role: content` paragraphs, or ChatML (`<|im_start|>role`, `<|im_end|>`)."""


class HubSource(Frozen):
    """Any dataset on the hub, streamed through the `datasets` library."""

    kind: Literal["hub"]
    name: str
    repo: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"


class FilesSource(Frozen):
    """Plain text files, one document each."""

    kind: Literal["files"]
    name: str
    paths: list[str]


Source = Annotated[DolmaSource | ChatSource | HubSource | FilesSource, Field(discriminator="kind")]
