import os

import pytest
import torch

from a1q.distill.teacher import ask_teacher, largest, publish_shards, shard_names, write_shards
from a1q.engine.artifact import sha256_file
from a1q.errors import StageError
from tests.distill.fakes import Killed, TableModel, random_tokens, write

V = 40


@pytest.fixture
def parts():
    return {"train": random_tokens(10, 6, V), "tune": random_tokens(3, 6, V, seed=1)}


def digests(folder):
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_shard_names():
    assert shard_names("train", 9, 4) == [f"train-0000{number}.safetensors" for number in range(3)]
    assert shard_names("tune", 0, 4) == []


@pytest.mark.parametrize("batches", range(1, 7))
def test_a_killed_writer_goes_on_and_ends_with_the_same_bytes(tmp_path, parts, batches):
    write(tmp_path / "whole", TableModel(V), parts)

    def die(done, total):
        if done >= 2 * batches:
            raise Killed

    with pytest.raises(Killed):
        write(tmp_path / "resumed", TableModel(V), parts, progress=die)
    finished = len(digests(tmp_path / "resumed"))
    model = TableModel(V)
    write(tmp_path / "resumed", model, parts)
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")
    assert len(digests(tmp_path / "whole")) == 4
    assert model.calls == 7 - (0, 2, 4, 5, 7)[finished]


@pytest.mark.parametrize("moment", ["before the shard's rename", "before the digest's rename"])
def test_killed_between_a_shard_and_its_digest(tmp_path, parts, monkeypatch, moment):
    write(tmp_path / "whole", TableModel(V), parts)
    rename, count = os.replace, [0]

    def replace(source, target):
        count[0] += 1
        if count[0] == (3 if moment.startswith("before the shard") else 4):
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            write(tmp_path / "resumed", TableModel(V), parts)
    write(tmp_path / "resumed", TableModel(V), parts)
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["bit flip", "truncation", "lost digest"])
def test_a_damaged_shard_is_named_and_computed_anew(tmp_path, parts, damage):
    names = write(tmp_path, TableModel(V), parts)
    before = digests(tmp_path)
    shard = tmp_path / names["train"][1]
    content = bytearray(shard.read_bytes())
    if damage == "bit flip":
        content[-5] ^= 4
        shard.write_bytes(content)
    elif damage == "truncation":
        shard.write_bytes(content[:-5])
    else:
        shard.with_suffix(".sha256").unlink()
    model, lines = TableModel(V), []
    write(tmp_path, model, parts, log=lines.append)
    assert digests(tmp_path) == before
    assert model.calls == 2  # only that shard's two batches
    assert len(lines) == 1 and "train-00001" in lines[0]


def test_negatives_depend_on_the_seed_and_differ_between_shards(tmp_path, parts):
    one = {"train": parts["train"][[0, 1, 0, 1]], "tune": parts["tune"][:0]}
    write(tmp_path / "a", TableModel(V), one, shard_sequences=2)
    write(tmp_path / "b", TableModel(V), one, shard_sequences=2, seed=12)
    a, b = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert len({*a.values(), *b.values()}) == 4


def test_progress_counts_sequences_of_both_parts(tmp_path, parts):
    seen = []
    write(tmp_path, TableModel(V), parts, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(count, 13) for count in (2, 4, 6, 8, 10, 12, 13)]


def test_published_shards_also_stay_where_they_were(tmp_path, parts):
    names = write(tmp_path / "scratch", TableModel(V), parts)
    (tmp_path / "out").mkdir()
    publish_shards(tmp_path / "scratch", names, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "scratch")


def test_logits_that_are_not_finite_are_refused(tmp_path, parts):
    model = TableModel(V)
    model.table[3, 4] = float("nan")
    with pytest.raises(StageError, match="not finite"):
        write_shards(
            model,
            {"train": parts["train"] * 0 + 3, "tune": parts["tune"]},
            folder=tmp_path,
            top_k=2,
            random_negatives=2,
            shard_sequences=4,
            batch=2,
            seed=0,
        )
    assert not digests(tmp_path)


@pytest.mark.parametrize(("vocabulary", "count"), [(500, 64), (500, 1), (500, 500), (5000, 64)])
def test_largest_is_topk(vocabulary, count):
    logits = torch.randperm(2 * 3 * vocabulary).reshape(2, 3, vocabulary).float()
    for found, wanted in zip(largest(logits, count), torch.topk(logits, count, dim=-1), strict=True):
        assert torch.equal(found, wanted)


def test_a_forbidden_token_is_stored_as_a_finite_number(parts):
    model = TableModel(V)
    model.table[:, 7] = -torch.inf
    tokens = torch.from_numpy(parts["train"]).long()
    found = ask_teacher(model, tokens, 3, V - 3, torch.Generator().manual_seed(0))
    assert found["negative_logits"].min() == -65504
