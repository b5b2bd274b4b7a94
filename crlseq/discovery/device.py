"""On which device a computation of a discovery runs: on that of the fit where it is large, else on the CPU."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")
# Operations that the cores of a small machine do in about a second. Less stays on the CPU: a device would spend the second on
# its first launches and on what it has to send.
SECOND = 1e11


def device_for(flops: float, device: torch.device) -> torch.device:
    """Where so many floating point operations are done, in a fit on `device`: there from `SECOND` on."""
    return device if flops >= SECOND else CPU
