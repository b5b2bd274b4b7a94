"""Are doubles predicted better than by one line of code, whatever law they obey? Screens with doubles of six kinds.

Single effects have programs, a common part, genes of their own and sizes over a decade, some of them 0. Doubles obey one of
`KINDS`; beyond that each perturbed gene acts in combinations somewhat otherwise than alone, and each double has a part of its
own. Cells are overdispersed counts. A fit sees the singles and a share of the doubles; the others are predicted from control
cells, and compared with the means of their own cells.

Written to the folder: ``combinations.csv`` (a row a screen, share and predictor: mean L2 and Pearson delta; of the model also
without the terms and without the law, and the shares of measured changes within intervals of 50, 80 and 95 %, of all genes and
of the 20 most changed ones).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.stats import norm

import crlseq

N_SINGLES, N_DOUBLES, N_GENES, N_CELLS, N_CONTROL = 40, 120, 1000, 100, 1500
TOP = 20
SHOWN = ("no_change", "additive", "shrunk_additive", "matching_mean", "ridge")


def _sum(a: np.ndarray, b: np.ndarray, common: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return a + b


def _half(a: np.ndarray, b: np.ndarray, common: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0.5 * (a + b + common) if a.any() and b.any() else a + b


def _published(a: np.ndarray, b: np.ndarray, common: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Coefficients as published of 125 CRISPRa doubles: medians .83 and .58, quartiles .2 to either side."""
    large, small = (a, b) if np.linalg.norm(a) > np.linalg.norm(b) else (b, a)
    return rng.normal(0.83, 0.3) * large + rng.normal(0.58, 0.3) * small


