"""Training in cycles: until cells that are not learned gain no more, and no step further."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crlseq.discovery import causal_training
from crlseq.discovery.causal_training import descend_in_cycles, loss_of

N = 4000


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_training, "CYCLES", (100, 200, 400))


def squared(weight: nn.Parameter, values: Tensor) -> Tensor:
    return (values - weight) ** 2


def test_it_ends_with_the_cycle_that_gains_nothing_and_undoes_it() -> None:
    """The mean of the learned cells, 3, is as good as reached in one cycle; the second is taken back."""
    values = 3 + torch.randn(N, generator=torch.Generator().manual_seed(0))
    weight, judging, steps = nn.Parameter(torch.zeros(())), torch.arange(N) % 2 == 0, []

    def loss(cells: Tensor) -> Tensor:
        steps.append(weight.item())
        return squared(weight, values[cells])

    assert descend_in_cycles(loss, [weight], judging, 0.3, 0) == 1
    assert weight.item() == pytest.approx(3, abs=0.15)  # what is left, 0.02, is within its error
    assert len(steps) == 1 + 101 + 201  # steps, and what judging cells say after each cycle
    assert weight.item() == steps[101]  # and not of the last


def test_what_makes_judging_cells_worse_is_undone() -> None:
    values, weight, judging = torch.ones(N), nn.Parameter(torch.zeros(())), torch.arange(N) % 2 == 0
    values[judging] = -1 + 0.01 * torch.randn(int(judging.sum()), generator=torch.Generator().manual_seed(0))
    assert descend_in_cycles(lambda cells: squared(weight, values[cells]), [weight], judging, 0.1, 0) == 0
    assert weight.item() == 0


def test_a_gain_within_its_error_is_none() -> None:
    """By hand: the cells' gains of (0 - x)^2 - (1 - x)^2 = 2 x - 1 have a deviation of 40 and a mean of 0.4 here: error 0.89."""
    values, judging = torch.zeros(N), torch.arange(N) % 2 == 0
    values[~judging] = 1.0
    own = torch.randn(int(judging.sum()), generator=torch.Generator().manual_seed(0))
    values[judging] = 0.7 + 20 * (own - own.mean()) / own.std()
    weight = nn.Parameter(torch.zeros(()))
    assert descend_in_cycles(lambda cells: squared(weight, values[cells]), [weight], judging, 0.1, 0) == 0
    values[judging] = 0.7 + 2 * (own - own.mean()) / own.std()  # error 0.09
    assert descend_in_cycles(lambda cells: squared(weight, values[cells]), [weight], judging, 0.1, 0) >= 1


def test_a_loss_that_is_no_number_is_undone() -> None:
    """The learned cells lie where the root has no gradient: weights become NaN."""
    weight, judging = nn.Parameter(torch.ones(())), torch.arange(N) % 2 == 0
    assert (
        descend_in_cycles(
            lambda cells: (weight - 1).sqrt() * judging[cells].logical_not() + weight**2, [weight], judging, 0.1, 0
        )
        == 0
    )
    assert weight.item() == 1


def test_the_loss_of_many_cells_is_that_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values, cells = torch.arange(7.0), torch.tensor([True, False, True, True, True, True, True])
    whole = loss_of(lambda i: values[i], cells)
    monkeypatch.setattr(causal_training, "CHUNK", 2)
    assert torch.equal(loss_of(lambda i: values[i], cells), whole)
    assert whole.tolist() == [0, 2, 3, 4, 5, 6] and whole.dtype == torch.float64
