"""Documents aside, in order, and mixed by weight."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import a1q.data.spool
from a1q.data import documents, identify, prepare, read_sequences
from a1q.data.bpe import train_tokenizer
from a1q.data.reading import Tokenized, mixed
from a1q.data.records import Record, conversational
from a1q.data.spool import Spool
from a1q.errors import StageError
from tests.data.test_chat import SWITCHED, use
from tests.data.test_records import write_lines
from tests.data.text import sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reading")
    train_tokenizer((sentence(number) for number in range(300)), 400, 512, place)
    return place


RECORDS = st.builds(
    Record,
    st.floats(0, 1, exclude_max=True),
    st.text(),
    st.lists(st.fixed_dictionaries({"role": st.text(), "content": st.text()}), max_size=3).map(tuple),
)


@given(st.lists(RECORDS, max_size=8), st.sampled_from([0, 40, 1 << 20]))
def test_what_is_put_aside_comes_back(records: list[Record], held: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a1q.data.spool, "HELD", held)
        with Spool(records) as spool:
            assert len(spool) == len(records)
            for number in reversed(range(len(records))):
                assert spool[number] == records[number]


def test_sequences_do_not_depend_on_where_documents_wait(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no file stays."""
    home = tmp_path / "home"
    monkeypatch.setenv("A1Q_HOME", str(home))
    entry = {"source": write_lines(tmp_path / "a.jsonl", [{"text": sentence(number)} for number in range(900)])}
    inside = read_sequences(entry, folder, "train", 32, None, 3)
    monkeypatch.setattr(a1q.data.spool, "HELD", 1000)
    outside = read_sequences(entry, folder, "train", 32, None, 3)
    assert (inside.tokens == outside.tokens).all() and (inside.starts == outside.starts).all()
    assert len(inside.tokens) > 300 and not list((home / "tmp").iterdir())


class Fixed:
    """A reader of documents of given lengths."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        return (Tokenized(numpy.zeros(length, numpy.int32), None) for length in self.lengths)


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=2, max_size=4), st.data())
def test_shares_are_never_further_from_the_weights_than_a_document(lengths: list[list[int]], data) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(lengths), max_size=len(lengths)))
    given_tokens = [0] * len(lengths)
    longest = max(max(part) for part in lengths)
    used = [0] * len(lengths)
    for number, document in mixed([Fixed(part) for part in lengths], weights):  # type: ignore[misc]
        given_tokens[number] += len(document.ids)
        assert len(document.ids) == lengths[number][used[number]]
        used[number] += 1
        levels = [tokens / weight for tokens, weight in zip(given_tokens, weights, strict=True)]
        assert max(levels) - min(levels) <= longest / min(weights) * (1 + 1e-9)
    assert any(count == len(part) for count, part in zip(used, lengths, strict=True))


@pytest.fixture
def mix(tmp_path: Path) -> dict:
    one = write_lines(tmp_path / "one.jsonl", [{"text": sentence(number)} for number in range(400)])
    two = write_lines(tmp_path / "two.jsonl", [{"question": f"What of {n}?", "answer": "So."} for n in range(400)])
    entries = [{"source": one, "holdout": 0.2}, {"source": two, "holdout": 0.1, "thinking": "off"}]
    parts = [{"name": name, "weight": weight, "entry": entry} for name, weight, entry in
             zip(("prose", "chats"), (3.0, 1.0), entries, strict=True)]  # fmt: skip
    return {"source": None, "parts": parts}


def test_a_mix_holds_its_parts_by_weight_and_each_by_its_own_split(folder: Path, mix: dict) -> None:
    use(folder, SWITCHED)
    found = read_sequences(mix, folder, "train", 32, 60, 5, marks=True)
    assert found.templated and found.separate and set(found.prompts) == {"off"}
    assert found.said is not None
    again = read_sequences(mix, folder, "train", 32, 20, 5)
    assert (again.tokens == found.tokens[:20]).all()
    opening = 1  # <|im_start|>
    chats = prose = 0
    flat, starts = found.tokens.reshape(-1), numpy.flatnonzero(found.starts)
    for begin, end in zip(starts, [*starts[1:], len(flat)], strict=True):
        if opening in flat[begin:end]:
            chats += end - begin
        else:
            prose += end - begin
    assert chats / (chats + prose) == pytest.approx(0.25, abs=0.02)
    sides = {split: set(documents(mix, split)) for split in ("train", "tune", "test")}
    assert sum(map(len, sides.values())) == len(set.union(*sides.values())) == 800
    held = [sum(text.startswith("Case") == kind for text in sides["test"]) for kind in (True, False)]
    assert 25 < held[0] < 55 and 8 < held[1] < 32


def test_the_part_that_ends_first_is_named(folder: Path, mix: dict) -> None:
    use(folder, SWITCHED)
    mix["parts"][0]["weight"] = 1000.0
    with pytest.raises(StageError, match=r"train side of the mix has text for .* `prose` is used up first"):
        read_sequences(mix, folder, "train", 32, 5000, 5)


def test_a_mix_is_known_by_its_parts(mix: dict, tmp_path: Path) -> None:
    digest = prepare(mix)
    assert digest == identify(mix) and conversational(mix) is True
    (tmp_path / "two.jsonl").write_text(json.dumps({"question": "Other?", "answer": "So."}) + "\n")
    assert prepare(mix) != digest
    mix["parts"][1]["entry"] = mix["parts"][0]["entry"]
    assert conversational(mix) is False


def test_both_ways_of_thinking_take_turns(folder: Path, tmp_path: Path) -> None:
    use(folder, SWITCHED)
    rows = [{"question": f"What of {number}?", "answer": "So."} for number in range(300)]
    source = write_lines(tmp_path / "qa.jsonl", rows)
    found = read_sequences({"source": source, "thinking": "both", "holdout": 1e-9}, folder, "train", 16, None, 0)
    from a1q.data.sequences import load_tokenizer

    text = load_tokenizer(folder)[0].decode(found.tokens.reshape(-1).tolist(), skip_special_tokens=False)
    answers = text.count("So.<|im_end|>")
    assert 0.4 < text.count("assistant\n<think>\n\n</think>\n\nSo.") / answers < 0.6
    assert set(found.prompts) == {"on", "off"} and found.prompts["on"] != found.prompts["off"]
