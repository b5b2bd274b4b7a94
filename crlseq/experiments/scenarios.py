"""What a benchmark simulates, and how it fits: names, which the help lists, with their options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# What real screens have: cells vary along factors that nobody perturbs, guides work in a part of the cells.
REAL: dict[str, Any] = {
    "n_latents": 8, "n_genes": 1000, "cells_per_perturbation": 300, "n_control": 2500, "depth": 4000.0,
    "expected_parents": 0.75, "edge_size": (0.5, 1.2), "shift_size": (1.5, 5.0), "penetrance": (0.3, 0.95), "guides": 3,
    "background": 2, "cell_cycle": True, "genewise_dispersion": True,
    "log_rate_scale": 0.45,  # programs then explain about 0.35 in control cells: shifts are a part of the signal
}  # fmt: skip
# Options of `crlseq.data.simulate.simulate` where they are not its own: 10 latents, 4 perturbations a latent,
# 150 cells a perturbation. `n_perturbations` keeps the first so many; `generator` is another one, of `GENERATORS`.
SCENARIOS: dict[str, dict[str, Any]] = {
    "linear-gaussian": {"noise": "gaussian", "n_genes": 60},
    "linear-counts": {},
    "network-gaussian": {"mixing": "network", "noise": "gaussian", "n_genes": 60},
    "network-counts": {"mixing": "network"},
    "toy": {"generator": "toy"},
    "large": {"n_latents": 30, "perturbations_per_latent": 7, "n_perturbations": 200},
    "shallow": {"mixing": "network", "cells_per_perturbation": 50, "depth": 2000.0},
    "linear-shift": {"intervention": "shift"},
    "linear-soft": {"intervention": "soft"},
    "sparse-counts": {"loading_density": 0.15},
    "real-linear": REAL,
    "real-soft": {**REAL, "intervention": "soft", "retention": (0.5, 0.5)},
    "real-network": {**REAL, "mixing": "network", "log_rate_scale": 0.55},  # the same 0.35
    "real-shift": {**REAL, "intervention": "shift"},
    "real-second": {**REAL, "second_targets": 0.4},
    "real-null": {**REAL, "penetrance": (0.0, 0.0)},
    "real-hidden": {**REAL, "hidden": 2},
    "real-cycle": {**REAL, "cycle": True},
    "real-relu": {**REAL, "equations": "relu"},
    "squires": {"generator": "squires"},
    "squires-soft": {"generator": "squires", "soft": True},
    "buchholz": {"generator": "buchholz"},
    "buchholz-noisy": {"generator": "buchholz", "noise": 0.1},
    "buchholz-10": {"generator": "buchholz", "n_latents": 10, "degree": 4.0},
    "buchholz-20": {"generator": "buchholz", "n_latents": 20, "n_features": 40, "cells": 1000},
    "buchholz-network": {"generator": "buchholz", "network": True},
    "varici": {"generator": "varici"},
    "varici-soft": {"generator": "varici", "soft": True},
    "varici-quadratic": {"generator": "varici", "quadratic": True},
    "varici-pairs": {"generator": "varici", "quadratic": True, "pairs": True},
    "varici-many": {"generator": "varici", "many": True},
    "cauca": {"generator": "cauca"},
    "heavy-tails": {"generator": "heavy_tails"},
    "gene-network": {"generator": "gene_network"},
}
METHODS: dict[str, dict[str, Any]] = {
    "default": {}, "sparse": {"decoder": "sparse"}, "linear": {"method": "linear"}, "changes": {"method": "changes"},
    **{name: {"method": name} for name in ("varimax", "squires", "score-linear", "multi-node", "score", "contrastive", "cauca", "icm-flow")},
    "diffusion": {"method": "diffusion"}, "paper": {"preset": "paper"},
    # Moran et al. 2022, without interventions: labels are permuted before.
    "sparse-vae": {"decoder": "sparse", "method": "gradient", "causal_layer": False, "mmd_weight": 0.0},
}  # fmt: skip
EXTERNAL = ("cnmf",)  # of other packages, see `crlseq.experiments.external`
BASELINES = ("random", "empty")


@dataclass(frozen=True)
class Suite:
    """Scenarios by heading, the methods and seeds that are run on them, and options of single methods and of the simulators."""

    scenarios: dict[str, tuple[str, ...]]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    of_methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    simulator: dict[str, Any] = field(default_factory=dict)


PEERS = "Settings of other papers"
OURS = "Settings of this project"
NO_DAG = "A gene network without a latent DAG"
WITHOUT_NETWORKS = ("linear", "changes", "squires", "score-linear", "multi-node", "varimax")
WITH_NETWORKS = (
    "default",
    "contrastive",
    "score",
    "cauca",
    "icm-flow",
)  # sparse has targets and graph of default, diffusion those of icm-flow
FIELD = (*WITHOUT_NETWORKS, *WITH_NETWORKS, "paper", "sparse-vae", *EXTERNAL)
# Targets and graphs of methods that train after the discovery do not depend on the epochs.
FEW_EPOCHS = {name: {"epochs": 20} for name in WITH_NETWORKS}
SUITES = {
    "field": Suite(
        {
            PEERS: (
                *("squires", "squires-soft", "buchholz", "buchholz-noisy", "buchholz-10", "buchholz-20", "buchholz-network"),
                *("varici", "varici-soft", "varici-quadratic", "varici-pairs", "varici-many", "cauca", "heavy-tails", "toy"),
            ),
            OURS: (
                *("linear-gaussian", "linear-counts", "linear-soft", "linear-shift", "network-counts"),
                *("real-linear", "real-network", "real-hidden", "real-null"),
            ),
            NO_DAG: ("gene-network",),
        },
        FIELD,
        (0, 1, 2),
        {**FEW_EPOCHS, "paper": {"epochs": 40}, "sparse-vae": {"epochs": 40}},
    )
}  # fmt: skip
QUICK = {  # the same, so small that it is done in two minutes
    "field": Suite(
        {PEERS: ("squires", "buchholz", "varici-soft", "varici-many"), NO_DAG: ("gene-network",)},
        (*WITHOUT_NETWORKS, "default", "paper", "sparse-vae", *EXTERNAL),
        (0,),
        {name: {"epochs": 1} for name in ("default", "paper", "sparse-vae")},
        {"cells": 300},
    )
}
