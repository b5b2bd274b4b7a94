"""Perturbations that were never seen, from vectors of their genes: a map from vectors to what fitted perturbations do.

A perturbation of a gene with vector e is predicted to do a weighted sum of what the fitted ones do to the average of their
cells, hit or not: their shifts of each program's equation (of a perturbation that cuts its target off: the shift with the
same mean effect), and what they do past the programs. Noise scales and cuts of a stranger are not predicted. The weights
are those of a ridge regression with an intercept on standardised vectors, ``w(e) = 1/K + k(e) (K_c + penalty I)^-1 (I - 1/K)`` with the linear
kernel, of the mean of the fitted perturbations (w = 1/K), or of no effect (w = 0): which of these, and the penalty, is
what has the least squared leave-one-out error in mean expression, summed over genes; what is less simple has to be better
by more than one standard error over the perturbations. The ridge has to be better than both of the others: a map that only
beats no effect may know no more than that perturbations are alike. What leave-one-out missed, gene by gene, is the standard
error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from crlseq.data.embeddings import COEXPRESSION, Embeddings, read_embeddings
from crlseq.data.files import readable
from crlseq.errors import InputError
from crlseq.model.discrepancy_vae import DiscrepancyVAE, extended

MIN_PERTURBATIONS = 5  # to fit a map to, and to tell by leaving one out whether it says anything
PENALTIES = np.logspace(-2, 4, 25)


@dataclass(frozen=True)
class Extrapolation:
    """A fitted map; its ``skill`` is 1 - squared leave-one-out error over that of the better of mean and no effect."""

    table: Embeddings  # of all genes of the user's table
    fitted: tuple[str, ...]  # K perturbations with a vector and cells of their own
    choice: str  # "ridge", "mean" or "none"
    penalty: float  # of the ridge
    skill: float  # 0 unless the ridge was chosen
    shifts: np.ndarray  # (K, p) mean shift of each latent's equation by the fitted perturbations
    error: np.ndarray  # (G,) root mean square of what leave-one-out missed, and of the fitted perturbations' own errors

    def weights(self, names: Sequence[str]) -> np.ndarray:
        """(len(names), K) weights of the fitted perturbations for genes of the table."""
        if self.choice == "none":
            return np.zeros((len(names), len(self.fitted)))
        n = len(self.fitted)
        mean = np.full((len(names), n), 1 / n)
        if self.choice == "mean":
            return mean
        own, asked = (_vectors_of(self.table, wanted) for wanted in (self.fitted, names))
        own, asked = own - own.mean(0), asked - own.mean(0)
        gram = own @ own.T / own.shape[1]
        kernel = asked @ own.T / own.shape[1]
        found: np.ndarray = mean + np.linalg.solve(gram + self.penalty * np.eye(n), kernel.T).T @ (np.eye(n) - 1 / n)
        return found

    @torch.no_grad()
    def extended(
        self, model: DiscrepancyVAE, perturbations: Sequence[str], names: Sequence[str]
    ) -> tuple[DiscrepancyVAE, dict[str, tuple[int, ...]]]:
        """A model of `perturbations` with those of genes `names` of the table, and the rows that each of these combines."""
        place = {name: k for k, name in enumerate(perturbations)}
        rows = [place[name] for name in self.fitted]
        w = torch.from_numpy(self.weights(names)).to(model.residual.dtype)
        shift = w @ torch.from_numpy(self.shifts).to(w.dtype)
        error = torch.from_numpy(self.error).to(w.dtype).expand(len(names), -1)
        first, p = len(place), shift.shape[1]
        of_names = {name: tuple(range(first + i * p, first + (i + 1) * p)) for i, name in enumerate(names)}
        missed = (model.residual[rows] + model.common) * model.penetrance[rows, None]
        # Every perturbation has the common effect, which is in the weighted sum already.
        return extended(model, shift, w @ missed - model.common, error), of_names

    def to_anndata(self) -> ad.AnnData:
        """The map as a file that `read_embeddings` takes too."""
        stored = ad.AnnData(self.table.vectors.astype(np.float32), obs=pd.DataFrame(index=list(self.table.names)))
        stored.uns["crlseq"] = {
            "fitted": np.array(self.fitted, dtype=object), "choice": self.choice, "penalty": self.penalty,
            "skill": self.skill, "shifts": self.shifts, "error": self.error,
        }  # fmt: skip
        return stored

    def summary(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        return {
            "n_genes": len(self.table.names), "n_dimensions": int(self.table.vectors.shape[1]),
            "n_fitted": len(self.fitted), "choice": self.choice, "penalty": self.penalty, "skill": self.skill,
        }  # fmt: skip

    def in_words(self) -> str:
        """One sentence on what the vectors are worth."""
        if self.choice == "ridge":
            worth = f"; predicting the effect of each from the others reduces the squared error by {self.skill:.0%}."
        else:
            what = "the mean effect" if self.choice == "mean" else "no effect"
            worth = f", but the vectors carry no predictive information: {what} is predicted for unseen perturbations."
        return f"{len(self.fitted)} fitted perturbations have a vector{worth}"


def refuse_strangers(table: Embeddings, perturbations: Sequence[str], path: str) -> None:
    """Refuse, by `InputError`, a table that lacks the perturbations, before anything is fitted."""
    known = set(table.names)
    common = [name for name in perturbations if name in known]
    if len(common) < MIN_PERTURBATIONS and path == COEXPRESSION:
        raise InputError(
            f"{len(common)} of the {len(perturbations)} fitted perturbations target a fitted gene; at least "
            f"{MIN_PERTURBATIONS} are needed to learn from co-expression.",
            "Fit more genes with --n-top-genes, or give a table of gene vectors.",
        )
    if len(common) < MIN_PERTURBATIONS:
        raise InputError(
            f"The embeddings {path} have vectors for {len(common)} of the {len(perturbations)} fitted perturbations; at "
            f"least {MIN_PERTURBATIONS} are needed.",
            f"Name genes as the labels do (such as {perturbations[0]!r}); the table has names like {table.names[0]!r}.",
        )


@torch.no_grad()
def fit_extrapolation(
    model: DiscrepancyVAE, table: Embeddings, names: Sequence[str], own_cells: np.ndarray, control: np.ndarray
) -> Extrapolation:
    """Fit the map to what a fitted model says of its perturbations.

    ``own_cells`` (K,) bool says which have cells of their own; effects are taken on the ``control`` cells (n, G).
    """
    known = set(table.names)
    chosen = [k for k, name in enumerate(names) if name in known and own_cells[k]]
    fitted = tuple(names[k] for k in chosen)
    x = torch.from_numpy(control).to(model.residual.dtype)[None]
    before = model(x, torch.full((1, 1), -1)).virtual.mean((0, 1))
    z = model.encoder(x)[0]
    effects, shifts = np.zeros((len(chosen), control.shape[1])), np.zeros((len(chosen), z.shape[-1]))
    for i, k in enumerate(chosen):
        output = model(x, torch.tensor([[k]]))
        share = float(model.penetrance[k])
        effects[i] = share * (output.virtual.mean((0, 1)) - before).double().numpy()
        shifts[i] = share * (model.scm.abduct(output.latents) - z).mean((0, 1)).double().numpy()
    own = _vectors_of(table, fitted)
    missed: dict[tuple[str, float], np.ndarray] = {("none", 0.0): effects}
    n = len(fitted)
    if n > 1:
        missed["mean", 0.0] = (effects - effects.mean(0)) * n / (n - 1)
        own = own - own.mean(0)
        gram = own @ own.T / own.shape[1]
        for penalty in PENALTIES if n >= MIN_PERTURBATIONS else ():
            hat = 1 / n + gram @ np.linalg.inv(gram + penalty * np.eye(n)) @ (np.eye(n) - 1 / n)
            missed["ridge", float(penalty)] = (effects - hat @ effects) / (1 - np.diag(hat))[:, None]
    squares = {key: (value**2).sum(1) for key, value in missed.items()}
    simple = _surely_better(squares, ("none", 0.0), [key for key in squares if key[0] == "mean"])
    ridges, plain = ([key for key in squares if (key[0] == "ridge") == wanted] for wanted in (True, False))
    believed = bool(ridges) and all(_surely_better(squares, key, ridges) != key for key in plain)
    choice, penalty = _surely_better(squares, simple, ridges) if believed else simple
    worst = min(float(squares[key].sum()) for key in plain)
    skill = 1 - float(squares[choice, penalty].sum()) / worst if choice == "ridge" and worst > 0 else 0.0
    # What is predicted is what the model says of a perturbation, which is sure to its own error only.
    own_error = model.missed_error(torch.tensor(chosen, dtype=torch.int64)[:, None]).double().numpy()
    error = np.sqrt((missed[choice, penalty] ** 2 + own_error**2).mean(0)) if n else np.zeros(control.shape[1])
    return Extrapolation(table, fitted, choice, penalty, skill, shifts, error)


def _surely_better(
    squares: dict[tuple[str, float], np.ndarray], simple: tuple[str, float], others: list[tuple[str, float]]
) -> tuple[str, float]:
    """The best of `others` by summed squares (K,), if it beats `simple` by more than one standard error; else `simple`."""
    if not others:
        return simple
    best = min(others, key=lambda key: float(squares[key].sum()))
    gain = squares[simple] - squares[best]
    return best if gain.mean() > gain.std(ddof=1) / len(gain) ** 0.5 else simple


def load_extrapolation(path: Path) -> Extrapolation:
    """The map of a run folder; InputError if its file is missing or damaged."""
    table = read_embeddings(path)
    with readable(str(path), "the map from embeddings"):
        stored = ad.read_h5ad(path).uns["crlseq"]
        return Extrapolation(
            table, tuple(map(str, stored["fitted"])), str(stored["choice"]), float(stored["penalty"]),
            float(stored["skill"]), np.asarray(stored["shifts"], dtype=float), np.asarray(stored["error"], dtype=float),
        )  # fmt: skip


def _vectors_of(table: Embeddings, names: Sequence[str]) -> np.ndarray:
    """(len(names), d) vectors, standardised over all genes of the table."""
    place = {name: i for i, name in enumerate(table.names)}
    vectors: np.ndarray = (table.vectors - table.vectors.mean(0)) / table.vectors.std(0)
    return vectors[[place[name] for name in names]]
