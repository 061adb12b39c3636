"""How much a model's predictions depend on the hidden states between its layers: their Fisher information.

F = E[g gᵀ], with g the gradient of a log-likelihood by the residual stream behind a decoder layer, one token's at a
time. The labels are drawn from the model's own predictions. So F is the Fisher information of the model's distribution
and not the empirical one of the text (Martens and Grosse, 2015, arXiv:1503.05671, draw them for K-FAC), and ½ δᵀ F δ is
to second order the KL in nats per token that changes δ of these states cost, on average over tokens, if the changes of
different tokens are unrelated. BRECQ (Li et al., 2021, arXiv:2102.05426) uses its diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from a1q.errors import StageError
from a1q.models.blocks import BlockStream
from a1q.quant.planning import LOGITS

if TYPE_CHECKING:
    from numpy import ndarray


def fisher_information(
    model: Any,
    tokens: ndarray,
    *,
    batch_size: int,
    borders: ndarray | None = None,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """Measure F at the output of every decoder layer.

    Memory holds the sums of all layers (float64, on the CPU), the hidden states at all boundaries for one batch, and
    what one layer or `LOGITS` keep for their gradient: a layer runs again when the gradient comes through it.

    Args:
        model: in evaluation mode; quantized modules may be inside.
        tokens: integers [n, L]. All n · L positions predict a token.
        borders: bool [n, L], where documents begin that attention stays within; None: it sees all before.
        seed: of the labels, which depend neither on `batch_size` nor, but for rounding, on the device.
        progress: called with the number of layers done, over all batches.

    Returns:
        Name of a decoder layer -> F [hidden, hidden], float32.

    Raises:
        StageError: if a gradient is not finite, naming the layer; if the model has no decoder layers.
    """
    draws = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
    sums: dict[str, Tensor] = {}
    done = 0
    with _frozen(model):
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            stream = BlockStream(model, tokens[rows], batch_size, None if borders is None else borders[rows])
            outputs = []
            for index in range(len(stream.names)):
                stream.advance(index)
                outputs.append(stream.hidden[0])
            gradient = _head_gradient(model, stream, outputs[-1], draws[rows])
            for index, name in reversed(list(enumerate(stream.names))):
                _accumulate(sums, name, gradient)
                if index:
                    gradient = _block_gradient(stream, index, outputs[index - 1], gradient)
                done += 1
                progress(done)
    return {name: sums.pop(name).div_(tokens.size).float() for name in sorted(sums, key=stream.names.index)}


def sample_labels(probabilities: Tensor, draws: Tensor) -> Tensor:
    """One label per row of `probabilities` [..., V], by numbers drawn evenly from [0, 1) [...]."""
    cumulative = probabilities.cumsum(-1)
    places = draws.to(cumulative)[..., None] * cumulative[..., -1:]
    labels = torch.searchsorted(cumulative, places, right=True)  # never a label without probability
    return labels.clamp_max(probabilities.shape[-1] - 1)[..., 0]  # beyond the end where a probability is NaN


def _head_gradient(model: Any, stream: BlockStream, hidden: Tensor, draws: Tensor) -> Tensor:
    """The gradient of -log p(label) by `hidden` [b, L, hidden], the output of the last layer."""
    step = max(1, LOGITS // (len(hidden) * model.get_input_embeddings().num_embeddings))
    gradient = torch.empty_like(hidden, device=stream.device)
    for start in range(0, hidden.shape[1], step):
        some = slice(start, start + step)
        states = hidden[:, some].to(stream.device).requires_grad_()
        logits = stream.logits(states, 0, some)
        by_logits = logits.detach().softmax(-1)
        labels = sample_labels(by_logits, draws[:, some])
        by_logits.scatter_add_(-1, labels[..., None], -torch.ones_like(by_logits[..., :1]))
        (gradient[:, some],) = torch.autograd.grad(logits, states, by_logits)
    return gradient


def _block_gradient(stream: BlockStream, index: int, hidden: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by the input `hidden` of layer `index`, given that by its output."""
    states = hidden.to(stream.device).requires_grad_()
    with torch.enable_grad():
        output = stream.run(index, states, 0)
    return torch.autograd.grad(output, states, gradient)[0]


def _accumulate(sums: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    g = gradient.reshape(-1, gradient.shape[-1])
    product = (g.T @ g).cpu().double()
    if not bool(torch.isfinite(product).all()):
        raise StageError(f"the gradients at the output of {name} are not finite")
    sums[name] = sums[name].add_(product) if name in sums else product


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters: layers then keep less for the gradient of their input."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
