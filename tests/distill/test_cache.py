import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.distill.cache import TeacherCache, position_bytes, sequence_bytes, token_bytes
from a1q.distill.losses import kd_loss
from a1q.errors import StageError
from a1q.models.view import read_safetensors_header
from tests.distill.fakes import RowModel, TableModel, random_tokens, write


@st.composite
def shapes(draw):
    vocabulary = draw(st.integers(2, 70))
    kept = draw(st.integers(1, vocabulary))
    return {
        "vocabulary": vocabulary,
        "top_k": kept,
        "random_negatives": draw(st.integers(0, vocabulary - kept)),
        "length": draw(st.integers(2, 9)),
        "train": draw(st.integers(1, 9)),
        "tune": draw(st.integers(0, 5)),
        "shard_sequences": draw(st.integers(1, 5)),
        "batch": draw(st.integers(1, 4)),
        "temperatures": draw(st.sampled_from([(), (2.0,), (0.5, 4.0)])),
    }


@settings(max_examples=40, deadline=None)
@given(shape=shapes(), data=st.data())
def test_what_is_read_is_what_the_teacher_said(tmp_path_factory, shape, data):
    folder = tmp_path_factory.mktemp("cache")
    model = TableModel(shape["vocabulary"])
    parts = {
        part: random_tokens(shape[part], shape["length"], shape["vocabulary"], seed)
        for seed, part in enumerate(("train", "tune"))
    }
    names = ("top_k", "random_negatives", "shard_sequences", "batch", "temperatures")
    starts = {part: random_tokens(*tokens.shape, 3, seed=7) == 0 for part, tokens in parts.items()}
    said = {part: random_tokens(*tokens.shape, 2, seed=8) == 0 for part, tokens in parts.items()}
    write(folder, model, parts, starts=starts, said=said, **{name: shape[name] for name in names})
    cache = TeacherCache(folder)
    assert cache.seq_len == shape["length"]
    for part in parts:
        assert cache.size(part) == len(parts[part])
        if not len(parts[part]):
            continue
        rows = data.draw(st.lists(st.integers(0, len(parts[part]) - 1), min_size=1, max_size=6))
        batch = cache.batch(rows, part)
        tokens = torch.from_numpy(parts[part][rows]).long()
        logits = model.table[tokens]
        assert torch.equal(batch.tokens, tokens)
        begins = torch.from_numpy(starts[part][rows])
        assert torch.equal(batch.starts, begins)
        assert torch.equal(batch.continues[:, :-1], ~begins[:, 1:]) and not batch.continues[:, -1].any()
        assert cache.target_share(rows, part) == pytest.approx(float(batch.continues.double().mean()), abs=1e-12)
        assert torch.equal(batch.said, torch.from_numpy(said[part][rows]))
        assert torch.equal(batch.says[:, :-1], batch.said[:, 1:]) and not batch.says[:, -1].any()
        share = float((batch.says & batch.continues).double().mean())
        assert cache.target_share(rows, part, said=True) == pytest.approx(share, abs=1e-12)
        assert torch.equal(batch.lse, logits.logsumexp(-1))
        assert tuple(batch.partitions) == shape["temperatures"]
        for temperature, partition in batch.partitions.items():
            assert torch.equal(partition, (logits / temperature).logsumexp(-1))
        assert torch.equal(batch.top1, logits.argmax(-1))
        top, ids = logits.topk(shape["top_k"])
        assert torch.equal(batch.ids, ids)
        # fp16 below the position's logsumexp: half a unit in the eleventh bit.
        bound = (top - batch.lse[..., None]).abs() * 2**-11 + 1e-5
        assert ((batch.logits - top).abs() <= bound).all()
        assert batch.negatives.shape == (*tokens.shape, shape["random_negatives"])
        if shape["random_negatives"]:
            exact = logits.gather(-1, batch.negatives)
            bound = (exact - batch.lse[..., None]).abs() * 2**-11 + 1e-5
            assert ((batch.negative_logits - exact).abs() <= bound).all()
        else:
            assert batch.negative_logits is None
        assert not (batch.negatives[..., :, None] == ids[..., None, :]).any()


@pytest.mark.parametrize("temperatures", [(), (2.0, 3.0)])
def test_size_on_disk_is_the_formula(tmp_path, temperatures):
    parts = {"train": random_tokens(8, 16, 500), "tune": random_tokens(4, 16, 500)}
    names = write(tmp_path, TableModel(500), parts, top_k=20, random_negatives=30, temperatures=temperatures)
    size = sum((tmp_path / name).stat().st_size for part in names.values() for name in part)
    headers = 0
    for name in (name for part in names.values() for name in part):
        ends = [item["data_offsets"][1] for item in read_safetensors_header(tmp_path / name).values()]
        headers += (tmp_path / name).stat().st_size - max(ends)
    asked = 20, 30, len(temperatures)
    assert size - headers == 12 * sequence_bytes(500, 16, *asked) == 12 * (16 * position_bytes(500, *asked) + 2)
    assert position_bytes(500, *asked) == 2 + 20 * 4 + 30 * 3 + 4 + 4 * len(temperatures)


