"""DiscrepancyVAE: networks + LatentSCM -> virtual interventional cells.

Zhang, Greenewald, Squires, Srivastava, Shanmugam, Uhler, "Identifiability Guarantees for Causal
Disentanglement from Soft Interventions", NeurIPS 2023, arXiv 2307.06250.

A control cell x is encoded to its exogenous noise z (abduction), the structural equations are
changed (action), and the latents decoded (prediction):

    z ~ q(z | x),   u = SCM(z),   u_c = SCM_c(z),   reconstruction f(u),   virtual cell f(u_c) + e.

The published model has e = 0. With ``noise="gaussian"`` the model of a cell is x = f(u) + noise with
one variance per gene, and abduction takes that noise along as well: e = x - f(u). A virtual cell is then
its control cell plus the decoded effect (and what the latents miss of it, `missed`), and an intervention without
effect changes nothing.

A perturbation k hits a cell with probability pi_k, its ``penetrance``, each part of a combination by itself. A cell that
escaped is a control cell, so that the cells of a condition are a mixture over the parts that hit them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crlseq.config import InterventionKind
from crlseq.model.combination_law import CombinationLaw, Group
from crlseq.model.networks import Decoder, Encoder, GeneSetLayer, InterventionEncoder
from crlseq.model.scm import LatentSCM, Mechanism, product_over_parts
from crlseq.model.sparse_decoder import SparseDecoder

LARGE = 40.0  # sigmoid(40) is 1 in float64, sigmoid(-40) is 4e-18
MOST_KINDS = 64  # of cells in a combination: those that all of six parts may escape


@dataclass(frozen=True)
class ModelOutput:
    """What one forward pass gives for C conditions with B control cells each."""

    virtual: Tensor  # (C, B, G) virtual interventional cells
    reconstruction: Tensor  # (C, B, G) reconstructed control cells
    mean: Tensor  # (C, B, p) posterior mean of z
    variance: Tensor  # (C, B, p) posterior variance of z
    latents: Tensor  # (C, B, p) latents of the virtual cells


@dataclass(frozen=True)
class Inference:
    """Perturbed cells as their own condition explains them."""

    mean: Tensor  # (C, B, p) posterior mean of z
    reconstruction: Tensor  # (C, B, G)
    divergence: Tensor  # (C, B) one draw of KL(q(u | x) || p_c(u))


class DiscrepancyVAE(nn.Module):
    """Discrepancy-based variational autoencoder of G genes, p latents, K perturbations and H hidden units.

    ``intervention``, ``equations`` and ``causal`` are those of `LatentSCM`, ``output_activation`` that of `Decoder`.
    The ``noise`` is ``gaussian`` (a learned variance per gene, abducted) or ``none`` (published). The encoder reads
    ``n_gene_sets`` with a ``leak`` (`GeneSetLayer`), all genes if there are 0; the ``decoder`` is ``dense`` or
    ``sparse`` (`SparseDecoder`, whose output is the identity).
    """

    def __init__(
        self,
        n_genes: int,
        n_latents: int,
        n_perturbations: int,
        n_hidden: int = 128,
        intervention: InterventionKind = "soft",
        equations: str = "linear",
        causal: bool = True,
        output_activation: str = "identity",
        noise: str = "gaussian",
        n_gene_sets: int = 0,
        leak: float = 0.0,
        decoder: str = "dense",
    ) -> None:
        super().__init__()
        self.encoder = Encoder(n_genes, n_hidden, n_latents, n_gene_sets, leak)
        self.intervention_encoder = InterventionEncoder(n_perturbations, n_hidden, n_latents)
        self.n_fitted = n_perturbations  # fewer than there are rows once `extended`
        self.scm = LatentSCM(n_latents, n_perturbations, intervention, equations, causal)
        sizes = n_latents, n_hidden, n_genes
        self.decoder = SparseDecoder(*sizes) if decoder == "sparse" else Decoder(*sizes, output_activation)
        self.log_noise = nn.Parameter(torch.zeros(n_genes)) if noise == "gaussian" else None  # log variance
        # What the latents miss, measured after the fit: effects (K, G) of single perturbations, one (G,) of being
        # perturbed at all, which a combination has once, and their standard errors.
        self.residual: Tensor
        self.residual_error: Tensor
        self.common: Tensor
        self.common_error: Tensor
        for name, shape in (("residual", (n_perturbations, n_genes)), ("common", (n_genes,))):
            self.register_buffer(name, torch.zeros(shape))
            self.register_buffer(f"{name}_error", torch.zeros(shape))
        # (G,) sampling error of the mean of the controls that were fitted, as far as perturbed cells tell it.
        self.control_error: Tensor
        self.register_buffer("control_error", torch.zeros(n_genes))
        self.penetrance: Tensor  # (K,) share of a perturbation's cells that it hits
        self.register_buffer("penetrance", torch.ones(n_perturbations))
        # Sharpness of the target weights; the trainer raises it, and it belongs to the weights it was fitted with.
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))
        # How combinations add up, once that was fitted; until then, and in the published model, by the equations alone.
        self.law: CombinationLaw | None = None

    def forward(
        self, control: Tensor, perturbations: Tensor, eps: Tensor | None = None, hit: Tensor | None = None
    ) -> ModelOutput:
        """Virtual cells of conditions (C, M) int64, filled up with -1, from the control cells (C, B, G) of each.

        ``eps`` (C, B, p) are standard normal draws, None for the posterior mean; ``hit`` (C, B, M) bool says which
        perturbations hit a cell, None for all.
        """
        mean, variance = self.encoder(control)
        z = mean if eps is None else mean + variance.sqrt() * eps
        latents = self.intervene(z, perturbations, hit)
        # Decoded in one product, whose gradient by the weights is one as well.
        reconstruction, virtual = self.decoder(torch.stack([self.scm(z), latents]))
        virtual = self.carried(virtual, control - reconstruction, perturbations, hit)
        if self.law is not None:
            virtual = virtual + self.interaction(z, perturbations)
        return ModelOutput(virtual, reconstruction, mean, variance, latents)

    def intervene(self, z: Tensor, perturbations: Tensor, hit: Tensor | None = None) -> Tensor:
        """Noise z (C, B, p) to the latents of its cells under conditions (C, M), filled up with -1; `hit` as in `forward`."""
        weights = self.target_weights(perturbations)
        if hit is None:
            latents: Tensor = self.scm(z, self.scm.mechanism(perturbations, weights))
            return latents
        latents = torch.empty_like(z)
        for kind in _kinds_of(hit):
            under: Tensor = self.scm(z, self.scm.mechanism(perturbations.where(kind, -1), weights))
            latents = torch.where((hit == kind).all(-1, keepdim=True), under, latents)
        return latents

    def carried(self, decoded: Tensor, rest: Tensor, perturbations: Tensor, hit: Tensor | None = None) -> Tensor:
        """Decoded latents (C, B, G) with what a control cell's own latents left over, and what conditions do besides."""
        if self.log_noise is None:
            return decoded
        return decoded + rest + self.missed(perturbations, hit)

    @torch.no_grad()
    def interaction(self, z: Tensor, perturbations: Tensor) -> Tensor:
        """What the law of combination adds to cells of noise z (C, B, p) all hit by conditions (C, M): (C, 1, G)."""
        found = self.residual.new_zeros((len(perturbations), 1, self.residual.shape[1]))
        for own, noise, rows in zip(found, z, perturbations.tolist(), strict=True):
            groups = self.groups(rows)
            if self.law is not None and self.law.governs(groups):
                by_equations = self.mean_effect(noise, [k for group in groups for k in group])
                own[0] = self.law.effect(groups, self.single_effects(noise, groups)) - by_equations
        return found

    def groups(self, rows: Sequence[int]) -> list[Group]:
        """Rows of a condition, -1 for none, by the perturbation that they are: one that is extrapolated has p rows."""
        found: dict[int, list[int]] = {}
        for k in rows:
            if k >= 0:
                own = k if k < self.n_fitted else -1 - (k - self.n_fitted) // len(self.scm.graph)
                found.setdefault(own, []).append(k)
        return [tuple(group) for group in found.values()]

    def single_effects(self, z: Tensor, groups: Sequence[Group]) -> Tensor:
        """(M, G) `mean_effect` of each of M perturbations, by their rows."""
        return torch.stack([self.mean_effect(z, group) for group in groups])

    def mean_effect(self, z: Tensor, rows: Sequence[int]) -> Tensor:
        """Mean change (G,) of hit cells of noise z (B, p) under perturbations, all at once, by the equations."""
        perturbations = torch.tensor([[*rows]], device=z.device)
        latents = torch.cat([self.scm(z[None]), self.intervene(z[None], perturbations)])
        before, after = self.decoder.mean(latents)
        change: Tensor = after - before + self.missed(perturbations)[0, 0]
        return change

    def missed(self, perturbations: Tensor, hit: Tensor | None = None) -> Tensor:
        """(C, M) perturbations, filled up with -1, to the effects (C, B, G) that go past the latents of cells.

        ``hit`` (C, B, M) as in `forward`; without it B is 1.
        """
        there = perturbations[:, None] >= 0
        there = (there if hit is None else there & hit).to(self.residual.dtype)
        return there @ self.residual[perturbations.clamp_min(0)] + self.common * there.amax(-1, keepdim=True)

    def missed_error(self, perturbations: Tensor) -> Tensor:
        """Standard errors (C, G) of the mean of `missed` over cells, of which `penetrance` are hit."""
        there = (perturbations >= 0).to(self.residual.dtype)
        chance = there * self.chance(perturbations)
        own = (self.residual_error[perturbations.clamp_min(0)] * chance[..., None]) ** 2
        return (own.sum(1) + (self.common_error * (1 - (1 - chance).prod(1, keepdim=True))) ** 2).sqrt()

    def chance(self, perturbations: Tensor) -> Tensor:
        """Probability (..., M) of perturbations (..., M) to hit a cell; 1 of what fills up."""
        return torch.where(perturbations < 0, 1.0, self.penetrance[perturbations.clamp_min(0)])

    def mixture(self, perturbations: Tensor, uniform: Tensor) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Kinds of cells under perturbations (M,) by those that hit them, `MOST_KINDS` of the most probable.

        Gives the probability of each, its perturbations (1, M), -1 for those escaped, and which of the cells are of that
        kind (n,) bool, by their draws ``uniform`` (n,) in [0, 1).
        """
        kinds: list[tuple[float, list[int]]] = [(1.0, [])]
        for k, chance in zip(perturbations.tolist(), self.chance(perturbations).tolist(), strict=True):
            parts = [(part, q) for part, q in ((k, chance), (-1, 1 - chance)) if q > 0]
            kinds = [(weight * q, [*hit, part]) for weight, hit in kinds for part, q in parts]
            kinds = sorted(kinds, key=lambda kind: -kind[0])[:MOST_KINDS]
        total, below = sum(weight for weight, _ in kinds), 0.0
        for i, (weight, hit) in enumerate(kinds):
            above = below + weight / total if i + 1 < len(kinds) else 1.0
            yield weight / total, perturbations.new_tensor([hit]), (uniform >= below) & (uniform < above)
            below = above

    def infer(self, x: Tensor, perturbations: Tensor, eps: Tensor, hit: Tensor | None = None) -> Inference:
        """Perturbed cells under their own condition: posterior of z, reconstruction, divergence from the prior.

        The interventional evidence lower bound: with u of the posterior and z_c = SCM_c^-1(u) the noise that gives
        it under the condition, log q(u | x) - log p_c(u) = sum_k (z_c^2 - eps^2 - log variance) / 2 + log scale of z_c
        (both SCMs are triangular with unit slope), one draw per cell. Cells x are (C, B, G), the rest as in `forward`;
        ``hit`` (C, B) are the cells' probabilities to have been hit, NaN where they are not known, None where all were.
        """
        mean, variance = self.encoder(x)
        weights = self.target_weights(perturbations)
        u = self.scm(mean + variance.sqrt() * eps)
        changed = None if hit is None else self.changed(perturbations, weights, hit)
        divergence = self.divergence(u, self.scm.mechanism(perturbations, weights), eps, variance, changed)
        return Inference(mean, self.decoder(u), divergence)

    def divergence(
        self, u: Tensor, mechanism: Mechanism, eps: Tensor, variance: Tensor, changed: Tensor | None = None
    ) -> Tensor:
        """(C, B) one draw of KL(q(u | x) || p_c(u)), see `infer`; all (C, B, p) but the mechanism.

        With the probability ``changed`` (C, B, p) of each equation to have been changed in a cell log p_c is the mean over
        that: the bound of EM, whose posterior is given. (Under the mixture itself, whose posterior depends on u, an encoder
        learns to read hit cells as escaped ones, nearer to 0.)
        """
        z = self.scm.abduct(u, mechanism)
        if changed is None:
            return 0.5 * (z**2 - eps**2 - variance.log()).sum(-1) + mechanism.log_scale.sum(-1)[..., None]
        of_hit, of_escaped = 0.5 * z**2 + mechanism.log_scale[:, None], 0.5 * self.scm.abduct(u) ** 2
        prior = changed * of_hit + (1 - changed) * of_escaped
        return (prior - 0.5 * (eps**2 + variance.log())).sum(-1)

    def changed(self, perturbations: Tensor, target_weights: Tensor, hit: Tensor) -> Tensor:
        """Probability (C, B, p) that conditions (C, M) with weights (C, M, p) changed a cell's equation; 1 of no target.

        Of cells whose probability ``hit`` (C, B) is known by that, of others by the penetrance.
        """
        weights = target_weights * (perturbations >= 0).to(target_weights.dtype)[..., None]
        by_chance = product_over_parts(1 - weights * (1 - self.chance(perturbations))[..., None])[:, None]
        known = 1 - weights.sum(1)[:, None] * (1 - hit.nan_to_num())[..., None]
        return torch.where(hit.isnan()[..., None], by_chance, known)

    def target_weights(self, perturbations: Tensor) -> Tensor:
        """(...) int64 perturbations to (..., p) target weights at the model's temperature."""
        weights: Tensor = self.intervention_encoder(perturbations, self.temperature)
        return weights

    def latents(self, x: Tensor) -> Tensor:
        """(..., G) expression to the posterior mean of u, (..., p); for control and perturbed cells alike."""
        latents: Tensor = self.scm(self.encoder(x)[0])
        return latents


