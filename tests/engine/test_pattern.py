"""Bounded matching equals `re.fullmatch` and never hangs."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1q.engine.pattern import compile_pattern

ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\D", r"\w", r"\W", r"\s", "[ab]", "[^a]", "[a-c0-9]", r"[\d.]", r"[^\w]", "7", ""]
)


def grow(inner):
    repeat = st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "+?", "??"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: "(" + "|".join(parts) + ")"),
        st.tuples(inner, repeat).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


@given(st.recursive(ATOMS, grow, max_leaves=6), st.text("ab.7_ ", max_size=8))
def test_equals_fullmatch_of_re(pattern, name):
    try:
        compiled = compile_pattern(pattern)
    except ValueError as error:
        assert "nested more than" in str(error)
        return
    assert compiled.fullmatch(name) == bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r"^model\.(?!layers\.0\.).*_proj$", "model.layers.1.mlp.up_proj"),
        (r"^model\.(?!layers\.0\.).*_proj$", "model.layers.0.mlp.up_proj"),
        (r"(?=.*mlp).*\Z", "model.mlp"),
        (r"a\nb", "a\nb"),
        (r"a.b", "a\nb"),
    ],
)
def test_anchors_and_lookahead(pattern, name):
    assert compile_pattern(pattern).fullmatch(name) == bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|a)*b",
        "(a|aa)+b",
        ".*" * 30 + "b",
        "(a?){40}" + "a{40}b",
        "((a*)*)*b",
        "(?:a|){1000000}b",
        "(.*)*b",
    ],
)
def test_patterns_that_backtrack_exponentially_are_fast(pattern):
    start = time.perf_counter()
    assert not compile_pattern(pattern).fullmatch("a" * 80)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("pattern", "fragment"),
    [
        ("(", "unterminated"),
        ("*", "nothing to repeat"),
        ("[z-a]", "bad character range"),
        ("a{99999999999999999999}", "too large"),
        ("(?i)a", "flags"),
        ("(?i:a)", "flags"),
        (r"(a)\1", "bounded time"),
        ("(?<=a)b", "bounded time"),
        ("(?>a)b", "bounded time"),
        (r"a\b", "word boundaries"),
        ("((((a*)*)*)*)*", "nested more than"),
        ("a" * 1001, "1001 characters"),
    ],
)
def test_refusals_say_why(pattern, fragment):
    with pytest.raises(ValueError, match=re.escape(fragment)):
        compile_pattern(pattern)
