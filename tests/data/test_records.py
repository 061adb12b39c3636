import json
from pathlib import Path

import pytest

from a1q.data import documents, identify, prepare
from a1q.data.records import records
from a1q.errors import MismatchError, StageError


def write_lines(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(source: str, **options) -> list[str]:
    return [record.text for record in records({"source": source, **options})]


def test_json_lines_with_the_usual_and_with_a_named_column(tmp_path: Path):
    rows = [{"text": "one", "other": "eins"}, {"text": " "}, {"text": "zwei ü", "other": "two"}]
    source = write_lines(tmp_path / "a.jsonl", rows)
    assert texts(source) == ["one", "zwei ü"]
    rows.pop(1)
    assert texts(write_lines(tmp_path / "a.jsonl", rows), column="other") == ["eins", "two"]


def test_empty_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}\n')
    assert texts(str(tmp_path / "a.jsonl")) == ["one", "two"]


def test_a_folder_of_all_kinds(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    write_lines(tmp_path / "set" / "b.jsonl", [{"text": "from lines"}])
    (tmp_path / "set" / "deep").mkdir()
    (tmp_path / "set" / "deep" / "c.txt").write_text("first\n\nsecond " + "x" * 2000 + "\n\nthird\n")
    (tmp_path / "set" / "ignored.csv").write_text("no")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["from parquet"]}), tmp_path / "set" / "a.parquet")
    assert texts(str(tmp_path / "set")) == ["from parquet", "from lines", "first\n\nsecond " + "x" * 2000, "third"]


def test_questions_and_conversations(tmp_path: Path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"question": "Why?", "answer": "So."},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    ]
    source = write_lines(tmp_path / "a.jsonl", rows)
    found = [[dict(message) for message in record.messages] for record in records({"source": source})]
    assert found[0] == [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert found[2] == rows[2]["messages"]
    assert found == [[dict(m) for m in record.messages] for record in records({"source": source, "format": "qa"})]
    assert all(documents({"source": source, "holdout": 1e-9}, "train"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', r"a\.jsonl:2 is not UTF-8: byte 10 is 0xff"),
        (b'{"text": ', r"a\.jsonl:2 is not JSON"),
        (b"[" * 100_000, r"a\.jsonl:2 is not JSON"),
        (b"[1]", r"a\.jsonl:2 is not a JSON object"),
        (b'{"text": "x \\ud800"}', r"a\.jsonl:2: half of a surrogate pair, '\\ud800', at character 2"),
        (b'{"question": "\\udfff", "answer": "x"}', r"a\.jsonl:2: half of a surrogate pair"),
        (b'{"txt": "x", "id": 1}', r"a\.jsonl:2 has no column .*columns found are txt, id; did you mean `column: txt`"),
        (b'{"text": 5}', r"a\.jsonl:2: column 'text' holds no text but int"),
        (b"{}", r"the columns found are none"),
        (b'{"messages": "x"}', r"a\.jsonl:2: not a list of messages"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(StageError, match=message):
        texts(str(tmp_path / "a.jsonl"))


def test_a_missing_named_column_is_named(tmp_path: Path):
    source = write_lines(tmp_path / "a.jsonl", [{"body": "x", "contents": "y"}])
    with pytest.raises(
        StageError, match=r"no column 'content', which .*; the columns found are body, contents; .*contents"
    ):
        texts(source, column="content")


def test_text_that_is_not_utf8_and_a_cut_parquet_file_are_named(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(StageError, match=r"a\.txt is not UTF-8: byte 3 is 0xe9"):
        texts(str(tmp_path / "a.txt"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(StageError, match=r"a\.parquet is no whole Parquet file"):
        texts(str(tmp_path / "a.parquet"))


def test_a_missing_file_names_the_nearest(tmp_path: Path):
    write_lines(tmp_path / "alpaca.jsonl", [])
    with pytest.raises(MismatchError, match=r"no file or folder .*alpacca\.jsonl\n.*did you mean .*alpaca\.jsonl"):
        prepare({"source": str(tmp_path / "alpacca.jsonl")})


def test_what_holds_no_text_is_refused(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"")
    for source in (tmp_path, tmp_path / "a.bin"):
        with pytest.raises(MismatchError, match=r"holds no text that a1q reads"):
            prepare({"source": str(source)})


def test_the_digest_is_of_content_not_place(tmp_path: Path):
    one = write_lines(tmp_path / "x" / "a.jsonl", [{"text": "one"}])
    two = write_lines(tmp_path / "y" / "b.jsonl", [{"text": "one"}])
    assert prepare({"source": one}) == prepare({"source": two}) == identify({"source": one})
    write_lines(tmp_path / "y" / "b.jsonl", [{"text": "two"}])
    assert prepare({"source": one}) != prepare({"source": two})
    assert prepare({"source": str(tmp_path / "x")}) != prepare({"source": str(tmp_path / "y")})
    plain = write_lines(tmp_path / "z" / "a.jsonl", [{"text": "one"}]).replace(".jsonl", ".txt")
    (tmp_path / "z" / "a.jsonl").rename(plain)
    assert prepare({"source": plain}) != prepare({"source": one})  # read as text it is another text


@pytest.mark.parametrize("source", ["someone/some-data-set", "squad"])
def test_an_unreachable_hub_names_what_works_offline(source: str, monkeypatch: pytest.MonkeyPatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'someone' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert identify({"source": source}) == ""
    with pytest.raises(MismatchError, match=r"Couldn't reach(.|\n)*builtin:prose") as caught:
        prepare({"source": source})
    assert caught.value.exit_code == 3


def test_a_hub_data_set_is_read_by_split_revision_and_column(monkeypatch: pytest.MonkeyPatch):
    import datasets

    calls = []

    def load(source, **options):
        calls.append((source, options))
        return datasets.Dataset.from_dict({"review": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    entry = {"source": "a/b", "split": "validation", "revision": "v1", "column": "review"}
    assert [record.text for record in records(entry)] == ["one", "two"]
    assert calls == [("a/b", {"split": "validation", "revision": "v1"})]
    assert len(prepare(entry)) == 64


def test_importing_the_data_package_is_light():
    import subprocess
    import sys

    code = "import a1q.data, sys; print(sorted({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
