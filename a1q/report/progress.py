"""What a run says while it runs: a live line on a terminal, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import IO, Any

from a1q.report.summary import main_figures
from a1q.report.table import about, duration, figure, size

LINE_SECONDS = 10.0
"""Plain progress lines come at most this often."""
LIVE_SECONDS = 0.1
LINE_WIDTH = 120
"""A plain progress line is at most this wide."""
_NO_FIGURES = {"time", "event", "id", "step", "total", "tokens"}
_IMPORTANT = ("seconds_left", "loss", "tune", "tokens_per_second", "memory_bytes")
"""Figures in the order in which a narrow line gives them up, the last first; all others are given up before."""


class JsonLines:
    """Every event as one JSON object a line."""

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Print one event."""
        self.stream.write(json.dumps(event, ensure_ascii=False) + "\n")
        self.stream.flush()


class Lines:
    """Lines for people and logs. With `live`, progress redraws one line of a terminal instead of adding lines."""

    def __init__(self, stream: IO[str], live: bool = False):
        self.stream = stream
        self.live = live
        self._stages: list[str] = []
        self._types: dict[str, str] = {}
        self._first: tuple[float, int] | None = None
        self._last = 0.0
        utf8 = (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"
        self._marks = {"hit": "=", "miss": "✓" if utf8 else "+", "run": "▸" if utf8 else ">"}

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Tell one event."""
        handler = getattr(self, f"_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _run_start(self, event: Mapping[str, Any]) -> None:
        self._stages = [item["id"] for item in event["stages"]]
        self._types = {item["id"]: item["stage"] for item in event["stages"]}
        smoke = ", smoke run" if event["smoke"] else ""
        self._line(f"{event['name']}: {len(self._stages)} stages in {event['run']}{smoke}")
        self._line(f"  {', '.join(self._stages)}")

    def _stage_start(self, event: Mapping[str, Any]) -> None:
        self._first, self._last = None, 0.0
        if self.live:
            self._draw(f"{self._place(event['id'])} looking in the store")

    def _stage_run(self, event: Mapping[str, Any]) -> None:
        changed = ", ".join(event["because"][:3]) + (", ..." if len(event["because"]) > 3 else "")
        self._draw(f"{self._place(event['id'])} running{f' (changed: {changed})' if changed else ''}")

    def _progress(self, event: Mapping[str, Any]) -> None:
        now, step, total = event["time"], event["step"], event["total"]
        if self._first is None:
            self._first = (now, step)
            self._last = self._last or (0.0 if self.live else now)
        if now - self._last < (LIVE_SECONDS if self.live else LINE_SECONDS):
            return
        self._last = now
        figures = {name: value for name, value in event.items() if name not in _NO_FIGURES}
        since, first = self._first
        if "seconds_left" not in figures and step > first and now > since:
            figures["seconds_left"] = (total - step) * (now - since) / (step - first)
        self._draw(self._fitted(event["id"], f"step {step}/{total}", figures))

    def _fitted(self, stage_id: str, step: str, figures: Mapping[str, Any]) -> str:
        """As many figures as fit; before an important one goes, the stage's type does."""
        width = shutil.get_terminal_size().columns - 1 if self.live else LINE_WIDTH
        told = {name for name, value in figures.items() if value is not None or name in ("loss", "tune")}
        important = [_shown(name, figures[name]) for name in _IMPORTANT if name in told]
        others = [_shown(name, value) for name, value in figures.items() if name not in _IMPORTANT]
        lines = [
            f"{place} {', '.join([step, *(important + others)[:count]])}"
            for place, least in ((self._place(stage_id), len(important)), (self._place(stage_id, typed=False), 0))
            for count in range(len(important) + len(others), least - 1, -1)
        ]
        return next((line for line in lines if len(line) <= width), lines[-1])

    def _log(self, event: Mapping[str, Any]) -> None:
        self._line(f"    {event['id']}: {event['message']}")

    def _stage_end(self, event: Mapping[str, Any]) -> None:
        cached = " from the store" if event["cache"] == "hit" else ""
        text = f"{self._place(event['id'], event['cache'])} {duration(event['seconds'])}{cached}  "
        room = shutil.get_terminal_size().columns - len(text) if self.live else None
        self._line(f"{text}{main_figures(event['metrics'], room)}".rstrip())

    def _run_end(self, event: Mapping[str, Any]) -> None:
        if self.live:
            self._clear()

    def _place(self, stage_id: str, mark: str = "run", typed: bool = True) -> str:
        wide = max((len(name) for name in self._stages), default=0)
        number = self._stages.index(stage_id) + 1
        of = len(self._stages)
        place = f"{self._marks[mark]} [{number:>{len(str(of))}}/{of}] {stage_id:<{wide}}"
        return f"{place} {self._types[stage_id]:<12}" if typed else place

    def _line(self, text: str) -> None:
        self._clear()
        self.stream.write(text + "\n")
        self.stream.flush()

    def _draw(self, text: str) -> None:
        if not self.live:
            self._line(text)
            return
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(f"\r\x1b[K{text[:width]}")
        self.stream.flush()

    def _clear(self) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")


def _shown(name: str, value: Any) -> str:
    """A figure in words."""
    match name:
        case "seconds_left":
            return f"{about(value)} left"
        case "tokens_per_second":
            return f"{value:,.0f} tokens/s"
        case "memory_bytes":
            return size(value)
    return f"{name} {figure(value)}"
