"""Virtual cells of a finished run: what fitted perturbations and their combinations would do to control cells.

A control cell x is encoded to its noise z (abduction), the equations of the targeted programs are changed (action) and
the latents decoded (prediction); see `crlseq.model.discrepancy_vae`. `predict` draws z from its posterior; with
``counterfactual`` z is the posterior mean, so that every cell has one answer, and the answers are judged
(`crlseq.prediction.counterfactual`).

As in an experiment, some cells escape: a perturbation hits a virtual cell with its penetrance, and each part of a
combination by itself. Means and effects are exact means of this mixture, whichever cells are drawn to be hit. With
``hit_cells``, and of counterfactuals, all cells are hit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from crlseq.data.contexts import levels_of
from crlseq.data.controls import is_named
from crlseq.data.guides import with_guide_labels
from crlseq.data.matrix import Screen, open_screen
from crlseq.data.perturbations import read_perturbations
from crlseq.data.preprocess import align
from crlseq.errors import InputError, UsageError
from crlseq.model.combination_law import Group
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.prediction.counterfactual import counterfactual_quality
from crlseq.prediction.intervals import COVERS, COVERS_NOT, combination_errors, effect_errors, shift_errors
from crlseq.prediction.labels import Request, understand
from crlseq.run.run import Run

N_CELLS = 500
NORMAL_QUANTILE = 1.959964  # of a two-sided interval of 95 %
TOP = 10  # genes that are named


@torch.no_grad()
def predict(
    run: Run,
    perturbations: str | Sequence[str],
    *,
    source: str | Path | ad.AnnData | None = None,
    n_cells: int | None = None,
    hit_cells: bool = False,
    counterfactual: bool = False,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> ad.AnnData:
    """Virtual cells under perturbations and combinations of perturbations that were fitted, or whose genes have vectors.

    Parameters
    ----------
    perturbations
        Labels such as ``"A"`` or ``"A+B"``; parts in any order, joined as in the fitted labels or by a usual separator.
    source
        Cells to start from, with the fitted kind of values: a file or AnnData. If it has the run's column of
        perturbations, its control cells. Genes are found by name; up to half may be missing, and are then given their
        mean over the fit's controls. None takes the control cells of the run folder.
    n_cells
        Control cells to draw, from all batches in proportion; the same for every perturbation. None takes 500, or all
        where there are fewer. A cell is used twice only if more are asked for than there are.
    hit_cells
        Hit cells alone. By default as many cells escape, and stay control cells, as the perturbation's penetrance says.
    counterfactual
        The posterior mean in place of a draw, the original cells beside the virtual ones, and the quality of
        the counterfactuals; all cells are hit.
    seed
        Of the cells that are drawn, and of their noise. What one perturbation gives does not depend on the others asked for.
    note
        Told what a user should know about this prediction; the notes are in the result as well.

    Returns
    -------
    AnnData of cells x fitted genes in the space of the fit (log-normalised for counts; a cell's values can fall below 0,
    since the change of a program is added to them):

    ``X`` float32. ``obs``: ``perturbation`` (and the same under the run's own key), ``cell`` (the cell that it started
    from), ``predicted``, ``hit`` (whether any perturbation of the label hit the cell), and ``counterfactual`` (False: the
    cell as it was measured) if asked for.
    ``obsm["X_crlseq"]``: latents. ``var["control_mean"]`` and ``varm``, with one column per perturbation, named by
    ``uns["crlseq_prediction"]["perturbations"]``: ``crlseq_mean``, ``crlseq_effect`` (mean of the virtual cells less
    that of the same cells without a perturbation: the real controls; of a model without abducted noise, as decoded), ``crlseq_effect_lower`` and ``crlseq_effect_upper`` (95 %).
    ``uns["crlseq_prediction"]["summary"]``: one row per perturbation.

    Raises
    ------
    InputError
        If a perturbation was neither fitted nor has a vector, is the control or is named twice in one label; if there are no control cells, or more than half of the fitted genes are missing.
    UsageError
        If no perturbation is asked for, fewer than one cell, or more counterfactuals than there are cells.
    """
    requests, notes = understand(run, [perturbations] if isinstance(perturbations, str) else list(perturbations))
    if n_cells is not None and n_cells < 1:
        raise UsageError(f"{n_cells} cells were requested.", "Request at least one.")
    x, cells = _start(run, source, n_cells, counterfactual, seed, notes, requests)
    for text in notes:
        note(text)
    unseen = sorted({name for request in requests for name in request.unseen})
    wider, rows_of = run.with_unseen(unseen)
    # float32 would leave rounding errors where nothing is to change.
    models = [copy.deepcopy(found).double() for found in ((run.model, wider) if unseen else (run.model,))]
    if hit_cells or counterfactual:
        for model in models:
            model.penetrance.fill_(1.0)
    control = torch.from_numpy(x.astype(float))[None]
    scale = torch.tensor([program.scale for program in run.facts.programs], dtype=control.dtype)
    eps = torch.randn((1, len(x), len(scale)), generator=_generator(seed, 0), dtype=control.dtype)
    # Combinations share parts, whose errors are computed once.
    errors = [cache(partial(_errors, model, control, _shift_errors(run, models, control), seed)) for model in models]
    answers = []
    for request in requests:
        model, of_rows = models[bool(request.unseen)], errors[bool(request.unseen)]
        perturbed = torch.tensor([[*request.parts, *(row for name in request.unseen for row in rows_of[name])]])
        answers.append(_answer(request, model, control, perturbed, None if counterfactual else eps, of_rows, seed))
        if counterfactual:
            answers[-1].row.update(counterfactual_quality(model, control, perturbed, scale))
    blocks, latents, hit = ([getattr(answer, name) for answer in answers] for name in ("virtual", "latents", "hit"))
    if counterfactual:  # after the real ones
        real = x, models[0].latents(control)[0].numpy(), np.zeros(len(x), dtype=bool)
        blocks, latents, hit = ([own, *made] for own, made in zip(real, (blocks, latents, hit), strict=True))
    names, genes = [request.name for request in requests], run.preprocessing.gene_names
    called = {} if genes.symbol_column is None else {"symbol": genes.symbols}
    result = ad.AnnData(
        np.concatenate(blocks),
        obs=_obs(run, names, cells, counterfactual).assign(hit=np.concatenate(hit)),
        var=pd.DataFrame(called, index=pd.Index(genes.index, dtype=object)),
    )
    result.obsm["X_crlseq"] = run.facts.in_units(np.concatenate(latents)).astype(np.float32)
    means = np.stack([answer.means for answer in answers], 2)  # (4, G, requests)
    for name, values in zip(("mean", "effect", "effect_lower", "effect_upper"), means, strict=True):
        result.varm[f"crlseq_{name}"] = values
    result.var["control_mean"] = control[0].mean(0).numpy()
    summary = pd.DataFrame([answer.row for answer in answers], index=pd.Index(names, dtype=object, name="perturbation"))
    result.uns["crlseq_prediction"] = {
        "perturbations": np.array(names, dtype=object), "summary": summary,
        "n_cells": len(x), "seed": seed, "interval": f"95 % over {COVERS}; {COVERS_NOT}",
        "notes": np.array(notes, dtype=object), "version": run.facts.version,
    }  # fmt: skip
    return result


def top_changes(virtual: ad.AnnData, perturbation: str) -> pd.DataFrame:
    """``gene, change, error`` of at most ten genes with the largest absolute effects, the largest first; fewer where fewer change.

    ``virtual`` is what `predict` returned, ``perturbation`` one of its predictions. ``change`` is
    in the fit's values, as that of ``effects.csv``: of natural logarithms, unless values are continuous. ``error`` is the
    standard error, from the half width of the 95 % interval.
    """
    place = list(virtual.uns["crlseq_prediction"]["perturbations"]).index(perturbation)
    effect, lower, upper = (
        np.asarray(virtual.varm[f"crlseq_{name}"])[:, place] for name in ("effect", "effect_lower", "effect_upper")
    )
    names = virtual.var.get("symbol", virtual.var_names)
    first = np.argsort(-np.abs(effect), kind="stable")[:TOP]
    first = first[effect[first] != 0]
    error = (upper - lower) / (2 * NORMAL_QUANTILE)
    return pd.DataFrame({
        "gene": np.asarray(names, dtype=object)[first], "change": effect[first], "error": error[first],
    })  # fmt: skip


@dataclass(frozen=True)
class _Answer:
    """What is predicted of one request."""

    virtual: np.ndarray  # (n, G) float32
    latents: np.ndarray  # (n, p)
    hit: np.ndarray  # (n,) bool
    means: tuple[np.ndarray, ...]  # mean, effect, and its lower and upper bound, (G,) each
    row: dict[str, Any]  # of the summary


def _shift_errors(run: Run, models: Sequence[DiscrepancyVAE], control: Tensor) -> np.ndarray:
    """Of all rows of the last model; NaN of unseen perturbations."""
    found = shift_errors(run, models[0].encoder(control)[1].mean((0, 1)).numpy())
    return np.append(found, np.full(len(models[-1].scm.shift) - len(found), np.nan))


def _errors(model: DiscrepancyVAE, control: Tensor, shift_error: np.ndarray, seed: int, rows: Group) -> Tensor:
    """`effect_errors` of perturbations by their rows."""
    return effect_errors(model, control, torch.tensor([rows]), shift_error, _generator(seed, 1))


def _answer(
    request: Request,
    model: DiscrepancyVAE,
    control: Tensor,
    perturbed: Tensor,
    eps: Tensor | None,
    errors: Callable[[Group], Tensor],
    seed: int,
) -> _Answer:
    """Virtual cells of control cells (1, n, G) under perturbations (1, M); ``errors`` are those of rows of the model alone."""
    combined = combination_errors(model, model.encoder(control)[0][0], perturbed, errors)
    error = (errors(tuple(perturbed[0].tolist())) if combined is None else combined).numpy()
    uniform = torch.rand(control.shape[1], generator=_generator(seed, 2), dtype=control.dtype)
    virtual, expected = torch.empty_like(control[0]), torch.zeros_like(control[0, 0])
    latents, hit = torch.empty((len(uniform), len(model.scm.graph)), dtype=control.dtype), torch.zeros(len(uniform))
    for chance, kind, own in model.mixture(perturbed[0], uniform):
        output = model(control, kind, eps)
        expected += chance * output.virtual[0].mean(0)
        virtual[own], latents[own], hit[own] = output.virtual[0, own], output.latents[0, own], float((kind >= 0).any())
    mean = expected.numpy()
    unperturbed = model(control, torch.full_like(perturbed[:, :1], -1), eps).virtual[0].mean(0)
    effect, half = mean - unperturbed.numpy(), NORMAL_QUANTILE * error
    row: dict[str, Any] = {
        "n_parts": len(request.parts) + len(request.unseen), "programs": request.programs, "seen": request.seen,
        "effect_l2": float(np.linalg.norm(effect)), "n_genes_changed": int((np.abs(effect) > half).sum()),
    }  # fmt: skip
    means = (mean, effect, effect - half, effect + half)
    return _Answer(virtual.numpy().astype(np.float32), latents.numpy(), hit.bool().numpy(), means, row)


def _generator(seed: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 9, purpose]).generate_state(1)[0]))


def _start(
    run: Run,
    source: str | Path | ad.AnnData | None,
    n_cells: int | None,
    paired: bool,
    seed: int,
    notes: list[str],
    requests: Sequence[Request],
) -> tuple[np.ndarray, np.ndarray]:
    """Control cells to start from, (n, G) float32 in the space of the fit, and their names (n,); adds to `notes`."""
    record, own = run.preprocessing, source is None
    if run.path is None and own:
        raise InputError("This run was never written to a folder.", "Give the cells to start from.")
    source = run.folder / "crlseq.h5ad" if source is None else source
    with open_screen(source, record.layer) as screen:
        with nullcontext() if run.path is None and run.source is None else run.screen() as fitted:
            alignment, about = align(record, screen, fitted)
        if len(alignment.present) < alignment.n_fitted and run.path is None:
            record.columns(screen)  # nothing to fill them with: says which are missing
        notes += about
        controls = _of_context(run, screen, requests, _controls(run, screen, source, own, notes), notes)
        wanted = min(N_CELLS, len(controls)) if n_cells is None else n_cells
        if wanted > len(controls):
            if paired:
                raise UsageError(
                    f"{wanted} counterfactuals were requested, but there are only {len(controls)} control cells.",
                    "Each cell has one counterfactual: lower --n-cells.",
                )
            notes.append(f"There are only {len(controls)} control cells, so some are used more than once.")
        key = run.facts.config.data.batch_key
        batch = screen.obs[key].astype(str).to_numpy() if key in screen.obs else np.zeros(screen.n_cells)
        rng = np.random.default_rng([seed, 7])
        index, again = np.unique(draw_controls(controls, batch, wanted, rng), return_inverse=True)
        block = screen.rows(index)
        record.check(block, screen.source)
        x = alignment.expression(record, block).toarray()
        if len(alignment.present) < alignment.n_fitted:
            x = alignment.filled(x, control_mean(run))
        return x[again], screen.obs.index.astype(str).to_numpy()[index][again]


def _of_context(
    run: Run, screen: Screen, requests: Sequence[Request], controls: np.ndarray, notes: list[str]
) -> np.ndarray:
    """The controls of the context that is asked for, or all where several are."""
    about, asked = run.facts.contexts, run.interventions
    contexts = {asked["context"].iloc[part] for request in requests for part in request.parts} if about else set()
    if about is None or about.key not in screen.obs or not contexts:
        return controls
    if len(contexts) > 1:
        notes.append("Cells start from controls of all contexts; ask for perturbations of one to start from its own.")
        return controls
    names, code = levels_of(screen.obs[about.key])
    own = controls[code[controls] == names.index(context)] if (context := contexts.pop()) in names else controls[:0]
    if not len(own):
        raise InputError(
            f"{screen.source} has no control cells in context {context!r}.",
            "Give cells of the context that you ask for.",
        )
    return own


def control_mean(run: Run) -> np.ndarray:
    """(G,) mean expression over the control cells of the run's folder, in the space of the fit."""
    return np.asarray(control_cells(run)[0].mean(0)).ravel()


