from hypothesis import given
from hypothesis import strategies as st

from a1q.data.cleaning import Novelty, clean, is_prose, shingles_of

PROSE = "Recursively copy an entire directory tree rooted at a directory named src to a directory named dst."
OTHER = "Return the canonical path of the specified filename, eliminating any symbolic links encountered in it."


def test_markup_goes_and_words_stay():
    text = (
        "Use :class:`~os.PathLike` objects or ``str`` values::\n\nSee [`AutoModel`] and [the guide](https://x.y/z) too."
    )
    assert clean(text) == ["Use `os.PathLike` objects or `str` values:", "See `AutoModel` and the guide too."]


def test_tables_rules_directives_and_fences_go():
    table, fence = "+---+\n| a |\n+---+", "```py\ny = f(x)\n```"
    text = f"Title of this\n=============\n\n{PROSE}\n\n.. versionadded:: 3.8\n\n{table}\n\n{fence}"
    assert clean(text) == ["Title of this", PROSE]


def test_one_short_example_stays():
    text = f"{PROSE}\n\n>>> f(1)\n2\n\n{OTHER}\n\n>>> f(2)\n3"
    assert clean(text) == [PROSE, ">>> f(1)\n2", OTHER]


def test_code_and_numbers_are_no_prose():
    assert is_prose(PROSE)
    assert not is_prose("x[0] = y[1] + z[2]; f(x) -> 3.14")
    assert not is_prose("0.12 0.33 0.11 0.99 1.23")
    assert not is_prose('try_stmt ::= "try" ":" suite')


def test_typographic_marks_become_plain():
    assert clean("It\u2019s a \u201csimple\u201d test \u2013 of the marks in a text.") == [
        'It\'s a "simple" test - of the marks in a text.'
    ]


def test_what_was_said_before_goes():
    novelty = Novelty()
    assert novelty.filter([PROSE]) == [PROSE]
    assert novelty.filter([PROSE]) == []
    assert novelty.filter([PROSE.replace("entire", "whole") + " And so on."]) == []
    assert novelty.filter([OTHER]) == [OTHER]


def test_a_dropped_document_still_counts_as_said():
    novelty = Novelty()
    novelty.filter([PROSE])
    words = PROSE.split()
    tail = " ".join(words[5:]) + " unless symlinks are followed"
    assert novelty.filter([tail]) == []
    assert novelty.filter([" ".join(tail.split()[6:]) + " by the caller"]) == []


def test_a_repeated_paragraph_goes_and_the_rest_stays():
    novelty = Novelty()
    novelty.filter([PROSE])
    new = [OTHER, "Raise an error if the file does not exist or the caller may not read it at all, ever."]
    assert novelty.filter([PROSE, *new]) == new


@given(st.lists(st.text(alphabet="abc xyz.\n", max_size=200), max_size=5))
def test_nothing_that_is_kept_is_mostly_seen(paragraphs: list[str]):
    novelty = Novelty()
    novelty.filter(paragraphs)
    before = set(novelty.seen)
    for kept in novelty.filter(paragraphs):
        shingles = shingles_of(kept)
        assert not shingles or len(shingles & before) < 0.5 * len(shingles)
