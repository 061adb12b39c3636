"""How much a model changes when some of its weights do: KL on text, against the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor, nn

from a1q.distill.divergence import precise_kl
from a1q.models.blocks import BlockStream
from a1q.models.positions import passed
from a1q.quant.fitter import class_for
from a1q.quant.importance import Inputs
from a1q.quant.module import naming


class Divergences:
    """KL(model || changed model) in nats per token over the full vocabulary, for changes of a few weights at a time.

    Only what comes after a change is computed again. Modules are asked for in the order of `ordered`. Memory holds the
    states at two boundaries between layers for all sequences, and the logits of one batch twice.
    """

    def __init__(self, model: nn.Module, tokens: ndarray, batch_size: int, borders: ndarray | None = None):
        """Take a model in evaluation mode, integers [n, L], and bool [n, L], where documents begin that attention
        stays within; None: it sees all before.

        Raises:
            StageError: if the model has no list of decoder layers.
        """
        self._model: Any = model
        self._ids = [torch.from_numpy(tokens[i : i + batch_size]).long() for i in range(0, len(tokens), batch_size)]
        self._borders = [
            None if borders is None else torch.from_numpy(borders[i : i + batch_size].copy())
            for i in range(0, len(tokens), batch_size)
        ]
        self._tokens = tokens.size
        stream = BlockStream(model, tokens, batch_size, borders)
        for index in range(len(stream.names)):
            stream.advance(index)
        self._final = stream.hidden
        self._stream = BlockStream(model, tokens, batch_size, borders)
        self._place = 0

    @property
    def batches(self) -> int:
        """How often the functions below call `tick` for one change."""
        return len(self._ids)

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Module names in the order in which changes have to be asked for: as the model runs."""
        return sorted(names, key=self._block_of)

    def of(self, name: str, weights: Sequence[Tensor], tick: Callable[[], None]) -> list[float]:
        """KL for each of `weights` [out, in] in the place of that of module `name`."""
        block = self._block_of(name)
        while self._place < block and self._place < len(self._stream.names):
            self._stream.advance(self._place)
            self._place += 1
        sums = [0.0] * len(weights)
        for number in range(len(self._ids)):
            before = self._stream.logits(self._final[number], number)
            for index, weight in enumerate(weights):
                with replaced(self._model, {name: weight}):
                    sums[index] += divergence(before, self._logits(block, number))
                tick()
        return [total / self._tokens for total in sums]

    def together(self, weights: Mapping[str, Tensor], tick: Callable[[], None]) -> float:
        """KL with all these weights in place at once, by module name."""
        total = 0.0
        for number in range(len(self._ids)):
            before = self._stream.logits(self._final[number], number)
            with replaced(self._model, weights):
                total += divergence(before, self._logits(-1, number))
            tick()
        return total / self._tokens

    def _block_of(self, name: str) -> int:
        """The decoder layer a module is in; -1 before the first, their number behind the last."""
        for index, block in enumerate(self._stream.names):
            if name.startswith(f"{block}."):
                return index
        module = self._model.get_submodule(name)
        return -1 if module is not self._model.get_output_embeddings() else len(self._stream.names)

    def _logits(self, block: int, number: int) -> Tensor:
        """Logits [b, L, V] of the model as it stands, computed from `block` on."""
        if block < 0:
            with torch.inference_mode():
                return self._model(**passed(self._ids[number].to(self._stream.device), self._borders[number])).logits
        hidden = self._stream.hidden[number]
        with torch.no_grad():
            for index in range(block, len(self._stream.names)):
                hidden = self._stream.run(index, hidden, number)
        return self._stream.logits(hidden, number)


def divergence(before: Tensor, after: Tensor) -> float:
    """Σ over positions of KL(before || after) from logits [b, L, V]."""
    total = 0.0
    for old, new in zip(before, after, strict=True):
        log_p, log_q = (torch.log_softmax(logits.float(), dim=-1) for logits in (old, new))
        total += precise_kl(log_p, log_q).cpu().double().sum().item()  # Metal has no float64
    return total


def quantized_weight(name: str, dense: nn.Module, spec: Mapping[str, Any], inputs: Inputs | None, seed: int) -> Tensor:
    """The weight [out, in] that `quantize` and `snap` make of a dense module, float32.

    Raises:
        StageError: if it can't be fitted; it names the module.
    """
    with naming(name):
        module = class_for(dense).quantize(dense, spec, inputs, seed, keep_latent=False)
    module.snap()
    return module.dequantize()


@contextmanager
def replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights in place of those of dense modules, by module name; a tied head follows its embedding."""
    parameters = {name: model.get_submodule(name).get_parameter("weight") for name in weights}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, weight in weights.items():
            parameters[name].data = weight.to(before[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]
