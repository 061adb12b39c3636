"""`a1q doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.support import a1q


def test_every_part_of_the_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    shown = a1q("doctor")
    assert shown.exit_code == 0, shown.output
    for text in ("processor", "torch", "device cpu", "Core ML", str(tmp_path / "home"), "Hub cache"):
        assert text in shown.output
    facts = json.loads(a1q("doctor", "--json").output)
    assert {"device cpu", "disk of store", "Hub cache"} <= {item["what"] for item in facts}
    assert not (tmp_path / "home").exists()
