"""Start the same command in several processes of this machine, and end as it ends: `a1q run --launch N`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from a1q.engine.signals import SIGNALS
from a1q.engine.world import LAUNCHER

GRACE = 60.0
"""Seconds that process 0 has to end by itself once another one is gone, and others once it is."""


def launch(arguments: Sequence[str], count: int, say: Callable[[str], None]) -> int:
    """Run `python -m a1q ARGUMENTS` in `count` processes that know of each other.

    SIGINT and SIGTERM go to process 0, which checkpoints. All processes end when one does.

    Returns:
        The exit code: that of process 0, or 1 where it or another process was killed.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: object) -> None:
        if processes and processes[0].poll() is None:
            processes[0].send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        environment = {
            **os.environ,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            LAUNCHER: str(os.getpid()),
        }
        for rank in range(count):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A group of their own: a terminal's Ctrl-C reaches process 0 once, through this one.
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "a1q", *arguments],
                    env=own,
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    process_group=0,
                )
            )
        return _watch(processes, say)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: Sequence[subprocess.Popen[bytes]], say: Callable[[str], None]) -> int:
    """Wait until all have ended, and hurry them once one has."""
    first, lost = processes[0], False
    while first.poll() is None:
        gone = [rank for rank, process in enumerate(processes) if process.poll()]
        if gone and not lost:
            lost = True
            say(f"process {gone[0]} of {len(processes)} {_ending(processes[gone[0]].returncode)}")
            deadline = time.monotonic() + GRACE
        if lost and time.monotonic() > deadline:
            first.kill()
        time.sleep(0.05)
    # The others keep nothing that isn't on disk, and after an error wait for nothing that comes.
    deadline = time.monotonic() + (0 if first.returncode else GRACE)
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    if first.returncode < 0:
        say(f"process 0 of {len(processes)} {_ending(first.returncode)}; the same command goes on from there")
        return 1
    if first.returncode == 0 and (lost or any(process.poll() for process in processes)):
        return 1
    return first.returncode


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
