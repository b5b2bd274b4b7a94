"""A fitted model with further interventions that are given and not fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.networks import GeneSetLayer
from crlseq.model.sparse_decoder import SparseDecoder

LARGE = 40.0  # sigmoid(40) is 1 in float64, sigmoid(-40) is 4e-18


@torch.no_grad()
def extended(model: DiscrepancyVAE, shift: Tensor, residual: Tensor, residual_error: Tensor) -> DiscrepancyVAE:
    """`model` with U more perturbations, each written as p interventions that shift one latent.

    What the fitted perturbations do stays as it is. Perturbation u is the combination of the rows K + u p to K + u p + p,
    of which row j shifts latent j alone, since one perturbation has one shift and a new one may raise one latent and
    lower another. ``shift`` (U, p) is what they add to the latents' equations, ``residual`` (U, G) what they do past the
    latents, and ``residual_error`` its standard error.
    """
    scm, encoder = model.scm, model.intervention_encoder
    n, p = shift.shape
    k, g = model.residual.shape
    hidden = model.encoder.hidden
    n_gene_sets, leak = (hidden.out_features, hidden.leak) if isinstance(hidden, GeneSetLayer) else (0, 0.0)
    new = DiscrepancyVAE(
        g, p, k + n * p, encoder.embedding.shape[1], "soft", scm.equations, True,
        model.decoder.output_activation, "none" if model.log_noise is None else "gaussian", n_gene_sets, leak,
        "sparse" if isinstance(model.decoder, SparseDecoder) else "dense",
    ).to(model.residual.dtype)  # fmt: skip
    first = torch.zeros((n, p, 1), dtype=residual.dtype)
    first[:, 0] = 1
    rows = {
        "intervention_encoder.embedding": torch.zeros((n * p, encoder.embedding.shape[1])),
        "intervention_encoder.given": torch.eye(p).repeat(n, 1),
        "intervention_encoder.is_given": torch.ones(n * p, dtype=torch.bool),
        "scm.shift": shift.flatten(),
        "scm.log_scale": torch.zeros(n * p),
        "scm.retention_logit": torch.full((n * p,), LARGE),
        "residual": (first * residual[:, None]).flatten(0, 1),
        "residual_error": (first * residual_error[:, None]).flatten(0, 1),
    }
    state = dict(model.state_dict())
    if scm.kind.retention is not None:  # the new model learns it: the logit of a fixed one, bounded
        state["scm.retention_logit"] = torch.full_like(scm.shift, scm.kind.retention).logit().clamp(-LARGE, LARGE)
    if not scm.kind.scales:
        state["scm.log_scale"] = torch.zeros_like(scm.shift)
    new.load_state_dict({
        name: torch.cat([value, rows[name].to(value.dtype)]) if name in rows else value for name, value in state.items()
    })  # fmt: skip
    return new.eval()
