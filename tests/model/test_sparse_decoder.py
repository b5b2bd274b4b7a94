"""The sparse decoder: a mask of 0 cuts a gene off from a program, and masks are standard deviations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.networks import Decoder
from crlseq.model.sparse_decoder import SparseDecoder
from crlseq.model.spike_slab import SpikeSlab

P, G = 3, 5


@pytest.fixture
def decoder() -> SparseDecoder:
    torch.manual_seed(0)
    made = SparseDecoder(P, 12, G).double()
    with torch.no_grad():
        made.output.mask.normal_()
    return made


def latents(n: int = 400) -> Tensor:
    return torch.randn(n, P, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_a_mask_of_zero_cuts_a_gene_off(decoder: SparseDecoder) -> None:
    with torch.no_grad():
        decoder.output.mask[1, 2] = 0
    jacobian = torch.func.vmap(torch.func.jacrev(decoder))(latents(20))  # (20, G, P)
    assert (jacobian[:, 1, 2] == 0).all()
    assert (jacobian[:, 1, :2] != 0).any() and (jacobian[:, 0, 2] != 0).any()


@torch.no_grad()
def test_it_is_the_dense_decoder_with_most_weights_zero(decoder: SparseDecoder) -> None:
    dense = Decoder(P, 12, G).double()
    dense.hidden.weight.copy_(torch.eye(P).repeat(4, 1) * decoder.hidden.weight[:, None])
    dense.hidden.bias.copy_(decoder.hidden.bias)
    dense.output.weight.copy_(decoder.output.weight)
    dense.output.bias.copy_(decoder.output.bias)
    u = latents(6).view(2, 3, P)
    torch.testing.assert_close(decoder(u), dense(u))


@torch.no_grad()
def test_standardised_masks_are_the_standard_deviations_that_programs_give(decoder: SparseDecoder) -> None:
    u = latents() * torch.tensor([1.0, 3.0, 0.2]) + 1
    before = decoder(u)
    decoder.standardise(u)
    torch.testing.assert_close(decoder(u), before)
    for k in range(P):
        alone = u.mean(0).repeat(len(u), 1)
        alone[:, k] = u[:, k]
        torch.testing.assert_close(decoder(alone).std(0, correction=0), decoder.output.mask[:, k].abs())


@torch.no_grad()
def test_masks_of_genes_that_a_program_does_not_move_become_zero(decoder: SparseDecoder) -> None:
    u = latents(3000)
    decoder.standardise(u)
    true = torch.tensor([[0.5, 0, 0], [0, 0.8, 0], [0, 0, -0.4], [0.6, 0, 0.6], [0, 0, 0]], dtype=torch.float64)
    h = decoder.features(u)
    decoder.output.mask.copy_(true)
    x = decoder(u) + 2 + torch.randn(len(u), G, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    decoder.output.mask.fill_(0.3)
    cross = x.T @ (h - h.mean(0))
    decoder.fit_masks(SpikeSlab.of(len(u)), torch.ones(G, dtype=torch.float64), h, x.mean(0), cross)
    assert ((decoder.output.mask != 0) == (true != 0)).all()
    torch.testing.assert_close(decoder.output.mask.detach(), true, atol=0.08, rtol=0)
    torch.testing.assert_close(decoder(u).mean(0), x.mean(0))  # the bias goes along


def test_hidden_units_are_shared_out() -> None:
    assert SparseDecoder(10, 128, 4).output.shape.shape == (4, 120)
    assert SparseDecoder(105, 128, 4).output.shape.shape == (4, 210)  # two units a program carry a line
    model = DiscrepancyVAE(4, 3, 2, 16, decoder="sparse")
    assert isinstance(model.decoder, SparseDecoder)
    assert model(torch.zeros(1, 2, 4), torch.tensor([[0]])).virtual.shape == (1, 2, 4)
