"""The closing table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from a1q.report.summary import summary

STAGE = {"id": "check", "stage": "eval", "cache": "miss", "seconds": 65.0}


def report(**changes: Any) -> dict[str, Any]:
    metrics = {"tokens": 4096, "note": "x", "bpw": 2.9, "kl": 0.0187, "ppl": 13.2, "top1": 0.9, "a": 1, "b": 2}
    base = {"status": "done", "seconds": 70.0, "error": None, "stages": [{**STAGE, "metrics": metrics}], "exports": {}}
    return {**base, **changes}


def test_key_metrics_come_first_and_the_rest_is_counted() -> None:
    text = summary(report(), Path("runs/x"))
    row = " ".join(text.splitlines()[2].split())
    assert row == "check eval miss 1:05 kl 0.0187 ppl 13.2 top1 0.9 bpw 2.9 tokens 4,096 (+2)"
    assert text.splitlines()[-1] == "done after 1:10"


def test_exports_and_the_place_of_a_failure_are_told() -> None:
    text = summary(report(status="failed", running="ane", error="no space", exports={"hf": "export/hf"}), Path("run"))
    assert "export hf: run/export/hf" in text
    assert text.splitlines()[-1] == "failed after 1:10 in stage ane: no space"


def test_a_run_without_a_finished_stage_has_no_table() -> None:
    assert summary(report(stages=[]), Path("run")) == "done after 1:10"


def test_a_place_that_the_error_names_is_told_once() -> None:
    text = summary(report(status="failed", running="ane", error="stage ane: no space"), Path("run"))
    assert text.splitlines()[-1] == "failed after 1:10: stage ane: no space"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    metrics = {"kl_before": 0.0902, "kl_adapter": 0.09002, "adapter_step": 3, "tokens_per_second": 9163}
    stages = [{**STAGE, "metrics": metrics}, {**STAGE, "id": "a_rather_long_id", "metrics": {}}]
    lines = summary(report(stages=stages), Path("run"), width).splitlines()
    assert max(map(len, lines)) <= width
    assert "kl_before 0.0902" in lines[2] and ("(+" in lines[2]) == (width < 120)
