"""Documents mixed from several sources, in an order that the seed decides and that can be resumed anywhere.

Shards wait in queues: one for each source when sources are mixed by weight, a single one for all in `shards` mode.
Each queue is in a seeded order, and each shard is read from its first row to its last. Document i comes from the queue
that the i-th random number picks, so the whole state is i and, for every queue, a shard and a row.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from olmoscope.errors import UserError
from olmoscope.recipe.schema import Split, Text
from olmoscope.seeds import generator
from olmoscope.text.chat import ToText
from olmoscope.text.document import Document
from olmoscope.text.row import Malformed, Row
from olmoscope.text.sources import Source, resolve
from olmoscope.text.split import is_held_out

_log = logging.getLogger(__name__)

_REPORTED = 10
"""How many malformed rows of a source are reported one by one."""

_ENOUGH_ROWS = 100
"""Rows of a source to read before its share of malformed rows is judged, unless it ends sooner."""


@dataclass(slots=True)
class _Queue:
    weight: float
    shards: list[tuple[int, int]]
    """(source, shard), in reading order."""
    shard: int = 0
    """Position in `shards`; their number when the queue is exhausted."""
    row: int = 0
    """Rows read of that shard."""
    ends: dict[int, int] = field(init=False)
    """For each source in the queue, the position at which it is exhausted."""
    rows: Iterator[Row | Malformed] | None = None
    """The rest of the open shard."""

    def __post_init__(self) -> None:
        self.ends = {source: place + 1 for place, (source, _) in enumerate(self.shards)}

    @property
    def exhausted(self) -> bool:
        return self.shard == len(self.shards)


class Mixture:
    """An iterator over the documents of a split.

    A source that has no more documents drops out, and the others continue; `exhausted` names it. Rows without text are
    skipped and counted. So are malformed rows, which are also logged with file and row (from 1): the first ten of a
    source one by one, the others as a total when the source ends.

    Attributes:
        documents, empty, malformed: how many of each there have been so far, by the source's name.
        rows: how many rows were read from each source: these three and the documents of the other split.
        lost: for each source, what its rows say but their texts do not (`Row.lost`), and in how many messages of the
            split's documents.

    Raises:
        UserError: on construction, a source has no files or cannot be listed; on iteration, a shard cannot be
            downloaded or read, too many rows are malformed, or the whole text has no usable document.
    """

    def __init__(self, text: Text, seed: int, split: Split, template: ToText | None = None) -> None:
        """
        Args:
            template: the model's chat template, if a source asks for it (template.py).
        """
        if split == "held_out" and text.held_out_share == 0:
            raise UserError("text.held_out_share is 0, so there are no held-out documents; set it above 0")
        self._text = text
        self._seed = seed
        self._split = split
        self._sources = [resolve(source, template) for source in text.sources]
        names = [source.name for source in self._sources]
        self.rows = dict.fromkeys(names, 0)
        self.documents = dict.fromkeys(names, 0)
        self.empty = dict.fromkeys(names, 0)
        self.malformed = dict.fromkeys(names, 0)
        self.lost: dict[str, dict[str, int]] = {name: {} for name in names}
        self._last_malformed: dict[str, str] = {}
        self._drawn = 0
        self._queues = self._fill_queues()
        self._identity = self._identify()

    @property
    def exhausted(self) -> list[str]:
        """Names of the sources that were read to their end."""
        ended = {number for queue in self._queues for number, end in queue.ends.items() if queue.shard >= end}
        return [source.name for number, source in enumerate(self._sources) if number in ended]

    def __iter__(self) -> "Mixture":
        return self

    def __next__(self) -> Document:
        while live := [queue for queue in self._queues if not queue.exhausted]:
            queue = self._draw(live)
            while not queue.exhausted:
                if (document := self._next_document(queue)) is not None:
                    return document
                self._end_shard(queue)
        if not any(self.documents.values()):
            raise self._nothing_usable()
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """The mixture's position, in a few JSON values."""
        lost = {name: dict(counts) for name, counts in self.lost.items() if counts}
        return {
            "identity": self._identity,
            "drawn": self._drawn,
            "queues": [[queue.shard, queue.row] for queue in self._queues],
            "counts": {name: [self.rows[name], self.documents[name], self.empty[name], self.malformed[name]]
                       for name in self.rows},
        } | ({"lost": lost} if lost else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the position of a `state_dict`, in a mixture with the same arguments.

        Raises:
            UserError: the sources, their files, the weights, the seed or the split are not the same.
        """
        if state["identity"] != self._identity:
            raise UserError("cannot resume: the text (its sources, their files, weights or held-out share), the seed "
                            "or the split differ from those of the run to resume; restore them or start again")
        self._drawn = state["drawn"]
        for queue, (shard, row) in zip(self._queues, state["queues"], strict=True):
            queue.shard, queue.row, queue.rows = shard, row, None
        for name, counts in state["counts"].items():
            self.rows[name], self.documents[name], self.empty[name], self.malformed[name] = counts
            self.lost[name] = dict(state.get("lost", {}).get(name, {}))

    def _fill_queues(self) -> list[_Queue]:
        by_source = [[(number, shard) for shard in range(len(source.names))]
                     for number, source in enumerate(self._sources)]
        if self._text.mixture == "shards":
            contents = [(1.0, [shard for shards in by_source for shard in shards])]
        else:
            contents = [(self._text.mixture[source.name], shards)
                        for source, shards in zip(self._sources, by_source, strict=True)]
        queues = []
        for number, (weight, shards) in enumerate(contents):
            order = generator(self._seed, "order of shards", number).permutation(len(shards))
            queues.append(_Queue(weight, [shards[place] for place in order]))
        return queues

    def _identify(self) -> str:
        """A hash of what decides the documents and their order. Files count by name, not by location."""
        sources = self._text.content or [[source.name, source.names] for source in self._sources]
        value = [self._seed, self._split, self._text.mixture, self._text.held_out_share, sources]
        return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()

    def _draw(self, queues: list[_Queue]) -> _Queue:
        self._drawn += 1
        if len(queues) == 1:
            return queues[0]
        point = generator(self._seed, "source of a document", self._drawn).random() * sum(q.weight for q in queues)
        for queue in queues:
            point -= queue.weight
            if point < 0:
                return queue
        return queues[-1]  # rounding of the sum

    def _next_document(self, queue: _Queue) -> Document | None:
        """The split's next document in the queue's current shard, or None at the shard's end."""
        number, shard = queue.shards[queue.shard]
        source = self._sources[number]
        name = source.name
        if queue.rows is None:
            queue.rows = source.read(shard, queue.row)
        for row in queue.rows:
            queue.row += 1
            self.rows[name] += 1
            if isinstance(row, Malformed):
                self._count_malformed(source, f"{source.addresses[shard]}:{queue.row}: {row.reason}")
            if self.rows[name] >= _ENOUGH_ROWS:
                self._judge(name)
            if isinstance(row, Malformed):
                continue
            if not row.text or row.text.isspace():
                self.empty[name] += 1
                self._count_lost(source, f"{source.addresses[shard]}:{queue.row}", row.lost)
            elif is_held_out(row.id, self._text.held_out_share) == (self._split == "held_out"):
                self.documents[name] += 1
                self._count_lost(source, f"{source.addresses[shard]}:{queue.row}", row.lost)
                return Document(row.text, name, row.id)
        return None

    def _end_shard(self, queue: _Queue) -> None:
        number, _ = queue.shards[queue.shard]
        queue.shard, queue.row, queue.rows = queue.shard + 1, 0, None
        if queue.shard == queue.ends[number]:
            name = self._sources[number].name
            self._judge(name)
            if self.malformed[name] > _REPORTED:
                _log.warning("source %s: %d of %d rows malformed", name, self.malformed[name], self.rows[name])

    def _count_malformed(self, source: Source, what: str) -> None:
        name = source.name
        self.malformed[name] += 1
        self._last_malformed[name] = what
        if self.malformed[name] <= _REPORTED:
            more = "; the rest are only counted" if self.malformed[name] == _REPORTED else ""
            _log.warning("source %s: skipped %s%s", name, what, more)

    def _count_lost(self, source: Source, where: str, lost: tuple[str, ...]) -> None:
        counts = self.lost[source.name]
        for what in lost:
            if what not in counts:
                _log.warning("source %s: %s: the text of a message lacks its %s; such messages are counted",
                             source.name, where, what)
            counts[what] = counts.get(what, 0) + 1

    def _judge(self, name: str) -> None:
        malformed, rows = self.malformed[name], self.rows[name]
        if malformed > self._text.max_bad_share * rows:
            last = f", the last one {self._last_malformed[name]}" if name in self._last_malformed else ""
            raise UserError(f"source {name}: {malformed} of {rows} rows are malformed, over text.max_bad_share "
                            f"({self._text.max_bad_share:.2%}){last}; fix the files or raise max_bad_share")

    def _nothing_usable(self) -> UserError:
        rows, empty, malformed = (sum(counts.values()) for counts in (self.rows, self.empty, self.malformed))
        if other := rows - empty - malformed:
            return UserError(f"text: none of its {other} documents falls into the {self._split} split; change "
                             f"text.held_out_share ({self._text.held_out_share}) or give more text")
        return UserError(f"text: no usable document in {', '.join(self.rows)} ({rows} rows read, {empty} of them "
                         f"empty, {malformed} malformed); give a text that has some")
