"""What `calibrate` measured: files, their writer, and the reader that gives a fit its `Inputs`.

    statistics.safetensors     name -> E[x²], float32 [in], of every linear
    gram-00003.safetensors     name -> E[x xᵀ], float32 [in, in], of decoder layer 3; gram-head.safetensors: of the head
    gradients.safetensors      decoder layer -> F = E[g gᵀ], float32 [hidden, hidden]; see a1q.quant.fisher
    tokens.safetensors         tokens, int32 [n, L]: the text itself; borders, uint8 [n, L], where attention stayed
                               within documents: 1 where one begins

Modules with one input have one matrix; the header of `statistics.safetensors` says where each module's lies. What a
tied head takes stands under the name of the embedding, whose weight it meets. A look-up alone has nothing to measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.engine.artifact import Artifact
from a1q.errors import StageError
from a1q.models.view import ModelView

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from a1q.quant.importance import Inputs

FILE, TOKENS, GRADIENTS = "statistics.safetensors", "tokens.safetensors", "gradients.safetensors"


class Statistics:
    """A folder of statistics; matrices are read from disk when asked for.

    Raises:
        StageError: wherever a file is missing or damaged; it names it.
    """

    square: Mapping[str, Tensor]
    """Name -> E[x²], float32 [in]."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.square, header = _load(folder / FILE)
        try:
            facts = json.loads(header["a1q"])
            self._grams: dict[str, tuple[str, str]] = {
                name: (file, key) for name, (file, key) in facts["grams"].items()
            }
            self._layers = frozenset(facts.get("gradients", ()))
            self._embedding = str(facts["embedding"]["name"])
            self._head = str(facts["head"])
            self._vocabulary, self._hidden = map(int, facts["embedding"]["shape"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StageError(f"{folder / FILE} is damaged: its header says nothing of the modules") from None

    @property
    def tokens(self) -> ndarray:
        """The text that was measured, int32 [n, L]."""
        return self._text[0]

    @property
    def borders(self) -> ndarray | None:
        """bool [n, L], where documents begin that attention stayed within; None where it saw all before."""
        return self._text[1]

    @cached_property
    def _text(self) -> tuple[ndarray, ndarray | None]:
        found, _ = _load(self.folder / TOKENS)
        if "tokens" not in found or found["tokens"].dim() != 2:
            raise StageError(f"{self.folder / TOKENS} is damaged: it holds no table of tokens")
        borders = found.get("borders")
        if borders is not None and borders.shape != found["tokens"].shape:
            raise StageError(f"{self.folder / TOKENS} is damaged: its borders are those of another text")
        return found["tokens"].numpy(), None if borders is None else borders.bool().numpy()

    @cached_property
    def counts(self) -> Tensor:
        """How often each token occurs in the text, int64 [vocabulary]."""
        import torch

        ids = torch.from_numpy(self.tokens).flatten().long()
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocabulary:
            raise StageError(f"{self.folder / TOKENS} is damaged: it holds ids beyond 0 to {self._vocabulary - 1}")
        return torch.bincount(ids, minlength=self._vocabulary)

    def inputs(self, name: str, gram: bool = True) -> Inputs | None:
        """What the weight of module `name` is multiplied with; None for a module that was not measured.

        Without `gram` E[x xᵀ] is left out, and fits take a fraction of the time.

        Of an embedding or a head, rows count as often as their tokens occur, and once more, for those that did not. A
        row is looked up that often, and errors of its logit enter the KL in second order by the token's probability.
        """
        import torch

        from a1q.quant.importance import Inputs

        square = self.square.get(name)
        if name == self._embedding and square is None:
            square = torch.ones(self._hidden)
        if square is None:
            return None
        return Inputs(
            square,
            self._gram(name) if gram else None,
            self.counts + 1.0 if name in (self._embedding, self._head) else None,
        )

    def sensitivity(self, layer: str) -> Tensor | None:
        """F [hidden, hidden] of the output of decoder layer `layer` (`model.layers.3`); None where it wasn't measured.

        A small change δ [hidden] of those hidden states costs a KL of ½ δᵀ F δ nats per token, on average over tokens.
        """
        return self._matrix(GRADIENTS, layer) if layer in self._layers else None

    def _gram(self, name: str) -> Tensor | None:
        return self._matrix(*self._grams[name]) if name in self._grams else None

    def _matrix(self, file: str, key: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / file, framework="pt") as handle:
                return handle.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise StageError(f"{self.folder / file} can't be read: {error}") from None


def read_statistics(artifact: Artifact | None, modules: Iterable[str]) -> Statistics | None:
    """The statistics of `modules`; None without an artifact.

    Raises:
        StageError: if the file is damaged or has no entry for a module; it names them.
    """
    if artifact is None:
        return None
    found = Statistics(artifact.path)
    missing = [name for name in modules if name not in found.square]
    if missing:
        raise StageError(f"the statistics have no entry for {', '.join(missing[:8])}")
    return found


def measured_modules(view: ModelView, names: Iterable[str]) -> list[str]:
    """Those of `names` that `calibrate` measures: linears, and the embedding that is also the head."""
    vocabulary = view.config.get("vocab_size") if view.tied else None
    modules = [view.modules[name] for name in names]
    return [item.name for item in modules if item.kind == "linear" or item.shape[0] == vocabulary]


def write_gram(folder: Path, part: str, grams: Mapping[str, Tensor]) -> str:
    """Write E[x xᵀ] [in, in] of one decoder layer, or of the head, by name; return the name of the file."""
    file = f"gram-{part}.safetensors"
    _save(grams, folder / file)
    return file


def write_sensitivity(folder: Path, matrices: Mapping[str, Tensor]) -> None:
    """Write F [hidden, hidden] of the outputs of decoder layers, by the layers' names."""
    _save(matrices, folder / GRADIENTS)


def write_statistics(
    folder: Path,
    square: Mapping[str, Tensor],
    tokens: ndarray,
    *,
    embedding: tuple[str, tuple[int, int]],
    head: str,
    grams: Mapping[str, tuple[str, str]] | None = None,
    layers: Iterable[str] = (),
    borders: ndarray | None = None,
) -> None:
    """Write all but the files of `write_gram` and `write_sensitivity`.

    Args:
        square: name -> E[x²] [in].
        tokens: integers [n, L].
        embedding: name and shape [vocabulary, hidden] of the embedding.
        head: name of the weight that the head multiplies with, the embedding where tied.
        grams: name -> (file, name in that file) of its E[x xᵀ].
        layers: the decoder layers of `write_sensitivity`.
        borders: bool [n, L], as `Statistics.borders`.
    """
    import torch

    text = {"tokens": torch.from_numpy(tokens.astype("int32"))}
    if borders is not None:
        text["borders"] = torch.from_numpy(borders.astype("uint8"))
    _save(text, folder / TOKENS)
    facts = {
        "embedding": {"name": embedding[0], "shape": embedding[1]},
        "head": head,
        "grams": dict(grams or {}),
        "gradients": list(layers),
    }
    _save(square, folder / FILE, {"a1q": json.dumps(facts, sort_keys=True)})


def _save(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None) -> None:
    """Write tensors, those of floating point as float32."""
    import torch
    from safetensors.torch import save_file

    stored = {
        name: tensor.to("cpu", torch.float32 if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, path, metadata=dict(header or {}))


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a small file and its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StageError(f"{path} can't be read: {error}") from None