def test_of_a_wide_vocabulary_a_kept_logit_takes_less_than_5_bytes(tmp_path):
    """Everything that a sequence takes over the top-k alone, and the sizes of what lies in a shard."""
    assert sequence_bytes(151_936, 128, 128, 0) / (128 * 128) < 4.4
    assert sequence_bytes(151_936, 128, 128, 128) / (128 * 256) < 4.2
    tokens = random_tokens(3, 10, 70_000)
    names = write(tmp_path, RowModel(70_000), {"train": tokens, "tune": tokens[:1]}, top_k=9, random_negatives=3)
    header = read_safetensors_header(tmp_path / names["train"][0])
    ends = [item["data_offsets"][1] for item in header.values()]
    assert max(ends) == 3 * sequence_bytes(70_000, 10, 9, 3) == 3 * (10 * (4 + 9 * 4 + 2 + 3 * 4 + 4) + 2)
    batch = TeacherCache(tmp_path).batch([2, 0])
    assert torch.equal(batch.tokens, torch.from_numpy(tokens[[2, 0]]).long())
    assert torch.equal(batch.ids, RowModel(70_000)(batch.tokens).logits.topk(9).indices)
    assert batch.ids.max() >= 1 << 16 and batch.ids.min() < 1 << 16


@pytest.mark.parametrize(("vocabulary", "size"), [(65_536, 2), (65_537, 4)])
def test_tokens_take_two_bytes_where_that_is_enough(vocabulary, size):
    assert token_bytes(vocabulary) == size


def test_a_cached_teacher_gives_nearly_the_loss_of_an_exact_one(tmp_path):
    model = TableModel(64)
    tokens = random_tokens(8, 16, 64)
    write(tmp_path, model, {"train": tokens, "tune": tokens[:0]}, top_k=16, random_negatives=48)
    batch = TeacherCache(tmp_path).batch(np.arange(8))
    teacher = model.table[batch.tokens]
    student = teacher + 0.3 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    loss, _ = kd_loss(student, batch)
    assert loss.item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=2e-3)
    perfect, _ = kd_loss(teacher, batch)
    assert perfect < 1e-5


def test_rows_outside_are_refused(tmp_path):
    tokens = random_tokens(3, 4, 20)
    write(tmp_path, TableModel(20), {"train": tokens, "tune": tokens[:1]})
    cache = TeacherCache(tmp_path)
    with pytest.raises(IndexError, match=r"rows 0 \.\.\. 2"):
        cache.batch([0, 3])
    with pytest.raises(IndexError, match="'tune'"):
        cache.batch([-1], "tune")


def test_a_folder_that_is_no_cache_or_a_damaged_one_is_named(tmp_path):
    with pytest.raises(StageError, match="no teacher cache"):
        TeacherCache(tmp_path)
    tokens = random_tokens(6, 4, 20)
    names = write(tmp_path, TableModel(20), {"train": tokens, "tune": tokens[:1]})
    shard = tmp_path / names["train"][1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(StageError, match=r"train-00001\.safetensors is truncated"):
        TeacherCache(tmp_path)
    shard.unlink()
    with pytest.raises(StageError, match=r"train-00001\.safetensors"):
        TeacherCache(tmp_path)
    shard.write_bytes(whole)
    description = json.loads((tmp_path / "teacher.json").read_text())
    description["parts"]["train"]["sequences"] = 9
    (tmp_path / "teacher.json").write_text(json.dumps(description))
    with pytest.raises(StageError, match=r"6 sequences in part 'train', teacher\.json says 9"):
        TeacherCache(tmp_path)
    (tmp_path / "teacher.json").write_text(json.dumps({**description, "format": 1}))
    with pytest.raises(StageError, match=r"`format` is 1, and this version reads 2; make the cache anew"):
        TeacherCache(tmp_path)


def test_a_folder_that_is_being_written_can_be_read_from_the_first_shard_on(tmp_path):
    tokens = random_tokens(10, 4, 20)
    parts = {"train": tokens, "tune": tokens[:3]}
    whole = write(tmp_path / "whole", TableModel(20), parts)
    shutil.copytree(tmp_path / "whole", tmp_path / "growing", ignore=shutil.ignore_patterns("t*-*"))
    cache = TeacherCache(tmp_path / "growing", partial=True)
    assert (cache.size(), cache.ready(), cache.ready("tune")) == (10, 0, 0)
    with pytest.raises(StageError, match=r"train-00001\.safetensors is not written yet; .* 'train' the first 0 of 10"):
        cache.batch([4])
    full = TeacherCache(tmp_path / "whole")
    for number, ready in ((0, 4), (2, 4), (1, 10)):  # as two processes may finish them
        shard = tmp_path / "whole" / whole["train"][number]
        shutil.copy(shard, tmp_path / "growing")
        if number == 2:
            with pytest.raises(StageError, match="train-00002"):  # there, and maybe not whole
                cache.batch([9])
        shutil.copy(shard.with_suffix(".sha256"), tmp_path / "growing")
        assert cache.ready() == ready
        rows = range(4 * number, min(4 * number + 4, 10))
        assert torch.equal(cache.batch(rows).ids, full.batch(rows).ids)
    assert (full.ready(), full.ready("tune"), cache.ready("tune")) == (10, 3, 0)
    with pytest.raises(StageError, match=r"tune-00000\.safetensors"):
        TeacherCache(tmp_path / "growing")
