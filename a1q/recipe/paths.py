"""Dotted paths into a recipe: `model.source`, `stages.q2_train.steps`.

A stage is named by its id, and what follows is an option inside its stage key; `id` and `from` stand beside that
key. Inside, a path is a tuple of keys and indices, as `("stages", 4, "train", "steps")`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from a1q.recipe.text import Node

Path = tuple[str | int, ...]
BESIDE = ("id", "from")
"""Keys of a stage that stand beside its stage key."""


def stage_keys(stage: Node) -> list[str]:
    """The keys of a stage's mapping that could be its stage key: one, if the recipe is right."""
    return [key for key in stage.entries if key not in BESIDE]


def stage_ids(root: Node) -> list[str]:
    """The id of every stage, in order: the one written, else the stage key, numbered from the second on.

    Stages that have no usable id (their mapping is wrong) are called by their position: `#3`.
    """
    ids: list[str] = []
    counts: dict[str, int] = {}
    for index, stage in enumerate(_stages(root)):
        keys = stage_keys(stage)
        written = stage.entries.get("id")
        if written is not None and isinstance(written.value, str):
            ids.append(written.value)
        elif len(keys) == 1:
            counts[keys[0]] = counts.get(keys[0], 0) + 1
            ids.append(keys[0] if counts[keys[0]] == 1 else f"{keys[0]}_{counts[keys[0]]}")
        else:
            ids.append(f"#{index + 1}")
    return ids


def show(ids: Sequence[str], path: Path) -> str:
    """The dotted form of a path, as `--set` takes it and as problems show it; `ids` as from `stage_ids`."""
    parts = [str(part) for part in path]
    if len(path) >= 2 and path[0] == "stages" and isinstance(path[1], int):
        parts[1] = ids[path[1]]
        if len(path) >= 3 and path[2] not in BESIDE:
            del parts[2]
    return ".".join(parts)


def child(node: Node, part: str | int) -> Node | None:
    """The entry `part` of a mapping or list, or None."""
    if isinstance(part, str):
        return node.entries.get(part)
    return node.value[part] if isinstance(node.value, list) and part < len(node.value) else None


def find(root: Node, path: Path) -> Node:
    """The node at `path`, or its nearest ancestor if there is none (a default that was filled in, say)."""
    node = root
    for part in path:
        below = child(node, part)
        if below is None:
            break
        node = below
    return node


def exact(root: Node, path: Path) -> Node | None:
    """The node at `path`, or None."""
    node: Node | None = root
    for part in path:
        node = child(node, part) if node is not None else None
    return node


def parse_path(root: Node, dotted: str) -> Path:
    """Turn a dotted path into a tuple; the stage must exist, what follows need not.

    Raises:
        ValueError: saying what is wrong; its second argument is a hint.
    """
    parts: list[str | int] = list(dotted.split("."))
    if not all(parts):
        raise ValueError(f"{dotted!r} is not a path like model.source or stages.ID.steps", "")
    if parts[0] != "stages":
        return indexed(root, parts)
    if len(parts) == 1:
        raise ValueError("stages are changed one at a time", "write stages.ID.OPTION")
    ids = stage_ids(root)
    if parts[1] not in ids:
        raise ValueError(f"there is no stage {parts[1]!r}", suggest(str(parts[1]), ids))
    index = ids.index(str(parts[1]))
    path: list[str | int] = ["stages", index, *parts[2:]]
    keys = stage_keys(_stages(root)[index])
    if len(path) > 2 and path[2] not in BESIDE and len(keys) == 1:
        path.insert(2, keys[0])
    return indexed(root, path)


def indexed(root: Node, parts: Sequence[str | int]) -> Path:
    """The same path with every part that points into a list read as a number."""
    node: Node | None = root
    path = list(parts)
    for position, part in enumerate(path):
        if node is None:
            break
        if isinstance(node.value, list) and isinstance(part, str) and part.isdecimal() and len(part) < 6:
            path[position] = part = int(part)
        node = child(node, part)
    return tuple(path)


def suggest(name: str, known: Iterable[str], noun: str = "known") -> str:
    """`did you mean 'x'?`, or the list of what there is."""
    known = list(known)[:500]
    near = difflib.get_close_matches(name[:100], known, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"{noun}: {', '.join(known[:30])}" if known else ""


def _stages(root: Node) -> list[Node]:
    stages = root.entries.get("stages")
    return stages.value if stages is not None and isinstance(stages.value, list) else []
