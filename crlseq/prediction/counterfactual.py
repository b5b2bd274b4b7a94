"""Are counterfactual cells sound? Composition, effectiveness and reversibility.

Monteiro, Ribeiro, Pawlowski, Castro, Glocker, "Measuring axiomatic soundness of counterfactual image models", ICLR
2023, arXiv 2303.01274. With x' the counterfactual of a control cell x (z its posterior mean), u(.) the latents that the
encoder reads off a cell, and u_c the latents that were set:

composition
    Largest \\|x(no intervention) - x\\|. 0 where noise is abducted; the reconstruction error of the published model.
effectiveness
    Root mean square of u(x') - u_c, in standard deviations of the programs over controls. ``realised`` is the share of
    the intended change that is read off, <u(x') - u(x), u_c - u(x)> / \\|u_c - u(x)\\|^2: an encoder that hedges against
    measurement noise reads less than 1.
reversibility
    Root mean square of x'' - x over cells and genes: x' is encoded, its noise abducted under the intervention, and the
    intervention taken back. The structural equations can always be taken back (a hard intervention rescales the noise
    of its target, and does not erase it), so that the encoder alone stands between x'' and x. ``change``, the root mean
    square of x' - x, is the size beside which it is to be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crlseq.model.discrepancy_vae import DiscrepancyVAE


@torch.no_grad()
def counterfactual_quality(
    model: DiscrepancyVAE, control: Tensor, perturbations: Tensor, scale: Tensor
) -> dict[str, float]:
    """``composition, effectiveness, realised, reversibility, change`` of control cells (1, n, G) under perturbations (1, M).

    ``scale`` (p,): standard deviations of the latents over controls.
    """
    unchanged = model(control, torch.full_like(perturbations, -1)).virtual
    output = model(control, perturbations)
    before, read = model.latents(control), model.latents(output.virtual)
    intended, found = (output.latents - before) / scale, (read - before) / scale
    mechanism = model.scm.mechanism(perturbations, model.target_weights(perturbations))
    back = model.decoder(model.scm(model.scm.abduct(read, mechanism)))
    if model.log_noise is not None:
        rest = output.virtual - model.decoder(read)
        back = back + rest - model.missed(perturbations) - model.interaction(model.encoder(control)[0], perturbations)
    size = float((intended**2).sum())
    return {
        "composition": float((unchanged - control).abs().max()),
        "effectiveness": _root_mean_square(found - intended),
        "realised": float((found * intended).sum()) / size if size > 0 else float("nan"),
        "reversibility": _root_mean_square(back - control),
        "change": _root_mean_square(output.virtual - control),
    }


def _root_mean_square(values: Tensor) -> float:
    return float((values**2).mean().sqrt())
