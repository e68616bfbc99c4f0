"""Any dataset on the hub, streamed through the `datasets` library, shard by shard.

A position is a shard and a row in it, as for files. To resume inside a shard, `datasets` reads the shard from its start
again and skips the rows before the position; its own `state_dict` does the same.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.recipe.sources import HubSource
from olmoscope.text.chat import ToText, row_of_chat
from olmoscope.text.hub_files import explained
from olmoscope.text.row import Malformed, Row, checked
from olmoscope.text.table import CHAT_COLUMNS, COLUMNS, column_of


class HubDataset:
    """A split of a dataset on the hub (or of a local folder that `datasets` can load).

    Raises:
        UserError: there is no network, or no such dataset, configuration, split or column.
    """

    def __init__(self, source: HubSource, to_text: ToText) -> None:
        from datasets import load_dataset
        from huggingface_hub import constants

        self._source, self._to_text = source, to_text
        self._address = f"source {source.name}: dataset {source.repo}"
        if constants.HF_HUB_OFFLINE and not Path(source.repo).is_dir():
            raise UserError(f"{self._address} is streamed from the hub, which HF_HUB_OFFLINE forbids: unset it, or "
                            "download the dataset and give its folder")
        with explained(self._address, source.repo, source.revision):
            try:
                self._dataset: Any = load_dataset(source.repo, source.config, split=source.split,
                                                  revision=source.revision, streaming=True)
            except ValueError as error:  # what `datasets` raises for an unknown configuration or split
                raise UserError(f"{self._address}: {_first_line(error)}") from error
        columns = self._columns()
        self._column = source.column if source.column is not None else column_of(columns or [])
        if self._column is None:
            raise UserError(f"{self._address} has none of the columns {', '.join(COLUMNS)}; it has "
                            f"{', '.join(columns or [])}: name one as `column` of a recipe's source of kind hub")
        if columns is not None and self._column not in columns:
            raise UserError(f"{self._address} has no column {self._column!r}; it has {', '.join(columns)}")
        if columns is not None:
            self._dataset = self._dataset.select_columns([self._column] + ["id"] * ("id" in columns))
        self.shards: int = self._dataset.num_shards

    def _columns(self) -> list[str] | None:
        """The dataset's columns. If its format does not name them (JSON lines), those of the first row, or None if the
        source names its column and they do not matter."""
        if (names := self._dataset.column_names) is not None or self._source.column is not None:
            return None if names is None else list(names)
        return list(next(self._rows(0, 0), {}))

    def read(self, shard: int, start: int) -> Iterator[Row | Malformed]:
        """The rows of a shard from row `start` on; a row without an `id` gets `repo/shard:row`, counted from 1.

        The column may hold texts or chats.

        Raises:
            UserError: the connection failed, or the data cannot be read.
        """
        for number, values in enumerate(self._rows(shard, start), start=start + 1):
            yield self._row(values, f"{self._source.repo}/{shard}:{number}")

    def _rows(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        rows = iter(self._dataset.shard(num_shards=self._dataset.num_shards, index=shard).skip(start))
        while True:
            try:
                with explained(self._address, self._source.repo, self._source.revision):
                    values = next(rows, None)
            except UserError:
                raise
            except ValueError as error:  # damaged data: ArrowInvalid, JSONDecodeError, UnicodeDecodeError
                raise UserError(f"{self._address}: {_first_line(error)}") from error
            if values is None:
                return
            yield values

    def _row(self, values: dict[str, Any], fallback_id: str) -> Row | Malformed:
        value = values.get(str(self._column))
        if isinstance(value, list | dict) or self._column in CHAT_COLUMNS:
            return row_of_chat(value, values.get("id"), fallback_id, self._to_text)
        return checked(value, values.get("id"), fallback_id)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
