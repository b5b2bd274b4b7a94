"""Columns that --covariates asks for: how they are read, and what is refused."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from crlseq.config import DataConfig
from crlseq.data.dataset import read_data
from crlseq.errors import InputError, UsageError
from tests.support import small_screen


@pytest.fixture
def screen() -> ad.AnnData:
    """280 cells, 100 of them controls, with columns of every kind."""
    adata = small_screen(seed=0, n_batches=2)
    rng, n = np.random.default_rng(0), len(adata)
    control = adata.obs["perturbation"].eq("control").to_numpy()
    donor = rng.choice(["d1", "d2", "d3"], n)
    adata.obs = adata.obs.assign(
        donor=donor, age=rng.normal(40, 5, n), S_score=rng.normal(size=n), clusters=rng.integers(0, 4, n), one="same",
        holes=np.where(np.arange(n) % 50 == 3, np.nan, 1.0 * np.arange(n)), endless=np.where(np.arange(n) == 7, np.inf, 1.0),
        many=rng.integers(0, 40, n).astype(str), lonely=np.where(~control & (rng.random(n) < 0.5), "x", donor),
        guide=adata.obs["perturbation"].astype(str) + rng.choice(["_1", "_2"], n), apart=control * 10.0 + rng.random(n),
        constant_in_controls=np.where(control, 0.0, rng.random(n)), plate=adata.obs["batch"].map({"0": "p", "1": "q"}).astype(object)
        if set(adata.obs["batch"]) == {"0", "1"} else adata.obs["batch"].astype(str) + "x",
    )  # fmt: skip
    adata.obs["a,b"] = rng.normal(size=n)
    return adata


def test_what_columns_are(screen: ad.AnnData) -> None:
    data = read_data(screen, DataConfig(covariates=("donor, age", "a,b", "clusters", "S_score", "log-depth")), 0)
    found = {column.name: column for column in data.covariates}
    assert [*found] == ["donor", "age", "a,b", "clusters", "S_score", "log-depth"]
    assert found["donor"].levels == ("d1", "d2", "d3") and found["clusters"].levels == ("0", "1", "2", "3")
    assert found["age"].levels == () and np.array_equal(found["age"].values, screen.obs["age"])
    assert [column.name for column in found.values() if column.outcome] == ["clusters", "S_score"]
    totals = np.asarray(screen.X.sum(1)).ravel()
    assert np.allclose(found["log-depth"].values, np.log(totals))
    # What is computed gives way to a column of that name.
    screen.obs["log-depth"] = np.arange(len(screen))[::-1] % 97 * 1.0
    own = read_data(screen, DataConfig(covariates=("log-depth",)), 0).covariates[0]
    assert np.array_equal(own.values, screen.obs["log-depth"])


@pytest.mark.parametrize(
    ("names", "batch_key", "says"),
    [
        ("absent", None, "The cells have no column 'absent' for --covariates"),
        ("holes", None, "Cells without a value in the covariate 'holes': 6."),
        ("one", None, "The covariate 'one' is the same in every cell."),
        ("endless", None, "Cells whose covariate 'endless' is infinite: 1."),
        ("perturbation", None, "The covariate 'perturbation' is the column of perturbations."),
        ("guide", None, "The covariate 'guide' and the perturbation tell each other"),
        ("apart", None, "The covariate 'apart' tells control cells from all others"),
        ("constant_in_controls", None, "The covariate 'constant_in_controls' is the same in every control cell."),
        ("batch", "batch", "The covariate 'batch' is the same in all cells of one 'batch'"),
        ("plate", "batch", "The covariate 'plate' is the same in all cells of one 'batch'"),
        ("many", None, "The covariates have 39 numbers and levels to compare, too many for 100 control cells."),
        ("lonely", None, "Levels of the covariate 'lonely' with fewer than 3 control cells: x."),
        ("cell-cycle", None, "this screen has 0 of 43 genes of S_score and 0 of 54 genes of G2M_score."),
    ],
)
def test_what_tells_nothing_is_refused(screen: ad.AnnData, names: str, batch_key: str | None, says: str) -> None:
    with pytest.raises(InputError) as refusal:
        read_data(screen, DataConfig(covariates=(names,), batch_key=batch_key), 0)
    assert says in str(refusal.value) and refusal.value.hint


def test_a_number_that_the_label_tells(screen: ad.AnnData) -> None:
    screen.obs["dose"] = pd.factorize(screen.obs["perturbation"].astype(str), sort=True)[0] * 1.5
    with pytest.raises(InputError, match="'dose' and the perturbation tell each other"):
        read_data(screen, DataConfig(covariates=("dose",)), 0)


def test_depth_of_values_that_are_no_counts() -> None:
    adata = small_screen(noise="gaussian", seed=0)
    with pytest.raises(InputError, match="log-depth is that of counts, and the values here are continuous"):
        read_data(adata, DataConfig(covariates=("log-depth",)), 0)


def test_options_that_contradict(screen: ad.AnnData) -> None:
    with pytest.raises(UsageError, match="--covariates names 'age' twice"):
        read_data(screen, DataConfig(covariates=("age", "donor,age")), 0)
    with pytest.raises(UsageError, match="--remove-covariate-effects needs covariates"):
        read_data(screen, DataConfig(remove_covariate_effects=True), 0)
