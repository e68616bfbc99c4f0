"""Chats become text: rendering messages, and reading them from parquet shards."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from olmoscope.errors import UserError
from olmoscope.text.row import Malformed, Row, checked

Format = Literal["plain", "chatml"]

_BATCH_ROWS = 128
"""Rows decoded at once: chats run to many thousand characters, and a row group may hold thousands of chats."""


def render(messages: Sequence[dict[str, Any]], format: Format) -> str:
    """One text from a chat.

    Args:
        messages: mappings with the texts `role` and `content`.
        format: `plain` gives `role: content` paragraphs; `chatml` gives `<|im_start|>role`, the content and
            `<|im_end|>` for each message.
    """
    if format == "plain":
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)


def row_of_messages(messages: object, row_id: object, fallback_id: str, format: Format) -> Row | Malformed:
    """A row from what should be a list of messages.

    A message whose content is null (a bare tool call, say) is rendered with an empty one. A chat in which nobody
    says anything is an empty text.
    """
    if not isinstance(messages, list):
        return Malformed("messages is missing" if messages is None else "messages is not a list")
    said = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            return Malformed(f"message {number} is not a mapping")
        role, content = message.get("role"), message.get("content", Ellipsis)
        content = "" if content is None else content
        if not isinstance(role, str) or not isinstance(content, str):
            return Malformed(f"message {number} lacks a text as its {'content' if isinstance(role, str) else 'role'}")
        said.append({"role": role, "content": content})
    silent = all(not message["content"].strip() for message in said)
    return checked("" if silent else render(said, format), row_id, fallback_id)


def read(path: Path, name: str, start: int, format: Format) -> Iterator[Row | Malformed]:
    """The chats of a parquet shard: the column `messages`, and `id` if there is one.

    Args:
        path: the shard.
        name: what ids call it: a row without an `id` gets `name:row`, counted from 1.
        start: rows to pass over; row groups before it are not read.

    Raises:
        UserError: the file is absent, is not parquet, is damaged, or has no column `messages`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "messages" not in columns:
                raise UserError(f"{path} has no column `messages` (it has {', '.join(columns)}); "
                                "for other columns use a source of kind hub")
            first, before = 0, 0
            while first < file.num_row_groups and before + file.metadata.row_group(first).num_rows <= start:
                before += file.metadata.row_group(first).num_rows
                first += 1
            wanted = ["messages", "id"] if "id" in columns else ["messages"]
            row = before
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=list(range(first, file.num_row_groups)),
                                           columns=wanted):
                for index in range(max(0, start - row), batch.num_rows):
                    yield _row(batch, index, f"{name}:{row + index + 1}", format)
                row += batch.num_rows
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({str(error).strip().splitlines()[0]}); if it is damaged, "
                        "delete it and fetch it again") from error


def _row(batch: Any, index: int, fallback_id: str, format: Format) -> Row | Malformed:
    try:
        values = {column: batch.column(column)[index].as_py() for column in batch.schema.names}
    except UnicodeDecodeError as error:
        return Malformed(f"not UTF-8: {error.reason}")
    return row_of_messages(values["messages"], values.get("id"), fallback_id, format)