def control_cells(run: Run) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Expression (n, G) of the control cells of the run's folder, in the space of the fit, and their batches (n,), as text."""
    record, key = run.preprocessing, run.facts.config.data.batch_key
    with run.screen() as fitted:
        own = _controls(run, fitted, run.folder / "crlseq.h5ad", True, [])
        rows = record.apply(fitted.rows(own))[:, record.columns(fitted)]
        batch = fitted.obs[key].astype(str).to_numpy()[own] if key in fitted.obs else np.zeros(len(own)).astype(str)
        return sparse.csr_matrix(rows), batch


def _controls(run: Run, screen: Screen, source: str | Path | ad.AnnData, own: bool, notes: list[str]) -> np.ndarray:
    """Indices of the control cells of a screen; of every cell where other cells bear no label."""
    key, labels = run.facts.perturbation_key, run.facts.controls
    config = run.config.data
    obs = with_guide_labels(screen, source, config, key, run.facts.control_label)
    if key not in obs:
        notes.append(f"{screen.source} has no column {key!r}, so every cell is treated as unperturbed.")
        return np.arange(screen.n_cells)
    try:
        found = np.flatnonzero(read_perturbations(obs, key, labels, config.separator).is_control)
    except InputError:  # no screen: without perturbations beside the control, or without a control
        if own:
            raise
        texts = obs[key].astype(str).str.strip()
        found = np.flatnonzero(texts.map(lambda text: is_named(text, labels)).to_numpy(dtype=bool))
    if not len(found):
        raise InputError(
            f"{screen.source}: no cell is labelled {labels[0]!r} in {key!r}.",
            "Virtual cells start from control cells: provide some, or omit the column if all cells are controls.",
        )
    if not own and len(found) < screen.n_cells:
        notes.append(f"{len(found)} of the {screen.n_cells} cells of {screen.source} are controls and are used.")
    return found


