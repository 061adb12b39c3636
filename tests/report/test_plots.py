"""Charts as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from a1q.report.curves import Chart, Line
from a1q.report.plots import draw

pytest.importorskip("matplotlib")


def chart(**options: bool) -> Chart:
    lines = [Line("one", [0, 1, 2], [3.0, 0.2, 1.0]), Line("two", [0, 2], [2.0, 1.5], marked=True)]
    return Chart("example", "An example", "step", "nats", lines, **options)


@pytest.mark.parametrize("options", [{}, {"logarithmic": True}, {"steps": True}, {"zero": False}])
def test_equal_charts_are_equal_files(tmp_path: Path, options: dict[str, bool]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths = draw(chart(**options), tmp_path / name, ("png", "svg"))
        assert [path.name for path in paths] == ["example.png", "example.svg"]
    for name in ("example.png", "example.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    text = (tmp_path / "a" / "example.svg").read_text()
    assert all(f">{word}<" in text for word in ("An example", "step", "nats", "one", "two"))  # words, not outlines
    assert str(tmp_path) not in text


def test_stages_are_named(tmp_path: Path) -> None:
    (path,) = draw(chart(steps=True), tmp_path, ("svg",), ["first", "second", "third"])
    assert all(f">{word}<" in path.read_text() for word in ("first", "second", "third"))


def test_nothing_is_left_of_a_picture_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pdfx"):
        draw(chart(), tmp_path, ("pdfx",))
    assert list(tmp_path.iterdir()) == []
