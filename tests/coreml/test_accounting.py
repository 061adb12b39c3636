from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest

from a1q.coreml.accounting import HEAD, KINDS, account_bundle, account_part, rows, summarize
from a1q.coreml.spec import read_functions, weight_file
from a1q.coreml.weightfile import read_spec
from tests.coreml.programs import const, write_program

X = {"x": ((1, 64, 1, 1), "fp16")}
LAYERS, HIDDEN, VOCABULARY, CONTEXT, CHUNK = 2, 64, 320, 128, 32


def report(form, name, tied=True, **options):
    _, package, _ = form(name, tied)
    return account_part(package.path, positions={"infer": 1, "prefill": CHUNK}, **options)


def projections(model):
    """(out, in) of every projection, from the model's own config."""
    config = model.config
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = [(query, hidden), (key, hidden), (key, hidden), (hidden, query)]
    return config.num_hidden_layers * [*shapes, (inner, hidden), (inner, hidden), (hidden, inner)]


@pytest.mark.parametrize(
    ("name", "rank"),
    [("dense", 1), ("group-4", 1), ("rank-1", 1), ("pairs", 1), ("fours", 2), ("rank-3", 3), ("factors", 3)],
)
def test_multiply_adds_show_the_price_of_ranks(form, name, rank):
    model, _, _ = form(name, True)
    part = report(form, name)
    body, head = sum(out * inner for out, inner in projections(model)), VOCABULARY * HIDDEN
    infer, prefill = part.functions["infer"], part.functions["prefill"]
    assert infer.multiply_adds == rank * body + head
    assert infer.dense_multiply_adds == body + head
    assert prefill.multiply_adds == CHUNK * rank * body + head, "only the last position has logits"
    assert prefill.dense_multiply_adds == CHUNK * body + head
    whole = summarize([part])
    assert whole.multiply_adds_ratio == (rank * body + head) / (body + head)


def test_attention_is_counted_apart(form):
    model, _, _ = form("dense", True)
    heads, size = model.config.num_attention_heads, model.config.head_dim
    part = report(form, "dense")
    per_position = LAYERS * 2 * heads * size * CONTEXT
    assert part.functions["infer"].attention_multiply_adds == per_position
    assert part.functions["prefill"].attention_multiply_adds == CHUNK * per_position


def test_operations_are_those_of_the_program_read_back(form):
    _, package, _ = form("rank-3", True)
    part = report(form, "rank-3")
    for name, function in package.program.functions.items():
        # coreml_update_state is one operation in memory and two in the file
        updates = sum(op.op_type == "coreml_update_state" for op in function.operations)
        assert sum(part.functions[name].operations.values()) == package.operations[name] + updates


def test_every_byte_of_the_weight_file_has_a_place(form):
    for name in ("dense", "tensor-2", "rank-3", "factors"):
        part = report(form, name)
        assert tuple(part.bytes_by_kind) == KINDS
        functions = read_functions(read_spec(form(name, True)[1].path))
        constants = {
            constant.offset: constant.tensor.bytes
            for function in functions.values()
            for operation in function.operations
            for constant in operation.constants.values()
            if constant.offset is not None
        }
        assert part.weight_bytes == sum(constants.values()) + part.overhead_bytes
        # a header for the file, one per entry, and alignment to 64 bytes
        assert 64 * (1 + len(constants)) <= part.overhead_bytes < 64 + 128 * len(constants)


@pytest.mark.parametrize(
    ("name", "bits", "numbers", "rank"),
    [("tensor-2", 2, 4, 0), ("tensor-6", 6, 64, 0), ("rank-3", 2, 4, 3), ("pairs", 2, 32, 1), ("fours", 1.5, 256, 2)],
)
def test_bits_per_weight(form, name, bits, numbers, rank):
    model, _, _ = form(name, True)
    shapes = projections(model)
    weights = sum(out * inner for out, inner in shapes)
    table = 16 * numbers * len(shapes)
    scales = 16 * rank * sum(out + inner for out, inner in shapes)
    part = report(form, name)
    assert part.quantized_weights == weights
    assert part.bits_per_weight == pytest.approx((bits * weights + table + scales) / weights)
    assert part.bytes_by_kind["indices"] == bits * weights // 8
    assert report(form, "dense").bits_per_weight is None


