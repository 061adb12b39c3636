"""Operations whose way hangs on values, as single nodes of a compiled graph: `torch.compile` asks for shapes only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def opaque(name: str, shape_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Callable], Callable]:
    """Make a function of two tensors one node wherever it is traced; elsewhere it is called as it is.

    Args:
        name: unique among a1q's operations.
        shape_of: an empty tensor of the result's shape and type.
    """

    def decorate(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def operation(first: Tensor, second: Tensor) -> Tensor:
            return function(first, second)

        node = torch.library.custom_op(f"a1q::{name}", operation, mutates_args=())
        node.register_fake(shape_of)

        def called(first: Tensor, second: Tensor) -> Tensor:
            return node(first, second) if torch.compiler.is_compiling() else function(first, second)

        called.__doc__ = function.__doc__
        return called

    return decorate
