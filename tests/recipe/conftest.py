"""A registry with fake stages, a folder to write recipes in, and a store of its own."""

import pytest
from hypothesis import settings

from a1q.recipe import load_recipe
from tests.recipe.fakes import fake_registry

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


@pytest.fixture
def registry():
    return fake_registry()


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))


@pytest.fixture
def load(tmp_path, registry):
    """Write a recipe's text to r.yaml and load it."""

    def load(text, sets=(), unsets=(), name="r.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / name, sets=sets, unsets=unsets, registry=registry)

    return load