def test_bits_per_weight_of_palettized_factors(form):
    model, _, _ = form("factors", True)
    shapes = projections(model)
    weights = sum(out * inner for out, inner in shapes)
    table = 16 * 4 * len(shapes)
    scales = 3 * sum(4 * (out + inner) + 2 * 16 * 16 for out, inner in shapes)
    part = report(form, "factors")
    assert part.quantized_weights == weights
    assert part.bytes_by_kind["scales"] == scales // 8
    assert part.bits_per_weight == pytest.approx((2 * weights + table + scales) / weights)


def test_theory(form):
    part = report(form, "tensor-2", theory_bytes=50_000)
    assert part.size_ratio == part.weight_bytes / 50_000
    assert report(form, "tensor-2").size_ratio is None


def test_a_token_reads_weights_once_and_rows_of_an_embedding(form):
    tied, untied = report(form, "dense", True), report(form, "dense", False)
    table, row = 2 * VOCABULARY * HIDDEN, 2 * HIDDEN
    stored = sum(untied.bytes_by_kind.values())
    read = untied.functions["infer"].bytes_read
    assert stored - table + row - 1024 < read <= stored - table + row, "all but the table (and prefill's own numbers)"
    assert tied.bytes_by_kind["dense"] == untied.bytes_by_kind["dense"] - table
    assert tied.functions["infer"].bytes_read == read - row, "the head reads the whole table, its rows are among it"
    assert untied.functions["prefill"].bytes_read > read + 20 * row


def test_gathered_rows_of_a_palettized_table(tmp_path):
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    kind = types.nptype_from_builtin(types.uint4)
    codes = np.random.default_rng(0).integers(0, 16, (256, 64, 1, 1)).astype(np.uint8).view(kind)

    def lookup(tables):
        def build(ids):
            lut = np.random.default_rng(1).standard_normal((tables, 1, 1, 1, 16, 1)).astype(np.float16)
            table = mb.constexpr_lut_to_dense(indices=const("codes", codes), lut=const("lut", lut))
            return mb.gather(x=table, indices=ids, axis=0, validate_indices=False)

        return build

    for tables, tables_read in ((1, 32), (16, 2)):
        folder = tmp_path / str(tables)
        folder.mkdir()
        part = account_part(write_program(folder, {"main": lookup(tables)}, {"ids": ((1, 1), "int32")}))
        assert part.functions["main"].bytes_read == 64 * 4 // 8 + tables_read


def test_integers_in_blocks_are_quantized_weights(tmp_path):
    from coremltools.converters.mil import Builder as mb

    rng = np.random.default_rng(0)

    def build(x):
        weight = mb.constexpr_blockwise_shift_scale(
            data=const("codes", rng.integers(-128, 127, (32, 64, 1, 1)).astype(np.int8)),
            scale=const("scale", rng.random((32, 2, 1, 1)).astype(np.float16)),
        )
        return mb.conv(x=x, weight=weight)

    part = account_part(write_program(tmp_path, {"main": build}, X))
    assert part.quantized_weights == 32 * 64
    assert part.bits_per_weight == 8 + 16 * 2 / 64
    assert part.functions["main"].multiply_adds == part.functions["main"].dense_multiply_adds == 32 * 64


