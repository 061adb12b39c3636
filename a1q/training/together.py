"""Training in several processes: gradients averaged by DDP, latent weights and their moments split by FSDP2.

What trains is the same in every process, and every process takes the same optimizer step. Each reads its share of every
micro-batch, so that a recipe's batch means the same however many compute it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from a1q.engine.world import ALONE, World, peers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

State = dict[str, "Tensor"]
Groups = list[dict[str, Any]]


class Together:
    """One process alone: what the others override."""

    world: World = ALONE

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of a micro-batch; gradients meet in a step's last one."""
        return nullcontext()

    def gather(self, gradients: Sequence[Tensor]) -> None:
        """After a step's last backward pass: average what has not met yet."""

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that this process holds, as plain memory that can be written to."""
        return tensor.detach()

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients together, the same in every process."""
        import torch

        return torch.nn.utils.get_total_norm(gradients)

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of parameters or moments, all of it; every process calls this for the same ones in turn."""
        return tensor

    def share(self, whole: Tensor, like: Tensor) -> Tensor:
        """What `whole` gave, as this process holds it."""
        return whole.to(like.device)

    def moved(self, groups: Groups, state: State) -> tuple[Groups, State]:
        """An optimizer's groups and the parameters by name, where wrapping has put other parameters in their place."""
        return groups, state

    def end(self) -> None:
        """Give modules their parameters as plain ones; no forward pass comes after."""


class Replicas(Together):
    """DDP: every process holds all that trains."""

    def __init__(self, world: World, module: nn.Module, device: torch.device):
        """Wrap `module`, from batch to loss, as `self.module`."""
        from torch.nn.parallel import DistributedDataParallel

        self.world = world
        # packed indices stand still, and all have read the same file
        newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        options: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
        with peers():
            self.module = DistributedDataParallel(
                module, device_ids=None if device.type == "cpu" else [device], gradient_as_bucket_view=True, **options
            )

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.module.no_sync()


class Shards(Together):
    """FSDP2: latent weights, their gradients and moments are split; all else is replicated."""

    def __init__(
        self,
        world: World,
        decoder: nn.Module,
        layers: Sequence[nn.Module],
        state: State,
        split: Collection[str],
        device: torch.device,
    ):
        """Split those of `state` named in `split` that lie in the `layers` of `decoder`.

        `self.state` has the parameters that come in their place.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.world = world
        with peers():
            self._mesh = init_device_mesh(device.type, (world.size,))
        wanted = {id(state[name]) for name in split}
        owners = {
            id(parameter): (owner, name)
            for layer in layers
            for owner in layer.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if id(parameter) in wanted
        }
        self._places = {name: owners[id(tensor)] for name, tensor in state.items() if id(tensor) in owners}
        self._sharded = []
        for layer in layers:
            ours = [parameter for parameter in layer.parameters() if id(parameter) in owners]
            if ours:
                fully_shard(layer, mesh=self._mesh, ignored_params=set(layer.parameters()) - set(ours))
                self._sharded.append(layer)
        fully_shard(decoder, mesh=self._mesh, ignored_params=_not_split(decoder))
        self.state: State = {
            name: getattr(*self._places[name]) if name in self._places else tensor for name, tensor in state.items()
        }

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        for layer in self._sharded:
            layer.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def gather(self, gradients: Sequence[Tensor]) -> None:
        import torch
        import torch.distributed as dist

        replicated = [gradient for gradient in gradients if not _split(gradient)]
        if not replicated:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in replicated])
        with peers():
            dist.all_reduce(flat)
        flat /= self.world.size
        for gradient, part in zip(replicated, flat.split([gradient.numel() for gradient in replicated]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local().detach() if _split(tensor) else tensor.detach()  # type: ignore[attr-defined]

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        import torch

        split = [self.local(gradient) for gradient in gradients if _split(gradient)]
        whole = [gradient for gradient in gradients if not _split(gradient)]
        (total,) = self.world.sums([sum(float(part.double().square().sum()) for part in split)])
        total += sum(float(part.double().square().sum()) for part in whole)
        return torch.tensor(total, dtype=torch.float64).sqrt().float()

    def moved(self, groups: Groups, state: State) -> tuple[Groups, State]:
        new = {id(state[name]): tensor for name, tensor in self.state.items()}
        return [{**group, "params": [new[id(item)] for item in group["params"]]} for group in groups], self.state

    def whole(self, tensor: Tensor) -> Tensor:
        if not _split(tensor):
            return tensor
        with peers():
            return tensor.full_tensor()  # type: ignore[attr-defined]

    def share(self, whole: Tensor, like: Tensor) -> Tensor:
        if not _split(like):
            return whole.to(like.device)
        from torch.distributed.tensor import distribute_tensor

        # every process has read all of it: nothing is sent
        return distribute_tensor(
            whole.to(like.device),
            like.device_mesh,  # type: ignore[attr-defined]
            like.placements,  # type: ignore[attr-defined]
            src_data_rank=None,
        )

    def end(self) -> None:
        import torch

        for layer in self._sharded:
            layer.reshard()  # type: ignore[operator]  # else asking for a state dict would put the shards back
        for name, (owner, attribute) in self._places.items():
            whole = self.whole(self.state[name]).detach()
            owner.register_parameter(attribute, torch.nn.Parameter(whole, requires_grad=False))


def _not_split(module: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if not _split(parameter)}


def _split(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def share_of(rows: Sequence[int], world: World) -> list[int]:
    """This process's sequences of a micro-batch: a run of them, as many as the others have, or one less."""
    first, last = (len(rows) * part // world.size for part in (world.rank, world.rank + 1))
    return list(rows[first:last])
