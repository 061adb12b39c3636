"""Schemas, stage keys, ids and links: every root problem at once, at its place, with the nearest name."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from a1q.errors import A1QError, RecipeError
from a1q.recipe import load_recipe
from a1q.recipe.schema import Checker, Finding
from tests.recipe.fakes import fake_registry

BASE = """\
a1q: 1
name: base
model: {source: builtin:pico}
data:
  text: {source: builtin:prose}
groups:
  mlp: {match: '.*mlp.*'}
stages:
  - teach: {}
  - id: g
    grow:
      steps: 3
      data: text
      teacher: teach
  - id: last
    from: g
    grow: {steps: 5}
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "path", "message", "hint"),
    [
        ("steps: 3", "stepz: 3", 12, 7, "stages.g.stepz", "unknown key 'stepz'", "did you mean 'steps'?"),
        ("      steps: 3\n", "", 11, 5, "stages.g.steps", "missing key 'steps'", "Steps."),
        ("steps: 3", "steps: 0", 12, 14, "stages.g.steps", "expected at least 1, found the number 0", ""),
        ("steps: 3", "steps: many", 12, 14, "stages.g.steps", "expected a whole number, found text 'many'", ""),
        ("steps: 3", "steps: '3'", 12, 14, "stages.g.steps", "found text '3'", "without quotes"),
        ("steps: 3", "steps: 1_000", 12, 14, "stages.g.steps", "found text '1_000'", "without quotes and underscores"),
        ("steps: 3", "steps: 3.5", 12, 14, "stages.g.steps", "expected a whole number, found the number 3.5", ""),
        ("steps: 3", "steps: true", 12, 14, "stages.g.steps", "expected a whole number, found true", ""),
        (
            "steps: 5",
            "steps: 5, verbose: yes",
            17,
            31,
            "stages.last.verbose",
            "found text 'yes'",
            "write true or false",
        ),
        ("steps: 5", "steps: 5, mode: fsat", 17, 28, "stages.last.mode", "one of fast, slow", "did you mean 'fast'?"),
        ("steps: 5", "steps: 5, rate: 0", 17, 28, "stages.last.rate", "expected more than 0", ""),
        (
            "steps: 5",
            "steps: 5, inner: {deep: 1}",
            17,
            30,
            "stages.last.inner.deep",
            "unknown key",
            "did you mean 'depth'?",
        ),
        ("steps: 5", "steps: 5, groups: mlp", 17, 30, "stages.last.groups", "expected a list, found text 'mlp'", ""),
        ("- teach: {}", "- teech: {}", 9, 5, "stages.teech", "there is no stage 'teech'", "did you mean 'teach'?"),
        (
            "- teach: {}",
            "- teach: {}\n    grow: {steps: 1}",
            10,
            5,
            "stages.#1",
            "exactly one stage key",
            "a stage of its own",
        ),
        ("- teach: {}", "- teach: {}\n    steps: 1", 10, 5, "stages.#1", "exactly one stage key", "inside it"),
        ("- teach: {}", "- teach: {}\n  - id: empty", 10, 5, "stages.empty", "no stage key", "stages:"),
        ("- teach: {}", "- teach: {}\n  - teach", 10, 5, "stages.#2", "expected a mapping, found text 'teach'", ""),
        ("- teach: {}", "- teach: [1]", 9, 12, "stages.teach", "expected a mapping of options, found a list", ""),
        ("from: g", "from: h", 16, 11, "stages.last.from", "there is no stage 'h'", "g"),
        ("from: g", "from: last", 16, 11, "stages.last.from", "can't take its own result", ""),
        ("from: g", "from: teach", 16, 11, "stages.last.from", "'teach' makes a teacher", "model"),
        ("from: g", "from: [g]", 16, 11, "stages.last.from", "expected text, found a list", ""),
        ("teacher: teach", "teacher: last", 14, 16, "stages.g.teacher", "comes later", "move it up"),
        ("teacher: teach", "teacher: model", 14, 16, "stages.g.teacher", "found the recipe's `model:`", ""),
        ("teacher: teach", "teacher: teech", 14, 16, "stages.g.teacher", "no stage 'teech'", "did you mean 'teach'?"),
        ("steps: 5", "steps: 5, from: g", 17, 22, "stages.last.from", "stands twice", ""),
        ("data: text", "data: txt", 13, 13, "stages.g.data", "no entry 'txt'", "did you mean 'text'?"),
        ("id: last", "id: g", 15, 9, "stages.g.id", "there are two stages 'g'", "line 10"),
        ("id: last", "id: teach", 15, 9, "stages.teach.id", "there are two stages 'teach'", "line 9"),
        ("id: last", "id: model", 15, 9, "stages.model.id", "recipe's own model", ""),
        ("id: last", "id: /etc/x", 15, 9, "stages./etc/x.id", "expected a plain name", ""),
        ("id: last", "id: ../x", 15, 9, "stages.../x.id", "expected a plain name", ""),
        ("id: last", "id: 5", 15, 9, "stages.grow.id", "expected a plain name", ""),
        (
            "model: {source: builtin:pico}",
            "model: {sorce: x}",
            3,
            9,
            "model.sorce",
            "unknown key",
            "did you mean 'source'?",
        ),
        ("model: {source: builtin:pico}\n", "", 8, 5, "stages.teach", "the recipe has no `model:`", ""),
        ("a1q: 1", "a1q: 2", 1, 6, "a1q", "expected 1, found the number 2", ""),
        ("name: base\n", "", 1, 1, "name", "missing key 'name'", ""),
        ("name: base", "name: a/b", 2, 7, "name", "expected a plain name", ""),
        ("  text: {s", "  te xt: {s", 5, 3, "data.te xt", "expected a plain name", ""),
        ("match: '.*mlp.*'", "match: '('", 7, 16, "groups.mlp.match", "not a regular expression", ""),
        ("match: '.*mlp.*'", "match: '((((a*)*)*)*)*'", 7, 16, "groups.mlp.match", "nested more than", ""),
        ("match: '.*mlp.*'", "match: '(a)\\1'", 7, 16, "groups.mlp.match", "bounded time", ""),
        ("match: '.*mlp.*'", "match: 3", 7, 16, "groups.mlp.match", "expected text, found the number 3", ""),
        (
            "stages:\n",
            "runtime: {device: xla}\nstages:\n",
            *(8, 19, "runtime.device", "one of auto, cpu, cuda, mps"),
            "XLA and TPUs are out of scope",
        ),
        ("stages:\n", "runtime: {device: gpu}\nstages:\n", 8, 19, "runtime.device", "one of auto, cpu, cuda, mps", ""),
        ("stages:\n", "runtime: {threads: 0}\nstages:\n", 8, 20, "runtime.threads", "expected at least 1", ""),
        ("stages:\n", "runtime: {threads: all}\nstages:\n", 8, 20, "runtime.threads", "'auto' or a whole number", ""),
        (
            "stages:\n",
            "runtime: {amp: false}\nstages:\n",
            8,
            16,
            "runtime.amp",
            "one of auto, no, bf16, fp16, found false",
            "",
        ),
        ("stages:\n", "seed: -1\nstages:\n", 8, 7, "seed", "expected at least 0", ""),
        ("stages:\n", "stage: []\nstages:\n", 8, 1, "stage", "unknown key 'stage'", "did you mean 'stages'?"),
    ],
)
def test_one_mistake_is_one_problem(load, old, new, line, column, path, message, hint):
    assert old in BASE
    with pytest.raises(RecipeError) as caught:
        load(BASE.replace(old, new, 1))
    [problem] = caught.value.problems
    assert (problem.line, problem.column, problem.path) == (line, column, path)
    assert message in problem.message
    assert hint in problem.hint


