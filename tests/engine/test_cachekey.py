"""What enters a cache key and what doesn't."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1q.engine import cachekey
from a1q.engine.artifact import Artifact
from a1q.engine.cachekey import differences, key_of, key_parts
from a1q.engine.stage import DataEntry, Group, Runtime
from tests.engine.fakes import Add, plan_of, stage

PLANNED = dataclasses.replace(
    stage("s1", {"add": 1}, {"model": "model"}),
    groups={"mlp": Group("mlp", "a.*", 12)},
    parts={"schemes/lut": 1},
    plugins={"stages/add": "abc"},
)
INPUTS = {"model": Artifact("model", Path("/one"), "d1", {"source": "one"}), "teacher": None}
DATA = {"text": DataEntry("text", {"source": "/one.txt", "revision": None, "seq_len": 128}, "d2")}


def key(planned: Any = PLANNED, inputs: Any = INPUTS, data: Any = DATA, plan: Any = None) -> str:
    return key_of(key_parts(plan or plan_of((planned,)), planned, inputs, data))


class NextAdd(Add):
    version = 2


@pytest.mark.parametrize(
    "changed",
    [
        {"planned": dataclasses.replace(PLANNED, options={"add": 2})},
        {"planned": dataclasses.replace(PLANNED, id="other")},
        {"planned": dataclasses.replace(PLANNED, type="other")},
        {"planned": dataclasses.replace(PLANNED, stage=NextAdd())},
        {"planned": dataclasses.replace(PLANNED, parts={"schemes/lut": 2})},
        {"planned": dataclasses.replace(PLANNED, plugins={"stages/add": "abd"})},
        {"planned": dataclasses.replace(PLANNED, groups={"mlp": Group("mlp", "b.*", 12)})},
        {"inputs": {**INPUTS, "model": Artifact("model", Path("/one"), "d9")}},
        {"inputs": {**INPUTS, "teacher": INPUTS["model"]}},
        {"data": {"text": dataclasses.replace(DATA["text"], digest="d9")}},
        {"data": {"text": dataclasses.replace(DATA["text"], config={"seq_len": 64})}},
        {"plan": plan_of((PLANNED,), seed=2)},
        {"plan": plan_of((PLANNED,), smoke=True)},
        {"plan": dataclasses.replace(plan_of((PLANNED,)), runtime=Runtime(device="cuda"))},
        {"plan": dataclasses.replace(plan_of((PLANNED,)), runtime=Runtime(amp="bf16"))},
        {"plan": dataclasses.replace(plan_of((PLANNED,)), runtime=Runtime(params="bf16"))},
    ],
)
def test_everything_that_decides_a_result_changes_the_key(changed: dict[str, Any]) -> None:
    assert key(**changed) != key()


@pytest.mark.parametrize(
    "changed",
    [
        {"inputs": {**INPUTS, "model": Artifact("model", Path("/two"), "d1", {"source": "two"})}},
        {"data": {"text": dataclasses.replace(DATA["text"], config={"source": "/two.txt", "seq_len": 128})}},
        {"planned": dataclasses.replace(PLANNED, groups={"mlp": Group("mlp", "a.*", None)})},
        {"plan": dataclasses.replace(plan_of((PLANNED,)), runtime=Runtime(threads=9))},
        {"plan": dataclasses.replace(plan_of((PLANNED,)), name="other", recipe_file="other.yaml", recipe_text="x")},
    ],
)
def test_paths_names_and_threads_do_not(changed: dict[str, Any]) -> None:
    assert key(**changed) == key()


CHATS = {"source": "/chats.jsonl", "revision": None, "format": "chat", "thinking": "off", "holdout": 0.05}
MIX = [{"name": "a", "weight": 3.0, "entry": {**CHATS, "thinking": None}}, {"name": "b", "weight": 1.0, "entry": CHATS}]


def mixed(*parts: dict[str, Any], **changes: Any) -> dict[str, DataEntry]:
    config = {"source": None, "mix": {part["name"]: part["weight"] for part in parts}, "seq_len": 128, **changes}
    return {"text": DataEntry("text", {**config, "parts": list(parts)}, "d2")}


@pytest.mark.parametrize(
    "changed",
    [
        mixed(MIX[0], {**MIX[1], "weight": 2.0}),
        mixed(MIX[1], MIX[0]),
        mixed(MIX[0], {**MIX[1], "entry": {**CHATS, "thinking": "both"}}),
        mixed(MIX[0], {**MIX[1], "entry": {**CHATS, "format": "auto"}}),
        mixed(MIX[0], {**MIX[1], "entry": {**CHATS, "holdout": 0.1}}),
        mixed(*MIX, seq_len=64),
        mixed(*MIX, attention="document"),
    ],
)
def test_everything_that_decides_the_tokens_of_a_mix_changes_the_key(changed: dict[str, DataEntry]) -> None:
    assert key(data=changed) != key(data=mixed(*MIX))


def test_what_its_parts_are_called_and_where_they_lie_does_not() -> None:
    moved = {**MIX[0], "name": "other", "entry": {**MIX[0]["entry"], "source": "/elsewhere.jsonl"}}
    assert key(data=mixed(moved, MIX[1])) == key(data=mixed(*MIX))


def test_a_package_version_does_and_its_local_build_tag_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(text: str) -> str:
        monkeypatch.setattr(cachekey, "package_versions", lambda: {"torch": text})
        return key()

    assert at("2.13.0+cpu") == at("2.13.0+cu128") == at("2.13.0") != at("2.12.0")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1, max_size=3), VALUES, max_size=4))
def test_no_difference_with_itself_and_one_for_every_added_part(parts: dict[str, Any]) -> None:
    assert differences(parts, parts) == []
    assert differences(parts, {**parts, "added here": 1}) == ["added here"]
    assert key_of(parts) == key_of(dict(reversed(parts.items())))
