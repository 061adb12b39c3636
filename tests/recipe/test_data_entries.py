"""Data entries: a source or a mix, each option where it belongs, and each problem at its place."""

import pytest

from a1q.errors import RecipeError
from a1q.recipe import load_recipe
from a1q.recipe.plan import make_plan
from tests.recipe.fakes import fake_registry

BASE = """\
a1q: 1
name: base
model: {source: builtin:pico}
data:
  prose: {source: builtin:prose}
  chats: {source: builtin:qa, thinking: off}
  both: {mix: {prose: 3, chats: 1}, seq_len: 64}
stages:
  - grow: {steps: 3, data: both}
"""


def load(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(str(path), registry=fake_registry())


@pytest.mark.parametrize(
    ("old", "new", "place", "path", "message", "hint"),
    [
        ("{source: builtin:prose}", "{seq_len: 64}", (5, 3), "data.prose", "this one has neither", ""),
        ("{mix:", "{source: x, mix:", (7, 3), "data.both", "this one has both", ""),
        ("seq_len: 64", "holdout: 0.1", (7, 46), "data.both.holdout", "belongs to a source", "entries that are mixed"),
        ("seq_len: 64", "thinking: on", (7, 47), "data.both.thinking", "belongs to a source", "entries that are"),
        ("{prose: 3,", "{prosa: 3,", (7, 16), "data.both.mix.prosa", "no entry 'prosa' under `data:`", "'prose'"),
        ("{prose: 3,", "{both: 3,", (7, 16), "data.both.mix.both", "'both' is a mix itself", "mix sources"),
        ("{prose: 3,", "{prose: 0,", (7, 23), "data.both.mix.prose", "expected more than 0", ""),
        ("{prose: 3, chats: 1}", "{prose: 3}", (7, 15), "data.both.mix", "at least 2", ""),
        ("thinking: off", "thinking: maybe", (6, 41), "data.chats.thinking", "one of off, on, both", ""),
        ("thinking: off", "format: sharegtp", (6, 39), "data.chats.format", "one of auto", "did you mean 'sharegpt'?"),
        (
            "thinking: off",
            "format: chat, column: x",
            (6, 53),
            "data.chats.column",
            "names the one that running text",
            "or write `format: text`",
        ),
    ],
)
def test_each_problem_is_at_its_place(tmp_path, old, new, place, path, message, hint):
    assert old in BASE
    with pytest.raises(RecipeError) as error:
        load(tmp_path, BASE.replace(old, new))
    found = [(item.line, item.column, item.path) for item in error.value.problems]
    (problem,) = [item for item in error.value.problems if item.path == path] or [pytest.fail(str(found))]
    assert message in problem.message and hint in problem.hint
    assert (problem.line, problem.column) == place


def test_a_plan_holds_a_mix_with_its_parts_in_order(tmp_path):
    recipe = load(tmp_path, BASE)
    made = make_plan(recipe, fake_registry())
    config = made.stages[0].data["both"].config
    assert [(part["name"], part["weight"], part["entry"]["source"]) for part in config["parts"]] == [
        ("prose", 3.0, "builtin:prose"),
        ("chats", 1.0, "builtin:qa"),
    ]
    assert config["seq_len"] == 64 and config["parts"][1]["entry"]["thinking"] == "off"


@pytest.mark.parametrize(("key", "place"), [("revision", (5, 44)), ("split", (5, 41))])
def test_options_of_the_hub_are_refused_for_what_lies_here(tmp_path, key, place):
    text = BASE.replace("{source: builtin:prose}", f"{{source: builtin:prose, {key}: main}}")
    with pytest.raises(RecipeError) as error:
        make_plan(load(tmp_path, text), fake_registry())
    (problem,) = error.value.problems
    assert f"`{key}` is for data sets of the Hub, and builtin:prose is none" in problem.message
    assert (problem.path, problem.line, problem.column) == (f"data.prose.{key}", *place)
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "one"}\n')
    with pytest.raises(RecipeError, match="is for data sets of the Hub"):
        make_plan(load(tmp_path, BASE.replace("builtin:prose", f"{lines}, {key}: main")), fake_registry())
