"""What became of a screen: read as it should be, refused in one sentence, or a fault."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np

import crlseq
from crlseq.config import DataConfig
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.inspection import describe
from crlseq.errors import InputError
from crlseq.run.anndata import write_annotated
from tests.faults.screens import Made
from tests.support import files_of, invoke

Outcome = dict[str, Any]


def check_sentence(error: InputError) -> None:
    """One sentence without a line break, and a hint."""
    assert error.exit_code == 3
    assert error.message.endswith(".") and "\n" not in error.message.replace("\\n", ""), error.message
    assert not re.search(r"[a-z)]\. [A-Z]", error.message), error.message
    assert error.hint and len(error.message) < 1000


def read(source: Path | ad.AnnData, made: Made | None = None) -> Outcome:
    """Read a screen as ``fit`` does; `made` says what has to come out."""
    problems = None
    try:
        problems = describe(source, DataConfig())["problems"]
    except InputError as error:
        check_sentence(error)
    refusal, data = None, None
    try:
        data = read_data(source, DataConfig(), 0)
    except InputError as error:
        refusal = error
    if refusal is not None or data is None:
        assert refusal is not None
        check_sentence(refusal)
        # `check` promises that the command that it prints works, but for the choice of genes.
        assert problems != [] or "too few genes to fit" in refusal.message, f"check saw nothing: {refusal}"
        return {"outcome": "refused", "detail": refusal.message}
    assert not problems, problems
    check_numbers(data)
    if made is not None:
        check_against(data, made)
    if isinstance(source, Path):
        check_written(source, data)
    return {"outcome": "read", "detail": f"{data.preprocessing.values}, {len(data.conditions)} conditions"}


def check_numbers(data: PerturbSeqData) -> None:
    """Finite, of one size, and enough of everything."""
    n = len(data.cell_names)
    assert data.x.shape == (n, len(data.genes)) and data.n_genes >= 2
    assert len(data.condition) == len(data.split) == len(data.batch) == n
    assert np.isfinite(data.dense(np.arange(n))).all()
    assert data.condition.max() < len(data.conditions)
    assert len(data.cells(0, splits.TRAIN)) >= 1
    assert all(0 <= part < len(data.perturbation_names) for parts in data.conditions for part in parts)


def check_against(data: PerturbSeqData, made: Made) -> None:
    """Labels and numbers, worked out from what was made by other means."""
    mark = (data.labels.separator or "").strip()
    for text, c in zip(made.labels, data.condition, strict=True):
        if c < 0 or data.labels.key != made.column:  # another column had a better name
            continue
        assert text is not None
        parts = {part.strip() for part in (text.split(mark) if mark else [text])} - {data.labels.control_label}
        assert parts == {data.perturbation_names[part] for part in data.conditions[c]}, text
    used = data.split == splits.TRAIN
    columns = [int(gene) for gene in np.flatnonzero((made.x != 0).any(0))]
    assert len(columns) == data.n_genes
    expected = made.x
    if data.preprocessing.values == "counts":
        totals = made.x.sum(1)
        assert data.preprocessing.target_sum == np.median(totals[used])
        expected = np.log1p(made.x / np.maximum(totals, 1e-300)[:, None] * np.median(totals[used]))
    np.testing.assert_allclose(data.dense(np.arange(len(made.x))), expected[:, columns], rtol=1e-5, atol=1e-30)


def check_written(source: Path, data: PerturbSeqData) -> None:
    """The annotated copy can be written, and has the new keys."""
    path = source.with_name("annotated.h5ad")
    n = len(data.cell_names)
    keys = {"obsm": {"X_crlseq": np.zeros((n, 2), dtype=np.float32)}, "obs": {"crlseq_split": data.split},
            "uns": {"crlseq": {"text": "x"}}}  # fmt: skip
    write_annotated(source, path, keys)
    with h5py.File(path, "r") as handle:
        assert (ad.io.read_elem(handle["obs"])["crlseq_split"].to_numpy() == data.split).all()
        assert handle["obsm/X_crlseq"].shape == (n, 2)


def fitted(path: Path) -> Outcome:
    """Fit through the command line; the run is whole and holds no NaN where a number should be."""
    folder = path.with_name("RUN")
    for left in (folder, folder.with_name("RUN.partial")):
        shutil.rmtree(left, ignore_errors=True)
    answer = invoke("fit", path, "--output", folder, "--method", "linear", "--bootstrap", 0)
    assert "Traceback" not in answer.err and answer.code in (0, 3), answer.err
    if answer.code == 3:
        assert not folder.exists()
        return {"outcome": "refused", "detail": answer.err.splitlines()[-2]}
    assert {file.name for file in folder.iterdir()} >= files_of(folder) - {"resume.pt"}
    run = crlseq.load(folder)
    assert np.isfinite(run.programs[["loading", "total_effect"]].to_numpy()).all()
    claims = run.interventions[run.interventions["program"] != ""]
    assert np.isfinite(claims[["weight", "shift", "retention", "noise_scale"]].to_numpy()).all()
    assert np.isfinite(run.evaluation[["mmd2", "mmd2_no_change", "l2", "l2_no_change"]].to_numpy()).all()
    assert np.isfinite(run.adjacency).all() and np.isfinite(run.edges["weight"].to_numpy(dtype=float)).all()
    with h5py.File(folder / "crlseq.h5ad") as handle:
        assert np.isfinite(handle["obsm/X_crlseq"][:]).all()
    try:
        ad.read_h5ad(path)
    except Exception:  # what was not read for the fit may be damaged, and is in the copy as well
        return {"outcome": "read", "detail": "fitted, a damaged part left as it was"}
    ad.read_h5ad(folder / "crlseq.h5ad")
    return {"outcome": "read", "detail": f"fitted, {run.info['n_latents']} programs"}
