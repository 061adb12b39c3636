"""Plug-in files that are wrong are told by name, without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from a1q.engine.registry import load_registry
from a1q.errors import UsageError

GOOD = (Path(__file__).parents[1] / "cli" / "numbers.py").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise RuntimeError('boo')", "RuntimeError: boo"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def (", "SyntaxError"),
        ("\0", "null bytes"),
        ("", "defines no stage, scheme or exporter"),
        (GOOD.replace('name = "add"', 'name = "begin"'), "'begin' in a1q.stages: that name is already taken"),
        (GOOD.replace('name = "add"', 'name = "train"'), "'train' in a1q.stages: that name is already taken"),
        (GOOD.replace('"output": "number", "smoke"', '"smoke"'), "'add'.* doesn't name the kind of artifact"),
        (GOOD.replace('"x-a1q": about', '"y-a1q": about'), "'begin'.* doesn't name the kind of artifact"),
        (GOOD.replace('"type": "object"', '"type": "objekt"'), r"no JSON Schema: 'objekt' .* at \$\.type"),
        (GOOD.replace("    die_at: int\n", ""), "'add'.* disagree about die_at"),
        (GOOD.replace("    Config = AddConfig\n", ""), "'add'.* no dataclass `Config`"),
    ],
)
def test_what_is_wrong_with_a_plug_in_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plugin.py").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_registry([tmp_path / "plugin.py"])
    load_registry()


def test_what_a_plug_in_file_prints_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plugin.py").write_text(f"{GOOD}\nprint('hello')\n")
    load_registry([tmp_path / "plugin.py"])
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "hello\n")
    load_registry()
