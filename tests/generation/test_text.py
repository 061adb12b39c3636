"""Text in pieces is the text as a whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.generation.text import Decoder, Thoughts, begins_inside
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder(tmp_path_factory.mktemp("text") / "tiny"))


@given(text=st.text(st.sampled_from("abc é ß 日本 😀\n"), max_size=20))
@settings(max_examples=60, deadline=None)
def test_pieces_are_never_broken_and_together_the_text(tokenizer, text: str) -> None:
    decoder = Decoder(tokenizer)
    pieces = [decoder(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def cut(text: str, sizes: list[int], inside: bool = False) -> list[tuple[bool, str]]:
    """What `Thoughts` makes of a text in pieces of these sizes, neighbours joined."""
    thoughts, found, place = Thoughts(inside), [], 0
    for size in [*sizes, len(text)]:
        found += thoughts(text[place : place + size])
        place += size
    found += thoughts.end()
    joined: list[tuple[bool, str]] = []
    for thought, part in found:
        if joined and joined[-1][0] == thought:
            joined[-1] = thought, joined[-1][1] + part
        else:
            joined.append((thought, part))
    return joined


@given(st.lists(st.integers(0, 6), max_size=20))
def test_thoughts_are_told_apart_wherever_pieces_end(sizes: list[int]) -> None:
    text = "So. <think>\nHm < or </thin?\n</think>\n\n2 <thin 3 <think>again"
    wanted = [(False, "So. "), (True, "\nHm < or </thin?\n"), (False, "\n\n2 <thin 3 "), (True, "again")]
    assert cut(text, sizes) == wanted
    assert cut("Hm.</think>So.", sizes, inside=True) == [(True, "Hm."), (False, "So.")]
    assert cut("a <th", sizes) == [(False, "a <th")]


def test_where_a_prompt_leaves_off() -> None:
    assert begins_inside("assistant\n<think>\n")
    assert not begins_inside("assistant\n<think>\n\n</think>\n\n")
    assert not begins_inside("assistant\n")
