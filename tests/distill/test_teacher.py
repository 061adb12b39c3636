import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from a1q.distill.teacher import ask_teacher, publish_shards, shard_names, write_shards
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


def test_a_forbidden_token_is_stored_as_a_finite_number(parts):
    model = TableModel(V)
    model.table[:, 7] = -torch.inf
    tokens = torch.from_numpy(parts["train"]).long()
    found = ask_teacher(model, tokens, 3, V - 3, torch.Generator().manual_seed(0))
    assert found["negative_logits"].min() == -65504


@pytest.mark.parametrize("at_once", [1, 3, 10**6])
def test_answers_are_the_same_however_many_positions_are_looked_at_together(parts, monkeypatch, at_once):
    tokens = torch.from_numpy(parts["train"]).long()
    monkeypatch.setattr("a1q.distill.teacher.PIECE", at_once * V)
    found = ask_teacher(TableModel(V), tokens, 3, 5, torch.Generator().manual_seed(0))
    monkeypatch.undo()
    wanted = ask_teacher(TableModel(V), tokens, 3, 5, torch.Generator().manual_seed(0))
    assert found.keys() == wanted.keys()
    assert all((found[name] == wanted[name]).all() for name in wanted)
    logits = TableModel(V).table[tokens].double()
    assert abs(found["lse"] - logits.logsumexp(-1).numpy()).max() < 1e-5


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_every_process_writes_its_share(tmp_path, parts, processes):
    whole = write(tmp_path / "whole", TableModel(V), parts)
    seen, models = [], [TableModel(V) for _ in range(processes)]
    for process, model in enumerate(models):
        names = write(
            tmp_path / "shared",
            model,
            parts,
            process=process,
            processes=processes,
            progress=lambda *counts, process=process: seen.append((process, *counts)),
        )
        assert names == whole
    assert digests(tmp_path / "shared") == digests(tmp_path / "whole")
    assert sum(model.calls for model in models) == 7
    totals = {process: total for process, _, total in seen}
    assert sum(totals.values()) == 13 and all((process, total, total) in seen for process, total in totals.items())


def test_two_processes_at_one_folder_give_the_bytes_of_one(tmp_path, parts):
    write(tmp_path / "whole", TableModel(V), parts)
    folder = tmp_path / "shared"
    commands = [[sys.executable, "-m", "tests.distill.fakes", str(folder), str(number), "2"] for number in range(2)]
    running = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in running] == [0, 0]
    assert digests(folder) == digests(tmp_path / "whole")
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".sha256", ".json"}
    model = TableModel(V)
    write(folder, model, parts)
    assert model.calls == 0


def test_what_a_killed_process_left_is_computed_by_the_next_start(tmp_path, parts):
    write(tmp_path / "whole", TableModel(V), parts)
    folder = tmp_path / "shared"
    command = [sys.executable, "-m", "tests.distill.fakes", str(folder), "1", "2", "die"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    write(folder, TableModel(V), parts, process=0, processes=2)
    (left,) = folder.glob(".train*")
    assert left.name.startswith(".train-00001.safetensors.") and len(digests(folder)) == 2
    write(folder, TableModel(V), parts)
    assert digests(folder) == digests(tmp_path / "whole")
    assert not left.exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path, parts, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("a1q.distill.teacher.fsync_path", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, TableModel(V), parts)
    assert not any(tmp_path.iterdir())
