"""That the fake device refuses what CUDA refuses, computes, and counts what it is asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.cuda.device import CUDA, CudaTensor, Mode, fake_cuda
from tests.cuda.rules import DeviceError

REFUSED: dict[str, Callable[[Tensor], object]] = {
    "a product of devices": lambda x: x @ torch.zeros(3, 3),
    "a sum of devices": lambda x: x + torch.zeros(3),
    "devices side by side": lambda x: torch.cat([x, torch.zeros(1, 3)]),
    "an index of the device for the CPU": lambda x: torch.zeros(3, 3)[x.long()],
    "index_select by the CPU": lambda x: x.index_select(0, torch.tensor([0])),
    "a generator of the CPU": lambda x: torch.randn(3, generator=torch.Generator(), device=CUDA),
    "a generator of the device": lambda x: torch.randn(3, generator=torch.Generator(CUDA)),
    "numpy": lambda x: x.numpy(),
    "atomics": lambda x: x.index_add(0, torch.tensor([0, 0, 1], device=CUDA), x),
    "atomics in a gradient": lambda x: (
        x.clone().requires_grad_().index_select(0, torch.tensor([0, 0], device=CUDA)).sum().backward()
    ),
    "a sum along": lambda x: x.cumsum(0),
    "bags that do not end": lambda x: F.embedding_bag(
        torch.tensor([0, 1], device=CUDA), x, torch.tensor([0, 1], device=CUDA), mode="sum", include_last_offset=True
    ),
    "layouts of an optimiser": lambda x: torch._fused_adam_(
        [x], [x.T], [x], [x], [], [x[0, 0]],
        lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(name: str) -> None:
    with fake_cuda(), Mode():
        x = torch.arange(9.0, device=CUDA).view(3, 3)
        with pytest.raises((RuntimeError, TypeError)) as refused:
            REFUSED[name](x)
    assert name == "numpy" or isinstance(refused.value, DeviceError)


def test_it_computes_and_counts() -> None:
    with fake_cuda() as record, Mode():
        x = torch.arange(4.0).to(CUDA).requires_grad_()
        (2 * x * torch.tensor(3.0)).sum().backward()  # a number of the CPU may take part
        assert isinstance(x.grad, CudaTensor) and x.grad.cpu().tolist() == [6.0] * 4
        assert (record.copies["up"], record.copies["down"]) == (1, 1) and record.waits == {"copy": 2}
        assert x.detach()[torch.tensor([1, 2])].cpu().tolist() == [1.0, 2.0]  # as may an index
        assert record.waits == {"copy": 3, "index sent": 1}
        assert float(x.detach()[x.detach() > 1].sum()) == 5.0
        assert record.waits == {"copy": 3, "index sent": 1, "boolean index": 1, "_local_scalar_dense": 1}
        torch.arange(3).pin_memory().to(CUDA, non_blocking=True)
        assert record.copies["up"] == 3 and record.waits["copy"] == 3
        launches = record.launches.total()
        x.detach().view(2, 2).T.unsqueeze(0)
        assert record.launches.total() == launches  # of views none


def test_streams_wait_for_one_another() -> None:
    with fake_cuda(), Mode():
        first, second = torch.cuda.current_stream(), torch.cuda.Stream()
        with torch.cuda.stream(second):
            x, there = torch.arange(3.0, device=CUDA), torch.cuda.Event()
            there.record()
            x.add_(1)
        with pytest.raises(DeviceError, match="not have written yet"):
            x + 1
        first.wait_event(there)  # which came before the last sum
        with pytest.raises(DeviceError, match="not have written yet"):
            x + 1
        with torch.cuda.stream(second):
            there.record()
        first.wait_event(there)
        with pytest.raises(DeviceError, match="may be given back"):
            x + 1
        x.record_stream(first)
        assert (x + 1).cpu().tolist() == [2.0, 3.0, 4.0]
        with torch.cuda.stream(second):
            x = torch.zeros(3, device=CUDA)
        torch.cuda.synchronize()
        assert (x + 1).cpu().tolist() == [1.0] * 3