def _kinds_of(hit: Tensor) -> Tensor:
    """(n, M) bool: which parts may hit a cell, of hits (C, B, M). All 2^M on CUDA, where the host would wait to see which
    there are; those there are on the CPU, and of many parts.
    """
    n_parts = hit.shape[-1]
    if hit.is_cuda and 2**n_parts <= MOST_KINDS:
        which = torch.arange(2**n_parts, device=hit.device)[:, None] >> torch.arange(n_parts, device=hit.device)
        return (which % 2).bool()
    found: Tensor = torch.unique(hit.flatten(0, 1), dim=0)
    return found


@torch.no_grad()
def extended(model: DiscrepancyVAE, shift: Tensor, residual: Tensor, residual_error: Tensor) -> DiscrepancyVAE:
    """A fitted model with U more perturbations, each written as p interventions that shift one latent.

    Perturbation u is the combination of the rows K + u p to K + u p + p, of which row j shifts latent j alone: a new
    one may raise one latent and lower another. ``shift`` (U, p) is what they add to the latents' equations,
    ``residual`` (U, G) what they do past the latents, and ``residual_error`` its standard error.
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
        "penetrance": torch.ones(n * p),
        "scm.retention_logit": torch.full((n * p,), LARGE),
        "residual": (first * residual[:, None]).flatten(0, 1),
        "residual_error": (first * residual_error[:, None]).flatten(0, 1),
    }
    state = dict(model.state_dict())
    if scm.kind.retention is not None:  # the new model learns it: the logit of a fixed one, bounded
        state["scm.retention_logit"] = torch.full_like(scm.shift, scm.kind.retention).logit().clamp(-LARGE, LARGE)
    if not scm.kind.scales:
        state["scm.log_scale"] = torch.zeros_like(scm.shift)
    new.law, new.n_fitted = model.law, k
    new.load_state_dict({
        name: torch.cat([value, rows[name].to(value.dtype)]) if name in rows else value for name, value in state.items()
    })  # fmt: skip
    return new.eval()
