"""Labels of the real screens; skipped where they are absent."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from crlseq.data.perturbations import candidates, read_perturbations
from tests.paths import shared


def real(name: str) -> pd.DataFrame:
    anndata = pytest.importorskip("anndata")
    screen = anndata.read_h5ad(shared(f"data/{name}"), backed="r")
    obs: pd.DataFrame = screen.obs
    screen.file.close()
    return obs


def test_papalexi() -> None:
    p = read_perturbations(real("papalexi2021_thp1_20729x299.h5ad"))
    assert (p.key, p.control_label, p.separator, p.style) == ("perturbation", "control", None, "pertpy/scPerturb")
    names = "ATF2 BRD4 CAV1 CD86 CMTM6 CUL3 ETV7 IFNGR1 IFNGR2 IRF1 IRF7 JAK2 MARCH8 MYC NFKBIA PDCD1LG2 POU2F2 SMAD4 "
    names += "SPI1 STAT1 STAT2 STAT3 STAT5A TNFRSF14 UBE2L6"
    assert p.names == tuple(names.split())
    assert p.condition_names == ("control", *p.names)
    assert p.is_control.sum() == 2386
    assert (p.condition == 1 + p.names.index("STAT1")).sum() == 444
    assert p.dropped == {}


@pytest.mark.parametrize("key", [None, "condition", "perturbation"])
def test_norman(key: str | None) -> None:
    obs = real("norman2019_k562_perturbench_3375x500.h5ad")
    p = read_perturbations(obs, key)
    assert p.key == (key or "perturbation")
    assert (p.control_label, p.separator) == ("control", "+")
    singles = "FOXO4 HK2 IER5L KLF1 KMT2A MAP2K3 MAP2K6 MAP3K21 MAP4K3 MAP4K5 MAPK1 MIDN NIT1 PLK4 SGK1 SLC38A2 TGFBR2 "
    singles += "TMSB4X"
    only_in_doubles = "BPGM CBL CEBPE CNN1 FOXL2 HOXB9 PTPN12 PTPN9 RUNX1T1 SAMD1 SET TBX3 ZBTB10"
    assert p.condition_names[:19] == ("control", *singles.split())
    assert [len(c) for c in p.conditions[19:]] == [2] * 15
    assert p.names == tuple(sorted(f"{singles} {only_in_doubles}".split()))
    assert "KLF1+SET" in p.condition_names
    assert "PTPN12+SAMD1" in p.condition_names
    assert p.is_control.sum() == 100
    assert (p.condition >= 0).all()
    assert "condition_cell_type" not in {c.key for c in candidates(obs)}


def test_adamson() -> None:
    p = read_perturbations(real("adamson2016_trishift_320x160.h5ad"))
    assert (p.key, p.control_label, p.style) == ("condition", "ctrl", "GEARS")
    assert " ".join(p.names) == "GBF1 HSPA5 HSPA9 IARS2 IER3IP1 SAMM50 SCYL1 SEC61A1 TARS YIPF5"
    assert np.bincount(p.condition).tolist() == [80] + [24] * 10


def test_gears_norman() -> None:
    obs = real("norman2019_gears_tiny_50x50.h5ad")
    p = read_perturbations(obs)
    assert [c.key for c in candidates(obs)] == ["condition"]
    assert (p.key, p.control_label, p.separator, p.style) == ("condition", "ctrl", "+", "GEARS")
    assert sum(len(c) == 1 for c in p.conditions) == 31
    assert sum(len(c) == 2 for c in p.conditions) == 10
    assert {"COL1A1", "ETS2", "ELMSAN1+MAP2K6", "ETS2+IGDCC3"} <= set(p.condition_names)
    assert not any("ctrl" in name for name in p.names)
    assert np.bincount(p.condition)[[0, p.condition_names.index("COL1A1")]].tolist() == [6, 2]
