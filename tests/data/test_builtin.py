import json
from pathlib import Path

import pytest

from a1q.data import builtin, documents, identify, prepare
from a1q.data.cleaning import shingles_of
from a1q.errors import MismatchError
from tests.data.text import sentence

ENTRY = {"source": "builtin:prose", "holdout": 0.4}


def test_extraction_is_deterministic_and_imports_nothing(library: Path, own_home: Path, monkeypatch):
    first = prepare(ENTRY)
    monkeypatch.setenv("A1Q_HOME", str(own_home.parent / "other"))
    assert prepare(ENTRY) == first
    assert len(first) == 64


def test_identity_is_known_after_extraction_only(library: Path):
    assert identify(ENTRY) == ""
    assert identify({"source": "builtin:qa"}) == ""
    digest = prepare(ENTRY)
    assert identify(ENTRY) == digest
    assert identify({"source": "builtin:qa"}) not in ("", digest)


def test_splits_are_disjoint_and_whole(library: Path):
    sides = [set(documents(ENTRY, split)) for split in ("train", "tune", "test")]
    assert all(sides)
    assert sum(map(len, sides)) == len(set.union(*sides)) == 120


def test_a_module_is_on_one_side(library: Path):
    place = {item.name: item.place for item in builtin.read("builtin:prose")}
    assert all(place[f"mod{n}"] == place[f"mod{n}.call_{n}"] for n in range(60))


def test_what_is_near_to_held_out_text_leaves_train(library: Path, own_home: Path):
    held_out = next(iter(documents(ENTRY, "test")))
    near = held_out.replace("before any other", "before any")
    for number in range(20):
        (library / f"copy{number}.py").write_text(f'"""{near} {sentence(number + 5000)[:20]}"""\n', encoding="utf-8")
    next((own_home / "text").glob("index-*.json")).unlink()
    train = list(documents(ENTRY, "train"))
    assert held_out in set(documents(ENTRY, "test"))
    shingles = shingles_of(held_out)
    assert train and all(len(shingles_of(text) & shingles) < 0.5 * len(shingles_of(text)) for text in train)


def test_a_damaged_text_is_made_again(library: Path, own_home: Path):
    digest = prepare(ENTRY)
    path = own_home / "text" / digest / "documents.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert prepare(ENTRY) == digest
    assert path.read_bytes() == whole
    assert sorted(item.name for item in (own_home / "text").iterdir() if item.is_dir()) == [digest]


def test_a_damaged_index_is_made_again(library: Path, own_home: Path):
    digest = prepare(ENTRY)
    index = next((own_home / "text").glob("index-*.json"))
    index.write_text('{"digest": ')
    assert identify(ENTRY) == ""
    assert prepare(ENTRY) == digest
    assert json.loads(index.read_text())["digest"] == digest


def test_the_real_library_has_text_for_the_demo():
    """About four seconds: the one test that reads the real standard library."""
    sizes = {split: sum(map(len, documents({"source": "builtin:prose"}, split))) for split in ("train", "tune", "test")}
    assert sizes["train"] > 1_000_000
    assert min(sizes["tune"], sizes["test"]) > 40_000
    questions = list(documents({"source": "builtin:qa", "holdout": 0.5}, "train"))
    assert len(questions) > 500
    assert all("\n\n" in text for text in questions)


def test_an_unknown_built_in_text_is_named():
    with pytest.raises(MismatchError, match="did you mean builtin:prose"):
        prepare({"source": "builtin:pros"})
