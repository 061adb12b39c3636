"""Feed tokens to the parts in the order and with the inputs of the ANEMLL apps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from a1q.coreml.runner import Backend, Runner

if TYPE_CHECKING:
    from a1q.coreml.bundle import Bundle
    from a1q.coreml.operations import Array


class AnemllRunner(Runner):
    """Embeddings, chunks of layers, head.

    Like the apps it fills the cache with the whole prompt in padded batches, throws away what they give, and calls
    `infer` with the prompt's last token once more for the first logits. Of the masks that apps send it takes the one
    that asks more of a package: -inf, and in `infer` one position too many shown, as by the Swift apps.

    Args:
        adapter: ending of the functions to call where a part has them.
    """

    def __init__(self, bundle: Bundle, backend: Backend, adapter: str | None = None):
        super().__init__(bundle, backend)
        self.batch = int(bundle.meta["prefill"])
        self.suffix = "" if adapter is None else f"_{adapter}"
        roles = {part["name"]: part["role"] for part in bundle.meta["parts"]}
        self.embeddings = next(name for name, role in roles.items() if role == "embeddings")
        self.chunks = [name for name, role in roles.items() if role == "ffn"]
        self.head = next(name for name, role in roles.items() if role == "lm_head")

    def _prefill(self, tokens: Array) -> Array:
        for start in range(0, len(tokens), self.batch):
            ids = np.zeros((1, self.batch), np.int32)
            given = tokens[start : start + self.batch]
            ids[0, : len(given)] = given
            self._hidden("prefill", ids, start, shown=0)
        return self._step(int(tokens[-1]), len(tokens) - 1)

    def _step(self, token: int, position: int) -> Array:
        hidden = self._hidden("infer", np.array([[token]], np.int32), position, shown=1)
        outputs = self._run(self.head, self._default(self.head), {"hidden_states": hidden})
        return np.concatenate([outputs[name].reshape(-1) for name in self.bundle.meta["outputs"]])

    def _hidden(self, function: str, ids: Array, start: int, shown: int) -> Array:
        """Hidden states after all layers.

        Args:
            shown: positions that the mask shows beyond each row's own.
        """
        positions = np.arange(start, start + ids.shape[1], dtype=np.int32)
        visible = np.arange(self.context)[None, :] <= positions[:, None] + shown
        inputs = {
            "position_ids": positions,
            "causal_mask": np.where(visible, 0, -np.inf).astype(np.float32)[None, None],
            "current_pos": positions[:1],
        }
        hidden = self._run(self.embeddings, self._default(self.embeddings), {"input_ids": ids})["hidden_states"]
        for chunk in self.chunks:
            hidden = self._run(chunk, function, {"hidden_states": hidden, **inputs})["output_hidden_states"]
        return hidden

    def _default(self, part: str) -> str:
        """The function that an app, which names none, gets of this part."""
        return next(iter(self.bundle.part(part)["functions"]))

    def _run(self, part: str, function: str, inputs: dict[str, Array]) -> dict[str, Array]:
        chosen = function + self.suffix
        if chosen not in self.bundle.part(part)["functions"]:
            chosen = function  # nothing in this part differs
        return self.backend.run(part, chosen, inputs, self.state)
