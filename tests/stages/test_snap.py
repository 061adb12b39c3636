import signal
from pathlib import Path

import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.errors import Interrupted, StageError
from a1q.models.checkpoint import load_model, save_model
from a1q.models.view import read_safetensors_header
from a1q.quant.linear import quantized_modules, swap_module
from a1q.stages.snap import compare_round_trip
from tests.stages.quantizing import MLP4, plan, run, view_of
from tests.training.student import build, read_tensors

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return build(tmp_path_factory.mktemp("snap"))


def changed(folder: Path, source: Artifact, change) -> Artifact:
    model = load_model(source.path)
    with torch.no_grad():
        change(model)
    folder.mkdir()
    save_model(model, folder, tokenizer_from=source.path)
    return Artifact("model", folder, "c" * 64)


def test_everything_is_fp16_and_reads_back_equal(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    def adapt(model) -> None:
        model.get_submodule(UP).set_adapter(torch.randn(2, 64), torch.randn(96, 2), 2.0)

    source = changed(tmp_path / "adapted", inputs["model"], adapt)
    outcome, problems = plan("snap", {"model": view_of(source)}, {})
    assert problems == []
    made, ctx = run("snap", tmp_path, {"model": source}, {})
    assert view_of(made).modules == outcome.view.modules
    header = read_safetensors_header(made.path / "model.safetensors")
    assert {item["dtype"] for name, item in header.items() if name != "__metadata__"} == {"F16", "U8"}
    assert not any(name.endswith(".latent") for name in header)
    assert outcome.disk_bytes == max(item["data_offsets"][1] for key, item in header.items() if key != "__metadata__")
    assert outcome.view.modules[UP].adapter == 2
    before, after = load_model(source.path), load_model(made.path)
    for (_, old), (_, new) in zip(quantized_modules(before), quantized_modules(after), strict=True):
        assert new.state == "snapped"
        assert torch.equal(new.indices[:1], old.parts()["indices"][:1])
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        drift = (before(tokens).logits - after(tokens).logits).abs().max()
    assert 0 < float(drift) < 0.05
    assert 0 < ctx.metrics["worst_error"] < 1e-5
    assert ctx.metrics["round_trip"]


def test_order_of_stages(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    made, _ = run("snap", tmp_path, {"model": inputs["model"]}, {})
    ((_, message, _, mismatch),) = plan("snap", {"model": view_of(made)}, {})[1]
    assert (message, mismatch) == ("the model here is snapped already", False)
    dense = Artifact("model", inputs["model"].path.parent / "dense", "")
    assert "no module of the model here is quantized" in plan("snap", {"model": view_of(dense)}, {})[1][0][1]


def test_what_is_quantized_after_a_snap_trains_and_is_snapped_by_a_second_one(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    def attention_only(model) -> None:
        for name, module in list(quantized_modules(model)):
            if ".mlp." in name:
                dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
                dense.weight = torch.nn.Parameter(module.latent.detach())
                swap_module(model, name, dense)

    source = changed(tmp_path / "attention", inputs["model"], attention_only)
    first, _ = run("snap", tmp_path, {"model": source}, {})
    both, _ = run("quantize", tmp_path, {"model": first}, {"rules": {"mlp": MLP4}})
    train = {"objective": {"kd": "teacher"}, "steps": 1, "batch": {"sequences": 2}, "evaluate_sequences": 2}
    trained, _ = run("train", tmp_path, {**inputs, "model": both}, train)
    assert plan("snap", {"model": view_of(trained)}, {})[1] == []
    second, ctx = run("snap", tmp_path, {"model": trained}, {})
    assert ctx.metrics["modules"] == 6
    before, after = read_tensors(first.path), read_tensors(second.path)
    assert all(torch.equal(before[name], after[name]) for name in before if ".mlp." not in name)
    assert {module.state for _, module in quantized_modules(load_model(second.path))} == {"snapped"}


def test_a_stop_is_honoured_between_modules(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    with pytest.raises(Interrupted):
        run("snap", tmp_path, {"model": inputs["model"]}, {}, should_stop=lambda: signal.SIGTERM)


def test_what_fp16_cannot_hold_is_named(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    source = changed(tmp_path / "big", inputs["model"], lambda model: model.model.norm.weight[3:4].fill_(1e5))
    with pytest.raises(StageError, match=r"model\.norm\.weight does not fit in fp16: its largest magnitude is 100000"):
        run("snap", tmp_path, {"model": source}, {})


def test_a_flipped_bit_is_seen_by_the_comparison(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    made, _ = run("snap", tmp_path, {"model": inputs["model"]}, {})
    model = load_model(made.path)
    compare_round_trip(model, made.path)
    file = made.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StageError, match="reads back differently"):
        compare_round_trip(model, made.path)
