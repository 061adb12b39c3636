"""What is known of the Neural Engine's likes and dislikes, each rule with the place that says so.

None of this is a specification: Apple publishes none. A rule that cites field reports rests on what several people
measured or were told, without a page to point at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Error: does not load, or computes nonsense. Warning: likely to leave the Neural Engine or to be slow there. Note:
worth knowing."""

FIELD = "field reports"
_GUIDE = "https://apple.github.io/coremltools/docs-guides/source/"
_HOLLANCE = "https://github.com/hollance/neural-engine/blob/master/docs/"
_COREMLTOOLS = "https://github.com/apple/coremltools/"
_VECTORS = "https://github.com/Anemll/anemll-forge/blob/main/docs/history/VECTOR_LUT_README.md"


@dataclass(frozen=True)
class Rule:
    """One rule."""

    id: str
    what: str
    """What was found, and what it means."""
    severity: Severity
    source: str
    """Where it is published, or `FIELD`."""
    threshold: float | None = None
    """The number that is compared, if there is one."""
    unit: str = ""
    """What is counted in what a finding gives as its value."""
    small: float | None = None
    """Up to this value a finding is only a note."""


RULES = {
    rule.id: rule
    for rule in (
        Rule(
            "rank",
            "tensor of more than 5 dimensions: not placed on the Neural Engine",
            "warning",
            FIELD,
            5,
            unit="dimensions",
        ),
        Rule(
            "dimension",
            "dimension above 16384: not placed on the Neural Engine",
            "warning",
            "https://huggingface.co/seba/qwen-2-coreml-ane",
            16384,
            unit="wide",
        ),
        Rule(
            "narrow-axis",
            "the last axis is padded to 64 bytes, which makes this tensor large",
            "warning",
            FIELD,
            2**20,
            unit="bytes",
        ),
        Rule(
            "dynamic-shape",
            "shape that is not static: only the default shape runs on the Neural Engine",
            "warning",
            "https://developer.apple.com/forums/thread/724930",
        ),
        Rule(
            "enumerated-shape",
            "one of several declared shapes: each can run on the Neural Engine, one function per shape is simpler",
            "note",
            "https://developer.apple.com/forums/thread/724930",
        ),
        Rule(
            "operation",
            "operation that runs on CPU or GPU: data moves there and back",
            "note",
            f"{_HOLLANCE}unsupported-layers.md, {_COREMLTOOLS}issues/1103",
        ),
        Rule(
            "recurrent",
            "recurrent operation: not supported on the Neural Engine",
            "warning",
            f"{_COREMLTOOLS}issues/1780",
        ),
        Rule(
            "int32",
            "operation on 32-bit integers: runs on the CPU",
            "warning",
            FIELD,
            unit="elements",
            small=2**16,
        ),
        Rule(
            "fp32",
            "fp32 tensor: the Neural Engine computes in fp16",
            "warning",
            f"{_HOLLANCE}16-bit.md",
            unit="elements",
            small=2**16,
        ),
        Rule(
            "fp32-constant",
            "fp32 constant: makes what reads it fp32, and that leaves the Neural Engine",
            "note",
            FIELD,
            unit="elements",
        ),
        Rule(
            "not-finite",
            "fp16 constant with infinities or NaN: use a large finite number, such as -40000 in masks",
            "error",
            FIELD,
            unit="elements",
        ),
        Rule(
            "subnormal",
            "fp16 constant with many numbers below 6.1e-5, which may count as 0",
            "note",
            f"{_HOLLANCE}16-bit.md",
            0.01,
            unit="of its elements",
        ),
        Rule("state-type", "state update of another type than its fp16 state", "error", FIELD),
        Rule(
            "state-size",
            "height or width of a state is no multiple of 32: reported to fail on the Neural Engine",
            "warning",
            f"{_COREMLTOOLS}issues/2631",
            32,
        ),
        Rule(
            "stateful-4-bit",
            "4-bit tables in a package with states: there are reports of wrong numbers and crashes after many "
            "predictions; verify on the device",
            "note",
            f"{_COREMLTOOLS}issues/2716",
            4,
        ),
        Rule(
            "small-groups",
            "fewer than 8 channels per table: more tables are slower, 8 or 16 channels are usual",
            "note",
            f"{_GUIDE}opt-palettization-perf.html",
            8,
            unit="channels",
        ),
        Rule(
            "input-groups",
            "tables per group of input channels: not supported on the Neural Engine",
            "warning",
            "https://huggingface.co/seba/qwen-2-coreml-ane",
        ),
        Rule(
            "vector-table",
            "table of vectors that the Neural Engine is reported to refuse: it takes at most 16 consecutive output "
            "channels per index, one table per weight, of 256 numbers at most",
            "warning",
            _VECTORS,
        ),
        Rule(
            "vectors",
            "tables of vectors: measured on the Neural Engines of M5 and M6, not known of others; verify on the device",
            "note",
            _VECTORS,
        ),
        Rule(
            "scale-behind-table",
            "constexpr_blockwise_shift_scale behind a table: fails to load on some Neural Engines; write the scale as "
            "a multiplication",
            "error",
            f"{_COREMLTOOLS}pull/2688",
        ),
        Rule(
            "integer-weights",
            "weights as integers with scales: only palettized ones stay packed on every Neural Engine",
            "note",
            FIELD,
        ),
        Rule("kernel", "convolution other than 1x1", "note", FIELD),
        Rule(
            "projection",
            "projection that is no convolution: 1x1 convolutions on (1, channels, 1, positions) suit the Neural Engine",
            "note",
            "https://machinelearning.apple.com/research/neural-engine-transformers",
        ),
        Rule(
            "input-is-output",
            "tensor is both input and output: macOS 26 refuses it",
            "error",
            "https://github.com/FluidInference/mobius/pull/11",
        ),
        Rule(
            "stored-per-function",
            "weights that functions could share are stored once for each",
            "warning",
            f"{_GUIDE}multifunction-models.html",
            4096,
            unit="bytes",
        ),
        Rule(
            "large-part",
            "package above 250 MB: reported to move to the GPU on some machines",
            "note",
            FIELD,
            250e6,
            unit="bytes",
        ),
        Rule(
            "huge-part",
            "package above 950 MB: ANEMLL divides models so that no package is larger",
            "warning",
            "https://github.com/Anemll/Anemll/blob/main/docs/calc_chunk_split.md",
            950e6,
            unit="bytes",
        ),
        Rule(
            "version-low",
            "states and several functions need specification version 9 (iOS 18, macOS 15)",
            "error",
            f"{_GUIDE}stateful-models.html",
            9,
        ),
        Rule(
            "version-high",
            "specification version above 9: does not load on iOS 18 and macOS 15",
            "note",
            f"{_GUIDE}stateful-models.html",
            9,
        ),
    )
}
"""By id."""

OFF_ENGINE = {
    **dict.fromkeys(("gather", "gather_along_axis", "gather_nd", "custom_layer"), "operation"),
    **dict.fromkeys(("gru", "lstm", "rnn"), "recurrent"),
}
"""Operation type -> the rule that it breaks."""
