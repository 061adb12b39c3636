import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from a1q.data import Sequences, read_sequences
from a1q.data.bpe import CHAT_TEMPLATE
from a1q.distill.cache import TeacherCache, sequence_bytes
from a1q.distill.losses import Terms
from a1q.distill.teacher_model import find_teacher
from a1q.distill.tokenizers import chat_template_digest
from a1q.engine.artifact import manifest_of, sha256_file
from a1q.engine.registry import load_registry
from a1q.engine.stage import Runtime
from a1q.errors import MismatchError
from a1q.models.view import ModelView
from a1q.recipe.schema import Checker
from a1q.stages.kd import KdStage, shuffled
from a1q.training.step_loss import DistillationLoss
from tests.distill.fakes import Killed
from tests.distill.workspace import as_artifact, make_context, model_artifact, plan_stage, run_stage, write_text


def options(**changes):
    registry = load_registry()
    cache = {"top_k": 8, "random_negatives": 16, "sequences": 10, "tune_sequences": 3, "shard_sequences": 4}
    cache["temperatures"] = [2]
    cache |= changes.pop("cache", {})
    values = {"data": "text", "cache": cache, "batch": 2, **changes}
    schema = registry.schema("stages", "kd")
    assert not list(Checker(registry).check(schema, values))
    return Checker(registry).fill(schema, values, set())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("kd")


@pytest.fixture(scope="module")
def entry(place):
    return write_text(place / "text.jsonl")


@pytest.fixture(scope="module")
def student(place):
    return model_artifact(place / "student")


@pytest.fixture(scope="module")
def cached(place, student, entry):
    return run_stage(KdStage, options(), {"model": student, "teacher_model": None}, entry, place / "cached")


