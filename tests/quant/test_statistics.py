import json
from pathlib import Path

import numpy as np
import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.errors import StageError
from a1q.quant.statistics import Statistics, read_statistics, write_gram, write_sensitivity, write_statistics

TOKENS = np.array([[1, 2, 2], [5, 2, 0]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    file = write_gram(tmp_path, "00000", {"q": torch.eye(4)})
    square = {"q": torch.ones(4), "k": torch.ones(4), "o": torch.arange(3.0)}
    grams = {"q": (file, "q"), "k": (file, "q")}
    write_sensitivity(tmp_path, {"layers.0": 2 * torch.eye(3, dtype=torch.float64)})
    ends = {"embedding": ("table", (7, 3)), "head": "o"}
    write_statistics(tmp_path, square, TOKENS, **ends, grams=grams, layers=["layers.0"])
    return tmp_path


def test_what_was_written_is_read(folder: Path) -> None:
    found = Statistics(folder)
    assert found.tokens.dtype == np.int32 and (found.tokens == TOKENS).all()
    assert found.counts.tolist() == [1, 1, 3, 0, 0, 1, 0]
    assert torch.equal(found.inputs("k").gram, torch.eye(4))
    assert found.inputs("o").gram is None and found.inputs("o").square.tolist() == [0, 1, 2]
    assert found.inputs("v") is None
    assert torch.equal(found.sensitivity("layers.0"), 2 * torch.eye(3))
    assert found.sensitivity("layers.1") is None


def test_statistics_from_before_gradients_are_read(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "statistics.safetensors"
    facts = {"embedding": {"name": "table", "shape": (7, 3)}, "head": "o", "grams": {}}
    save_file(load_file(file), file, metadata={"a1q": json.dumps(facts)})
    assert Statistics(folder).sensitivity("layers.0") is None


def test_rows_of_tokens_count_as_often_as_the_tokens_occur(folder: Path) -> None:
    found = Statistics(folder)
    table, head, other = found.inputs("table"), found.inputs("o"), found.inputs("q")
    assert table.square.tolist() == [1, 1, 1] and table.gram is None
    assert table.rows.tolist() == head.rows.tolist() == [2, 2, 4, 1, 1, 2, 1]
    assert other.rows is None


def test_matrices_are_read_only_when_asked_for(folder: Path) -> None:
    (folder / "gram-00000.safetensors").write_bytes(b"nonsense")
    found = Statistics(folder)
    assert found.inputs("o") is not None
    with pytest.raises(StageError, match=r"gram-00000\.safetensors can't be read"):
        found.inputs("q")


@pytest.mark.parametrize(
    "name", ["statistics.safetensors", "tokens.safetensors", "gram-00000.safetensors", "gradients.safetensors"]
)
@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_damage_is_named(folder: Path, name: str, damage: str) -> None:
    from safetensors.torch import save_file

    file = folder / name
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        save_file({"something": torch.ones(2)}, file)
    with pytest.raises(StageError, match=name.replace(".", r"\.")):
        found = Statistics(folder)
        found.inputs("q")
        found.sensitivity("layers.0")
        found.counts  # noqa: B018


def test_tokens_beyond_the_vocabulary_are_damage(tmp_path: Path) -> None:
    write_statistics(tmp_path, {}, TOKENS, embedding=("table", (5, 3)), head="table")
    with pytest.raises(StageError, match=r"tokens\.safetensors is damaged: it holds ids beyond 0 to 4"):
        Statistics(tmp_path).counts  # noqa: B018


def test_missing_modules_are_named(folder: Path) -> None:
    assert read_statistics(None, ["q"]) is None
    assert read_statistics(Artifact("statistics", folder, ""), ["q", "o"]) is not None
    with pytest.raises(StageError, match="no entry for v, w"):
        read_statistics(Artifact("statistics", folder, ""), ["q", "v", "w"])
