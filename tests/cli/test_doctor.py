"""`a1q doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from a1q.cli.doctor import _devices
from tests.cli.support import a1q


def test_every_part_of_the_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    shown = a1q("doctor")
    assert shown.exit_code == 0, shown.output
    for text in ("processor", "torch", "device cpu", "Core ML", str(tmp_path / "home"), "Hub cache"):
        assert text in shown.output
    assert "bf16 instructions: " in shown.output
    facts = json.loads(a1q("doctor", "--json").output)
    assert {"device cpu", "disk of store", "Hub cache"} <= {item["what"] for item in facts}
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("set_to", "ok", "text"), [("1", True, "CPU fallback on"), ("0", False, "set PYTORCH_ENABLE_MPS_FALLBACK=1")]
)
def test_a_mac_is_told_of_the_fallback(monkeypatch: pytest.MonkeyPatch, set_to: str, ok: bool, text: str) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", set_to)
    (fact,) = [item for item in _devices() if item[1] == "device mps"]
    assert fact[0] is ok and text in fact[2]


@pytest.mark.parametrize(("has", "text"), [(True, "yes"), (False, "no, so `amp: bf16` is slow"), (None, "not known")])
def test_bf16_instructions_of_the_processor(monkeypatch: pytest.MonkeyPatch, has: bool | None, text: str) -> None:
    monkeypatch.setattr("a1q.recipe.runtime.multiplies_bf16", lambda: has)
    assert _devices()[0][2].endswith(f"bf16 instructions: {text}")