def test_a_weight_stored_twice_is_found(tmp_path):
    from coremltools.converters.mil import Builder as mb

    weight = np.random.default_rng(0).standard_normal((32, 64, 1, 1)).astype(np.float16)

    def build(shared):
        return lambda x: mb.conv(x=x, weight=const("weight", weight, shared))

    for shared in (True, False):
        folder = tmp_path / str(shared)
        folder.mkdir()
        part = account_part(write_program(folder, {"infer": build(shared), "prefill": build(shared)}, X))
        assert part.bytes_by_kind["dense"] == weight.nbytes * (1 if shared else 2)
        assert part.wasted_bytes == (0 if shared else weight.nbytes)
        if not shared:
            assert part.duplicates[0].functions == (("infer",), ("prefill",))
            assert part.duplicates[0].sharing_lost


def test_equal_weights_of_one_function_are_no_lost_sharing(tmp_path):
    from coremltools.converters.mil import Builder as mb

    weight = np.random.default_rng(0).standard_normal((64, 64, 1, 1)).astype(np.float16)

    def build(x):
        return mb.conv(x=mb.conv(x=x, weight=const("first", weight)), weight=const("second", weight))

    part = account_part(write_program(tmp_path, {"infer": build, "prefill": build}, X))
    assert part.wasted_bytes == weight.nbytes
    assert not part.duplicates[0].sharing_lost


def test_adapters_are_no_part_of_the_dense_model(tmp_path):
    from tests.coreml.models import SCHEMES, decoder, package_of

    package, _ = package_of(decoder(SCHEMES["rank-1"], adapter=4), tmp_path)
    part = account_part(package.path)
    shapes = projections(decoder())
    infer = part.functions["infer"]
    assert infer.dense_multiply_adds == sum(out * inner for out, inner in shapes) + VOCABULARY * HIDDEN
    assert infer.multiply_adds - infer.dense_multiply_adds == 4 * sum(out + inner for out, inner in shapes)


def test_the_whole_sums_the_parts_and_shares_their_state(form):
    part = report(form, "rank-1")
    other = replace(part, name="other", functions={"infer": part.functions["infer"]})
    whole = summarize([part, other], parameters=1000)
    cache = LAYERS * 2 * 2 * CONTEXT * 32 * 2
    assert whole.cache_bytes == cache == part.states["kv_cache"]
    assert whole.weight_bytes == 2 * part.weight_bytes
    assert whole.bits_per_parameter == 8 * whole.weight_bytes / 1000
    assert whole.bytes_per_token == 2 * part.functions["infer"].bytes_read
    assert whole.multiply_adds_per_token == 2 * part.functions["infer"].multiply_adds
    assert len(rows(whole)) == 3
    assert all(len(row) == len(HEAD) for row in rows(whole))
    assert json.loads(json.dumps(asdict(whole)))["parts"]["other"]["name"] == "other"


def test_a_bundle_is_counted_from_its_files(form):
    """`meta.json` names the parts; no program is read back for it."""
    path = form("rank-1", True)[1].path
    part = {"name": "all", "file": path.name, "role": "model", "functions": {"infer": 1}, "theory_bytes": 90_000}
    whole = account_bundle(SimpleNamespace(folder=path.parent, meta={"parts": [part]}), parameters=127_000)
    assert whole.parts["all"].size_ratio == whole.weight_bytes / 90_000
    assert whole.parts["all"].functions["infer"].positions == 1
    assert whole.parameters == 127_000


def test_the_token_function_of_a_part(form):
    part = report(form, "dense")
    assert part.token_function.name == "infer"
    functions = part.functions
    renamed = replace(part, functions={"b": functions["prefill"], "a": replace(functions["infer"], name="a")})
    assert renamed.token_function.name == "a", "the fewest positions"


def test_a_truncated_weight_file_is_told(form, tmp_path):
    import shutil

    path = tmp_path / "cut.mlpackage"
    shutil.copytree(form("dense", True)[1].path, path)
    with open(weight_file(path).path, "r+b") as file:
        file.truncate(50_000)
    with pytest.raises(ValueError, match="no whole entry at"):
        account_part(path)
