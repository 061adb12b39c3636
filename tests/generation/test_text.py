"""Text in pieces is the text as a whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.generation.text import Decoder, Thoughts, begins_inside, harmless, said
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


def with_bytes(decoder: str) -> Any:
    """A tokenizer as those of Llama 2 and Mistral, or of Gemma, or the tiny models' own, without merges."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", *(f"<0x{number:02X}>" for number in range(256)), "▁", "▁a", "b", "▁日", "é", ".", "\ufffd"]
    vocabulary = {word: number for number, word in enumerate(words)}
    found = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    found.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if decoder == "mistral" else steps)
    found.add_special_tokens(["</s>"])
    return found


@pytest.mark.parametrize("decoder", ["mistral", "gemma", "tiny"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_tokens_are_what_the_tokenizer_makes_of_all(tokenizer, decoder: str, data: st.DataObject) -> None:
    """Models of few bits write bytes that are no text."""
    plain = tokenizer.backend_tokenizer if decoder == "tiny" else with_bytes(decoder)
    size = plain.get_vocab_size()  # the two behind are in no vocabulary, as in padded embeddings
    mostly_words = st.one_of(st.integers(size - 9, size + 1), st.integers(0, size + 1))
    ids = data.draw(st.lists(mostly_words, max_size=25))
    read = Decoder(SimpleNamespace(backend_tokenizer=plain))
    assert "".join([*map(read, ids), read.end()]) == plain.decode(ids)


def test_bytes_that_are_no_text_behind_some_that_are() -> None:
    plain = with_bytes("gemma")
    ids = [plain.token_to_id(word) for word in ("<0x0A>", "b", "<0x41>", "<0xE6>", "▁a", "<0xC3>", "<0xA9>", "b")]
    read = Decoder(SimpleNamespace(backend_tokenizer=plain))
    assert [read(token) for token in ids] == ["", "\nb", "", "", "\ufffd\ufffd a", "", "", "éb"]


@pytest.mark.parametrize(
    ("text", "inside", "wanted"),
    [
        ("So.", False, "So."),
        ("<think>\nHm.\n</think>\n\nSo.", False, "So."),
        ("Hm.\n</think>\n\nSo.", True, "So."),
        ("Hm.", True, ""),
        ("<think>\nHm", False, ""),
        ("\n So <think>hm", False, "\n So "),
        ("<think>a</think>b<think>c", False, "b"),
    ],
)
def test_what_is_said_is_no_thought(text: str, inside: bool, wanted: str) -> None:
    assert said(text, inside) == wanted


def test_a_terminal_gets_no_commands() -> None:
    assert harmless("a\x1b[2J\x07\rb\x9bc\n\té日") == "a\ufffd[2J\ufffd\ufffdb\ufffdc\n\té日"


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
