from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny_folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model of all checkpoints here."""
    return tiny_folder(tmp_path_factory.mktemp("importing") / "tiny")
