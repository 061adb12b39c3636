"""Measure E[x²] and E[x xᵀ] of what every linear of a decoder is multiplied with, one decoder layer at a time.

Means are over tokens. Products over the positions of a batch are made in the type of the activations (float32) and
summed over batches in float64, so that results depend on the size of a batch no more than the model's own rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from a1q.errors import StageError
from a1q.models.blocks import BlockStream
from a1q.quant.fisher import fisher_information
from a1q.quant.importance import Inputs
from a1q.quant.statistics import write_gram, write_sensitivity, write_statistics
from a1q.quant.tied import TiedHead

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass
class _Sums:
    """Sums over the tokens seen so far, of modules that run one after the other."""

    with_gram: bool
    square: dict[str, Tensor] = field(default_factory=dict)
    """Name -> Σ x², float64 [in]."""
    gram: dict[str, Tensor] = field(default_factory=dict)
    """Name of the first module with this input -> Σ x xᵀ, float64 [in, in]."""
    same: dict[str, str] = field(default_factory=dict)
    """Name -> name of the first module with the same input."""
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, x: Tensor) -> None:
        """Add the inputs x [..., in] of module `name`, which has them before other modules."""
        x = x.detach().reshape(-1, x.shape[-1])
        exact = torch.device("cpu") if x.device.type == "mps" else x.device  # Metal has no float64
        self.same[name] = name
        self.tokens[name] = self.tokens.get(name, 0) + len(x)
        _accumulate(self.square, name, x.to(exact, torch.float64).square().sum(0))
        if self.with_gram:
            _accumulate(self.gram, name, (x.T @ x).to(exact, torch.float64))

    def means(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """E[x²] of every module (float64), E[x xᵀ] of those with an input of their own (float32); ends the sums.

        Raises:
            StageError: if inputs are not finite; it names the first module.
        """
        for name, owner in self.same.items():
            if not bool(torch.isfinite(self.square[owner]).all()):
                raise StageError(f"the inputs of {name} are not finite")
        square = {name: self.square[owner] / self.tokens[owner] for name, owner in self.same.items()}
        return square, {name: total.div_(self.tokens[name]).float() for name, total in self.gram.items()}


def measure_statistics(
    model: Any,
    tokens: ndarray,
    folder: Path,
    *,
    batch_size: int,
    borders: ndarray | None = None,
    gram: bool = True,
    gradient_sequences: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Run `model` over `tokens` (integers [n, L]) and write what `a1q.quant.statistics.Statistics` reads.

    Args:
        borders: bool [n, L], where documents begin that attention stays within; None: it sees all before.
        folder: of the files; those of one decoder layer are written before the next one runs.
        gram: whether E[x xᵀ] is measured too.
        gradient_sequences: the first so many sequences are those that F is measured on, see `a1q.quant.fisher`.
        seed: of the labels that F needs.
        progress: called with (steps done, steps in all).

    Returns:
        Name -> E[x²] [in], float64.

    Raises:
        StageError: if a weight, an activation or a gradient is not finite, naming the module or the layer; if the model
            has no decoder layers.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise StageError(f"{name} holds values that are not finite")
    embedding, head = _ends(model)
    stream = BlockStream(model, tokens, batch_size, borders)
    layers, batches = stream.names, len(stream.hidden)
    first = tokens[:gradient_sequences]
    before_gradients = (len(layers) + 1) * batches
    total = before_gradients + len(layers) * len(range(0, len(first), batch_size))
    square: dict[str, Tensor] = {}
    grams: dict[str, tuple[str, str]] = {}

    def keep(sums: _Sums, part: str) -> None:
        found, products = sums.means()
        square.update(found)
        if gram:
            file = write_gram(folder, part, products)
            grams.update({name: (file, owner) for name, owner in sums.same.items()})

    for index, name in enumerate(layers):
        sums = _Sums(gram)
        with _listening(model.get_submodule(name), f"{name}.", sums) as forget:

            def done(number: int, before: int = index * batches, forget: Callable[[], None] = forget) -> None:
                forget()
                progress(before + number, total)

            stream.advance(index, done)
        keep(sums, f"{index:05d}")
    sums = _Sums(gram)
    for number in range(batches):
        sums.add(head, stream.leave(number))
        progress(before_gradients - batches + number + 1, total)
    keep(sums, "head")
    del stream  # and the states of all sequences
    if len(first):
        matrices = fisher_information(
            model,
            first,
            batch_size=batch_size,
            borders=None if borders is None else borders[:gradient_sequences],
            seed=seed,
            progress=lambda done: progress(before_gradients + done, total),
        )
        write_sensitivity(folder, matrices)
    table = model.get_input_embeddings()
    shape = (table.num_embeddings, table.embedding_dim)
    measured = layers if len(first) else ()
    write_statistics(
        folder,
        square,
        tokens,
        embedding=(embedding, shape),
        head=head,
        grams=grams,
        layers=measured,
        borders=borders,
    )
    return square


def measure_layer(model: Any, stream: BlockStream, index: int) -> dict[str, Inputs]:
    """Module name -> what each linear of decoder layer `index` is multiplied with, `stream.hidden` being its input.

    Raises:
        StageError: if an activation is not finite, naming the module.
    """
    name = stream.names[index]
    sums = _Sums(with_gram=True)
    with torch.no_grad(), _listening(model.get_submodule(name), f"{name}.", sums) as forget:
        for number, hidden in enumerate(stream.hidden):
            stream.run(index, hidden, number)
            forget()
    square, grams = sums.means()
    return {name: Inputs(square[name].float(), grams[owner]) for name, owner in sums.same.items()}


@contextmanager
def _listening(block: nn.Module, prefix: str, sums: _Sums) -> Iterator[Callable[[], None]]:
    """Add what the linears of `block` take to `sums`; the function given has to be called after every batch."""
    seen: list[tuple[str, Tensor]] = []
    hooks = []

    def listen(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            for owner, x in seen:
                if x is inputs[0]:
                    sums.same[name] = owner
                    return
            seen.append((name, inputs[0]))
            sums.add(name, inputs[0])

        hooks.append(module.register_forward_pre_hook(hook))

    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            listen(prefix + name, module)
    try:
        yield seen.clear
    finally:
        for handle in hooks:
            handle.remove()


def _ends(model: Any) -> tuple[str, str]:
    """Names of the embedding and of the weight that the head multiplies with: the same name where they are tied."""
    names = {id(module): name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding = names[id(table)]
    tied = isinstance(head, TiedHead) or head._parameters.get("weight", head) is table._parameters.get("weight")
    return embedding, embedding if tied else names[id(head)]


def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name].add_(value) if name in sums else value
