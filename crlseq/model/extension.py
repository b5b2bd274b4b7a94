"""A fitted model with further interventions that are given and not fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.scm import MAX_LOG_SCALE, Mechanism

LARGE = 40.0  # sigmoid(40) is 1 in float64, sigmoid(-40) is 4e-18
EDGE = 1e-9


@torch.no_grad()
def extended(model: DiscrepancyVAE, mechanism: Mechanism, residual: Tensor, residual_error: Tensor) -> DiscrepancyVAE:
    """`model` with U more perturbations, each written as p interventions on one latent.

    What the fitted perturbations do stays as it is. Perturbation u is the combination of the rows K + u p to K + u p + p,
    of which row j changes latent j alone, since one perturbation has one shift and a new one may raise one latent and
    lower another.

    Parameters
    ----------
    mechanism
        (U, p) each: what the perturbations do to the latents' equations.
    residual, residual_error
        (U, G): what they do past the latents, and its standard error.
    """
    scm, encoder = model.scm, model.intervention_encoder
    n, p = mechanism.shift.shape
    k, g = model.residual.shape
    new = DiscrepancyVAE(
        g, p, k + n * p, model.encoder.hidden.out_features, "soft", scm.equations, True,
        model.decoder.output_activation, "none" if model.log_noise is None else "gaussian",
    ).to(model.residual.dtype)  # fmt: skip
    retention = {"soft": scm.retention_logit, "hard": torch.full_like(scm.shift, -LARGE)}
    first = torch.zeros((n, p, 1), dtype=residual.dtype)
    first[:, 0] = 1
    keep = mechanism.keep.clamp(EDGE, 1 - EDGE)
    kept = torch.where(mechanism.keep >= 1 - EDGE, torch.full_like(keep, LARGE), (keep / (1 - keep)).log())
    scale = (mechanism.log_scale / MAX_LOG_SCALE).clamp(-1 + EDGE, 1 - EDGE)
    rows = {
        "intervention_encoder.embedding": torch.zeros((n * p, encoder.embedding.shape[1])),
        "intervention_encoder.given": torch.eye(p).repeat(n, 1),
        "intervention_encoder.is_given": torch.ones(n * p, dtype=torch.bool),
        "scm.shift": mechanism.shift.flatten(),
        "scm.log_scale": (MAX_LOG_SCALE * torch.atanh(scale)).flatten(),
        "scm.retention_logit": kept.flatten(),
        "residual": (first * residual[:, None]).flatten(0, 1),
        "residual_error": (first * residual_error[:, None]).flatten(0, 1),
    }
    state = dict(model.state_dict())
    state["scm.retention_logit"] = retention.get(scm.intervention, torch.full_like(scm.shift, LARGE))
    if scm.intervention == "shift":
        state["scm.log_scale"] = torch.zeros_like(scm.shift)
    new.load_state_dict({
        name: torch.cat([value, rows[name].to(value.dtype)]) if name in rows else value for name, value in state.items()
    })  # fmt: skip
    return new.eval()
