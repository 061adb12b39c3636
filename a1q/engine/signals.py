"""Ctrl-C and SIGTERM ask the running stage to stop at its next safe point; a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from a1q.engine.world import launcher_gone

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Which signal has asked to stop. Calling it gives that number, or 0; a launcher's end counts as SIGTERM."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> int:
        if not self.number and launcher_gone():
            self.number = signal.SIGTERM
        return self.number


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Within the block, note the first SIGINT or SIGTERM and tell the user; the second ends the process at once.

    Outside the main thread, where Python can't handle signals, the request stays 0.
    """
    request = StopRequest()

    def handle(number: int, _frame: object) -> None:
        if request.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        request.number = number
        say("stopping at the next safe point; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
