"""docs/data.md: its rows are read in the format they stand beside, and what it says is refused is refused so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from a1q.data.formats import FORMATS, decide
from a1q.data.records import records
from tests.cli.support import ROOT, a1q
from tests.tiny import tiny_folder

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \|.*\| `(\{.*\})` \|$", PAGE, re.MULTILINE))
RECIPE = """\
a1q: 1
name: bad
model: {{source: {model}}}
data:
{data}
stages:
  - kd: {{data: d, cache: {{sequences: 4, tune_sequences: 2, top_k: 4, random_negatives: 4}}}}
"""


def test_every_format_has_a_row_that_is_read_as_such(tmp_path: Path) -> None:
    assert set(ROWS) == {"text", *FORMATS}
    for name, row in ROWS.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(row + "\n")
        (record,) = records({"source": str(path), "format": name})
        assert bool(record.text) == (name == "text") and bool(record.messages) == (name != "text")
        found = decide(json.loads(row))
        assert found == ("sharegpt" if name == "openhermes" else name)
        assert next(iter(records({"source": str(path), "format": "auto"}))) == record


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has no chat template."""
    return tiny_folder(tmp_path_factory.mktemp("plain") / "model")


def parquet(rows: list[dict]) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


QA = b'{"question": "Why?", "answer": "So."}\n' * 50
CASES: dict[str, tuple[str, bytes, str, int, str]] = {
    "columns": ("a.jsonl", b'{"title": "x"}\n', "{source: FILE}", 3, "found are title"),
    "format": (
        "a.jsonl",
        b'{"instruction": "Add.", "response": "3"}\n',
        "{source: FILE, format: alpaca}",
        3,
        "columns found are instruction, response; such rows are `format: dolly`",
    ),
    "message": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": null}]}\n',
        "{source: FILE}",
        3,
        "holds nothing",
    ),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "{source: FILE}", 3, "half of a surrogate pair"),
    "encoding": ("a.jsonl", b'{"text": "x\xff"}\n', "{source: FILE}", 3, "a.jsonl:1 is not UTF-8: byte 11 is 0xff"),
    "a later row": ("a.jsonl", b'{"text": "x"}\n{"texts": "x"}\n', "{source: FILE}", 1, "a.jsonl:2 has no column"),
    "later bytes": ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "{source: FILE}", 1, "a.jsonl:2 is not UTF-8"),
    "json": ("a.jsonl", b'{"text": "x"}\n{"te\n', "{source: FILE}", 1, "a.jsonl:2 is not JSON"),
    "parquet": ("a.parquet", parquet([{"text": "x y z"}] * 99)[:-40], "{source: FILE}", 3, "is no whole Parquet file"),
    "fields": ("a.csv", b"text,id\nx,1\ny\n", "{source: FILE}", 1, "a.csv:3 has another number of fields"),
    "empty file": ("a.jsonl", b"", "{source: FILE}", 3, "a.jsonl holds no text"),
    "empty text": ("a.txt", b" \n\n \n", "{source: FILE}", 3, "a.txt holds no text"),
    "short": ("a.jsonl", QA, "{source: FILE, seq_len: 1024}", 1, "has text for"),
    "missing": ("a.jsonl", QA, "{source: FILES}", 3, "no file or folder"),
    "no data": ("a.png", b"x", "{source: FILE}", 3, "holds no text that a1q reads"),
    "builtin": ("a.jsonl", QA, "{source: 'builtin:prosa'}", 3, "did you mean builtin:prose?"),
    "thinking": ("a.jsonl", QA, "{source: FILE, thinking: both}", 3, "knows no thinking"),
    "template": ("a.jsonl", QA, "{source: FILE}", 3, "has no chat template"),
    "thinking of text": (
        "a.txt",
        b"Text.",
        "{source: FILE, thinking: off}",
        3,
        "a.txt is running text name the format of its conversations",
    ),
    "column": ("a.jsonl", QA, "{source: FILE, format: qa, column: answer}", 2, "the one that running text stands in"),
    "value": ("a.jsonl", QA, "{source: FILE, format: alpacca}", 2, "did you mean 'alpaca'?"),
    "neither": ("a.jsonl", QA, "{seq_len: 64}", 2, "this one has neither"),
    "nested mix": (
        "a.jsonl",
        QA,
        "{mix: {e: 1, f: 1}}\n  e: {source: FILE}\n  f: {mix: {e: 1, g: 1}}\n  g: {source: FILE}",
        2,
        "'f' is a mix itself",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_gives_its_message_and_exit_code_and_leaves_nothing(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("A1Q_HOME", str(home))
    file, content, entry, code, message = CASES[name]
    (tmp_path / file).write_bytes(content)
    model = plain if name == "template" else "builtin:pico"
    data = f"  d: {entry.replace('FILES', 'nothing/here.jsonl').replace('FILE', str(tmp_path / file))}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, data=data))
    result = a1q("run", recipe, "-o", tmp_path / "run")
    said = " ".join(result.output.split())
    assert result.exit_code == code and message in said and "Traceback" not in said, said
    store = home / "store"
    assert not store.exists() or not any(path.is_file() for path in store.rglob("*"))
    waiting = home / "tmp"
    assert not waiting.exists() or not any(path.is_file() for path in waiting.rglob("*"))


def test_what_auto_takes_a_file_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    (tmp_path / "a.jsonl").write_bytes(QA * 40)
    (tmp_path / "b.txt").write_text("Some text.")
    data = (
        f"  d: {{mix: {{chats: 3, prose: 1}}}}\n  chats: {{source: {tmp_path / 'a.jsonl'}}}\n"
        f"  prose: {{source: {tmp_path / 'b.txt'}}}\n  e: {{source: {tmp_path / 'a.jsonl'}, format: qa, seq_len: 16}}"
    )
    recipe = tmp_path / "recipe.yaml"
    stages = RECIPE.format(model="builtin:pico", data=data) + "  - calibrate: {data: e, sequences: 1}\n"
    recipe.write_text(stages)
    planned = a1q("plan", recipe).output
    assert "  data d: a mix of chats 3, prose 1\n" in planned
    assert f"  data e: {tmp_path / 'a.jsonl'}, conversations (`qa`)\n" in planned
    recipe.write_text(stages.replace("data: d", "data: chats"))
    planned = a1q("plan", recipe).output
    assert f"  data chats: {tmp_path / 'a.jsonl'}, conversations (`qa`), by the columns of its first row\n" in planned
    said = a1q("run", recipe, "-o", tmp_path / "run").output
    assert said.count("is read as") == 1
    assert "a1q: data.chats is read as conversations (`qa`), by the columns of its first row" in said
