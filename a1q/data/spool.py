"""Documents kept aside, in memory while they are few and in a file when they are many, and given back by number."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable
from types import TracebackType
from typing import IO

from a1q.data.records import Record
from a1q.engine.files import home

HELD = 64 << 20
"""Characters held in memory; from then on a file in `$A1Q_HOME/tmp` holds them, which goes with the process."""


class Spool:
    """Records by number, in the order they came; a context manager that lets go of the file.

    A file beside the store, not in the system's temporary folder, which is memory on many machines.
    """

    def __init__(self, records: Iterable[Record]):
        self._held: list[Record] = []
        self._file: IO[bytes] | None = None
        self._places, self._begins = array("d"), array("Q", [0])
        size = 0
        try:
            for record in records:
                if self._file is not None:
                    self._write(self._file, record)
                    continue
                self._held.append(record)
                size += len(record.text) + sum(len(text) for message in record.messages for text in message.values())
                if size > HELD:
                    self._spill()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._held) if self._file is None else len(self._places)

    def __getitem__(self, number: int) -> Record:
        if self._file is None:
            return self._held[number]
        begin = self._begins[number]
        self._file.seek(begin)
        text, messages = json.loads(self._file.read(self._begins[number + 1] - begin))
        return Record(self._places[number], text, tuple(messages))

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def _spill(self) -> None:
        folder = home() / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        for record in self._held:
            self._write(self._file, record)
        self._held.clear()

    def _write(self, file: IO[bytes], record: Record) -> None:
        content = json.dumps([record.text, [dict(message) for message in record.messages]]).encode("ascii")
        file.write(content)
        self._places.append(record.place)
        self._begins.append(self._begins[-1] + len(content))
