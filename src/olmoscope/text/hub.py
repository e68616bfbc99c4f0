"""Any dataset on the hub, streamed through the `datasets` library, shard by shard.

A position is a shard and a row in it, as for files. Going on inside a shard passes over the rows before it, for which
`datasets` reads the shard from its start again; its own `state_dict` does the same.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.recipe_sources import HubSource
from olmoscope.text.chat import row_of_messages
from olmoscope.text.hub_files import explained
from olmoscope.text.row import Malformed, Row, checked


class HubDataset:
    """A split of a dataset on the hub (or of a local folder that `datasets` can load).

    Raises:
        UserError: no network, no such dataset, configuration, split or column.
    """

    def __init__(self, source: HubSource) -> None:
        from datasets import load_dataset
        from huggingface_hub import constants

        self._source = source
        self._address = f"source {source.name}: dataset {source.repo}"
        if constants.HF_HUB_OFFLINE and not Path(source.repo).is_dir():
            raise UserError(f"{self._address} is read from the hub as it goes, which HF_HUB_OFFLINE forbids: unset it, "
                            "or download the data set and give its folder")
        with explained(self._address, source.repo, source.revision):
            try:
                self._dataset: Any = load_dataset(source.repo, source.config, split=source.split,
                                                  revision=source.revision, streaming=True)
            except ValueError as error:  # what `datasets` raises for an unknown configuration or split
                raise UserError(f"{self._address}: {_first_line(error)}") from error
        columns = self._dataset.column_names
        if columns is not None and source.column not in columns:
            raise UserError(f"{self._address} has no column {source.column!r}; it has {', '.join(columns)}")
        if columns is not None:
            self._dataset = self._dataset.select_columns([source.column] + ["id"] * ("id" in columns))
        self.shards: int = self._dataset.num_shards

    def read(self, shard: int, start: int) -> Iterator[Row | Malformed]:
        """The rows of a shard from row `start` on; a row without an `id` gets `repo/shard:row`, counted from 1.

        The column may hold texts, or chats (a list of `{role, content}`), which become `role: content` paragraphs.

        Raises:
            UserError: the connection fails, or the data cannot be read.
        """
        rows = iter(self._dataset.shard(num_shards=self.shards, index=shard).skip(start))
        number = start
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
            number += 1
            yield self._row(values, f"{self._source.repo}/{shard}:{number}")

    def _row(self, values: dict[str, Any], fallback_id: str) -> Row | Malformed:
        value = values.get(self._source.column)
        if isinstance(value, list):
            return row_of_messages(value, values.get("id"), fallback_id, "plain")
        return checked(value, values.get("id"), fallback_id)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
