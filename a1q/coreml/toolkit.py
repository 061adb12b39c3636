"""Import coremltools without the messages that mean nothing to a user of a1q."""

from __future__ import annotations

import logging
from typing import Any

SPECIFICATION = 9
"""Core ML specification version of iOS 18 / macOS 15: states, grouped LUTs and several functions in a package."""


def coremltools() -> Any:
    """The coremltools module.

    Importing it warns that this torch was not tested (only its torch converter cares, which a1q does not use) and,
    off a Mac, that the native runtime is missing (a1q interprets packages itself). Both are silenced.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools

    return coremltools
