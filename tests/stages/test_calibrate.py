import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.engine.stage import DataEntry
from a1q.errors import StageError
from a1q.models.checkpoint import load_model
from a1q.models.view import ModelView
from a1q.quant.fisher import fisher_information
from a1q.quant.statistics import Statistics, read_statistics
from tests.stages.quantizing import MLP4, plan, run, view_of
from tests.tiny import TEXT, tiny_folder

OPTIONS = {"data": "text", "sequences": 6, "batch": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Artifact("model", tiny_folder(tmp_path_factory.mktemp("source") / "model"), "s" * 64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataEntry]:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"{number}: {line} {number * 37}"}) for number in range(80) for line in TEXT]
    file.write_text("\n".join(lines), encoding="utf-8")
    config = {"source": str(file), "seq_len": 16, "holdout": 0.05, "format": "auto", "column": None, "revision": None}
    return {"text": DataEntry("text", config, "t" * 64)}


def data_bytes(folder: Path) -> int:
    """Bytes of all tensors, without the headers."""
    files = list(folder.glob("*.safetensors"))
    return sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)


@pytest.mark.parametrize(("gram", "gradients"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_is_written_was_planned(
    tmp_path: Path, source: Artifact, text: dict[str, DataEntry], gram: bool, gradients: bool
) -> None:
    options = {**OPTIONS, "gram": gram, "gradients": gradients}
    outcome, problems = plan("calibrate", {"model": view_of(source)}, options, text)
    assert problems == []
    made, ctx = run("calibrate", tmp_path, {"model": source}, options, text)
    found = Statistics(made.path)
    assert sorted(found.square) == sorted(outcome.view["modules"])
    assert outcome.disk_bytes == data_bytes(made.path)
    names = {file.name for file in made.path.iterdir()}
    grams = {"gram-00000.safetensors", "gram-00001.safetensors", "gram-head.safetensors"} if gram else set()
    fisher = {"gradients.safetensors"} if gradients else set()
    assert names == {"statistics.safetensors", "tokens.safetensors", *grams, *fisher}
    for layer in ("model.layers.0", "model.layers.1"):
        matrix = found.sensitivity(layer)
        assert (matrix.shape == (64, 64) and matrix.diagonal().min() > 0) if gradients else matrix is None
    notes = [note for note in outcome.notes if "gradients" in note]
    assert notes == (["gradients at 2 decoder layers over 96 tokens"] if gradients else [])
    assert ctx.meta["tokens"] == 96 == found.tokens.size
    again, _ = run("calibrate", tmp_path / "again", {"model": source}, options, text)
    assert all((again.path / name).read_bytes() == (made.path / name).read_bytes() for name in names)


def test_gradients_are_those_of_the_first_sequences_with_labels_of_the_seed(
    tmp_path: Path, source: Artifact, text: dict[str, DataEntry]
) -> None:
    made, _ = run("calibrate", tmp_path, {"model": source}, {**OPTIONS, "gradient_sequences": 3}, text)
    found = Statistics(made.path)
    model = load_model(source.path)
    expected = fisher_information(model, found.tokens[:3], batch_size=4, seed=7)
    assert all(torch.equal(found.sensitivity(name), matrix) for name, matrix in expected.items())


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"sequences": 3}, "gradients of 48 tokens say little of 64 hidden channels: raise `sequences`"),
        (
            {"gradient_sequences": 2},
            "gradients of 32 tokens say little of 64 hidden channels: raise `gradient_sequences`",
        ),
        ({"gradient_sequences": 4}, None),
        ({"sequences": 3, "gradients": False}, None),
    ],
)
def test_gradients_of_few_tokens_are_told(
    source: Artifact, text: dict[str, DataEntry], options: dict[str, Any], remedy: str | None
) -> None:
    outcome, _ = plan("calibrate", {"model": view_of(source)}, {**OPTIONS, **options}, text)
    assert [note for note in outcome.notes if "say little of 64" in note] == ([] if remedy is None else [remedy])


def test_few_tokens_are_told(tmp_path: Path, source: Artifact, text: dict[str, DataEntry]) -> None:
    for sequences, few in ((5, True), (6, False)):  # of 16 tokens, for 96 inputs
        options = {**OPTIONS, "sequences": sequences}
        outcome, _ = plan("calibrate", {"model": view_of(source)}, options, text)
        assert any("raise `sequences`" in note for note in outcome.notes) == few
        lines: list[str] = []

        def emit(kind: str, values: Mapping[str, Any], lines: list[str] = lines) -> None:
            lines.extend([values["message"]] if kind == "log" else [])

        run("calibrate", tmp_path / str(sequences), {"model": source}, options, text, emit=emit)
        assert any(line.startswith("WARNING: 80 tokens say little") for line in lines) == few


def test_too_short_a_text_is_an_error_that_counts(tmp_path: Path, source: Artifact, text: dict[str, DataEntry]) -> None:
    with pytest.raises(StageError, match=r"has text for \d+ sequences of 16 tokens, and 100000 were asked for"):
        run("calibrate", tmp_path, {"model": source}, {**OPTIONS, "sequences": 100000}, text)


def test_a_quantized_model_calibrates_too(tmp_path: Path, source: Artifact, text: dict[str, DataEntry]) -> None:
    quantized, _ = run("quantize", tmp_path, {"model": source}, {"rules": {"mlp": MLP4}})
    made, _ = run("calibrate", tmp_path, {"model": quantized}, {"data": "text", "sequences": 2}, text)
    names = [name for name, module in load_model(source.path).named_modules() if "proj" in name]
    found = read_statistics(made, names)
    assert found is not None and set(found.square) == {*names, "model.embed_tokens"}


def test_bad_activations_are_named(tmp_path: Path, text: dict[str, DataEntry]) -> None:
    folder = tiny_folder(tmp_path / "model")
    model = load_model(folder)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[:] = 3e38
    model.save_pretrained(folder)
    with pytest.raises(StageError, match=r"inputs of model\.layers\.1\.self_attn\.q_proj are not finite"):
        run("calibrate", tmp_path / "out", {"model": Artifact("model", folder, "b" * 64)}, OPTIONS, text)


def memory(view: ModelView, text: dict[str, DataEntry], **options: Any) -> int:
    return plan("calibrate", {"model": view}, {**OPTIONS, **options}, text)[0].memory_bytes


def test_memory_is_the_model_and_one_block(source: Artifact, text: dict[str, DataEntry]) -> None:
    view = view_of(source)
    needed = [memory(view, text, sequences=sequences, gradients=False) for sequences in (6, 106)]
    assert needed[1] - needed[0] == 100 * 16 * 64 * 4
    assert needed[0] > 4 * view.parameters + np.square([64, 64, 96, 96]).sum() * 8


def test_memory_of_gradients_depends_on_the_batch_and_not_on_the_text(
    source: Artifact, text: dict[str, DataEntry]
) -> None:
    view = view_of(source)
    few, many = (memory(view, text, sequences=n, gradient_sequences=n, gram=False, batch=4) for n in (6, 12))
    assert few == many
    assert memory(view, text, gram=False, batch=4) == few > memory(view, text, gram=False, batch=2)
    assert few >= 4 * view.parameters + 2 * 8 * 64**2 + 4 * 4 * 16 * (320 * 3 + 64 * 3)
