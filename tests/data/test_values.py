"""Kinds of values: counts, logarithms and others, as they are found in files, and as they are made here."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import crlseq
from crlseq.config import DataConfig
from crlseq.data.dataset import read_data
from crlseq.data.matrix import open_screen
from crlseq.data.values import Values, better_layers, kind_of_values, scan
from crlseq.errors import InputError


def values(x: np.ndarray, asked: str = "auto", base: float | None = None) -> Values:
    uns = {} if base is None else {"log1p": {"base": base}}
    with open_screen(ad.AnnData(np.asarray(x), uns=uns)) as screen:
        return kind_of_values(screen, scan(screen), asked)


def kind(x: np.ndarray, asked: str = "auto") -> str:
    return values(np.asarray(x, dtype=float), asked).kind


RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(3.0, (8, 5)).astype(float)
COUNTS[0] = [0, 1, 2, 5, 0]


def test_kinds() -> None:
    assert kind(COUNTS) == "counts"
    assert kind(np.log1p(COUNTS)) == "log"
    assert kind(RNG.standard_normal((8, 5))) == "continuous"
    assert kind(COUNTS, "log") == "log"
    assert kind(np.log1p(COUNTS), "continuous") == "continuous"
    assert kind(np.minimum(COUNTS, 1), "counts") == "counts"
    assert kind(-COUNTS, "continuous") == "continuous"


@pytest.mark.parametrize(
    ("x", "asked"),
    [
        (np.zeros((3, 3)), "auto"),
        (np.minimum(COUNTS, 1), "auto"),
        (COUNTS - 1, "auto"),
        (COUNTS - 1, "counts"),
        (np.log1p(COUNTS) - 0.01, "log"),
        (np.argsort(RNG.random((8, 5)), axis=1) + 1, "auto"),
        (RNG.integers(1, 12, (8, 5)), "auto"),
        (np.log1p(COUNTS), "counts"),
        (COUNTS / np.arange(1, 9)[:, None] * 20.5, "auto"),
        (COUNTS * 20.5, "log"),
        (-np.log1p(COUNTS), "auto"),
    ],
)
def test_kinds_that_are_refused(x: np.ndarray, asked: str) -> None:
    with pytest.raises(InputError) as caught:
        kind(x, asked)
    assert caught.value.hint.endswith(".")


@given(hnp.arrays(np.int64, st.tuples(st.integers(2, 8), st.integers(2, 6)), elements=st.integers(0, 1000)))
@settings(max_examples=100, deadline=None)
def test_whole_numbers_are_counts_or_refused(x: np.ndarray) -> None:
    try:
        assert kind(x) == "counts"
    except InputError:
        assert x.max() <= 20 or np.ptp(x.sum(1)) == 0


def counts(seed: int, depth: float) -> np.ndarray:
    """Cells of one or two kinds with so many UMIs, half of the genes rare."""
    rng = np.random.default_rng(seed)
    genes = rng.gamma(0.5, 1.0, 300) + 1e-3
    kinds = genes * np.exp(rng.normal(0, 0.7, (2, 300)))
    share = kinds[rng.integers(0, 2, 120)] * rng.gamma(5.0, 0.2, (120, 300))
    size = depth * rng.lognormal(0, 0.4, (120, 1))
    return rng.poisson(share / share.sum(1, keepdims=True) * size).astype(float)


def normalised(x: np.ndarray, total: float = 1e4) -> np.ndarray:
    return x / np.maximum(x.sum(1, keepdims=True), 1) * total


def pseudo_aligned(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Some reads shared out between neighbouring genes."""
    moved = rng.binomial(x.astype(int), 0.03) * rng.choice([1 / 2, 1 / 3, 0.27], x.shape)
    return x - moved + np.roll(moved, 1, axis=1)


