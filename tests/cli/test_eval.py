"""`a1q eval` and `a1q compare` against figures made another way."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from a1q.looking.sources import text_tokens
from a1q.models.checkpoint import load_model
from a1q.models.locate import locate_model
from tests.cli.support import a1q
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("beside", "spoiled")


@pytest.fixture(scope="module")
def spoiled(looked: Path) -> None:
    """Beside the others `damaged`, an artifact with a flipped bit, and `broken`, a model with a number that is none."""
    report = json.loads((looked / "runs" / "looked" / "report.json").read_text())
    artifact = next(item["artifact"] for item in report["stages"] if item["id"] == "final")
    content = bytearray((shutil.copytree(artifact, looked / "damaged") / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (looked / "damaged" / "model.safetensors").write_bytes(content)
    file = shutil.copytree(looked / "tiny", looked / "broken") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


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
        (("--data", "one.txt"), 2, "takes two tokens to predict one, and it has 1"),
        (("--data", "broken.txt"), 2, "byte 2 is 0xff"),
        (("--against", "damaged"), 3, "is damaged: model.safetensors is not what was published"),
        (("--against", "broken"), 1, "the reference's logits for token 1 are not finite"),
        (("--data", "txt.jsonl"), 3, "did you mean text.jsonl?"),
        (("--against", "builtin:pico"), 3, "tiny and builtin:pico can't be compared"),
        (("--device", "tpu"), 2, "tpu"),
    ],
)
def test_refusals(options: tuple, code: int, words: str) -> None:
    Path("empty.txt").write_text("\n")
    Path("one.txt").write_text("a")
    Path("broken.txt").write_bytes(b"ab\xff")
    result = a1q("eval", "tiny", "--data", "text.jsonl", *options)
    assert result.exit_code == code and words in result.output and "Traceback" not in result.output


def test_what_predicts_nothing() -> None:
    result = a1q("eval", "looked:teacher")
    assert result.exit_code == 2 and "looked:teacher is of kind teacher, which predicts nothing" in result.output
    result = a1q("compare", "tiny", "looked:statistics")
    assert result.exit_code == 2 and "looked:statistics is of kind statistics" in result.output


def test_a_package_to_compare_with_runs_where_it_can() -> None:
    options = ("--data", "text.jsonl", "--tokens", 8, "--device", "cpu")
    assert facts("looked", "--against", "looked:ane", *options)["kl"] < 1e-3


def test_vocabularies_filled_up_differently(tmp_path: Path) -> None:
    """Loss is over all logits a model gives; KL and agreement over the tokens that both have."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained("tiny")
    other.resize_token_embeddings(352)
    torch.manual_seed(0)
    with torch.no_grad():
        other.get_input_embeddings().weight += 0.05 * torch.randn(352, 64)
    shutil.copytree("tiny", tmp_path / "padded")
    other.save_pretrained(tmp_path / "padded")
    options = ("--data", "text.jsonl", "--tokens", 20)
    found = facts(tmp_path / "padded", "--against", "tiny", *options)
    ids = text_tokens("text.jsonl", Path("tiny"), 20)
    with torch.no_grad():
        q, p = (
            load_model(folder).double()(torch.from_numpy(ids)[None]).logits[0, :-1]
            for folder in (tmp_path / "padded", Path("tiny"))
        )
    assert q.shape == (19, 352)
    loss = torch.nn.functional.cross_entropy(q, torch.from_numpy(ids[1:]))
    q, p = q[:, :320].log_softmax(-1), p.log_softmax(-1)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3) and found["kl"] > 1e-4
    again = facts("tiny", "--against", tmp_path / "padded", *options)
    assert (again["loss"], again["reference_loss"]) == (found["reference_loss"], found["loss"])


def test_end_of_text_stands_between_documents_only() -> None:
    from tokenizers import Tokenizer

    Path("two.jsonl").write_text('{"text": "one thing"}\n{"text": "and another"}\n')
    encode = Tokenizer.from_file("tiny/tokenizer.json").encode
    wanted = [*encode("one thing").ids, 0, *encode("and another").ids]
    assert text_tokens("two.jsonl", Path("tiny"), None).tolist() == wanted
    assert text_tokens("two.jsonl", Path("tiny"), 3).tolist() == wanted[:3]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("looked", "--prompt", ""), 2, "--prompt '' has 0 tokens; expected 1 to 255"),
        (("looked", "--prompt", "word " * 300), 2, "expected 1 to 255"),
        (("looked", "--data", "text.txt"), 3, "text.txt"),
        (("damaged",), 3, "is damaged: model.safetensors"),
        (("broken",), 1, "the model's logits for token 1 are not finite"),
        (("builtin:pico",), 3, "tiny and builtin:pico can't be compared"),
    ],
)
def test_what_is_not_compared(arguments: tuple[str, ...], code: int, words: str) -> None:
    result = a1q("compare", "tiny", "--tokens", 32, "--data", "text.jsonl", *arguments)
    assert result.exit_code == code and words in result.output and "Traceback" not in result.output
    said = json.loads(a1q("compare", "tiny", "--tokens", 32, "--data", "text.jsonl", *arguments, "--json").stdout)
    assert said["ok"] is False and said["exit_code"] == code


def test_weights_that_are_not_finite_are_said_to_be_so(tmp_path: Path) -> None:
    from a1q.looking.comparison import weight_errors
    from a1q.report.comparison import text_of

    first, second = load_model(Path("tiny")), load_model(Path("tiny"))
    with torch.no_grad():
        second.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = float("nan")
    errors = weight_errors(first, second)
    assert errors.pop("model.layers.0.mlp.up_proj") is None and set(errors.values()) == {0.0}
    figures = {
        "reference_ppl": 1.0,
        "ppl": 1.0,
        "reference_loss": 0.0,
        "loss": 0.0,
        "kl": 0.0,
        "top1": 1.0,
        "tokens": 3,
    }
    sizes = [{"bytes": 1}, {"bytes": 2}]
    found = {"sizes": sizes, "figures": figures, "layers": [0.01, None], "samples": []}
    text = text_of({**found, "modules": {**errors, "model.layers.0.mlp.up_proj": None}}, ("a", "b"), 80)
    assert "not finite  model.layers.0.mlp.up_proj" in text and "    1  not finite" in text


def test_two_models_side_by_side(tmp_path: Path) -> None:
    found = facts("tiny", "looked", "--data", "text.jsonl", "--tokens", 512, "--max-tokens", 5, command="compare")
    first, second = load_model(locate_model("tiny")), load_model(locate_model("looked"))
    name = "model.layers.1.mlp.down_proj"
    a = first.get_submodule(name).weight.double()
    b = second.get_submodule(name).dequantize().double()
    assert found["modules"][name] == pytest.approx(float((a - b).square().sum() / a.square().sum()))
    assert found["modules"]["model.embed_tokens"] == pytest.approx(0, abs=1e-6)  # fp16 once snapped
    assert len(found["layers"]) == 2 and 0 < found["layers"][0] < found["layers"][1] * 10
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
    head, prompt = text.splitlines().index(f"{'looked:fitted':48} │ looked"), text.splitlines().index("» Return a list")
    assert head < prompt
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
