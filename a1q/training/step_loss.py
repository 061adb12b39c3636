"""From a batch's tokens to a scalar loss, in one module: what a wrapper for several processes can wrap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from a1q.distill.cache import TeacherBatch
from a1q.distill.exact import exact_loss, exact_loss_of
from a1q.distill.head import Head, HeadFinder
from a1q.distill.local import layer_outputs, local_loss
from a1q.distill.losses import Terms, answers, asked_of, following, kd_loss, loss_of, next_token_loss
from a1q.engine.stage import Runtime
from a1q.models.positions import passed
from a1q.training.device import autocast
from a1q.training.width import tiled


class DistillationLoss(nn.Module):
    """Forward of the student, of a teacher that runs along, and the loss.

    Args:
        student: a causal language model, held as a submodule.
        teacher: another one that runs without gradients beside the student, as far as the loss asks it; held aside, so
            it is none of this module's parts. None: the batch's cached answers are all there is of it.
        terms: the training loss.
        held_out: the loss of `forward(batch, held_out=True)`.
        local: weight of `a1q.distill.local.local_loss` in the training loss; takes a `teacher`.
        tiled: whether logits are too many to be held at once.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        terms: Terms,
        held_out: Terms,
        local: float,
        tiled: bool,
        runtime: Runtime,
    ):
        super().__init__()
        self.student = student
        self.terms, self.held_out, self.local, self.tiled, self.runtime = terms, held_out, local, tiled, runtime
        self.local_layer: int | None = None
        """The one decoder layer that `local` looks at; None: all of them."""
        self._teachers: tuple[Any, ...] = () if teacher is None else (teacher.eval().requires_grad_(False),)
        self._finders = [HeadFinder(model) for model in (student, *self._teachers)]

    def forward(self, batch: TeacherBatch, held_out: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean per token, and the detached terms it is made of, without their weights."""
        terms = self.held_out if held_out else self.terms
        local = 0.0 if held_out else self.local
        heads = self.heads()
        if self._teachers and terms.kl:
            return self._online(batch, terms, local, heads)
        if not local:
            return self._cached(batch, terms, heads)
        with (
            autocast(self.runtime),
            torch.no_grad(),
            layer_outputs(self._teachers[0], True, self.local_layer) as theirs,
        ):
            _run(self._teachers[0], batch, states=True)
        with layer_outputs(self.student, True, self.local_layer) as ours:
            found = self._cached(batch, terms, heads) if terms.hard else self._nothing_said(batch)
        return _with_local(*found, local, ours, theirs)

    def heads(self) -> list[Head] | None:
        """The student's and the teacher's head, where losses are taken from them tile by tile."""
        if not self.tiled:
            return None
        found = [finder() for finder in self._finders]
        known = [head for head in found if head is not None]
        return known if len(known) == len(found) else None

    def _cached(self, batch: TeacherBatch, terms: Terms, heads: list[Head] | None) -> tuple[Tensor, dict[str, Tensor]]:
        if heads is None:
            with autocast(self.runtime):
                logits = _run(self.student, batch, states=False)
            return kd_loss(logits, batch, **vars(terms))
        terms.check(batch, heads[0].vocabulary)
        with autocast(self.runtime):
            states = _run(self.student, batch, states=True)
            said = heads[0].partitions_and_picked(states, asked_of(batch, terms), terms.temperatures)
        return loss_of(*said, batch, terms)

    def _nothing_said(self, batch: TeacherBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """A forward pass whose logits nobody asks for."""
        with autocast(self.runtime):
            _run(self.student, batch, states=True)
        return torch.zeros((), device=batch.tokens.device), {}

    def _online(
        self, batch: TeacherBatch, terms: Terms, local: float, heads: list[Head] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (teacher,) = self._teachers
        with autocast(self.runtime):
            with torch.no_grad(), layer_outputs(teacher, local > 0, self.local_layer) as theirs:
                taught = _run(teacher, batch, heads is not None)
            with layer_outputs(self.student, local > 0, self.local_layer) as ours:
                said = _run(self.student, batch, heads is not None)
            if heads is not None:
                own, other = heads
                found = own.beside(said, following(batch.tokens), terms.temperatures, other, taught)
        if heads is not None:
            loss, figures = exact_loss_of(*found, terms, batch)
        else:
            loss, figures = exact_loss(said, taught, batch, **vars(terms))
        return _with_local(loss, figures, local, ours, theirs) if local else (loss, figures)


class NextTokenLoss(nn.Module):
    """Forward of a model and its mean cross-entropy with the text's next tokens.

    Args:
        model: a causal language model, held as a submodule.
    """

    def __init__(self, model: Any, runtime: Runtime | None = None):
        super().__init__()
        self.model, self.runtime = model, runtime or Runtime()
        self._finder = HeadFinder(model)

    def forward(self, tokens: Tensor, counts: Tensor | None = None, borders: Tensor | None = None) -> Tensor:
        """In nats per token, of tokens int64 [B, L]; `counts` as `a1q.distill.losses.next_token_loss` takes it,
        `borders` as `a1q.models.positions.passed` does."""
        head = self._finder() if tiled(tokens.numel(), self.model.config.vocab_size) else None
        index = following(tokens)
        with autocast(self.runtime):
            said = _answer(self.model, head is not None, passed(tokens, borders))
            if head is not None:
                partitions, picked = head.partitions_and_picked(said, index, (1.0,))
        if head is None:
            partitions, picked = answers(said, index, (1.0,))
        return next_token_loss(partitions[0], picked[..., 0], counts)


def _with_local(
    loss: Tensor, figures: dict[str, Tensor], weight: float, ours: list[Tensor], theirs: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    error = local_loss(ours, theirs)
    return loss + weight * error, {**figures, "local": error.detach()}


def _run(model: Any, batch: TeacherBatch, states: bool) -> Tensor:
    return _answer(model, states, passed(batch.tokens, batch.borders))


def _answer(model: Any, states: bool, arguments: Mapping[str, Any]) -> Tensor:
    """The head's input [B, L, H], or else the logits [B, L, V]."""
    if states:
        return model.base_model(**arguments).last_hidden_state
    return model(**arguments).logits
