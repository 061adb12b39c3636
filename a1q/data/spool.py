"""Documents kept aside, in memory while they are few and in a file when they are many, and given back by number."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable
from types import TracebackType

from a1q.data.records import Record
from a1q.engine.files import home

HELD = 64 << 20
"""Bytes held in memory; from then on a temporary file in `$A1Q_HOME/tmp` holds them, which goes with the process."""


class Spool:
    """Records by number, in the order they came; a context manager that lets go of the file.

    A file beside the store, not in the system's temporary folder, which is memory on many machines.
    """

    def __init__(self, records: Iterable[Record]):
        folder = home() / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        self._file: tempfile.SpooledTemporaryFile[bytes] = tempfile.SpooledTemporaryFile(  # noqa: SIM115
            max_size=HELD, dir=str(folder), prefix="documents-"
        )
        self._places = array("d")
        self._begins = array("Q", [0])
        try:
            for record in records:
                content = json.dumps([record.text, [dict(message) for message in record.messages]])
                self._file.write(content.encode("ascii"))
                self._places.append(record.place)
                self._begins.append(self._file.tell())
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Record:
        begin = self._begins[number]
        self._file.seek(begin)
        text, messages = json.loads(self._file.read(self._begins[number + 1] - begin))
        return Record(self._places[number], text, tuple(messages))

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