def without_ambient(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    soup = x.sum(0) / x.sum()
    return np.maximum(x - rng.uniform(0.02, 0.1, (len(x), 1)) * x.sum(1, keepdims=True) * soup, 0)


@pytest.mark.parametrize("depth", [300, 3000, 30000])
@pytest.mark.parametrize("seed", [0, 1])
def test_values_as_they_are_made(seed: int, depth: float) -> None:
    x, rng = counts(seed, depth), np.random.default_rng(seed)
    subset = np.argsort(-normalised(x).var(0))[:150]
    logs = np.log1p(normalised(x)).astype(np.float32)
    for log in (
        logs,
        logs[:, subset],
        np.log1p(x),
        np.log1p(normalised(x, 1e6)),
        np.log1p(normalised(x, np.median(x.sum(1)))),
    ):
        found = values(log)
        assert (found.kind, found.base, found.doubt) == ("log", np.e, "")
    for base in (2.0, 10.0):
        found = values((logs / np.log(base)).astype(np.float32))
        assert (found.kind, found.base) == ("log", base)
    for fractional in (pseudo_aligned(x, rng), without_ambient(x, rng), without_ambient(x, rng)[:, subset]):
        found = values(fractional)
        assert (found.kind, found.fractional) == ("counts", True)
    corrected = np.log1p(normalised(without_ambient(x, rng)))
    assert values(corrected).kind == values(corrected[:, subset]).kind == "log"
    with pytest.raises(InputError, match="without the logarithm"):
        values(normalised(x))
    scaled = (logs - logs.mean(0)) / np.maximum(logs.std(0), 1e-9)
    assert values(scaled).kind == "continuous"


def test_what_was_done_twice_is_suspected() -> None:
    logs = np.log1p(normalised(counts(0, 3000)))
    assert "normalised twice" in values(np.log1p(normalised(logs))).doubt
    assert "taken twice" in values(np.log1p(logs)).doubt


def test_the_recorded_base_of_corrected_counts_is_used() -> None:
    x = without_ambient(counts(0, 3000), np.random.default_rng(0))
    found = values(np.log1p(normalised(x)) / np.log(5), base=5.0)
    assert (found.kind, found.base) == ("log", 5.0)


def labelled(x: np.ndarray) -> ad.AnnData:
    obs = pd.DataFrame({"perturbation": ["control", "A", "B"] * (len(x) // 3)}, index=[f"c{i}" for i in range(len(x))])
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(x.shape[1])]))


def test_other_bases_become_natural_logarithms() -> None:
    logs = np.log1p(normalised(counts(0, 3000)))
    natural, binary = (read_data(labelled(x), DataConfig(), 0) for x in (logs, logs / np.log(2)))
    every = np.arange(120)
    np.testing.assert_allclose(binary.dense(every), natural.dense(every), rtol=1e-5)


def test_fractional_counts_are_not_rounded() -> None:
    x = pseudo_aligned(counts(0, 3000), np.random.default_rng(0))
    data = read_data(labelled(x), DataConfig(n_top_genes="all"), 0)
    kept = [int(gene[1:]) for gene in data.genes]
    np.testing.assert_allclose(data.counts(np.arange(120)).toarray(), x[:, kept], atol=1e-3)


def test_scaled_values_name_the_layer_that_is_better(tmp_path: Path) -> None:
    x = counts(0, 3000)
    x[1::3, 60:120] *= 3  # what A and B do
    x[2::3, 130:200] *= 3
    adata = labelled(x)
    adata.raw = adata.copy()
    logs = np.log1p(normalised(x))
    adata.X = (logs - logs.mean(0)) / np.maximum(logs.std(0), 1e-9)
    adata = adata[:, 50:250].copy()
    adata.write_h5ad(tmp_path / "scaled.h5ad")
    for source in (adata, tmp_path / "scaled.h5ad"):
        assert better_layers(source, ("raw",), None) == {"raw": "counts"}
        assert any(
            "Layer 'raw' holds counts: use --layer raw" in note for note in read_data(source, DataConfig(), 0).notes
        )
        data = read_data(source, DataConfig(layer="raw", n_top_genes="all"), 0)
        assert data.preprocessing.values == "counts" and data.preprocessing.n_genes_in_file == 300
    run = crlseq.fit(tmp_path / "scaled.h5ad", tmp_path / "run", method="linear", n_latents=2, bootstrap=0, layer="raw")
    written = ad.read_h5ad(tmp_path / "run" / "crlseq.h5ad")
    loadings = run.programs[run.programs["program"] == "P0"].set_index("gene")["loading"]
    expected = loadings.reindex(written.var_names).fillna(0.0)
    np.testing.assert_allclose(written.varm["crlseq_programs"][:, 0], expected, rtol=1e-6)
    assert written.var["crlseq_fitted"].sum() == expected.ne(0).sum() > 0
