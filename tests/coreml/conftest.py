"""Packages that several tests look at; nobody changes them."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.coreml.models import SCHEMES, decoder, package_of


@pytest.fixture(scope="session")
def form(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """form(scheme name, tied) -> (model, package read back, layout)."""

    @functools.cache
    def build(name: str, tied: bool) -> Any:
        model = decoder(SCHEMES[name], tie_word_embeddings=tied)
        return model, *package_of(model, tmp_path_factory.mktemp(name))

    return build
