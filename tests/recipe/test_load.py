"""Composition: overrides, `use`, references; and finding recipes by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1q.errors import A1QError, RecipeError, UsageError
from a1q.recipe import load_recipe, shipped_recipes
from tests.recipe.fakes import fake_registry

BASE = """\
a1q: 1
name: base
seed: 7
model: {source: builtin:pico}
data:
  text: {source: builtin:prose}
groups:
  mlp: {match: '.*mlp.*'}
stages:
  - id: first
    grow: {steps: 3, groups: [mlp]}
  - teach:
  - grow: {steps: 5, from: first}
"""


def problem_of(caught):
    [problem] = caught.value.problems
    return problem


def test_ids_defaults_and_links(load):
    recipe = load(BASE + "  - grow: {steps: 1}\n  - grow: {steps: 1, from: model}\n")
    assert [stage.id for stage in recipe.stages] == ["first", "teach", "grow", "grow_2", "grow_3"]
    assert [dict(stage.inputs) for stage in recipe.stages] == [
        {"model": "model", "teacher": None},
        {"model": "model", "larger": None},
        {"model": "first", "teacher": "teach"},
        {"model": "grow", "teacher": "teach"},
        {"model": "model", "teacher": "teach"},
    ]
    assert recipe.stages[0].options == {
        "steps": 3,
        "rate": 1.0,
        "teacher": None,
        "data": None,
        "verbose": False,
        "mode": "fast",
        "groups": ["mlp"],
        "inner": {"depth": 2},
    }
    runtime = {"device": "auto", "amp": "auto", "params": "fp32", "threads": "auto", "shard": False}
    assert recipe.document["runtime"] == runtime
    assert recipe.document["stages"][2] == {"id": "grow", "from": "first", "grow": recipe.stages[2].options}
    assert recipe.text.startswith("a1q: 1")


def test_numbers_have_the_type_of_the_schema(load):
    options = load(BASE, ["stages.first.steps=1e3", "stages.first.rate=2"]).stages[0].options
    assert (options["steps"], type(options["steps"])) == (1000, int)
    assert (options["rate"], type(options["rate"])) == (2.0, float)


@pytest.mark.parametrize(
    ("setting", "path", "expected"),
    [
        ("seed=9", ("seed",), 9),
        ("model.source=a/b", ("model", "source"), "a/b"),
        ("runtime.threads=2", ("runtime", "threads"), 2),
        ("data.text.seq_len=64", ("data", "text", "seq_len"), 64),
        ("data.more={source: builtin:qa}", ("data", "more", "source"), "builtin:qa"),
        ("groups.mlp.expect=6", ("groups", "mlp", "expect"), 6),
        ("stages.first.steps=800", ("stages", 0, "grow", "steps"), 800),
        ("stages.first.rate=1e-5", ("stages", 0, "grow", "rate"), 1e-5),
        ("stages.first.inner.depth=4", ("stages", 0, "grow", "inner", "depth"), 4),
        ("stages.first.groups.0=mlp", ("stages", 0, "grow", "groups"), ["mlp"]),
        ("stages.grow.from=model", ("stages", 2, "from"), "model"),
        ("stages.teach.model={source: x}", ("stages", 1, "teach", "model", "source"), "x"),
    ],
)
def test_set(load, setting, path, expected):
    text = BASE.replace("from: first", "rate: 1") if setting.startswith("stages.grow.from") else BASE
    value = load(text, [setting]).document
    for part in path:
        value = value[part]
    assert value == expected


def test_unset_a_key_a_list_entry_and_a_stage(load):
    recipe = load(BASE, unsets=["seed", "stages.first.groups.0", "stages.teach"])
    assert recipe.seed == 0
    assert recipe.stages[0].options["groups"] == []
    assert [stage.id for stage in recipe.stages] == ["first", "grow"]


@pytest.mark.parametrize(
    ("sets", "unsets", "place", "fragment"),
    [
        (["stages.frist.steps=1"], [], "--set stages.frist.steps=1", "no stage 'frist'"),
        (["stages.first.steps=x"], [], "--set stages.first.steps=x", "expected a whole number, found text 'x'"),
        (["stages.first.stepz=1"], [], "--set stages.first.stepz=1", "unknown key 'stepz'"),
        (["stages.first={}"], [], "--set stages.first={}", "one option at a time"),
        (["stages=[]"], [], "--set stages=[]", "one at a time"),
        (["seed.x=1"], [], "--set seed.x=1", "can't be set inside the number 7"),
        (["stages.first.groups.7=mlp"], [], "--set stages.first.groups.7=mlp", "can't be set inside a list"),
        (["a..b=1"], [], "--set a..b=1", "is not a path"),
        (["seed=[1"], [], "--set seed=[1", "not YAML"),
        (["seed=.nan"], [], "--set seed=.nan", "finite"),
        ([], ["stages.nothing"], "--unset stages.nothing", "no stage"),
        ([], ["model.sourcee"], "--unset model.sourcee", "nothing to unset"),
        ([], ["model.x.source"], "--unset model.x.source", "nothing to unset"),
    ],
)
def test_wrong_overrides_are_named(load, sets, unsets, place, fragment):
    with pytest.raises(RecipeError) as caught:
        load(BASE, sets, unsets)
    problem = problem_of(caught)
    assert problem.file == place
    assert fragment in problem.message


def test_set_without_a_value_is_a_usage_error(load):
    with pytest.raises(UsageError, match="PATH=VALUE"):
        load(BASE, ["seed"])


USING = """\
a1q: 1
name: mine
use: base.yaml
set:
  seed: 8
  stages.first.steps: 30
  data.text.seq_len: 64
