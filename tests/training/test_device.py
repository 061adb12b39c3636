import pytest
import torch

from a1q.engine.stage import Runtime
from a1q.errors import MismatchError
from a1q.training.device import autocast, available_devices, grad_scaler, machine_identity, prepare_torch


def test_a_device_that_is_not_there_is_refused_with_those_that_are() -> None:
    missing = next(name for name in ("cuda", "mps") if name not in available_devices())
    with pytest.raises(MismatchError, match=f"runtime.device is {missing}, and this machine has cpu"):
        prepare_torch(Runtime(device=missing), 1)


def test_prepare_sets_threads_seed_and_determinism() -> None:
    device = prepare_torch(Runtime(threads=1), 11)
    first = torch.rand(4)
    prepare_torch(Runtime(threads=1), 11)
    assert device.type == "cpu"
    assert torch.equal(first, torch.rand(4))
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


def test_autocast_follows_amp() -> None:
    left, right = torch.ones(2, 2), torch.ones(2, 2)
    with autocast(Runtime(amp="no")):
        assert (left @ right).dtype == torch.float32
    with autocast(Runtime(amp="bf16")):
        assert (left @ right).dtype == torch.bfloat16


@pytest.mark.parametrize(("device", "amp"), [("cpu", "fp16"), ("cpu", "bf16"), ("mps", "fp16")])
def test_no_loss_scaling_outside_cuda_fp16(device: str, amp: str) -> None:
    assert not grad_scaler(Runtime(device=device, amp=amp)).is_enabled()


def test_identity_names_what_changes_the_last_bit() -> None:
    prepare_torch(Runtime(threads=1), 1)
    identity = machine_identity(Runtime(threads=1))
    assert identity["threads"] == 1
    assert identity["torch"] == torch.__version__
    assert identity["processor"]
