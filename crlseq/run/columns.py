"""The columns of the tables of a run folder, with the type of each."""

from __future__ import annotations

import pandas as pd

# Columns that each table has at least; more may follow in later versions.
COLUMNS: dict[str, dict[str, type]] = {
    "programs": {"program": str, "gene": str, "loading": float, "total_effect": float, "rank": int},
    "interventions": {
        "perturbation": str, "program": str, "weight": float, "shift": float, "retention": float,
        "n_cells": int, "p_value": float, "fdr": float, "energy_distance": float, "noise_scale": float, "support": float,
    },
    "dag": {"source": str, "target": str, "weight": float, "support": float, "identified": str},
    "history": {"epoch": int, "total": float},
    "evaluation": {
        "condition": str, "split": str, "n_cells": int, "mmd2": float, "mmd2_no_change": float,
        "pearson_delta": float, "l2": float, "l2_no_change": float, "pearson_delta_training": float,
        "pearson_delta_mean": float, "l2_training": float, "l2_mean": float,
    },
}  # fmt: skip
# Of interventions, and of these with the cells: `crlseq.readout.agreement`, since format 3
HIT: dict[str, type] = dict.fromkeys(("penetrance", "penetrance_error", "retained", "retained_error"), float)
AGREEMENT: dict[str, type] = dict.fromkeys(
    ("shift_se", "knock_down", "knock_down_se", "explained", "agrees", "agrees_se", "disagrees"), float
)
PAIR_COLUMNS: dict[str, type] = {
    "source": str, "target": str, "change": float, "se": float, "z": float, "z_reversed": float, "fdr": float,
    "status": str, "guards": str, "detectable": float, "robust": bool,
}  # fmt: skip
SECOND_COLUMNS: dict[str, type] = {
    "perturbation": str, "program": str, "shift": float, "se": float, "z": float, "fdr": float
}  # fmt: skip
EFFECT_COLUMNS: dict[str, type] = {
    "perturbation": str, "gene": str, "change": float, "se": float, "log2_fold_change": float,
    "log2_fold_change_se": float, "p_value": float, "fdr": float, "program_part": float, "residual": float,
}  # fmt: skip
CONTEXT_COLUMNS: dict[str, type] = {
    "perturbation": str, "program": str, "context": str, "other": str, "shift": float, "se": float, "shift_other": float,
    "se_other": float, "difference": float, "difference_se": float, "p_value": float, "fdr": float, "n_cells": int,
    "n_cells_other": int,
}  # fmt: skip
# Of interventions, effects, pairs and edges, in runs with contexts alone; of pairs and edges empty where all share it.
CONTEXT: dict[str, type] = {"context": str}
INTERACTION_COLUMNS: dict[str, type] = {
    "perturbations": str, "scope": str, "n": int, "term": float, "error": float, "fdr": float, "similarity": float,
    "masking": float, "class": str,
}  # fmt: skip
# Of programs: with a sparse decoder alone; where the screen has symbols beside identifiers.
LATER_PROGRAMS: dict[str, type] = {"anchor": bool, "symbol": str}
ENSEMBLE_COLUMNS = {"kind": str, "source": str, "target": str, "agreement": float, "mean": float, "sd": float}
GUIDE_COLUMNS: dict[str, type] = {
    "guide": str, "perturbation": str, "n_cells": int, "strength": float, "strength_se": float, "fdr": float, "weak": bool,
    "knock_down": float, "knock_down_se": float, "penetrance": float,
}  # fmt: skip
ARM_COLUMNS: dict[str, type] = {
    "perturbation": str, "chromosome": str, "arm": str, "part": str, "n_genes": int, "change": float, "se": float,
    "p_value": float, "fdr": float, "lost": bool, "program_part": float, "program_p_value": float, "program_fdr": float,
}  # fmt: skip
COVARIATE_COLUMNS: dict[str, type] = {
    "perturbation": str, "covariate": str, "level": str, "n_cells": int, "mean": float, "control": float, "difference": float,
    "se": float, "p_value": float, "fdr": float, "kept": bool, "beyond": float,
}  # fmt: skip
PATHWAY_COLUMNS = {
    "program": str, "gene_set": str, "description": str, "weight": float, "rank": int, "n_genes": int, "same_genes": str,
}  # fmt: skip
# Columns of obs: the split; what guides were read as, where a fit was asked for them; and of fits that find targets by
# likelihood, the probability that a cell was hit by its perturbation.
CELL_COLUMNS = ("crlseq_split", "crlseq_perturbation", "crlseq_hit")
SPLIT = pd.CategoricalDtype(["train", "validation", "test", "unused"])