def test_all_root_problems_at_once_in_the_order_of_the_text(load):
    text = BASE.replace("steps: 3", "steps: -3").replace("steps: 5", "stops: 5").replace("builtin:pico", "''")
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert [problem.line for problem in caught.value.problems] == [3, 12, 17]


def test_a_broken_stage_is_no_second_problem_where_it_is_used(load):
    with pytest.raises(RecipeError) as caught:
        load(BASE.replace("- teach: {}", "- id: teach\n    teech: {}"))
    assert len(caught.value.problems) == 1


def test_stages_that_are_missing_or_empty(load):
    head = BASE.partition("stages:")[0]
    for text, fragment in (
        (head, "missing key 'stages'"),
        (head + "stages: []\n", "at least 1 entries"),
        (head + "stages: {}\n", "expected a list"),
    ):
        with pytest.raises(RecipeError, match=fragment) as caught:
            load(text)
        assert len(caught.value.problems) == 1


def test_many_problems_are_cut(load):
    stages = "".join("  - nothing: {}\n" for _ in range(80))
    with pytest.raises(RecipeError) as caught:
        load(BASE + stages)
    assert len(caught.value.problems) == 51
    assert caught.value.problems[-1].message == "and 30 more problems"


ROOT_KEYS = ["a1q", "name", "seed", "runtime", "model", "data", "groups", "stages", "use", "set", "unset", "other"]
WORDS = st.sampled_from(
    ["grow", "teach", "export", "quantize", "rules", "scheme", "format", "id", "from", "steps", "mlp", "match"]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(-1, 9),
    WORDS,
    st.sampled_from(["lut_lowrank", "packed", "../x", ""]),
)
SHAPES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=10
)


