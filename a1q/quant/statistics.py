"""E[x²] per input channel: measured, and kept in `statistics.safetensors` (name -> float32 [in]).

Of every linear. The inputs of a tied head stand under the name of the embedding, whose weight they multiply; a look-up
alone has no inputs to measure, so an embedding without a tied head has no entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.engine.artifact import Artifact
from a1q.errors import StageError
from a1q.models.view import ModelView

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor, nn

    from a1q.quant.importance import Inputs

FILE = "statistics.safetensors"


def collect_statistics(
    model: nn.Module, tokens: ndarray, *, batch_size: int, progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """E[x²] over all positions of `tokens` (integers [n, L]), float64 [in], by the name of the weight it multiplies.

    Sums are kept in float64, so they do not depend on the batch size beyond the model's own rounding.

    Raises:
        StageError: if an activation is not finite; it names the module.
    """
    import torch
    from torch import nn

    from a1q.quant.tied import TiedHead

    device = next(model.parameters()).device
    exact = torch.device("cpu") if device.type == "mps" else device  # Metal has no float64
    embeddings: dict[int, str] = {}
    sums: dict[str, Tensor] = {}
    hooks = []

    def listen(name: str, module: nn.Module, columns: int) -> None:
        sums[name] = torch.zeros(columns, dtype=torch.float64, device=exact)

        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().reshape(-1, columns).to(exact, torch.float64)
            sums[name] += x.square().sum(0)

        hooks.append(module.register_forward_pre_hook(add))

    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings[id(module._parameters.get("weight", module))] = name
        elif isinstance(module, nn.Linear):
            listen(embeddings.get(id(module._parameters.get("weight")), name), module, module.in_features)
        elif isinstance(module, TiedHead):
            listen(embeddings[id(module.source)], module, module.source.shape[1])
    try:
        with torch.inference_mode():
            for first in range(0, len(tokens), batch_size):
                ids = torch.from_numpy(tokens[first : first + batch_size].astype("int64")).to(device)
                model(input_ids=ids, use_cache=False)
                progress(min(first + batch_size, len(tokens)), len(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise StageError(f"the inputs of {name} are not finite")
    return {name: total / tokens.size for name, total in sums.items()}


def write_statistics(folder: Path, values: Mapping[str, Tensor]) -> None:
    """Write module name -> E[x²] [in]."""
    import torch
    from safetensors.torch import save_file

    save_file({name: value.to("cpu", torch.float32).contiguous() for name, value in values.items()}, folder / FILE)


def measured_modules(view: ModelView, names: Iterable[str]) -> list[str]:
    """Those of `names` that `collect_statistics` measures: linears, and the embedding that is also the head."""
    vocabulary = view.config.get("vocab_size") if view.tied else None
    modules = [view.modules[name] for name in names]
    return [item.name for item in modules if item.kind == "linear" or item.shape[0] == vocabulary]


def read_statistics(artifact: Artifact | None, modules: Iterable[str]) -> dict[str, Inputs]:
    """The inputs of each of `modules`; nothing without an artifact.

    Raises:
        StageError: if the file is damaged or has no entry for a module; it names them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from a1q.quant.importance import Inputs

    if artifact is None:
        return {}
    try:
        found = load_file(artifact.path / FILE)
    except (OSError, SafetensorError) as error:
        raise StageError(f"{artifact.path / FILE} can't be read: {error}") from None
    missing = [name for name in modules if name not in found]
    if missing:
        raise StageError(f"the statistics have no entry for {', '.join(missing[:8])}")
    return {name: Inputs(square) for name, square in found.items()}
