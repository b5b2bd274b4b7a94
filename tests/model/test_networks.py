"""The encoder that reads gene sets: nothing but their genes, whatever is trained."""

from __future__ import annotations

import pytest
import torch

from crlseq.model.discrepancy_vae import DiscrepancyVAE, extended
from crlseq.model.networks import Encoder, GeneSetLayer

MEMBERS = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)  # the last two genes are in no set


def encoder(leak: float) -> Encoder:
    torch.manual_seed(0)
    made = Encoder(5, 99, 3, n_gene_sets=2, leak=leak).double()
    assert isinstance(made.hidden, GeneSetLayer)
    made.hidden.assign(MEMBERS)
    return made


def test_weights_by_hand() -> None:
    layer = GeneSetLayer(5, 2, 0.1)
    layer.assign(MEMBERS)
    with torch.no_grad():
        layer.free.copy_(torch.arange(10.0).view(2, 5))
    torch.testing.assert_close(layer.weight, torch.tensor([[0, 1, 0.2, 0.3, 0.4], [0.5, 6, 7, 0.8, 0.9]]))


def test_weights_start_within_the_bound_of_a_layer_with_so_many_inputs() -> None:
    layer = GeneSetLayer(200, 2, 0.0)
    members = torch.zeros(2, 200, dtype=torch.bool)
    members[0, :4] = members[1, :] = True
    torch.manual_seed(0)
    layer.assign(members)
    largest = layer.weight.detach().abs().amax(1).tolist()
    assert 0.25 < largest[0] <= 0.5
    assert 0.06 < largest[1] <= 200**-0.5


def test_no_set_no_say() -> None:
    made, x = encoder(0.0), torch.randn(7, 5, dtype=torch.float64)
    other = x.clone()
    other[:, 3:] += 10
    for a, b in zip(made(x), made(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    other[:, 2] += 10
    assert not torch.equal(made(x)[0], made(other)[0])


@pytest.mark.parametrize("leak", [0.0, 0.1])
def test_training_leaves_the_mask(leak: float) -> None:
    made, x = encoder(leak), torch.randn(50, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    before = made.hidden.weight.detach().clone()
    for _ in range(5):
        mean, variance = made(x)
        optimizer.zero_grad()
        ((mean - x[:, 2:]) ** 2 + variance).sum().backward()
        optimizer.step()
    moved = made.hidden.weight.detach() != before
    assert moved[MEMBERS].all()
    assert bool(moved[~MEMBERS].any()) == (leak > 0)


def test_a_model_with_unseen_perturbations_reads_the_same_sets() -> None:
    torch.manual_seed(0)
    model = DiscrepancyVAE(5, 3, 4, n_hidden=8, n_gene_sets=2, leak=0.1).double()
    assert isinstance(model.encoder.hidden, GeneSetLayer)
    model.encoder.hidden.assign(MEMBERS)
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    new, x = extended(model, torch.ones(2, 3, dtype=torch.float64), zeros, zeros), torch.randn(7, 5).double()
    for ours, theirs in zip(new.encoder(x), model.encoder(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    moved = new(x[None], torch.tensor([[4, 5, 6]])).latents - new(x[None], torch.tensor([[-1, -1, -1]])).latents
    assert bool((moved.abs() > 0.1).all())  # perturbation 4 to 6: each latent is shifted
