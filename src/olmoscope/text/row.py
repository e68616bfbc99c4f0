"""What a shard's reader yields: one item per row, in order, so that a row's number is a position to resume from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A readable row. `text` may be empty."""

    id: str
    text: str
    lost: tuple[str, ...] = ()
    """What the source contains but the text lacks, such as `image` or `reasoning`; once for each message that lost it.
    """


@dataclass(frozen=True, slots=True)
class Malformed:
    """A row that cannot be read, and why."""

    reason: str


def checked(text: object, row_id: object, fallback_id: str, lost: tuple[str, ...] = ()) -> Row | Malformed:
    """A row from values of unknown type.

    Args:
        text: should be a string.
        row_id: should be a string or an integer; the fallback replaces None and "".
        fallback_id: an id made of the file's name and the row's number.
        lost: see `Row`.
    """
    if not isinstance(text, str):
        return Malformed("text is missing" if text is None else f"text is of type {type(text).__name__}")
    if row_id is None or row_id == "":
        row_id = fallback_id
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        return Malformed(f"id is of type {type(row_id).__name__}, neither a string nor an integer")
    row = Row(str(row_id), text, lost)
    # JSON can spell half of a surrogate pair, which no encoding (and no tokenizer) accepts.
    for value in (row.id, row.text):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                return Malformed(f"not Unicode text: {error.reason} at character {error.start}")
    return row
