"""`a1q eval` and `a1q compare` against figures made another way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from a1q.models.checkpoint import load_model
from a1q.models.locate import locate_model
from tests.cli.support import a1q
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("beside")


def facts(*arguments: object, command: str = "eval") -> dict:
    result = a1q(command, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def by_hand(name: str, ids: list[int], window: int, stride: int) -> torch.Tensor:
    """Log-probabilities float64 [n - 1, V] of what follows each token, a window a prediction."""
    model = load_model(locate_model(name)).double()
    rows = []
    for target in range(1, len(ids)):
        start = next(first for first in range(0, len(ids), stride) if first + window > target)
        stop = min(start + window, len(ids))
        with torch.no_grad():
            rows.append(model(torch.tensor([ids[start:stop]])).logits[0, target - 1 - start].log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (24, 5), (2, 1), (100, 50)])
def test_figures_are_those_of_a_plain_loop(window: int, stride: int) -> None:
    from tokenizers import Tokenizer

    options = ("--data", "text.jsonl", "--tokens", 60, "--window", window, "--stride", stride)
    found = facts("looked", "--against", "tiny", *options)
    text = [json.loads(line)["text"] for line in Path("text.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.from_file("tiny/tokenizer.json")
    ids = [token for item in text[:8] for token in [*tokenizer.encode(item).ids, 0]][:60]
    q, p = (by_hand(name, ids, window, stride) for name in ("looked", "tiny"))
    targets = torch.tensor(ids[1:])[:, None]
    assert found["tokens"] == 59
    assert found["loss"] == pytest.approx(-float(q.gather(-1, targets).mean()), rel=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(found["loss"]))
    assert found["reference_loss"] == pytest.approx(-float(p.gather(-1, targets).mean()), rel=1e-5)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.02)


def test_a_package_measures_as_its_model_does() -> None:
    options = ("--data", "text.jsonl", "--tokens", 20, "--window", 16, "--stride", 8)
    found = facts("looked:ane", "--against", "looked", *options, "--precision", "fp32")
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["loss"] == pytest.approx(facts("looked", *options)["loss"], abs=1e-4)  # its norms are fp16


def test_text_for_people_and_defaults() -> None:
    result = a1q("eval", "looked", "--against", "looked:fitted", "--data", "text.jsonl", "--tokens", 64)
    assert result.exit_code == 0
    assert "perplexity of looked:fitted" in result.stdout and "nats of KL a token" in result.stdout
    assert facts("tiny", "--data", "text.jsonl", "--tokens", "all")["window"] == 256


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--tokens", "1"), 2, "expected a number of at least 2, or `all`"),
        (("--tokens", "many"), 2, "--tokens is 'many'"),
        (("--window", 1000), 2, "between 2 and the model's context of 256"),
        (("--window", 16, "--stride", 16), 2, "--stride is 16; it is between 1 and"),
        (("--data", "empty.txt"), 2, "holds no text"),
        (("--data", "txt.jsonl"), 3, "did you mean text.jsonl?"),
        (("--against", "builtin:pico"), 3, "tiny and builtin:pico can't be compared"),
        (("--device", "tpu"), 2, "tpu"),
    ],
)
def test_refusals(options: tuple, code: int, words: str) -> None:
    Path("empty.txt").write_text("\n")
    result = a1q("eval", "tiny", "--data", "text.jsonl", *options)
    assert result.exit_code == code and words in result.output and "Traceback" not in result.output


def test_what_predicts_nothing() -> None:
    result = a1q("eval", "looked:teacher")
    assert result.exit_code in (2, 3) and "teacher" in result.output


def test_two_models_side_by_side(tmp_path: Path) -> None:
    found = facts("tiny", "looked", "--data", "text.jsonl", "--tokens", 512, "--max-tokens", 5, command="compare")
    first, second = load_model(locate_model("tiny")), load_model(locate_model("looked"))
    name = "model.layers.1.mlp.down_proj"
    a = first.get_submodule(name).weight.double()
    b = second.get_submodule(name).dequantize().double()
    assert found["modules"][name] == pytest.approx(float((a - b).square().sum() / a.square().sum()))
    assert found["modules"]["model.embed_tokens"] == pytest.approx(0, abs=1e-6)  # fp16 once snapped
    assert len(found["layers"]) == 2 and 0 < found["layers"][0] < found["layers"][1] * 10
    from a1q.looking.sources import text_tokens

    ids = text_tokens("text.jsonl", Path("tiny"), 512).reshape(2, 256)
    with torch.no_grad():
        states = [m.model(torch.from_numpy(ids), output_hidden_states=True).hidden_states[1] for m in (first, second)]
    wanted = (states[0] - states[1]).double().square().sum() / states[0].double().square().sum()
    assert found["layers"][0] == pytest.approx(float(wanted), rel=1e-4)
    assert found["sizes"][0]["bpw"] == 16 and found["sizes"][1]["bpw"] < 6
    assert [len(item["written"]) for item in found["samples"]] == [2, 2, 2]
    same = facts("tiny", "tiny", "--data", "text.jsonl", "--tokens", 64, "--max-tokens", 0, command="compare")
    assert set(same["modules"].values()) == {0.0} and same["figures"]["kl"] == pytest.approx(0, abs=1e-7)
    assert same["samples"] == []


def test_side_by_side_for_people() -> None:
    options = ("--data", "text.jsonl", "--tokens", 64, "--prompt", "Return a list", "--max-tokens", 6)
    text = a1q("compare", "looked:fitted", "looked", *options).output
    for part in ("perplexity", "KL 0.", "relative squared error of weights", "» Return a list", " │ "):
        assert part in text
    packaged = a1q("compare", "looked", "looked:ane", "--data", "text.jsonl", "--tokens", 12, "--max-tokens", 2).output
    assert "KL" in packaged and "weights" not in packaged


def test_models_of_other_shapes_compare_as_far_as_they_can(tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", num_hidden_layers=1)
    found = facts("tiny", other, "--data", "text.jsonl", "--tokens", 32, "--max-tokens", 0, command="compare")
    assert found["layers"] == [] and "model.layers.0.mlp.up_proj" in found["modules"]


def test_samples_are_the_likeliest(tmp_path: Path) -> None:
    from a1q.looking.sources import open_speaker, sample
    from a1q.looking.target import find

    speaker = open_speaker(find("tiny"), "cpu")
    model = load_model(Path("tiny"))
    wanted = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert sample(speaker, [5, 6, 7], 6, []) == wanted[0, 3:].tolist()
    assert isinstance(np.asarray(speaker.logits(np.array([1, 2]))), np.ndarray)
