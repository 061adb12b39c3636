"""Patterns that mean some modules and no others."""

from __future__ import annotations

import re

import yaml
from hypothesis import given
from hypothesis import strategies as st

from a1q.engine.pattern import MAX_LENGTH, compile_pattern
from a1q.quant.pinning import clauses, pinned, pinned_text
from a1q.quant.rules import Rule

LEAVES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.router", "mlp.experts.1.up_proj"]
NAMES = ["model.embed_tokens", *(f"model.layers.{i}.{leaf}" for i in range(12) for leaf in LEAVES), "lm_head"]
LUT3, LUT4 = {"scheme": "lut", "bits": 3}, {"scheme": "lut", "bits": 4}


def matched(pattern: str, names: list[str]) -> list[str]:
    ours = [name for name in names if compile_pattern(pattern).fullmatch(name)]
    assert ours == [name for name in names if re.fullmatch(pattern, name)]
    return ours


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_clauses_match_their_modules_and_no_others(chosen):
    members = [name for name in NAMES if name in chosen]
    found = [matched(pattern, NAMES) for pattern, _ in clauses(members, NAMES)]
    assert [len(names) for names in found] == [count for _, count in clauses(members, NAMES)]
    assert sorted(name for names in found for name in names) == sorted(members)


def test_patterns_say_it_shortly():
    every = [name for name in NAMES if name.endswith(("mlp.gate_proj", "mlp.up_proj"))]
    assert clauses(every, NAMES) == [(r"model\.layers\.\d+\.mlp\.(gate|up)_proj", 24)]
    some = [name for name in every if name.split(".")[2] in ("0", "7", "11")]
    assert clauses(some, NAMES) == [(r"model\.layers\.(0|7|11)\.mlp\.(gate|up)_proj", 6)]
    assert clauses(["model.layers.3.mlp.router"], NAMES) == [(r"model\.layers\.3\.mlp\.router", 1)]
    assert clauses(["model.embed_tokens", "lm_head"], NAMES) == [(r"model\.embed_tokens", 1), ("lm_head", 1)]


@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from([LUT3, LUT4]), min_size=1))
def test_every_module_gets_its_scheme_from_one_group(chosen):
    rules = {name: Rule("some", (chosen[name],)) for name in NAMES if name in chosen}
    document = pinned(rules, NAMES, ["some", "some_3bit"])
    assert set(document["groups"]) == set(document["rules"]) and "some_3bit" not in document["groups"]
    given_by = {}
    for group, about in document["groups"].items():
        members = matched(about["match"], NAMES)
        assert len(members) == about["expect"]
        for name in members:
            assert name not in given_by
            given_by[name] = document["rules"][group]
    assert given_by == chosen
    assert yaml.safe_load(pinned_text(document, "budget")) == document


def test_half_bits_make_names_without_a_point():
    rules = {name: Rule("some", ({"scheme": "vector_lut", "bits": 1.5},)) for name in NAMES[:3]}
    document = pinned(rules, NAMES, [])
    assert set(document["groups"]) == {"some_1_5bit"}
    assert yaml.safe_load(pinned_text(document, "budget"))["rules"]["some_1_5bit"]["bits"] == 1.5


def test_a_deep_models_patterns_stay_within_what_a_pattern_may_be():
    leaves = [f"{part}.{leaf}_proj" for part in ("mlp", "attn") for leaf in ("a", "b", "c", "d")]
    names = [f"model.layers.{i}.{leaf}" for i in range(400) for leaf in leaves]
    members = [name for index, name in enumerate(names) if index * index % 7 > 1]
    rules = {name: Rule("all", (LUT4,)) for name in members}
    groups = pinned(rules, names, [])["groups"]
    assert len(groups) > 1
    assert all(len(group["match"]) <= MAX_LENGTH for group in groups.values())
    assert sorted(name for group in groups.values() for name in matched(group["match"], names)) == sorted(members)
