"""What an exporter is: it turns a model artifact into files that other programs read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from a1q.engine.artifact import Artifact
    from a1q.engine.stage import StageContext


class Exporter(ABC):
    """One export format: `exporters/NAME.py` plus `schemas/exporters/NAME.json`; torch only inside functions."""

    version: ClassVar[int] = 1
    """Part of the cache key: raise it whenever the same options write other files."""
    Config: ClassVar[type]
    schema: ClassVar[Mapping[str, Any] | None] = None
    """Inline schema, for plug-ins outside this package only."""

    @abstractmethod
    def refusals(self, view: Any, config: Any) -> list[str]:
        """Say why this model view (`a1q.models.view.ModelView`) can't be exported so; empty when it can. No torch."""

    @abstractmethod
    def estimate(self, view: Any, config: Any) -> int:
        """Bytes the export will take on disk."""

    @abstractmethod
    def export(self, model: Artifact, config: Any, ctx: StageContext) -> None:
        """Write the files to `ctx.out` and the figures to `ctx.metrics`."""
