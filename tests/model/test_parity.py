"""The preset `paper` against outputs, losses and gradients of the published model (Zhang et al. 2023)."""

import numpy as np
import pytest
import torch

from crlseq.config import make_config
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import Kernel, loss_terms, mmd_squared, weighted_total
from crlseq.training.schedules import schedule
from crlseq.training.trainer import architecture_of
from tests.paths import shared

NAMES = {
    "encoder.hidden": "fc1",
    "encoder.mean": "fc_mean",
    "encoder.variance": "fc_var",
    "intervention_encoder.logits": "c2",
    "decoder.hidden": "d1",
    "decoder.output": "d2",
}
CASES = ("single", "single_temp5", "double")


@pytest.fixture(scope="module")
def published():
    return np.load(shared("parity/discrepancy_vae.npz"))


def parameters(published, prefix):
    """Published tensors under our names; the one-hot layer `c1` is our table."""
    found = {"intervention_encoder.embedding": published[f"{prefix}c1.weight"].T}
    found["intervention_encoder.bias"] = published[f"{prefix}c1.bias"]
    found["scm.graph"] = published[f"{prefix}G"]
    found["scm.shift"] = published[f"{prefix}c_shift"]
    for ours, theirs in NAMES.items():
        for part in ("weight", "bias"):
            found[f"{ours}.{part}"] = published[f"{prefix}{theirs}.{part}"]
    return {name: torch.tensor(value) for name, value in found.items()}


def run(published, case, dtype):
    config = make_config("paper").model
    model = DiscrepancyVAE(**architecture_of(config, n_genes=60, n_latents=7, n_perturbations=9)).to(dtype)
    missing = model.load_state_dict(parameters(published, "param."), strict=False)
    own = {
        "temperature",
        "penetrance",
        "residual",
        "residual_error",
        "common",
        "common_error",
        "control_error",
        "scm.log_scale",
        "scm.retention_logit",
        "scm.intercept",
    }
    given = {"intervention_encoder.given", "intervention_encoder.is_given"}  # of targets that are not learned
    assert set(missing.missing_keys) == own | given
    assert not model.residual.any() and not model.scm.intercept.any() and not model.intervention_encoder.is_given.any()
    assert not missing.unexpected_keys
    model.temperature.fill_(float(published[f"{case}.temperature"]))
    x, y, eps = (torch.tensor(published[key], dtype=dtype)[None] for key in ("x", "y", "eps"))
    targets = torch.tensor(published[f"{case}.targets"])
    # A single perturbation is listed twice in the published call and counts once.
    perturbations = targets[None] if case == "double" else targets[None, :1]
    output = model(x, perturbations, eps)
    unbiased = config.mmd_estimator == "unbiased"
    terms = loss_terms(model, output, x, y, Kernel(config.mmd_bandwidth, config.mmd_kernels, unbiased), None)
    final = schedule(99, 100, config, make_config("paper").training)
    assert final.terms == pytest.approx({"mmd": 10, "reconstruction": 1, "kl": 2, "graph": 1e-3, "anchor": 1})
    assert "anchor" not in terms
    total = weighted_total(terms, final.terms)
    total.backward()
    return model, output, terms, total, (output.virtual, y)


def quantities(published, case, dtype):
    """Pairs of (ours, published) for everything that the file holds for a case."""
    model, output, terms, total, (virtual, y) = run(published, case, dtype)
    pairs = {
        "y_hat": output.virtual[0],
        "x_recon": output.reconstruction[0],
        "mu": output.mean[0],
        "var": output.variance[0],
        "u": output.latents[0],
        "mmd": terms["mmd"],
        "mse": terms["reconstruction"],
        "kl": terms["kl"],
        "l1": terms["graph"],
        "total": total,
        "mmd_sigma5": mmd_squared(virtual, y, Kernel(5.0, 10, unbiased=False))[0],
        "mmd_sigma200": mmd_squared(virtual, y, Kernel(200.0, 10, unbiased=False))[0],
    }
    both = published[f"{case}.targets"]
    for i, target in enumerate(both, start=1):
        pairs[f"target_weights_{i}"] = model.target_weights(torch.tensor(target))
        pairs[f"shift_{i}"] = model.scm.shift[target]
    pairs = {name: (ours.detach(), torch.tensor(published[f"{case}.{name}"])) for name, ours in pairs.items()}
    gradients = dict(model.named_parameters())
    for name, theirs in parameters(published, f"{case}.grad.").items():
        pairs[f"grad.{name}"] = (gradients[name].grad, theirs)
    return pairs


@pytest.mark.parametrize("case", CASES)
def test_float64_agrees_to_1e_9(published, case):
    pairs = quantities(published, case, torch.float64)
    assert len(pairs) == 12 + 4 + 16
    for name, (ours, theirs) in pairs.items():
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9), (name, (ours - theirs).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_float32_agrees_to_1e_4_relative(published, case):
    for name, (ours, theirs) in quantities(published, case, torch.float32).items():
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-12)
        assert error < 1e-4, (name, float(error))


def test_every_published_quantity_is_compared(published):
    for case in CASES:
        held = {key.removeprefix(f"{case}.") for key in published.files if key.startswith(f"{case}.")}
        compared = set(quantities(published, case, torch.float64))
        gradients = {key for key in held if key.startswith("grad.")}
        assert held - gradients - {"targets", "temperature"} == {key for key in compared if not key.startswith("grad.")}
        assert len(gradients) == len([key for key in compared if key.startswith("grad.")])


def test_ablation_without_mmd_takes_the_term_out_of_the_objective():
    terms = {
        name: torch.tensor(value) for name, value in {"mmd": float("nan"), "reconstruction": 2.0, "kl": 3.0}.items()
    }
    assert weighted_total(terms, {"mmd": 0.0, "reconstruction": 1.0, "kl": 2.0}).item() == 8.0


def test_ablation_without_causal_layer_adds_shifts_alone():
    model = DiscrepancyVAE(5, 3, 2, causal=False, intervention="shift", noise="none").double()
    assert not model.scm.graph.requires_grad
    z = torch.randn(1, 4, 3, dtype=torch.float64)
    mechanism = model.scm.mechanism(torch.tensor([[1]]), model.target_weights(torch.tensor([[1]])))
    assert torch.equal(model.scm(z, mechanism), z + model.target_weights(torch.tensor([1]))[0] * model.scm.shift[1])