unset: [stages.grow]
"""


def test_use_sets_and_unsets_what_another_recipe_says(load, tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    recipe = load(USING, ["seed=9"])
    assert (recipe.name, recipe.seed) == ("mine", 9)
    assert recipe.stages[0].options["steps"] == 30
    assert recipe.data["text"]["seq_len"] == 64
    assert [stage.id for stage in recipe.stages] == ["first", "teach"]
    assert recipe.text == USING


def test_problems_of_a_composed_recipe_are_where_they_were_written(load, tmp_path):
    (tmp_path / "base.yaml").write_text(BASE.replace("seq", "seq").replace("steps: 5", "steps: -5"))
    with pytest.raises(RecipeError) as caught:
        load(USING.replace("30", "lots").replace("unset: [stages.grow]\n", ""))
    places = {(problem.file.rpartition("/")[2], problem.line, problem.path) for problem in caught.value.problems}
    assert places == {("r.yaml", 6, "stages.first.steps"), ("base.yaml", 13, "stages.grow.steps")}


@pytest.mark.parametrize(
    ("text", "line", "fragment"),
    [
        ("a1q: 1\nname: x\nuse: nested.yaml\n", 3, "can't say `use` itself"),
        ("a1q: 1\nname: x\nuse: nowhere.yaml\n", 3, "there is no recipe 'nowhere.yaml'"),
        ("a1q: 1\nname: x\nuse: [a]\n", 3, "expected the file of a recipe"),
        ("a1q: 1\nname: x\nuse: base.yaml\nseed: 3\n", 4, "can't stand beside `use`"),
        ("a1q: 1\nname: x\nuse: base.yaml\nset: [1]\n", 4, "expected PATH: VALUE pairs"),
        ("a1q: 1\nname: x\nuse: base.yaml\nunset: {a: 1}\n", 4, "expected a list of paths"),
        ("a1q: 1\nname: x\nuse: base.yaml\nset:\n  stages.frst.steps: 1\n", 5, "no stage 'frst'"),
        ("a1q: 1\nname: x\nuse: base.yaml\nset:\n  model.sauce: 1\n", 5, "unknown key 'sauce'"),
        ("a1q: 1\nname: x\nuse: base.yaml\nunset: [stages.frst]\n", 4, "no stage 'frst'"),
        (BASE + "set: {seed: 1}\n", 14, "only beside `use`"),
    ],
)
def test_wrong_use(load, tmp_path, text, line, fragment):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "nested.yaml").write_text(USING)
    with pytest.raises(RecipeError) as caught:
        load(text)
    problem = problem_of(caught)
    assert problem.line == line or problem.file.endswith("nested.yaml")
    assert fragment in problem.message


def test_a_recipe_that_uses_itself_is_nested(load):
    with pytest.raises(RecipeError, match="one level"):
        load("a1q: 1\nname: x\nuse: r.yaml\n")


def test_references_take_earlier_scalars_with_their_type(load):
    recipe = load(
        BASE.replace("steps: 5", "steps: '${stages.first.steps}', rate: '${seed}'").replace(
            "source: builtin:prose", "source: '${name}-${seed}$${x}'"
        )
    )
    assert recipe.stages[2].options["steps"] == 3
    assert recipe.stages[2].options["rate"] == 7.0
    assert recipe.data["text"]["source"] == "base-7${x}"


@pytest.mark.parametrize(
    ("old", "new", "line", "fragment"),
    [
        ("seed: 7", "seed: '${stages.first.steps}'", 3, "not a scalar that stands earlier"),
        ("seed: 7", "seed: '${seed}'", 3, "not a scalar that stands earlier"),
        ("seed: 7", "seed: '${nmae}'", 3, "did you mean 'name'"),
        ("builtin:prose", "'x${name'", 6, "without `}`"),
        ("steps: 5", "steps: '${model}'", 13, "not a scalar that stands earlier"),
    ],
)
def test_wrong_references(load, old, new, line, fragment):
    with pytest.raises(RecipeError) as caught:
        load(BASE.replace(old, new))
    problem = problem_of(caught)
    assert problem.line == line
    assert fragment in str(problem)


def test_references_can_not_grow_without_bound(load):
    doubling = "".join(
        f"  d{level}: {{source: '${{data.d{level - 1}.source}}${{data.d{level - 1}.source}}'}}\n"
        for level in range(1, 40)
    )
    with pytest.raises(RecipeError, match="more than 10000 characters"):
        load(BASE.replace("\ngroups:", "\n  d0: {source: xxxxxxxx}\n" + doubling + "groups:"))


def test_shipped_recipes_are_found_by_name(registry):
    assert "q4_to_q2" in shipped_recipes()
    for name in ("q4_to_q2", "q4_to_q2.yaml", "recipes/q4_to_q2.yaml"):
        assert load_recipe(name, registry=registry).name == "q4-to-q2"
    with pytest.raises(UsageError, match="did you mean 'q4_to_q2'"):
        load_recipe("q4_to_q3", registry=registry)


def test_a_folder_is_no_recipe(tmp_path, registry):
    with pytest.raises(UsageError, match="is a folder"):
        load_recipe(tmp_path, registry=registry)


PARTS = st.sampled_from(
    [
        "a1q",
        "name",
        "stages",
        "first",
        "grow",
        "teach",
        "steps",
        "groups",
        "0",
        "9",
        "mlp",
        "match",
        "data",
        "text",
        "",
        "-1",
        "x",
    ]
)
VALUES = st.sampled_from(
    ["1", "x", "{}", "[]", "{a: 1}", "[1", "", "null", "${seed}", "${", "1e5", "'", "&a [*a]", "true"]
)


@given(
    st.lists(st.tuples(st.lists(PARTS, min_size=1, max_size=5).map(".".join), VALUES).map("=".join), max_size=3),
    st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), max_size=2),
)
def test_no_override_does_more_than_raise_a_user_error(tmp_path_factory, sets, unsets):
    file = tmp_path_factory.getbasetemp() / "overrides.yaml"
    file.write_text(BASE)
    try:
        load_recipe(file, sets=sets, unsets=unsets, registry=fake_registry())
    except A1QError as error:
        assert error.exit_code == 2
