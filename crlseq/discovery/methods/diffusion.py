"""A diffusion decoder given the causal latents of icm-flow, and how sound counterfactuals through it are.

    minimise over e    sum_cells E_t,e |e - e(y_t, t, u)|^2,    y_t = sqrt(a_t) y + sqrt(1 - a_t) e

of components y, with latents u of the autoencoder of `crlseq.discovery.methods.icm_flow`. A control cell is read to its noise
under its latents and written from it under those of an intervention, both without chance (`crlseq.model.diffusion`). How sound
that is, beside the autoencoder's own decoder with what it left over, is told as a note: composition, effectiveness and
reversibility after Monteiro et al. 2023 (arXiv 2303.01274). Programs and targets are those of icm-flow.

Source: Komanduri et al. 2024, "Causal diffusion autoencoders" (CausalDiffAE), ECAI, arXiv 2404.17735, which trains encoder and
decoder at once, held by labels of the causal variables; without those the latents that this gave were worse, and so the decoder
comes second here.
Assumes: as icm-flow.
Identified: as icm-flow, nothing that is declared.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from crlseq.discovery.causal_training import descend, of_environments
from crlseq.discovery.methods import Programs, icm_flow
from crlseq.discovery.straighten import StraighteningVAE
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import Answer
from crlseq.model.diffusion import DiffusionDecoder
from crlseq.model.scm import LatentSCM, Mechanism

AT_MOST: Answer = "not identified"
STEPS, RATE = 4000, 3e-3


class Decoder(Protocol):
    """What is left of components given latents, and back."""

    def read(self, y: Tensor, u: Tensor) -> Tensor:
        """Components (n, q) of latents (n, p) to what the latents leave over (n, q)."""

    def write(self, rest: Tensor, u: Tensor) -> Tensor:
        """The inverse of `read`, under these or other latents."""


@dataclass(frozen=True)
class Additive:
    """The autoencoder's decoder, to which what it left over is added."""

    network: StraighteningVAE

    def read(self, y: Tensor, u: Tensor) -> Tensor:
        """y - f(u)."""
        return y - self.network.decode(u)

    def write(self, rest: Tensor, u: Tensor) -> Tensor:
        """f(u) + rest."""
        return self.network.decode(u) + rest


@dataclass(frozen=True)
class Soundness:
    """Of counterfactual control cells, root mean squares: ``composition`` of what a cell changes without an intervention,
    ``effectiveness`` of latents read off less latents set (in standard deviations of controls), ``reversibility`` of a cell
    whose intervention was taken back less the cell, and ``change``, of the intervention, beside which these are to be read.
    """

    composition: float
    effectiveness: float
    reversibility: float
    change: float

    def in_words(self, name: str) -> str:
        """One sentence."""
        return (
            f"Counterfactual cells by the {name} (components, root mean square): composition {self.composition:.3f}, "
            f"effectiveness {self.effectiveness:.3f}, reversibility {self.reversibility:.3f}, beside a change of {self.change:.3f}."
        )


def find(task: Task) -> Programs:
    """The programs of icm-flow; what is found of counterfactuals is noted."""
    start, cells, targets, network, scm = icm_flow.fit(task)
    task.stage("training the diffusion decoder")
    values, _, environment = cells.training()
    y = values.float()
    control = y[environment == 0]
    for name, decoder in (
        ("diffusion decoder", fit_decoder(network, y, task.seed, STEPS)),
        ("autoencoder", Additive(network)),
    ):
        task.note(soundness(network, scm, decoder, control, targets).in_words(name))
    return icm_flow.programs_of(task, start, cells, targets, network, scm)


def fit_decoder(network: StraighteningVAE, y: Tensor, seed: int, steps: int) -> DiffusionDecoder:
    """Of components (n, q), given their latents by the encoder; it starts from the line through both."""
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        u = network.encode(y)[0]
    line = torch.linalg.lstsq(torch.cat([u, torch.ones(len(u), 1)], 1), y).solution
    decoder = DiffusionDecoder(line[:-1], line[-1])
    descend(lambda i: decoder.loss(y[i], u[i], draws), [*decoder.parameters()], torch.arange(len(y)), steps, RATE, seed)
    return decoder


@torch.no_grad()
def soundness(
    network: StraighteningVAE, scm: LatentSCM, decoder: Decoder, control: Tensor, targets: Tensor
) -> Soundness:
    """Of control cells (n, q) under each of the interventions, on ``targets`` (K,)."""
    interventions, u = of_environments(scm, targets), network.encode(control)[0]
    z, rest, unit = scm.abduct(u), decoder.read(control, u), u.std(0)
    change, missed, left = [], [], []
    for c in range(1, len(targets) + 1):
        own = Mechanism(interventions.retention[c], interventions.log_scale[c], interventions.shift[c])
        meant = scm(z, own)
        virtual = decoder.write(rest, meant)
        read = network.encode(virtual)[0]
        back = decoder.write(decoder.read(virtual, read), scm(scm.abduct(read, own)))
        change.append(virtual - control)
        missed.append((read - meant) / unit)
        left.append(back - control)
    found = decoder.write(rest, u) - control, torch.stack(missed), torch.stack(left), torch.stack(change)
    return Soundness(*(float((part**2).mean().sqrt()) for part in found))
