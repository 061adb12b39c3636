"""Folders that several tests look at; nobody changes them."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.coreml.anemll.exported import exported, family


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """made(model type) -> (model, exported folder)."""

    @functools.cache
    def build(model_type: str) -> Any:
        model = family(model_type)
        return model, exported(model, tmp_path_factory.mktemp(model_type))

    return build
