"""Rules resolve to modules, or to problems that name what is nearby."""

from types import SimpleNamespace

import pytest

from a1q.engine.matching import resolve_rules, summarize
from a1q.engine.stage import Group, PlanContext
from a1q.models.view import ModelView, ModuleView

LINEARS = [
    f"{part}.{name}_proj" for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))) for name in names
]


@pytest.fixture
def view():
    names = ["model.embed_tokens", *(f"model.layers.{layer}.{linear}" for layer in range(4) for linear in LINEARS)]
    modules = {name: ModuleView(name, (8, 8), "embedding" if "embed" in name else "linear") for name in names}
    return ModelView(modules, 1, {"tie_word_embeddings": True})


def resolve(view, groups, rules, path="rules"):
    problems = []
    ctx = PlanContext(
        id="q4",
        config=SimpleNamespace(),
        views={},
        groups={name: Group(name, *args) for name, args in groups.items()},
        data={},
        report=lambda *problem: problems.append(problem),
    )
    return resolve_rules(ctx, rules, path, view), problems, ctx.used_groups


MLP = r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj"
ATTENTION = r"model\.layers\.\d+\.self_attn\.[qkvo]_proj"


def test_every_module_of_every_group_in_model_order(view):
    found, problems, used = resolve(view, {"mlp": (MLP, 12), "attn": (ATTENTION,)}, {"attn": {}, "mlp": {}})
    assert not problems
    assert used == {"mlp", "attn"}
    assert list(found) == [name for name in view.modules if "proj" in name]
    assert {name for name, group in found.items() if group == "mlp"} == {name for name in found if ".mlp." in name}


def test_a_pattern_must_match_the_whole_name(view):
    found, problems, _ = resolve(view, {"mlp": ("mlp",)}, {"mlp": {}})
    assert not found
    [(path, message, hint, mismatch)] = problems
    assert (path, mismatch) == ("rules.mlp", True)
    assert "matches no module: mlp" in message
    assert ".mlp." in hint


def test_a_misspelt_pattern_shows_the_names_nearby(view):
    _, [(_, _, hint, _)], _ = resolve(view, {"mlp": (r"model\.layers\.\d+\.mpl\.gate_proj",)}, {"mlp": {}})
    assert "model.layers.{0..3}.mlp.gate_proj" in hint


def test_expect_not_met(view):
    _, [(path, message, hint, mismatch)], _ = resolve(view, {"mlp": (MLP, 9)}, ["mlp"], "groups")
    assert (path, mismatch) == ("groups.0", True)
    assert "expects 9 modules and matches 12" in message
    assert "model.layers.{0..3}.mlp.up_proj" in hint


def test_a_module_in_two_rules(view):
    _, problems, _ = resolve(view, {"mlp": (MLP,), "down": (r".*\.down_proj",)}, {"mlp": {}, "down": {}})
    [(path, message, hint, mismatch)] = problems
    assert (path, mismatch, hint) == ("rules.down", True, "model.layers.{0..3}.mlp.down_proj")
    assert "4 modules are in 'mlp' and 'down'" in message


def test_an_unknown_group_is_the_recipes_fault(view):
    _, [(path, message, hint, mismatch)], used = resolve(view, {"mlp": (MLP,)}, {"mpl": {}})
    assert (path, mismatch, hint) == ("rules.mpl", False, "did you mean 'mlp'?")
    assert "no group 'mpl'" in message
    assert not used


def test_a_tied_head_says_so(view):
    _, [(_, _, hint, _)], _ = resolve(view, {"head": ("lm_head",)}, {"head": {}})
    assert "model.embed_tokens" in hint and "tied" in hint


def test_summaries_fold_layers_and_stay_short():
    assert summarize(["a.0.b", "a.1.b", "a.3.b", "c"]) == ["a.{0..1,3}.b", "c"]
    assert summarize([f"name{letter}" for letter in "abcd"], limit=2) == ["namea", "nameb", "and 2 more"]
