"""The YAML dialect: values, places, and what is refused where."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from a1q.errors import RecipeError
from a1q.recipe.text import Node, parse_recipe, parse_value

KEYS = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\ufeff\ufffe\uffff"),
        max_size=20,
    ),
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


class Quoting(yaml.SafeDumper):
    """Writes all text in quotes: PyYAML leaves `0E0` bare, which YAML 1.2 reads as a number."""


Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def value(text):
    return parse_recipe(f"key: {text}".encode(), "r.yaml").plain()["key"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("1e+3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("012", 12),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("~", None),
        ("null", None),
        ("", None),
        ("'1'", "1"),
        ("nan", "nan"),
        ("=", "="),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
    ],
)
def test_scalars_follow_yaml_1_2(text, expected):
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "line", "column", "fragment"),
    [
        ("a: 1\nb: .nan\n", 2, 4, "not a finite number"),
        ("a: -.inf\n", 1, 4, "not a finite number"),
        ("a: 1e999\n", 1, 4, "not a finite number"),
        ("a: 99999999999999999999\n", 1, 4, "64 bits"),
        ("a: " + "9" * 5000 + "\n", 1, 4, ""),
        ("a: 1\n\nb:\n  c: 1\n  c: 2\n", 5, 3, "duplicate key 'c'"),
        ("a: 1\n1: 2\n", 2, 1, "a key must be text"),
        ("[a, b]: 2\n", 1, 1, "a key must be text"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", 3, 3, "merge keys"),
        ("a: !!python/object:os.system {}\n", 1, 4, "tag !!python/object:os.system"),
        ("a: !custom 3\n", 1, 4, "tag !custom"),
        ("a: !!int abc\n", 1, 4, ""),
        ("a: !!bool maybe\n", 1, 4, "tag !!bool"),
        ("a:\n\tb: 1\n", 2, 1, "not YAML"),
        ("a: [1, 2\nb: 3\n", 2, 2, "not YAML"),
        ("a: *nowhere\n", 1, 4, "undefined alias"),
        ("a: 1\n---\nb: 2\n", 2, 1, "one YAML document"),
        ("", 1, 1, "empty"),
        ("# only a comment\n", 1, 1, "empty"),
        ("- a\n- b\n", 1, 1, "a recipe is a mapping of keys, not a list"),
        ("just text\n", 1, 1, "not text 'just text'"),
        ("a: &x [*x]\n", 1, 4, "nested more than"),
        ("a: " + "[" * 400 + "]" * 400, 1, 0, "nested more than"),
        ("a: " + "[" * 40000, 1, 0, "nested more than"),
        ('a: "\\ud800"\n', 1, 4, "surrogate"),
    ],
)
def test_refused_at_its_place(text, line, column, fragment):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text.encode(), "r.yaml")
    problem = caught.value.problems[0]
    assert (problem.file, problem.line) == ("r.yaml", line)
    assert column in (0, problem.column)
    assert fragment in problem.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("data", "line", "fragment"),
    [
        (b"a: 1\nb: \xff\xfe\n", 2, "0xff is not UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", 1, "not UTF-8"),
        (b"a: 1\nb: \x00\n", 2, "not allowed"),
        (b"a: " + b"x" * 200_000, 0, "at most"),
    ],
)
def test_binary_and_huge_files(data, line, fragment):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, "r.yaml")
    assert caught.value.problems[0].line == line
    assert fragment in caught.value.problems[0].message


def test_tabs_get_a_remedy():
    with pytest.raises(RecipeError, match="indent with spaces"):
        parse_recipe(b"a:\n\tb: 1\n", "r.yaml")


def test_all_duplicates_are_shown_at_once():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(b"a: 1\nb: {c: 1, c: 2}\na: 2\n", "r.yaml")
    assert [problem.line for problem in caught.value.problems] == [2, 3]


def test_an_alias_bomb_fails_fast():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    with pytest.raises(RecipeError, match="aliases unfold to more than"):
        parse_recipe("\n".join(lines).encode(), "r.yaml")


def test_aliases_are_copies_with_their_anchors_place():
    node = parse_recipe(b"a: &x {b: 1}\nc: *x\n", "r.yaml")
    assert node.plain() == {"a": {"b": 1}, "c": {"b": 1}}
    assert node.value["c"].value["b"].place.line == 1
    assert node.value["c"].value["b"] is not node.value["a"].value["b"]


def test_a_byte_order_mark_and_windows_line_ends_are_fine():
    assert parse_recipe(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n", "r.yaml").plain() == {"a": 1, "b": 2}


@given(st.dictionaries(KEYS, TREES, min_size=1, max_size=4))
def test_what_yaml_writes_is_read_back_equal(tree):
    text = yaml.dump(tree, Dumper=Quoting, allow_unicode=True)
    assert parse_recipe(text.encode(), "r.yaml").plain() == tree


@given(st.dictionaries(KEYS, TREES, min_size=1, max_size=4))
def test_every_key_is_where_its_place_says(tree):
    text = yaml.safe_dump(tree, allow_unicode=True)
    lines = text.split("\n")

    def check(node: Node) -> None:
        for key, child in node.entries.items():
            place = child.key_place
            written = lines[place.line - 1][place.column - 1 :].lstrip("? ").lstrip("'\"")
            assert written.startswith(key)
        for child in node.value if isinstance(node.value, list) else node.entries.values():
            check(child)

    check(parse_recipe(text.encode(), "r.yaml"))


@given(
    st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
)
def test_no_bytes_do_more_than_raise_a_recipe_error(data):
    try:
        found = parse_recipe(data, "r.yaml").plain()
    except RecipeError as error:
        assert all(problem.file == "r.yaml" for problem in error.problems)
    else:
        assert isinstance(found, dict)


@given(st.text("ab:-[]{},&*!|>'\"#%@`<=?~01.eE \n\t", max_size=60))
def test_no_yaml_like_text_does_more_than_raise_a_recipe_error(text):
    try:
        parse_recipe(text.encode(), "r.yaml")
    except RecipeError as error:
        assert str(error)


@given(st.floats())
def test_numbers_are_finite_or_refused(number):
    try:
        found = parse_value(repr(number), "--set a").plain()
    except RecipeError:
        assert not math.isfinite(number)
    else:
        assert found == number or isinstance(found, str)
