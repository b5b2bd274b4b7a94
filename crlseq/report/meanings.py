"""What every number of the report means, in words: each opens at a question mark beside it."""

from __future__ import annotations

# By key: the name, and what it says. Texts are of this file alone; nothing from the data stands in them.
MEANINGS: dict[str, tuple[str, str]] = {
    "detectable": (
        "Detectable effect",
        "Cells of the perturbation differ from control cells by a permutation test, at a false discovery rate of at most 0.05. The test knows nothing of programs.",
    ),
    "resamplings": (
        "Found in n of m resamplings",
        "The cells of every condition were drawn again m times, with replacement, and the programs were found again from each draw. n is in how many of them the perturbation came to the same program. Below half, a finding is called a guess.",
    ),
    "guess": ("A guess", "Fewer than half of the resamplings confirm it. Do not build on it."),
    "identified": (
        "Identified",
        "Whether these data can tell the graph from every other graph. Identified: single edges. Ancestry only: who is upstream of whom. Partly identified: the order of some pairs. Not identified: no graph; programs and targets stand nevertheless.",
    ),
    "baselines": (
        "Better than baselines",
        "The model's prediction of each condition against simple ones: no change, the mean effect of all perturbations, the effect in training cells. A difference within two standard errors is no clear difference.",
    ),
    "converged": ("Converged", "Whether the validation loss had stopped falling when training ended."),
    "misfit": (
        "Misfit",
        "How far means and covariances of the conditions are from what the model of programs says of them, over what chance makes. 1: the model describes the cells. Above 1.1 its edges may be artefacts.",
    ),
    "explains": (
        "Share of the effects",
        "The part of the perturbations' squared mean effects, without sampling noise, that the program carries. All programs together explain the sum. A sum above 100 % contains noise.",
    ),
    "variance": (
        "Share of the variance",
        "What the program alone explains of the variation of control cells. Correlated programs share variance.",
    ),
    "stability": (
        "Stability",
        "Mean cosine of the program's loadings with those of resampled cells. 1: always the same genes. Below 0.5 the program is a guess.",
    ),
    "sd": (
        "Standard deviation of a program",
        "The unit of shifts and weights: how much the program varies between control cells, measurement noise taken off.",
    ),
    "shift": (
        "Shift",
        "By how much the perturbation moves its program in the cells that it hit, in standard deviations of the program. Positive: it raises the program.",
    ),
    "target_weight": (
        "Weight of a target",
        "How much of the perturbation is put down to this program. 1: all of it.",
    ),
    "support": (
        "Support",
        "Share of the resamplings that find the same target, or the same edge. Below 0.5 it is a guess. –: not resampled.",
    ),
    "strength": (
        "Strength of a guide",
        "The guide's mean effect, along that of its gene, divided by the gene's. 1: as the other guides; 0: nothing.",
    ),
    "fdr": (
        "False discovery rate (FDR)",
        "Of all findings with at most this value, the share that is expected to be false.",
    ),
    "loading": (
        "Loading",
        "Change of the gene's log expression when the program rises by one standard deviation and all other programs stay.",
    ),
    "total": (
        "Total effect",
        "Change of the gene's log expression when the program rises by one standard deviation and the programs downstream follow.",
    ),
    "set_weight": (
        "Weight of a gene set",
        "Change of the program, in its standard deviations, for one standard deviation of the set's activity.",
    ),
    "set_fdr": (
        "FDR of a gene set",
        "False discovery rate over programs and sets. Genes are correlated, so that small values are too small.",
    ),
    "set_size": ("Size of a gene set", "How many of its genes, or perturbations, were measured."),
    "pair": (
        "Pair of programs",
        "Whether the source (row) acts on the target (column), by what perturbing the target changes. The number beside a change is its standard error, in standard deviations of control cells.",
    ),
    "negative": (
        "Negative controls",
        "Groups of control cells that nothing was done to, and mere shifts of control cells: what is found there is false.",
    ),
    "edge_weight": (
        "Weight of an edge",
        "Change of the target, in its standard deviations, when the source rises by one standard deviation. Negative: the source lowers the target.",
    ),
    "retention": (
        "Retention",
        "Share of its parents' influence that the program keeps under the perturbation. 0: cut off from them; 1: a mere shift. It is poorly determined.",
    ),
    "hit": (
        "Hit",
        "Share of the perturbation's cells that it acted on, ± standard error. The others are as control cells. –: hit and escaped cells cannot be told apart.",
    ),
    "cells": ("Cells", "Cells of the perturbation alone that the fit has used."),
    "compared": ("Cells", "Cells that the prediction was compared with."),
    "number": ("Cells or combinations", "Of a combination its cells; of a perturbation the combinations that it is in."),
    "energy": (
        "Energy distance",
        "How far the cells of a perturbation are from control cells, over all principal components. 0: not at all; it may be negative by chance.",
    ),
    "term": (
        "Term of a combination",
        "Of a combination: its effect along the sum of its parts' effects, less 1; 0 where effects add up. Of a perturbation: the share of what its combinations do beyond the law that recurs.",
    ),
    "pearson": (
        "Pearson Δ",
        "Correlation over genes of the predicted and the measured change of the mean. 1: perfect; 0: useless.",
    ),
    "l2": (
        "L2",
        "Distance of the predicted and the measured mean expression over all genes. Smaller is better.",
    ),
    "mmd": (
        "MMD²",
        "Distance of the predicted and the measured distribution of cells (maximum mean discrepancy, squared). Smaller is better.",
    ),
    "metrics": (
        "Metrics",
        "Pearson Δ, R², DE score and discrimination: larger is better. L2 and MMD²: smaller is better. docs/prediction.md defines them.",
    ),
    "agreement": (
        "Agreement of seeds",
        "Of programs the mean correlation of loadings with those of the other seeds; of perturbations and edges the share of seeds that have the same.",
    ),
    "loss": (
        "Loss",
        "What training lowers. mmd: distance of virtual and measured cells; reconstruction: error of decoded cells; kl: distance of the encoder's noise from a standard normal; total: their weighted sum.",
    ),
}  # fmt: skip
