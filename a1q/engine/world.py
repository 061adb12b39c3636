"""The processes that compute one run together: how many there are, which this one is, and what they tell each other.

`a1q run --launch N`, torchrun and `accelerate launch` all start processes that find this in their environment: RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Process 0 leads: it alone reads and writes the store and the run
folder, and runs every stage. At a stage that may use them (`Stage.parallel`) it tells the others, which follow
(`a1q.engine.follow`). They see the same files: a store on a disk that all of them share.

Nothing here imports torch before there is more than one process.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from a1q.errors import Problem, StageError, UsageError

PATIENCE = datetime.timedelta(days=30)
"""How long a process waits for another one: stages that run in one process alone take as long as they take."""
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER = "A1Q_LAUNCHER"
"""Tells a process of `a1q run --launch` its launcher's process id."""


class PeerLost(StageError):
    """Another process of this run has ended."""

    def __init__(self) -> None:
        super().__init__("another process of this run has ended; the same command goes on from the last checkpoint")


def launcher_gone() -> bool:
    """Whether the launcher that started this process is no longer there."""
    noted = os.environ.get(LAUNCHER)
    return noted is not None and os.getppid() != int(noted)


@dataclass(frozen=True)
class World:
    """Which process this is, `rank` of `size`. All of them call the methods below in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those on this machine."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    def shared(self, value: Any) -> Any:
        """Process 0's JSON value, in every process.

        Raises:
            PeerLost: if one of them has ended.
        """
        if self.alone:
            return value
        import torch
        import torch.distributed as dist

        data = json.dumps(value).encode() if self.leads else b""
        size = torch.tensor([len(data)])
        with peers():
            dist.broadcast(size, 0)
            content = torch.frombuffer(bytearray(data or bytes(int(size))), dtype=torch.uint8)
            dist.broadcast(content, 0)
        return json.loads(bytes(content.tolist()))

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, in float64; the same ones in every process.

        Raises:
            PeerLost: if one of them has ended.
        """
        if self.alone:
            return list(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(list(values), dtype=torch.float64)
        with peers():
            dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Until all processes are here.

        Raises:
            PeerLost: if one of them has ended.
        """
        self.sums([0.0])


ALONE = World()


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Around what processes do together: the end of another one is told as such.

    Raises:
        PeerLost: in place of what the library raises then.
    """
    try:
        yield
    except RuntimeError as error:
        if is_lost_peer(error):
            raise PeerLost from error
        raise


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of a collective operation says that another process is no longer there."""
    text = str(error).lower()
    signs = (
        "connection closed by peer",
        "connection reset",
        "broken pipe",
        "gloo",
        "nccl",
        "process group",
        "timed out",
    )
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def world_here() -> World:
    """What the environment says.

    Raises:
        UsageError: if it says half of it.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return ALONE
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    try:
        rank, count = int(os.environ.get("RANK", "")), int(size)
        local = int(os.environ.get("LOCAL_RANK", rank))
    except ValueError:
        rank = count = -1
    if missing or not 0 <= rank < count:
        named = ", ".join(f"{name}={os.environ.get(name)}" for name in VARIABLES)
        raise UsageError(f"the environment speaks of several processes, but not which this is: {named}")
    return World(rank, count, local)


def processes_per_machine() -> int:
    """How many processes of this run share this machine's processors."""
    text = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    return max(int(text), 1) if text.isdigit() else 1


@contextlib.contextmanager
def joined(world: World, device: str) -> Iterator[None]:
    """Within the block the processes can reach each other.

    Raises:
        StageError: if they don't find each other.
    """
    if world.alone:
        yield
        return
    import torch.distributed as dist

    try:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise StageError(f"process {world.rank} of {world.size} doesn't find the others: {error}") from error
    yield
    # Not after an error: the others may be waiting for anything, and learn of it by this process's end.
    dist.destroy_process_group()


def problem_on(device: str, world: World) -> Problem | None:
    """Why so many processes can't compute on a device."""
    if device == "mps" and not world.alone:
        return Problem("one process alone can use mps", hint="leave --launch out")
    return None
