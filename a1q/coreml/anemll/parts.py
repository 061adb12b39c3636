"""The parts of this layout: `embeddings`, `ffn_1` ... `ffn_N`, `lm_head`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from a1q.coreml.anemll.chunks import even_chunks, fitting_chunks
from a1q.coreml.anemll.names import PREFIXES, default_splits, file_name, logits_names
from a1q.coreml.anemll.programs import embeddings_program, head_program, layers_program
from a1q.coreml.architecture import Architecture
from a1q.coreml.layouts import BASE, Options, Part, linear_bytes

if TYPE_CHECKING:
    from a1q.coreml.weights import DecoderWeights, Linear


def parts(architecture: Architecture, weights: DecoderWeights, options: Options) -> list[Part]:
    """The packages in the order in which an app calls them.

    A tied head is stored a second time, for it is another package's.
    """
    layers = architecture.layers
    if options.chunks is None:
        borders = fitting_chunks([linear_bytes(weights, index, index + 1) for index in range(layers)])
    else:
        borders = even_chunks(layers, options.chunks)
    chunks = [_chunk(architecture, weights, options, number, borders) for number in range(1, len(borders) + 1)]
    return [_embeddings(architecture, weights, options), *chunks, _head(architecture, weights, options)]


def outputs(architecture: Architecture, weights: DecoderWeights, options: Options) -> list[str]:
    """Names of the logits' outputs."""
    step = weights.head().row_step
    return logits_names(options.head_parts or default_splits(architecture.model_type, architecture.vocabulary, step))


def table_bits(linears: Iterable[Linear]) -> int | None:
    """Bits of the lookup tables that most of the weights have; None if most have none."""
    count: Counter[int | None] = Counter()
    for linear in linears:
        count[None if linear.palette is None else linear.palette.bits] += linear.shape[0] * linear.shape[1]
    return count.most_common(1)[0][0]


def ffn_bits(weights: DecoderWeights) -> int | None:
    """Bits in the file names of the chunks: those of most weights of all layers, for all chunks are named alike."""
    return table_bits(linear for name, linear in weights.linears.items() if name != "lm_head")


def _embeddings(architecture: Architecture, weights: DecoderWeights, options: Options) -> Part:
    def build(tick: Callable[[], None]) -> Any:
        return embeddings_program(architecture, weights, options)

    file = file_name(PREFIXES[architecture.model_type], "embeddings", table_bits([weights.embedding]))
    theory = weights.embedding.theory_bits // 8
    return Part("embeddings", file, "embeddings", {"main": options.prefill}, (0, 0), theory, build)


def _chunk(
    architecture: Architecture, weights: DecoderWeights, options: Options, number: int, borders: list[tuple[int, int]]
) -> Part:
    begin, end = borders[number - 1]
    functions = {"infer": 1, "prefill": options.prefill}
    if options.adapter_functions:
        functions |= {f"{name}{BASE}": positions for name, positions in functions.items()}
    theory = linear_bytes(weights, begin, end)
    if end == architecture.layers:
        theory += 2 * weights.norms["model.norm"].size

    def build(tick: Callable[[], None]) -> Any:
        return layers_program(architecture, weights, options, functions, begin, end, tick)

    file = file_name(PREFIXES[architecture.model_type], "FFN_PF", ffn_bits(weights), (number, len(borders)))
    return Part(f"ffn_{number}", file, "ffn", functions, (begin, end), theory, build)


def _head(architecture: Architecture, weights: DecoderWeights, options: Options) -> Part:
    head = weights.head()
    functions = {"main": 1}
    if options.adapter_functions and head.adapter is not None:
        functions = {"infer": 1, f"infer{BASE}": 1}

    def build(tick: Callable[[], None]) -> Any:
        names = outputs(architecture, weights, options)
        return head_program(architecture, weights, options, functions, names)

    file = file_name(PREFIXES[architecture.model_type], "lm_head", table_bits([head]))
    layers = architecture.layers
    return Part("lm_head", file, "lm_head", functions, (layers, layers), head.theory_bits // 8, build)
