"""Encoder, decoder and intervention encoder: one hidden layer each, leaky ReLU 0.2, as published."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crlseq.model.scm import NEGATIVE_SLOPE


class Linear(nn.Linear):
    """A linear layer from or to no units as well, which torch warns of: a screen without any effect has no latents."""

    def reset_parameters(self) -> None:
        """Random weights; without any, biases of 0."""
        if self.weight.numel():
            super().reset_parameters()
        else:
            nn.init.zeros_(self.bias)


class GeneSetLayer(nn.Module):
    """Activities of gene sets: a linear layer whose unit s reads the genes of set s, W = V * (M + leak (1 - M)).

    De la Fuente et al., "Interpretable causal representation learning for biological data in the pathway space", ICLR
    2025. M (S, G) bool says which genes are in which set; with a leak of 0 a unit reads its own genes alone.
    """

    members: Tensor

    def __init__(self, n_genes: int, n_sets: int, leak: float) -> None:
        super().__init__()
        self.out_features, self.leak = n_sets, leak
        self.free = nn.Parameter(torch.zeros(n_genes, n_sets).T)  # V, gene by gene in memory as in `Encoder`
        self.bias = nn.Parameter(torch.zeros(n_sets))
        self.register_buffer("members", torch.zeros(n_genes, n_sets, dtype=torch.bool).T)

    @property
    def weight(self) -> Tensor:
        """W (S, G)."""
        return self.free * torch.where(self.members, 1.0, self.leak).to(self.free.dtype)

    @torch.no_grad()
    def assign(self, members: Tensor) -> None:
        """Set M, and start the weights of each unit as `nn.Linear` does with so many inputs."""
        self.members.copy_(members)
        bound = members.sum(1, keepdim=True).clamp_min(1).to(self.free.dtype).rsqrt()
        self.free.uniform_(-1, 1).mul_(bound)
        self.bias.uniform_(-1, 1).mul_(bound[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """(..., G) expression to (..., S)."""
        return F.linear(x, self.weight, self.bias)


class Encoder(nn.Module):
    """Expression to the posterior of the exogenous noise, q(z | x) = N(mean, diag(variance)): h = LeakyReLU(x W1 + b1),
    mean = h Wm + bm, variance = softplus(h Wv + bv). With gene sets the hidden units are their activities.
    """

    def __init__(self, n_genes: int, n_hidden: int, n_latents: int, n_gene_sets: int = 0, leak: float = 0.0) -> None:
        super().__init__()
        self.hidden: nn.Linear | GeneSetLayer
        if n_gene_sets:
            self.hidden, n_hidden = GeneSetLayer(n_genes, n_gene_sets, leak), n_gene_sets
        else:
            self.hidden = nn.Linear(n_genes, n_hidden)
            # Gene by gene in memory: products with sparse rows read, and their gradients write, whole rows of (G, H).
            self.hidden.weight = nn.Parameter(self.hidden.weight.detach().T.contiguous().T)
        self.mean = Linear(n_hidden, n_latents)
        self.variance = Linear(n_hidden, n_latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., G) expression to mean and variance, (..., p) each."""
        return self.posterior(self.hidden(x))

    def posterior(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(..., H) ``x W1 + b1`` to mean and variance, (..., p) each."""
        h = F.leaky_relu(hidden, NEGATIVE_SLOPE)
        return self.mean(h), F.softplus(self.variance(h))


class Decoder(nn.Module):
    """Latents to mean expression: x = act(LeakyReLU(u W1 + b1) W2 + b2); act the identity or, as published, leaky ReLU."""

    def __init__(self, n_latents: int, n_hidden: int, n_genes: int, output_activation: str = "identity") -> None:
        super().__init__()
        self.hidden = Linear(n_latents, n_hidden)
        self.output = nn.Linear(n_hidden, n_genes)
        self.output_activation = output_activation

    def forward(self, u: Tensor) -> Tensor:
        """(..., p) latents to (..., G) mean expression."""
        x: Tensor = self.output(self.features(u))
        return F.leaky_relu(x, NEGATIVE_SLOPE) if self.output_activation == "leaky_relu" else x

    def mean(self, u: Tensor) -> Tensor:
        """(..., B, p) latents to the mean (..., G) of the expression of B cells; of a linear output, that of its mean."""
        linear = self.output_activation == "identity"
        mean: Tensor = self.output(self.features(u).mean(-2)) if linear else self(u).mean(-2)
        return mean

    def features(self, u: Tensor) -> Tensor:
        """(..., p) latents to (..., H) what the output layer reads."""
        return F.leaky_relu(self.hidden(u), NEGATIVE_SLOPE)


class InterventionEncoder(nn.Module):
    """Perturbation to target weights: t = softmax(temperature * (LeakyReLU(embedding + b1) W2 + b2)).

    The published one-hot layer is the table ``embedding`` (K, n_hidden): a look-up and not a product. Known targets are
    given and not learned: `is_given` (K,) says which, `given` (K, p) holds their weights (all 0: no effect).
    """

    given: Tensor
    is_given: Tensor

    def __init__(self, n_perturbations: int, n_hidden: int, n_latents: int) -> None:
        super().__init__()
        bound = n_perturbations**-0.5  # nn.Linear's own start for a one-hot input
        self.embedding = nn.Parameter(torch.empty(n_perturbations, n_hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_hidden).uniform_(-bound, bound))
        self.logits = Linear(n_hidden, n_latents)
        self.register_buffer("given", torch.zeros(n_perturbations, n_latents))
        self.register_buffer("is_given", torch.zeros(n_perturbations, dtype=torch.bool))

    def forward(self, perturbations: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        """(...) int64 perturbations to (..., p) target weights. Indices below 0 give the first row; mask them."""
        index = perturbations.clamp_min(0)
        h = F.leaky_relu(self.embedding[index] + self.bias, NEGATIVE_SLOPE)
        learned = torch.softmax(temperature * self.logits(h), dim=-1)
        return torch.where(self.is_given[index][..., None], self.given[index], learned)
