"""Every method: who runs it, with which options, in which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.quality.configurations import CONFIGURATIONS, GRADIENTS, VERSION
from benchmarks.quality.job import Job, Outcome
from benchmarks.quality.settings import SETTINGS

ALL = ("pico", "pico-diag", "pico-heavy")
UNTRAINED = ("w2", "w2a4", "w3", "w4")
ASKED = {"pico-diag": ("w2",), "pico-heavy": ("w2",)}
"""The settings of teachers that don't take part in all."""
OURS = ("pico", "w2-200", "a1q")
"""Where our learning rate is chosen: one configuration for all cells."""


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    runner: str
    """`own`, `others` or `peer`: the module of this package that runs it."""
    options: Mapping[str, Any]
    settings: tuple[str, ...]
    calibrated: bool = True
    """Whether it looks at the calibration tokens; one that does not, and does not train, hangs on no seed."""
    teachers: tuple[str, ...] = ("pico",)
    tuned_at: tuple[str, str, str] | None = None
    """Teacher, setting and method where its one learning rate is chosen; None: every row has its own."""
    version: int = 1
    """Counted up when the code behind it changes figures, so that cached cells run again."""

    def takes_part(self, teacher: str, setting: str) -> bool:
        """Whether there are cells of it."""
        return setting in self.settings and teacher in self.teachers and setting in ASKED.get(teacher, self.settings)

    def trains(self, setting: str) -> bool:
        """Whether it gets a learning rate of the grid there."""
        return SETTINGS[setting].steps > 0

    def seeded(self, setting: str) -> bool:
        """Whether its result there hangs on the seed."""
        return self.calibrated or self.trains(setting)

    def run(self, job: Job) -> Outcome:
        """Quantize."""
        if self.runner == "own":
            from benchmarks.quality import own

            return own.run(job, CONFIGURATIONS[self.options["configuration"]])
        if self.runner == "others":
            from benchmarks.quality import others

            return others.run(job, self.options)
        from benchmarks.quality import peer

        return peer.run(job, self.options)

    def identity(self, setting: str) -> dict[str, Any]:
        """What of it determines a result in that setting, as JSON holds it."""
        found: dict[str, Any] = {"runner": self.runner, "version": self.version, "options": dict(self.options)}
        if self.runner == "own":
            found["configuration"] = _own_identity(self.options["configuration"], setting)
        elif self.runner == "peer":
            from benchmarks.quality.peer import pins

            found["pins"] = pins()
        return found


def _own(name: str, *settings: str, **changes: Any) -> Method:
    return Method("own", {"configuration": name}, settings, CONFIGURATIONS[name].calibrate, **changes)


def _other(kind: str, rates: dict[str, float], teachers: tuple[str, ...] = ("pico",), **options: Any) -> Method:
    """SEQ or DWQ; its rates are multiples of the grid's learning rate by parameter set."""
    return Method("others", {"kind": kind, "rates": rates, **options}, ("w2-200",), calibrated=False, teachers=teachers)


def _peer(
    program: str, *settings: str, calibrated: bool = True, teachers: tuple[str, ...] = ("pico",), **options: Any
) -> Method:
    return Method("peer", {"program": program, **options}, settings, calibrated, teachers)


METHODS: dict[str, Method] = {
    "a1q": _own("a1q", *UNTRAINED, "w2-200", "w2a4-200", "whole", teachers=ALL, tuned_at=OURS),
    "a1q-wide": _own("a1q-wide", "w2"),
    "a1q-budget": _own("a1q-budget", "w2", "w2-200", tuned_at=OURS),
    "a1q-pairs": _own("a1q-pairs", "w2", "w3", "w2-200", tuned_at=OURS),
    "a1q-scales": _own("a1q-scales", "w2-200"),
    "a1q-fit": _own("a1q-fit", *UNTRAINED),
    "a1q-published": _own("a1q-published", "w2", "w4", teachers=ALL),
    "a1q-lut": _own("a1q-lut", "w2", "w4"),
    "rtn": _own("rtn", *UNTRAINED, teachers=ALL),
    "seq": _other("seq", {"weights": 1.0, "scales": 1.0}, teachers=ALL, group_size=64, start="mse"),
    "dwq": _other("dwq", {"scales": 1.0}, group_size=64),
    "peer:gptq": _peer("gptq", *UNTRAINED, teachers=ALL),
    "peer:autoround": _peer("autoround", *UNTRAINED, teachers=ALL, iters=200),
    "peer:autoround-1000": _peer("autoround", "w2", iters=1000),
    "peer:coremltools": _peer("coremltools_kmeans", "w2", "w4", calibrated=False),
    "peer:coremltools-scales": _peer("coremltools_kmeans", "w2", "w4", calibrated=False, enable_per_channel_scale=True),
    "peer:torchao-qat": _peer("torchao_qat", "w2-200"),
}


def _own_identity(name: str, setting: str) -> dict[str, Any]:
    """The part of a configuration that a setting uses, with the versions of its schemes."""
    from a1q.engine.registry import active_registry
    from a1q.quant.build import complete

    configuration, asked = CONFIGURATIONS[name], SETTINGS[setting]
    widths = {asked.bits} if isinstance(asked.bits, int) else set(asked.bits.values())
    specs = {
        str(bits): {pattern: complete({"bits": bits, **spec}) for pattern, spec in configuration.specs[bits].items()}
        for bits in sorted(widths)
    }
    used = {spec["scheme"] for patterns in specs.values() for spec in patterns.values()}
    found: dict[str, Any] = {"code": VERSION, "specs": specs, "calibrate": configuration.calibrate}
    if configuration.calibrate:
        found["gradients"] = GRADIENTS
    if configuration.reconstruct:
        found["reconstruct"] = asdict(configuration.reconstruct)
    if isinstance(asked.bits, int) and asked.bits in configuration.budget:
        found["budget"] = asdict(configuration.budget[asked.bits])
    if asked.whole:
        found["embedding"] = complete(configuration.embedding)
        used.add(found["embedding"]["scheme"])
    if asked.steps:
        found["train"] = dict(configuration.train)
    found["schemes"] = {scheme: active_registry().get("schemes", scheme).version for scheme in sorted(used)}
    return found