def draw_controls(controls: np.ndarray, batch: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Ascending indices (n,) of controls, from every batch in proportion (largest remainder).

    Each control is drawn as often as any other, or once more. ``batch`` (cells,) is of every cell.
    """
    rounds, rest = divmod(n, len(controls))
    names, of = np.unique(batch[controls], return_inverse=True)
    share = np.bincount(of, minlength=len(names)) * rest / len(controls)
    quota = np.floor(share).astype(np.int64)
    quota[np.argsort(quota - share, kind="stable")[: rest - quota.sum()]] += 1
    drawn = [rng.choice(controls[of == b], size, replace=False) for b, size in enumerate(quota)]
    return np.sort(np.concatenate([*[controls] * rounds, *drawn]))


def _obs(run: Run, names: list[str], cells: np.ndarray, counterfactual: bool) -> pd.DataFrame:
    """Labels of the virtual cells, after the real ones of counterfactuals."""
    labels = [run.facts.control_label] * counterfactual + names
    cell = np.tile(cells.astype(object), len(labels))
    perturbation = np.repeat(np.array(labels, dtype=object), len(cells))
    index = pd.Series([f"{c}:{label}" for c, label in zip(cell, perturbation, strict=True)], dtype=object)
    again = index.groupby(index).cumcount()
    index = index.where(again == 0, index + "#" + (again + 1).astype(str))
    real = np.arange(len(cell)) < len(cells) * counterfactual
    columns: dict[str, Any] = {
        key: pd.Categorical(perturbation, categories=list(dict.fromkeys(labels)))
        for key in ("perturbation", run.facts.perturbation_key)
    }
    columns |= {"cell": cell, "predicted": ~real}
    if counterfactual:
        columns["counterfactual"] = ~real
    return pd.DataFrame(columns, index=pd.Index(index, dtype=object))