def shards(folder):
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_the_cache_holds_what_the_model_says_about_both_sides(cached, student, entry):
    cache = TeacherCache(cached.out)
    model = AutoModelForCausalLM.from_pretrained(student.path)
    for part, count in (("train", 10), ("tune", 3)):
        assert cache.size(part) == count
        text = read_sequences(entry.config, student.path, part, 16, count, cached.seed)
        text = shuffled(text, cached.seed) if part == "train" else text
        batch = cache.batch(range(count), part)
        assert torch.equal(batch.tokens, torch.from_numpy(text.tokens).long())
        assert torch.equal(batch.starts, torch.from_numpy(text.starts)) and batch.starts.any()
        with torch.no_grad():
            logits = model(input_ids=batch.tokens).logits
        torch.testing.assert_close(batch.lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(batch.partitions[2.0], (logits / 2).logsumexp(-1), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(batch.logits, logits.gather(-1, batch.ids), rtol=0, atol=1e-2)
        torch.testing.assert_close(batch.negative_logits, logits.gather(-1, batch.negatives), rtol=0, atol=1e-2)
        torch.testing.assert_close(batch.logits[..., 0], logits.max(-1).values, rtol=0, atol=1e-2)


def conversations(folder, entry, template):
    """A model that chats, and an entry of questions and answers."""
    model = model_artifact(folder / "model")
    settings = json.loads((model.path / "tokenizer_config.json").read_text())
    (model.path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    rows = [{"question": f"What of {number}?", "answer": f"It is {number * 7}."} for number in range(60)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {**entry.config, "source": str(folder / "qa.jsonl"), "format": "qa"}
    return {"model": model, "teacher_model": None}, dataclasses.replace(entry, config=config)


def test_what_an_assistant_said_is_kept_of_chats(entry, tmp_path):
    """In the shuffled order, with its size predicted; other text has none."""
    inputs, talk = conversations(tmp_path, entry, CHAT_TEMPLATE)
    done = run_stage(KdStage, options(), inputs, talk, tmp_path / "run")
    cache, folder = TeacherCache(done.out), inputs["model"].path
    text = shuffled(read_sequences(talk.config, folder, "train", 16, 10, done.seed, marks=True), done.seed)
    assert torch.equal(cache.batch(range(10)).said, torch.from_numpy(text.said))
    assert done.meta["said"]["train"] == text.said.sum() > 10
    header = sum(len(part["shards"]) for part in done.meta["parts"].values()) * 1100
    assert 0 <= done.metrics["bytes"] - 13 * sequence_bytes(320, 16, 8, 16, 1, chats=True) <= header
    plain = TeacherCache(run_stage(KdStage, options(), inputs, entry, tmp_path / "plain").out)
    assert not plain.knows_who and plain.batch([0]).said is None


def documents_alone(model, tokens, starts):
    """Logits [n, L, V] of every document in a forward pass of its own."""
    rows = []
    for row, begins in zip(tokens, starts, strict=True):
        cuts = [0, *(np.flatnonzero(begins[1:]) + 1).tolist(), len(row)]
        some = [slice(first, last) for first, last in itertools.pairwise(cuts)]
        with torch.no_grad():
            rows.append(torch.cat([model(input_ids=row[None, piece]).logits[0] for piece in some]))
    return torch.stack(rows)


@pytest.mark.parametrize(("attention", "separate"), [(None, True), ("document", True), ("sequence", False)])
def test_a_conversation_is_asked_about_by_itself(entry, tmp_path, attention, separate):
    """By the teacher and, with the same cache, by a student: one equal to its teacher has nothing to learn."""
    inputs, talk = conversations(tmp_path, entry, CHAT_TEMPLATE)
    talk = dataclasses.replace(talk, config={**talk.config, "attention": attention})
    done = run_stage(KdStage, options(cache={"top_k": 320, "random_negatives": 0}), inputs, talk, tmp_path / "run")
    cache = TeacherCache(done.out)
    assert cache.separate is separate
    batch = cache.batch(range(10))
    model = AutoModelForCausalLM.from_pretrained(inputs["model"].path).eval()
    alone = documents_alone(model, batch.tokens, batch.starts.numpy())
    difference = (batch.logits - alone.gather(-1, batch.ids)).abs().max()
    assert difference < 1e-2 if separate else difference > 0.1
    step = DistillationLoss(model, None, Terms(), Terms(), 0.0, False, Runtime())
    assert abs(step(batch)[0].item()) < 1e-4
    other = step(dataclasses.replace(batch, separate=not separate))[0].item()
    assert other > 1e-2


def test_running_text_is_asked_about_by_sequence(cached):
    assert not TeacherCache(cached.out).separate and cached.meta["separate"] is False


def test_chats_of_which_it_cannot_be_told_are_said_aloud(entry, tmp_path):
    inputs, talk = conversations(tmp_path, entry, CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>"))
    logs = []
    done = run_stage(
        KdStage, options(), inputs, talk, tmp_path / "run", emit=lambda _, values: logs.append(values.get("message"))
    )
    assert done.meta["said"] is None and "prompts for one" in done.meta["said_problem"]
    assert any("WARNING: what an assistant said in any conversation can't be told" in (line or "") for line in logs)


def test_the_first_shards_are_of_the_whole_text():
    """Also where one document fills many sequences."""
    tokens = np.arange(400, dtype=np.int32)[:, None].repeat(3, axis=1)
    starts = (tokens == 7) | (np.arange(3) == 2) & (tokens % 5 == 0)
    text = Sequences(tokens, starts, False)
    found = shuffled(text, 3)
    rows = found.tokens[:, 0]
    assert sorted(rows) == list(range(400)) and (found.starts == starts[rows]).all()
    assert np.bincount(rows[:80] // 100, minlength=4).min() >= 12  # 20 expected of each quarter
    assert (shuffled(text, 3).tokens == found.tokens).all()
    assert (shuffled(text, 4).tokens != found.tokens).any()


def test_the_cache_is_readable_from_the_first_shard_on(cached, student, entry, tmp_path):
    seen = []

    def look(kind, values):
        if kind == "progress":
            cache = TeacherCache(tmp_path / "scratch", partial=True)
            seen.append((cache.size(), cache.ready(), cache.ready("tune")))
            if cache.ready():
                assert torch.equal(cache.batch([0]).ids, TeacherCache(cached.out).batch([0]).ids)

    found = run_stage(KdStage, options(), {"model": student, "teacher_model": None}, entry, tmp_path, emit=look)
    assert [ready for _, *ready in seen] == [[0, 0], [0, 0], [4, 0], [4, 0], [8, 0], [10, 0], [10, 0]]
    assert json.loads((tmp_path / "scratch" / "teacher.json").read_text()) == found.meta


def test_the_chat_template_is_noted_where_conversations_went_through_it(tmp_path):
    student = model_artifact(tmp_path / "student")
    settings = student.path / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    plain = write_text(tmp_path / "text.jsonl")
    lines = [json.dumps({"question": f"What is the word {n}?", "answer": f"The string {n}."}) for n in range(200)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    chat = dataclasses.replace(plain, config={**plain.config, "source": str(tmp_path / "chat.jsonl")})
    inputs = {"model": student, "teacher_model": None}
    of_plain = run_stage(KdStage, options(), inputs, plain, tmp_path / "plain")
    of_chat = run_stage(KdStage, options(), inputs, chat, tmp_path / "chat")
    assert of_plain.meta["chat_template"] is None
    assert of_chat.meta["chat_template"] == chat_template_digest(student.path) is not None


def test_meta_names_the_teacher_the_data_and_the_tokenizer(cached, student, entry):
    meta = cached.meta
    assert meta["teacher"] == {"source": str(student.path), "revision": None, "digest": student.digest}
    assert meta["data"] == {"name": "text", "digest": entry.digest}
    assert len(meta["tokenizer"]) == 64 and meta["chat_template"] is None
    assert json.loads((cached.out / "teacher.json").read_text()) == meta
    json.dumps(manifest_of("teacher", cached.out, meta), allow_nan=False)
    assert cached.metrics["tokens"] == 13 * 16


@pytest.mark.parametrize("after", [1, 5, 6])
def test_killed_and_run_again_gives_the_same_bytes(cached, student, entry, tmp_path, after):
    def die(kind, values):
        if kind == "progress" and values["step"] >= 2 * after:
            raise Killed

    inputs = {"model": student, "teacher_model": None}
    with pytest.raises(Killed):
        run_stage(KdStage, options(), inputs, entry, tmp_path, emit=die)
    kept = len(shards(tmp_path / "scratch"))
    assert not shards(tmp_path / "out")
    again = run_stage(KdStage, options(), inputs, entry, tmp_path)
    assert shards(again.out) == shards(cached.out)
    assert again.meta == cached.meta
    assert kept == {1: 0, 5: 2, 6: 3}[after]


def test_a_flipped_bit_in_an_unfinished_cache_is_found(cached, student, entry, tmp_path):
    lines = []

    def emit(kind, values):
        if kind == "log":
            lines.append(values["message"])

    inputs = {"model": student, "teacher_model": None}
    stopped = make_context(KdStage, options(), inputs, entry, tmp_path)
    KdStage().run(stopped)
    shard = stopped.scratch / "train-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.unlink()  # `out` holds the same file under another name
    shard.write_bytes(content)
    again = run_stage(KdStage, options(), inputs, entry, tmp_path / "again", emit=emit)
    assert shards(again.out) == shards(cached.out) and not lines
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    resumed = run_stage(KdStage, options(), inputs, entry, tmp_path, emit=emit)
    assert shards(resumed.out) == shards(cached.out)
    assert len(lines) == 1 and "train-00001.safetensors" in lines[0]


def test_a_larger_teacher_answers_about_the_same_tokens(student, entry, place):
    larger = model_artifact(place / "larger", seed=3, num_hidden_layers=3)
    inputs = {"model": student, "teacher_model": larger}
    found = run_stage(KdStage, options(model={"source": str(larger.path)}), inputs, entry, place / "from_larger")
    batch = TeacherCache(found.out).batch([0, 1])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(larger.path)(input_ids=batch.tokens).logits
    torch.testing.assert_close(batch.lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-4)
    assert found.meta["teacher"]["digest"] == larger.digest


def test_a_teacher_with_another_tokenizer_is_refused(student, entry, tmp_path):
    other = model_artifact(tmp_path / "other")
    path = other.path / "tokenizer.json"
    text = json.loads(path.read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(text))
    inputs = {"model": student, "teacher_model": other}
    with pytest.raises(MismatchError, match=r"differ in 2 tokens: 'a' \(65 and 66\)") as error:
        run_stage(KdStage, options(), inputs, entry, tmp_path)
    assert error.value.problems[0].path == "stages.it.model"


def test_a_teacher_made_by_an_earlier_stage_is_kept_with_the_cache(entry, tmp_path):
    folder = model_artifact(tmp_path / "made", seed=4).path
    (folder / "artifact.json").write_text(json.dumps(manifest_of("model", folder, {})))
    (folder / "entry.json").write_text("when it was made: no part of the artifact")
    made = as_artifact("model", folder)
    found = run_stage(KdStage, options(cache={"tune_sequences": 0}), {"model": made}, entry, tmp_path)
    assert found.meta["teacher"]["source"] is None
    assert TeacherCache(found.out).size("tune") == 0
    kept = find_teacher(as_artifact("teacher", found.out, **found.meta))
    assert kept == found.out / "model"
    assert not (kept / "entry.json").exists()
    assert sha256_file(kept / "model.safetensors") == sha256_file(folder / "model.safetensors")


def view(vocabulary=320):
    return ModelView(modules={}, parameters=1000, config={"vocab_size": vocabulary})


def test_plan_predicts_the_size_on_disk(cached):
    outcome, problems = plan_stage(KdStage, options(), {"model": view(), "teacher_model": None})
    assert not problems
    assert outcome.disk_bytes == 13 * sequence_bytes(320, 16, 8, 16, 1)
    size = sum(path.stat().st_size for path in cached.out.glob("*.safetensors"))
    assert outcome.disk_bytes < size < outcome.disk_bytes + 4 * 1000  # four shards' headers
    assert outcome.view["random_negatives"] == 16 and outcome.view["vocabulary"] == 320
    assert outcome.memory_bytes > 4000


@pytest.mark.parametrize(
    ("cache", "teacher", "path", "text"),
    [
        ({"top_k": 321}, None, "cache.top_k", "320"),
        ({"top_k": 300, "random_negatives": 30}, None, "cache.random_negatives", "20 tokens are left"),
        ({}, view(400), "model", "400 tokens, the model's 320"),
    ],
)
def test_plan_refuses_what_does_not_fit(cache, teacher, path, text):
    _, problems = plan_stage(KdStage, options(cache=cache), {"model": view(), "teacher_model": teacher})
    assert len(problems) == 1
    assert problems[0][0] == path and text in problems[0][1] and problems[0][3]


def test_the_whole_vocabulary_may_be_kept():
    outcome, problems = plan_stage(KdStage, options(cache={"top_k": 320, "random_negatives": 0}), {"model": view()})
    assert not problems and outcome.disk_bytes == 13 * (16 * (2 + 320 * 4 + 2 * 4) + 2)


def test_stages_import_no_torch():
    code = "import a1q.stages.kd, a1q.stages.eval, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
