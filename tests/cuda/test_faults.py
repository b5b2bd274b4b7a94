"""Mistakes with devices, planted one at a time, are found: by a refusal of the fake device, another result, or a wait."""

from __future__ import annotations
import __future__

import inspect
import sys
import textwrap
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from crlseq.config import make_config
from crlseq.data.dataset import PerturbSeqData
from crlseq.model import discrepancy_vae, losses, scm, sparse_decoder, sparse_losses, spike_slab
from crlseq.training import cell_source, learner, objective, streams, trainer
from tests.cuda.conftest import FIT, with_escaped_cells
from tests.cuda.device import CUDA, GIB, CudaTensor, Mode, fake_cuda
from tests.cuda.test_budget import (
    test_a_step_of_cells_that_may_have_escaped_waits_for_nothing as escaped_cells_wait_for_nothing,
)
from tests.cuda.test_budget import test_a_step_sends_one_copy_and_waits_for_nothing as steps_wait_for_nothing


@dataclass(frozen=True)
class Fault:
    """In the source of ``owner.name``, `old` becomes `new`; a fit of a screen with these options must show it."""

    owner: Any
    name: str
    old: str
    new: str
    screen: str = "sparse"
    options: dict[str, Any] = field(default_factory=dict)


SENT, CSR = {"memory": 1}, {"memory": 300_000}  # the screen takes 350 kB densely, and 240 kB by its non-zeros
SOURCE, DECODER, ANCHOR = cell_source.CellSource, {"decoder": "sparse"}, {"anchored": True}
FAULTS = [
    Fault(cell_source, "sent", "_sent(flat, device)", "torch.from_numpy(flat)"),
    Fault(SOURCE, "_settle", "dtype=self.dtype, device=self.device", "dtype=self.dtype"),
    Fault(SOURCE, "_settle", "dtype=torch.int32, device=self.device", "dtype=torch.int32", options=CSR),
    Fault(SOURCE, "_settle", "first += rows.nnz", "first = 0", options=CSR),
    Fault(SOURCE, "_look_for_room", "torch.cuda.synchronize(self.device)", "pass"),
    Fault(streams, "take", "stream.wait_event(there)", "pass"),
    Fault(streams, "take", "tensor.record_stream(stream)", "pass"),
    Fault(streams.SideStream, "made", "there.record()", "there.of = torch.cuda.current_stream(), 0"),
    Fault(SOURCE, "_of", "_sent(x, self.device)", "torch.from_numpy(x)", "dense", SENT),
    Fault(SOURCE, "_of", "_sent(x.data, self.device)", "torch.from_numpy(x.data)", options=SENT),
    Fault(SOURCE, "_laid_out", "torch.arange(len(n), device=self.device)", "torch.arange(len(n))", options=SENT),
    Fault(SOURCE, "_laid_out", "dtype=self.dtype, device=self.device", "dtype=self.dtype", options=SENT),
    Fault(SOURCE, "_dense", "torch.arange(size, device=self.device)", "torch.arange(size)", options=CSR),
    Fault(SOURCE, "_dense", "n.cumsum(0) - n", "n.cumsum(0)", options=CSR),
    Fault(objective.Objective, "__init__", "perturbation_table()).to(self.device)", "perturbation_table())"),
    Fault(objective.Objective, "__init__", "(anchor.z).to(self.device, self.dtype)", "(anchor.z).to(self.dtype)", options=ANCHOR),
    Fault(objective.Objective, "__init__", "(anchor.hit).to(self.device, self.dtype)", "(anchor.hit)", options=ANCHOR),
    Fault(
        objective.Objective, "__init__", "(anchor.variance).to(self.device, self.dtype)", "(anchor.variance)", options=ANCHOR
    ),
    Fault(objective.Objective, "prepare", 'there["mask"].bool()', "torch.from_numpy(batch.mask)"),
    Fault(objective.Objective, "_draws", ", device=self.device", ""),
    Fault(learner.Learner, "begin", "torch.Generator(device).manual_seed(noise)", "torch.Generator().manual_seed(noise)"),
    Fault(
        learner.Learner, "begin", "self.validation_noise = torch.Generator(device)", "self.validation_noise = torch.Generator()"
    ),
    Fault(learner.Learner, "_summed", ".cpu().tolist()", ".numpy().tolist()"),
    Fault(learner.Sparsity, "__init__", "z.to(model.scm.graph)", "z.to(model.scm.graph.dtype)", options=DECODER),
    Fault(learner.Sparsity, "begin", ".manual_seed(1)).to(mean)", ".manual_seed(1)).to(mean.dtype)", options=DECODER),
    Fault(learner.Sparsity, "begin", "torch.ones(len(self.cells), device=mean.device)", "torch.ones(len(self.cells))", options=DECODER),
    Fault(sparse_decoder.SparseDecoder, "standardise", "torch.ones_like(deviation)", "torch.ones(deviation.shape, dtype=deviation.dtype)", options=DECODER),
    Fault(spike_slab, "fit_masks", "threshold[:, k], size", "threshold[:, k].cpu(), size", options=DECODER),
    Fault(scm.LatentSCM, "forward", ", dtype=z.dtype, device=z.device", ", dtype=z.dtype"),
    Fault(losses.Kernel, "mean", ", device=weight.device", ""),
    Fault(sparse_losses.Pairs, "spread", "_Spread.apply(values, self)", "values.index_select(0, self.row.flatten()).view(*self.row.shape, -1)"),
    Fault(sparse_losses.Pairs, "gather", "return F.", "return values.new_zeros(len(self.start) - 1, values.shape[-1]).index_add_(0, self.row.flatten(), values.flatten(0, 2))\n    return F."),
    Fault(sparse_losses, "step_cells", "pairs.start.diff()", "torch.bincount(pairs.row.flatten().cpu(), minlength=n + n_pairs)"),
    Fault(trainer, "_learners", "model.to(device)", "pass"),
    Fault(trainer, "_fit_on", "learner.model.cpu()", "pass"),
]  # fmt: skip
# These wait where nothing has to be waited for.
WAITS = [
    Fault(scm, "product_over_parts", "functools.reduce(operator.mul, factors.unbind(1))", "factors.prod(1)"),
    Fault(objective.Objective, "prepare", '["mask"].bool()', '["mask"].bool().cpu().to(self.device)'),
    Fault(learner.Learner, "_descended", "value.double() / n_steps", "value.double().item() / n_steps"),
    Fault(cell_source, "_sent", "made.pin_memory().to(device, non_blocking=True)", "made.to(device)"),
    Fault(losses.Kernel, "mean", "kernel * weight", "torch.where(weight > 0, kernel, 0.0) * weight[weight > 0].mean()"),
]  # fmt: skip


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Compile the changed source in the module that it is of, and put it in its place, also where it was imported."""
    found = inspect.getattr_static(fault.owner, fault.name)
    inner = inspect.unwrap(getattr(found, "__func__", found))
    source = textwrap.dedent(inspect.getsource(inner))
    assert source.count(fault.old) >= 1, (fault.name, fault.old)
    space: dict[str, Any] = {}
    flags = inner.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(source.replace(fault.old, fault.new, 1), inner.__code__.co_filename, "exec", flags, True)
    exec(code, inner.__globals__, space)
    changed = space[fault.name]
    monkeypatch.setattr(fault.owner, fault.name, changed)
    for module in [each for name, each in sys.modules.items() if name.startswith("crlseq.")]:
        if getattr(module, fault.name, None) is found:
            monkeypatch.setattr(module, fault.name, changed)


@pytest.fixture(scope="session")
def losses_of_the_cpu() -> dict[str, dict[str, float]]:
    """Those of the first epoch, by screen and options."""
    return {}


def train(read: dict[str, PerturbSeqData], fault: Fault, device: str) -> trainer.Fit:
    options = {**FIT, "epochs": 1, **fault.options}
    return trainer.fit_model(read[fault.screen], make_config(**options, device=device), 3)


def check(read: dict[str, PerturbSeqData], fault: Fault, known: dict[str, dict[str, float]]) -> None:
    """A fit of one epoch on the device, or a step with an anchor; an error if there is a mistake in it."""
    options = dict(fault.options)
    memory, is_anchored = options.pop("memory", 100 * GIB), options.pop("anchored", False)
    fault = replace(fault, options=options)
    with fake_cuda(memory) as record:
        if is_anchored:
            with Mode():
                objective, batch = with_escaped_cells(read[fault.screen], CUDA)
                objective(objective.prepare(batch), torch.Generator(CUDA))
            return
        found = train(read, fault, "cuda")
    assert record.launches.total() > 300
    assert not any(isinstance(value, CudaTensor) for value in found.model.state_dict().values())
    assert found.history[0] == pytest.approx(known[f"{fault.screen}, {options}"], rel=1e-9)


def names(faults: list[Fault]) -> list[str]:
    return [f"{fault.name}: {fault.old[:30]} {fault.options or ''}" for fault in faults]


@pytest.mark.parametrize("fault", FAULTS, ids=names(FAULTS))
def test_a_fault_is_caught(
    fault: Fault, read: dict[str, PerturbSeqData], losses_of_the_cpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {name: value for name, value in fault.options.items() if name not in ("memory", "anchored")}
    key = f"{fault.screen}, {options}"
    if key not in losses_of_the_cpu:
        losses_of_the_cpu[key] = train(read, replace(fault, options=options), "cpu").history[0]
        check(read, fault, losses_of_the_cpu)  # without the fault nothing is wrong
    plant(monkeypatch, fault)
    with pytest.raises((RuntimeError, TypeError, IndexError, AssertionError)):
        check(read, fault, losses_of_the_cpu)


@pytest.mark.parametrize("fault", WAITS, ids=names(WAITS))
def test_a_wait_is_caught(fault: Fault, screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, fault)
    with pytest.raises((AssertionError, TypeError)):
        steps_wait_for_nothing("sparse", screens)


def test_a_wait_for_escaped_cells_is_caught(read: dict[str, PerturbSeqData], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, Fault(discrepancy_vae, "_kinds_of", "if hit.is_cuda and", "if False and"))
    with pytest.raises(AssertionError):
        escaped_cells_wait_for_nothing(read)
