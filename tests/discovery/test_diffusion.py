"""A diffusion decoder: deterministic both ways, and sounder counterfactuals than the autoencoder's decoder."""

from __future__ import annotations

import math

import pytest
import torch

from crlseq.config import ModelConfig
from crlseq.discovery.causal_training import descend, linear_start
from crlseq.discovery.methods import diffusion, icm_flow, method_of
from crlseq.discovery.methods.diffusion import Additive, fit_decoder, soundness
from crlseq.discovery.methods.icm_flow import fit_autoencoder
from crlseq.model.diffusion import DiffusionDecoder
from tests.discovery.test_discover import Screen
from tests.discovery.test_icm_flow import TARGETS, Bent, P


def test_steps_keep_the_noise_of_a_cell() -> None:
    """Where the network says that all is noise of a constant size, y_t moves along a circle, back to where it was."""
    decoder = DiffusionDecoder(torch.zeros(1, 2), torch.zeros(2))
    with torch.no_grad():
        for weight in decoder.network.parameters():
            weight.zero_()
        decoder.network[-1].bias.copy_(torch.tensor([0.5, -1.0]))
    y, u = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
    first, last = (float(decoder.signal[i]) for i in (0, -1))
    assert 1 - first == pytest.approx(1e-4, rel=1e-2) and last == pytest.approx(1e-4, rel=1e-2)
    for k, e in enumerate((0.5, -1.0)):
        clean = (float(y[0, k]) - math.sqrt(1 - first) * e) / math.sqrt(first)
        noise = math.sqrt(last) * clean + math.sqrt(1 - last) * e
        assert float(decoder.read(y, u)[0, k]) == pytest.approx(noise, abs=1e-3)
    torch.testing.assert_close(decoder.write(decoder.read(y, u), u), y, atol=1e-3, rtol=1e-3)


def test_of_normal_components_the_noise_is_standard_normal_and_a_cell_moves_with_its_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    u = torch.randn(4000, 1, generator=generator)
    y = torch.cat([u, -u], 1) + (u / 2).exp() * torch.randn(4000, 2, generator=generator)
    decoder = DiffusionDecoder(torch.tensor([[1.0, -1.0]]), torch.zeros(2))
    cells = torch.arange(len(u))
    descend(lambda i: decoder.loss(y[i], u[i], generator), [*decoder.parameters()], cells, 3000, 3e-3, 0)
    noise = decoder.read(y, u)
    assert noise.std(0).tolist() == pytest.approx([1, 1], abs=0.1)
    low = (u[:, 0] < 0) & (u[:, 0] > -2)
    meant = u[low] + 2
    rest = (decoder.write(noise[low], meant) - torch.cat([meant, -meant], 1)) / (meant / 2).exp()
    assert rest.std(0).tolist() == pytest.approx([1, 1], abs=0.25)  # a rest that is added would have 1 / e


def test_counterfactuals_are_sounder_than_those_of_the_autoencoder() -> None:
    screen = Bent(False, 0)
    y, control = screen.y.float(), screen.environment == 0
    linear = linear_start(screen.y, screen.environment, TARGETS, P, "hard")
    network, scm = fit_autoencoder(y, screen.environment, TARGETS, linear, "flow", 0, 600)
    by_diffusion, by_network = (
        soundness(network, scm, decoder, y[control], TARGETS)
        for decoder in (fit_decoder(network, y, 0, 1200), Additive(network))
    )
    assert by_network.composition < 1e-5 and by_diffusion.composition < 0.1 * by_diffusion.change
    assert by_diffusion.effectiveness < 0.7 * by_network.effectiveness
    assert by_diffusion.reversibility < by_network.reversibility
    assert by_diffusion.change == pytest.approx(by_network.change, rel=0.15)


def test_a_screen_is_told_of_both_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (icm_flow, diffusion):
        monkeypatch.setattr(method, "STEPS", 20)
    noted: list[str] = []
    task = Screen().task(ModelConfig(method="diffusion", n_latents=4), note=noted.append)
    found = method_of("diffusion").find(task).discovery
    assert found is not None and found.verdict.answer == "not identified" and found.equations == "flow"
    assert ["diffusion decoder" in noted[-2], "autoencoder" in noted[-1]] == [True, True]
