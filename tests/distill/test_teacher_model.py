import shutil

import pytest

from a1q.distill.teacher_model import find_teacher, note_teacher
from a1q.engine.artifact import Artifact
from a1q.errors import MismatchError
from a1q.models.source import resolve_source
from tests.tiny import tiny_folder


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    return resolve_source(str(tiny_folder(tmp_path / "teacher")), None)


@pytest.fixture
def cache(teacher, tmp_path):
    (tmp_path / "cache").mkdir()
    return Artifact("teacher", tmp_path / "cache", "c" * 64, {"teacher": note_teacher(teacher, tmp_path / "cache")})


def test_found_again_by_its_source(teacher, cache):
    assert find_teacher(cache).resolve() == teacher.path.resolve()
    assert not list(cache.path.iterdir())


def test_the_same_model_at_hand_is_taken_wherever_it_lies(teacher, cache, tmp_path):
    moved = tmp_path / "moved"
    shutil.move(teacher.path, moved)
    near = resolve_source(str(moved), None)
    assert find_teacher(cache, near).resolve() == moved.resolve()


def test_gone_or_changed_since_says_what_to_do(teacher, cache, tmp_path):
    other = resolve_source(str(tiny_folder(tmp_path / "other", seed=9)), None)
    shutil.copyfile(other.path / "model.safetensors", teacher.path / "model.safetensors")
    with pytest.raises(MismatchError, match=r"has changed since[\s\S]*teacher_model: \{source") as error:
        find_teacher(cache, other)
    assert str(teacher.path) in str(error.value)
    shutil.rmtree(teacher.path)
    with pytest.raises(MismatchError, match=r"is not found[\s\S]*teacher_model: \{source"):
        find_teacher(cache, other)
