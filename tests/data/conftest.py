"""A home of its own for every test, and one built-in text made of a few written modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.text import sentence


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`$A1Q_HOME`, empty."""
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library of 60 modules; importing any of them would raise."""
    folder = tmp_path / "library"
    folder.mkdir()
    for number in range(60):
        text = f'"""{sentence(number)}"""\n\ndef call_{number}(a, b):\n    """{sentence(1000 + number)}"""\n\n'
        (folder / f"mod{number}.py").write_text(text + 'raise RuntimeError("imported")\n', encoding="utf-8")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})
    return folder
