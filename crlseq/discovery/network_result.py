"""What a structural model found that was trained with networks on given targets, in the terms of a screen."""

import numpy as np
import torch
from torch import Tensor

from crlseq.discovery.result import LOG_SCALE, Discovery
from crlseq.discovery.task import Start, Task
from crlseq.discovery.verdict import Verdict
from crlseq.model.scm import LatentSCM


@torch.no_grad()
def network_result(
    task: Task,
    start: Start,
    latents: Tensor,
    scm: LatentSCM,
    environments: np.ndarray,
    targets: Tensor,
    verdict: Verdict,
) -> Discovery:
    """Of ``latents`` (n, p) of the fitted cells, in causal order, and their structural model, whose interventions are those
    of the perturbations ``environments`` (m,) with ``targets`` (m,). Other perturbations have no claim.
    """
    k, p = len(task.effect), len(scm.graph)
    target, shift, log_scale, retention = np.full(k, -1), np.zeros(k), np.zeros(k), np.ones(k)
    target[environments] = targets.numpy()
    shift[environments] = scm.shift.double().numpy()
    retention[environments] = scm.retention().double().numpy()
    if scm.kind.scales:
        log_scale[environments] = scm.log_scale.double().clamp(-LOG_SCALE, LOG_SCALE).numpy()
    index, measured = task.fitted_cells(), 0.0 if start.cells.noise is None else start.cells.noise
    y = start.cells.values[index].double()
    slope = torch.linalg.lstsq(y - y.mean(0), latents.double() - latents.double().mean(0)).solution
    mechanisms = None if scm.mechanisms is None else dict(scm.mechanisms.state_dict())
    return Discovery(
        index=index,
        latents=latents.double().numpy(),
        noise=(measured * (slope**2).sum(0)).numpy(),
        adjacency=scm.adjacency.double().numpy(),
        intercept=np.zeros(p),
        target=target,
        shift=shift,
        log_scale=log_scale,
        retention=retention,
        kind=scm.intervention,
        equations=scm.equations,
        mechanisms=mechanisms,
        verdict=verdict,
        held_out={},
        gain=float("nan"),
        gain_error=float("nan"),
        misfit=float("nan"),
        environments=environments,
        choice=start.choice,
    )
