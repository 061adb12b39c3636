"""Rows of every kind of file are the same rows, and what is damaged is named by place."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.data.tables import rows_of_path
from a1q.errors import MismatchError, StageError

ROWS = [{"question": "Why, then?", "answer": 'So "it"\nis.'}, {"question": "Är det så?", "answer": ""}]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as handle:
            table = csv.DictWriter(handle, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path: Path) -> list[dict]:
    return [dict(row) for _, row in rows_of_path(path)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_are_the_same_whatever_holds_them(tmp_path: Path, suffix: str) -> None:
    assert read(write(tmp_path / f"set{suffix}", ROWS)) == ROWS


@given(
    st.lists(st.fixed_dictionaries({"a": st.text(st.characters(codec="utf-8", exclude_characters="\r\0"))}), min_size=1)
)
@settings(max_examples=40)
def test_csv_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    rows = [{"b": "x", **row} for row in rows]
    assert read(write(tmp_path_factory.mktemp("csv") / "a.csv", rows)) == rows


def test_a_list_may_stand_under_a_key(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read(tmp_path / "a.json") == ROWS


def test_of_a_folder_what_tells_about_the_data_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", ROWS[:1])
    write(tmp_path / "a.parquet", ROWS[1:])
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", "state.json", "picture.png"):
        (tmp_path / name).write_text("no data")
    assert read(tmp_path) == ROWS[::-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv:3 has another number of fields than the header, which has a, b"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2 has another number of fields"),
        ("a.csv", b'a,b\n"1" x,2\n', r"a\.csv:2 is not CSV"),
        ("a.csv", b'a,b\n"1,2\n', r"a\.csv:2 is not CSV"),
        ("a.csv", b"a\nx\xff\n", r"a\.csv:2 is not UTF-8: byte 1 is 0xff"),
        ("a.json", b'{"a": 1}', r"a\.json is no list of JSON objects; objects line by line belong in a \.jsonl file"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}\n', r"a\.json is not JSON"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json, row 2 is not a JSON object"),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StageError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_a_truncated_parquet_file_is_named(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "a.parquet", ROWS * 50)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(StageError, match=r"a\.parquet is no whole Parquet file"):
        read(path)


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(MismatchError, match="holds no text that a1q reads"):
        read(tmp_path)