@given(
    st.dictionaries(st.sampled_from(ROOT_KEYS), SHAPES),
    st.lists(st.dictionaries(WORDS, SHAPES, max_size=3), max_size=4),
)
def test_no_mapping_does_more_than_raise_a_recipe_error(tmp_path_factory, root, stages):
    file = tmp_path_factory.getbasetemp() / "shapes.yaml"
    file.write_text(yaml.safe_dump({**root, "stages": stages} if stages else root))
    try:
        recipe = load_recipe(file, registry=fake_registry())
    except A1QError as error:
        assert error.exit_code == 2
        assert str(error)
    else:
        assert len(recipe.stages) == len(stages)


SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rules"],
    "properties": {
        "rules": {"type": "object", "additionalProperties": {"type": "object", "x-plugin": "schemes"}},
        "rest": {"anyOf": [{"enum": ["keep", "error"]}, {"x-plugin": "schemes"}], "default": "keep"},
        "partial": {
            "type": "object",
            "additionalProperties": {"x-plugin": "schemes", "x-partial": True},
            "default": {},
        },
    },
}


@pytest.fixture
def checker():
    return Checker(fake_registry())


def test_plugin_mappings_are_filled_from_their_own_schema(checker):
    value = {"rules": {"mlp": {"scheme": "lut_lowrank", "bits": 2}}, "partial": {"mlp": {"bits": 4}}}
    assert checker.check(SCHEMA, value) == []
    uses = set()
    filled = checker.fill(SCHEMA, value, uses)
    assert uses == {("schemes", "lut_lowrank")}
    assert filled["rules"]["mlp"].keys() == {"scheme", *checker.registry.schema("schemes", "lut_lowrank")["properties"]}
    assert filled["rest"] == "keep"
    assert filled["partial"] == {"mlp": {"bits": 4}}
    rest = checker.fill(SCHEMA, {"rules": {}, "rest": {"scheme": "lut_lowrank", "bits": 4}}, set())["rest"]
    assert rest["rank"] == 1


@pytest.mark.parametrize(
    ("value", "path", "fragment"),
    [
        ({"rules": {"mlp": {"bits": 2}}}, ("rules", "mlp"), "missing key 'scheme'"),
        ({"rules": {"mlp": {"scheme": "lut_lowrnk", "bits": 2}}}, ("rules", "mlp", "scheme"), "no scheme 'lut_lowrnk'"),
        ({"rules": {"mlp": {"scheme": 4, "bits": 2}}}, ("rules", "mlp", "scheme"), "expected text"),
        ({"rules": {"mlp": {"scheme": "lut_lowrank"}}}, ("rules", "mlp", "bits"), "missing key 'bits'"),
        ({"rules": {"mlp": {"scheme": "lut_lowrank", "bits": 5}}}, ("rules", "mlp", "bits"), "one of 1, 2, 3, 4, 6, 8"),
        ({"rules": {"mlp": {"scheme": "lut_lowrank", "bits": 2, "rnk": 1}}}, ("rules", "mlp", "rnk"), "unknown key"),
        ({"rules": {"mlp": 4}}, ("rules", "mlp"), "expected a mapping"),
        ({"rules": {}, "rest": "kep"}, ("rest",), "one of keep, error or a mapping with `scheme`"),
        ({"rules": {}, "rest": {"scheme": "nothing"}}, ("rest", "scheme"), "no scheme 'nothing'"),
        ({"rules": {}, "rest": {"scheme": "lut_lowrank", "bits": 7}}, ("rest", "bits"), "one of"),
        ({"rules": {}, "partial": {"m": {"bits": 5}}}, ("partial", "m", "bits"), "one of"),
        ({"rules": {}, "partial": {"m": {"bitz": 4}}}, ("partial", "m", "bitz"), "unknown key"),
        ({"rules": {}, "partial": {"m": {"scheme": "x"}}}, ("partial", "m", "scheme"), "no scheme 'x'"),
    ],
)
def test_plugin_mappings_are_checked_by_their_own_schema(checker, value, path, fragment):
    [finding] = checker.check(SCHEMA, value)
    assert isinstance(finding, Finding)
    assert finding.path == path
    assert fragment in finding.message


def test_a_missing_model_points_to_the_stage_that_makes_one(load):
    text = "a1q: 1\nname: x\ndata:\n  text: {source: builtin:prose}\nstages:\n  - id: m\n    pretrain: {data: text}\n"
    with pytest.raises(RecipeError) as caught:
        load(text + "  - kd: {data: text}\n")
    (problem,) = caught.value.problems
    assert "the recipe has no `model:`" in problem.message and "`from: m`" in problem.hint
    load(text + "  - kd: {data: text, from: m}\n")