def _saturating(a: np.ndarray, b: np.ndarray, common: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    most = np.maximum(np.abs(a), np.abs(b)) + 1e-9  # a gene goes little further than either effect takes it
    return np.asarray(1.2 * most * np.tanh((a + b) / (1.2 * most)))


def _dominant(a: np.ndarray, b: np.ndarray, common: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    large, small = (a, b) if np.linalg.norm(a) > np.linalg.norm(b) else (b, a)
    return large + 0.2 * small


def _greater(a: np.ndarray, b: np.ndarray, common: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.where(np.abs(a) > np.abs(b), a, b)


Law = Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
KINDS: dict[str, Law] = {
    "published": _published, "half and half": _half, "sum": _sum, "saturating": _saturating, "dominant": _dominant, "greater": _greater,
}  # fmt: skip


def single_effects(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Effects (singles, genes) in log expression, and what they have in common."""
    loading = rng.standard_t(8, (8, N_GENES)) * (rng.random((8, N_GENES)) < 0.3) * 0.2
    scores = rng.normal(size=(N_SINGLES, 8)) * (rng.random((N_SINGLES, 8)) < 0.35)
    own = rng.standard_t(8, (N_SINGLES, N_GENES)) * (rng.random((N_SINGLES, N_GENES)) < 0.05) * 0.2
    common = rng.normal(size=N_GENES) * 0.06
    size = 10 ** rng.uniform(-0.3, 0.6, (N_SINGLES, 1)) * (rng.random((N_SINGLES, 1)) < 0.8)
    effects = size * (scores @ loading + own + common)
    return effects, effects.mean(0)


def screen(kind: str, seed: int) -> tuple[ad.AnnData, dict[str, np.ndarray]]:
    """Counts of controls, singles and doubles, and the true changes of log expression by double."""
    rng = np.random.default_rng([seed, 21])
    effects, common = single_effects(rng)
    pairs = [(i, j) for i in range(N_SINGLES) for j in range(i)]
    chosen = [pairs[k] for k in rng.permutation(len(pairs))[:N_DOUBLES]]
    term = 0.25 * rng.normal(size=effects.shape) * np.sqrt((effects**2).mean(1, keepdims=True))
    changes = {f"G{i}": effects[i] for i in range(N_SINGLES)}
    for i, j in chosen:
        law = KINDS[kind](effects[i], effects[j], common, rng)
        own = 0.3 * rng.normal(size=N_GENES) * (np.abs(law) + np.sqrt((law**2).mean())) / 2
        changes[f"G{i}+G{j}"] = law + term[i] + term[j] + own
    base = rng.normal(-1.0, 1.3, N_GENES)
    labels = ["control"] * N_CONTROL + [name for name in changes for _ in range(N_CELLS)]
    shift = np.stack([np.zeros(N_GENES), *changes.values()])
    row = np.repeat(np.arange(len(shift)), [N_CONTROL, *[N_CELLS] * len(changes)])
    blocks = []
    for part in np.array_split(np.arange(len(row)), 40):
        depth = rng.normal(0, 0.35, (len(part), 1))
        mean = np.exp(base + depth + shift[row[part]])
        blocks.append(sp.csr_matrix(rng.poisson(mean * rng.gamma(2.0, 0.5, mean.shape)).astype(np.float32)))
    adata = ad.AnnData(sp.vstack(blocks, format="csr"), obs=pd.DataFrame({"perturbation": labels}))
    adata.obs_names = [f"c{i}" for i in range(len(labels))]
    adata.var_names = [f"gene{i}" for i in range(N_GENES)]
    return adata, changes


def judge(adata: ad.AnnData, share: float, seed: int, folder: Path, options: dict[str, object]) -> pd.DataFrame:
    """Fit without the doubles that are judged, and predict those."""
    label = adata.obs["perturbation"].to_numpy()
    doubles = sorted({name for name in label if "+" in name})
    held = sorted(np.random.default_rng([seed, 22]).permutation(doubles)[int(share * len(doubles)) :])
    judged = np.isin(label, held)
    run = crlseq.fit(adata[~judged].copy(), folder, seed=seed, bootstrap=0, force=True, **options)  # type: ignore[arg-type]
    found = crlseq.evaluate(run, adata[judged | (label == "control")].copy()).summary
    found = found[found["metric"].isin(["l2", "pearson_delta"]) & found["predictor"].isin(SHOWN)]
    table = found.pivot(index="predictor", columns="metric", values="mean").reset_index()
    law, rows = run.model.law, []
    free = torch.zeros_like(law.mean)
    variants = {"the model": law, "without terms": replace(law, terms=law.terms[:0], term_of=law.term_of[:0], mean=free),
                "equations alone": None}  # fmt: skip
    for name, variant in variants.items():
        run.model.law = variant
        rows.append({"predictor": name, **scores(adata, label, run, held)})
    about = {"beta": float(law.factors[0]), "gamma": float(law.factors[1]), "terms": len(law.terms)}
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True).assign(**about)


def scores(adata: ad.AnnData, label: np.ndarray, run: crlseq.Run, held: Sequence[str]) -> dict[str, float]:
    """L2 and Pearson delta of predicted doubles, and shares of measured changes in intervals of 50, 80 and 95 %."""
    virtual = run.predict(held, n_cells=500)
    columns, record = adata.var_names.get_indexer(virtual.var_names), run.preprocessing

    def mean(name: str) -> np.ndarray:
        return np.asarray(record.apply(adata[label == name].X).mean(0)).ravel()[columns]

    control = mean("control")
    change_of = {frozenset(name.split("+")): mean(name) - control for name in held}
    names = virtual.uns["crlseq_prediction"]["perturbations"]
    change = np.stack([change_of[frozenset(name.split("+"))] for name in names])
    predicted, high = (np.asarray(virtual.varm[f"crlseq_effect{end}"]).T for end in ("", "_upper"))
    z = np.abs(change - predicted) / (high - predicted) * norm.ppf(0.975)
    top = np.take_along_axis(z, np.argsort(-np.abs(change), 1)[:, :TOP], 1)
    found = {
        "l2": float(np.linalg.norm(predicted - change, axis=1).mean()),
        "pearson_delta": float(np.mean([np.corrcoef(p, c)[0, 1] for p, c in zip(predicted, change, strict=True)])),
    }
    for level in (0.5, 0.8, 0.95):
        bound = norm.ppf((1 + level) / 2)
        found |= {f"in {level:.0%}": float((z <= bound).mean()), f"top in {level:.0%}": float((top <= bound).mean())}
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Simulate, fit, predict, write."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark_combinations", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="screens of each kind [2]")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.0, 0.3], help="of the doubles that are measured [0 0.3]"
    )
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the cells, at most [100]")
    given = parser.parse_args(words)
    given.output.mkdir(parents=True, exist_ok=True)
    options, tables = {"epochs": given.epochs, "threads": given.threads}, []
    for kind in given.kinds:
        for seed in range(given.seeds):
            adata, _ = screen(kind, seed)
            for share in given.shares:
                found = judge(adata, share, seed, given.output / "run", options)
                tables.append(found.assign(kind=kind, seed=seed, share=share))
                pd.concat(tables).to_csv(given.output / "combinations.csv", index=False)
                print(f"{kind} {seed}, {share:.0%} measured\n{found.round(3).to_string(index=False)}", flush=True)


if __name__ == "__main__":
    main()
