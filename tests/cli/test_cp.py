"""`a1q cp`: copies that still work, and nothing overwritten."""

import pytest

from a1q.recipe import shipped_recipes
from tests.cli.support import a1q


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_copy_is_valid_and_says_the_same(name, folder):
    result = a1q("cp", name, "mine.yaml")
    assert result.exit_code == 0, result.output
    original, copy = shipped_recipes()[name].read_text(), (folder / "mine.yaml").read_text()
    assert copy == original or "use:" in copy
    assert a1q("validate", "mine.yaml").exit_code == 0
    assert [path.name for path in folder.iterdir()] == ["mine.yaml"]


def test_the_default_destination_is_here(folder):
    assert a1q("cp", "q4_to_q2").exit_code == 0
    assert (folder / "q4_to_q2.yaml").is_file()
    (folder / "sub").mkdir()
    assert a1q("cp", "q4_to_q2", "sub").exit_code == 0
    assert (folder / "sub" / "q4_to_q2.yaml").is_file()


def test_nothing_is_overwritten_unasked(folder):
    (folder / "q4_to_q2.yaml").write_text("mine")
    result = a1q("cp", "pico", "q4_to_q2.yaml")
    assert result.exit_code == 2
    assert "is there already" in result.output
    assert (folder / "q4_to_q2.yaml").read_text() == "mine"
    assert a1q("cp", "pico", "q4_to_q2.yaml", "--force").exit_code == 0
    assert "name: pico" in (folder / "q4_to_q2.yaml").read_text()


def test_use_still_finds_its_recipe_from_the_copys_place(folder):
    (folder / "a" / "b").mkdir(parents=True)
    assert a1q("cp", "q4_to_q2", "a/base.yaml").exit_code == 0
    text = "a1q: 1\nname: mine\nuse: '../base.yaml'  # the base\nset:\n  seed: 3\n"
    (folder / "a" / "b" / "mine.yaml").write_text(text)
    assert a1q("cp", "a/b/mine.yaml", "copy.yaml").exit_code == 0
    assert (folder / "copy.yaml").read_text() == text.replace("../base.yaml", "a/base.yaml")
    assert a1q("validate", "copy.yaml").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [(("q4_to_q3",), "did you mean 'q4_to_q2'?"), (("q4_to_q2", "nowhere/x.yaml"), "nowhere is not a folder")],
)
def test_what_can_not_be_copied(arguments, fragment, folder):
    result = a1q("cp", *arguments)
    assert result.exit_code == 2
    assert fragment in result.output
    assert list(folder.iterdir()) == []
