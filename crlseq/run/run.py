"""Run: a finished fit, read from and written to its folder; what Python users hold. Needs no torch to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import networkx as nx
import numpy as np
import pandas as pd

from crlseq._version import __version__
from crlseq.config import Config
from crlseq.errors import InputError, in_a_line
from crlseq.run import columns, schema
from crlseq.run.anndata import add_effects, anndata_keys, read_cells, set_keys, write_annotated
from crlseq.run.consistency import check_consistency, read_effects
from crlseq.run.graph import ancestry, dag_graph, dag_json, declared_order, graphml
from crlseq.run.schema import RunInfo
from crlseq.run.summary import Program, describe_programs, short, summary_table
from crlseq.run.tables import effect_matrix
from crlseq.storage import runfolder as files
from crlseq.storage.csv import read_csv, write_rows
from crlseq.storage.files import refuse_links_outside
from crlseq.storage.runfolder import is_run, no_run, partial_of, replaced_by
from crlseq.storage.text import to_json

if TYPE_CHECKING:
    import anndata as ad

    from crlseq.data.matrix import Screen
    from crlseq.data.preprocess import Preprocessing
    from crlseq.model.combination_law import CombinationLaw
    from crlseq.model.discrepancy_vae import DiscrepancyVAE
    from crlseq.training.extrapolation import Extrapolation

SHOWN, WIDTH = 8, 80  # programs that a run is shown with, and characters of a line
AT_ONCE = 1024  # cells that are encoded together


@dataclass(frozen=True)
class Run:
    """A fitted screen.

    Attributes
    ----------
    info
        Contents of ``run.json``; `facts` is the same with types.
    programs
        ``program, gene, loading, total_effect, rank``; of a sparse decoder also ``anchor``.
    interventions
        ``perturbation, program, weight, shift, retention, n_cells, p_value, fdr, ...``; one row per perturbation.
    edges
        ``source, target, weight, support, identified``: the declared edges.
    history, evaluation
        Loss terms by epoch; virtual against held-out cells by condition.
    path
        The folder, None for a run that was not written.
    weights, law, cells, map
        State and architecture of the model, and its law of combination; `crlseq.run.columns.CELL_COLUMNS` by the name of the cell; from gene vectors
        to perturbations never seen, where the fit was given embeddings. None: read from the folder when first needed.
    ensemble
        ``kind, source, target, agreement, mean, sd``: what models of other seeds agree on; None for one seed.
    pathways
        ``program, gene_set, weight, ...``: what the encoder reads each program from; None where it reads all genes.
    pairs
        ``source, target, change, se, z, z_reversed, fdr, status, guards, detectable, robust``: every ordered pair of
        programs, whether the source is upstream of the target; None where targets were learned by gradient.
    second_targets
        ``perturbation, program, shift, se, z, fdr``: what perturbations shift beside their targets; None likewise.
    interactions
        ``perturbations, scope, n, term, error, fdr, similarity, masking, class``: what measured combinations do that their
        parts do not, and perturbations that act in them otherwise than alone; None without measured combinations.
    guides
        ``guide, perturbation, n_cells, strength, ...``: beside the others of their gene; None where none were read.
    arms
        ``perturbation, chromosome, arm, part, n_genes, ...``: do genes beside the target fall together? None without positions.
    covariates
        ``perturbation, covariate, level, n_cells, mean, ...``: what perturbations do to covariates; None without any.
    contexts
        ``perturbation, program, context, other, shift, ...``: do contexts differ in its effect? None without contexts.
    effect_rows
        `effects`; None: read from the folder when first needed.
    source
        The screen of a run that was not written.
    """

    info: dict[str, Any]
    programs: pd.DataFrame
    interventions: pd.DataFrame
    edges: pd.DataFrame
    history: pd.DataFrame
    evaluation: pd.DataFrame
    path: Path | None = None
    weights: tuple[dict[str, Any], dict[str, Any]] | None = field(default=None, repr=False)
    law: CombinationLaw | None = field(default=None, repr=False)
    cells: pd.DataFrame | None = field(default=None, repr=False)
    map: Extrapolation | None = field(default=None, repr=False)
    ensemble: pd.DataFrame | None = field(default=None, repr=False)
    pathways: pd.DataFrame | None = field(default=None, repr=False)
    pairs: pd.DataFrame | None = field(default=None, repr=False)
    second_targets: pd.DataFrame | None = field(default=None, repr=False)
    interactions: pd.DataFrame | None = field(default=None, repr=False)
    guides: pd.DataFrame | None = field(default=None, repr=False)
    arms: pd.DataFrame | None = field(default=None, repr=False)
    covariates: pd.DataFrame | None = field(default=None, repr=False)
    contexts: pd.DataFrame | None = field(default=None, repr=False)
    effect_rows: pd.DataFrame | None = field(default=None, repr=False)
    source: str | Path | ad.AnnData | None = field(default=None, repr=False)

    def _brief(self) -> dict[str, str]:
        """A few lines about the run, for `repr` and notebooks; text from the data on one line each."""
        facts, n = self.facts, len(self.edges)
        edges, shown = f"{n} declared edge{'s' * (n != 1)}", [*self.described.values()][:SHOWN]
        rest = facts.n_latents - len(shown)
        return {
            "input": short(facts.input.path, WIDTH),
            "perturbations": f"{len(self.interventions)}, {facts.metrics.n_detected} with a detectable effect",
            "programs": str(facts.n_latents),
            **{program.name: short(program.title, WIDTH) for program in shown},
            **({"...": f"{rest} more"} if rest else {}),
            "graph": "none" if facts.without_effect else f"{facts.identification.verdict}, {edges}",
            "folder": "not written" if self.path is None else short(self.path, WIDTH),
        }

    def __repr__(self) -> str:
        return "\n    ".join([type(self).__name__, *(f"{name}: {value}" for name, value in self._brief().items())])

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self._brief().items())
        return f"<table><caption>{type(self).__name__}</caption>{''.join(rows)}</table>"

    @cached_property
    def facts(self) -> RunInfo:
        """`info` with types."""
        return RunInfo.read(self.info)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What was done to the values, and can be done to those of other cells."""
        from crlseq.data.preprocess import Preprocessing

        try:
            return Preprocessing.from_json(self.info["preprocessing"])
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            what = f"The run folder {self.path} is damaged: preprocessing in run.json cannot be read."
            raise InputError(what, "Restore it, or fit again.") from error

    @cached_property
    def dag(self) -> nx.DiGraph[str]:
        """The declared DAG; ``dag.graph["identified"]`` says whether the data determine it."""
        return dag_graph(self.facts.programs, self.edges, self.facts.identification)

    @property
    def program_names(self) -> list[str]:
        """P0, P1, ... in topological order."""
        return [program.name for program in self.facts.programs]

    @cached_property
    def model(self) -> DiscrepancyVAE:
        """The fitted model, in evaluation mode on the CPU."""
        from crlseq.storage.checkpoint import build, load_law, load_model

        if self.weights is not None:
            model = build(*self.weights)
            model.law = self.law
            return model
        sizes = len(self.preprocessing.genes), self.facts.n_latents, len(self.interventions)
        later = ("penetrance", "control_error")[self.facts.format - 1 :]
        model = load_model(self.folder / "model.safetensors", sizes, later)
        if self.facts.combinations is not None:
            model.law = load_law(self.folder / files.COMBINATIONS, *sizes[::2])
        return model

    @cached_property
    def config(self) -> Config:
        """The configuration of the fit; InputError if this version does not have it."""
        try:
            return Config.model_validate(self.info["config"])
        except ValueError as error:
            what = f"The configuration in {self.path or 'this run'}/run.json is not one of this version."
            raise InputError(what, "Restore it, or fit again.") from error

    @cached_property
    def effects(self) -> pd.DataFrame:
        """``perturbation, gene, change, se, log2_fold_change, log2_fold_change_se, p_value, fdr, program_part, residual``:
        what each perturbation does to every gene, or of a large screen to the genes that surely change.

        InputError if the run is of a version that did not measure it, or the table is damaged.
        """
        if self.effect_rows is not None:
            return self.effect_rows
        if self.facts.format < schema.WITH_EFFECTS:
            what = f"{self.path} was fitted by crlseq {self.facts.version}, whose runs hold no effects on genes."
            raise InputError(what, "Fit again with this version.")
        return read_effects(
            self.folder / files.EFFECTS, list(self.interventions["perturbation"]), self.preprocessing.genes
        )

    @cached_property
    def extrapolation(self) -> Extrapolation | None:
        """The map from gene vectors to perturbations never seen; None without embeddings."""
        from crlseq.training.extrapolation import load_extrapolation

        stored = self.map is None and self.facts.embeddings is not None
        return load_extrapolation(self.folder / files.EMBEDDINGS) if stored else self.map

    def with_unseen(self, names: Sequence[str]) -> tuple[DiscrepancyVAE, dict[str, tuple[int, ...]]]:
        """The model with perturbations of genes that `extrapolation` knows, and the rows that each is the combination of."""
        table = self.extrapolation
        if not names or table is None:
            return self.model, {}
        return table.extended(self.model, list(self.interventions["perturbation"]), names)

    @property
    def adjacency(self) -> np.ndarray:
        """(p, p) standardised weights of all edges, declared or not; row -> column."""
        return np.asarray(self.facts.adjacency, dtype=float)

    @property
    def ancestry(self) -> pd.DataFrame:
        """``ancestor, descendant, declared, support, status``: which program is upstream of which.

        Declared by a path of declared edges or by a pair that is ``upstream``; and those that are ``likely``, or have
        support of 0.1.
        """
        return ancestry(declared_order(self.dag, self.pairs), self.pairs, self.facts.bootstrap)

    @cached_property
    def described(self) -> dict[str, Program]:
        """Every program by its name: drivers, genes, what lies up- and downstream; see `crlseq.run.summary.Program`."""
        found = describe_programs(
            self.facts, self.programs, self.interventions, self.dag, declared_order(self.dag, self.pairs), self.pathways, self.arms
        )  # fmt: skip
        return {program.name: program for program in found}

    @property
    def summary(self) -> pd.DataFrame:
        """One row per program: ``program, title, n_drivers, up, down, upstream, downstream`` and what it explains."""
        return summary_table(list(self.described.values()))

    def screen(self) -> AbstractContextManager[Screen]:
        """The fitted cells: of a run that was not written, its source as it is now."""
        from crlseq.data.matrix import open_screen

        source = self.source if self.path is None and self.source is not None else self.folder / "crlseq.h5ad"
        return open_screen(source, self.preprocessing.layer)

    def latents(self, source: str | Path | ad.AnnData) -> np.ndarray:
        """(cells, p) float32 activities of programs in any cells with these genes, in the programs' standard deviations.

        Posterior means: what one cell says little of is drawn towards the controls' mean of 0, so that the mean over a
        perturbation's cells is nearer to 0 than its ``penetrance * shift``.

        InputError if a fitted gene is missing, or values are not of the kind that was fitted.
        """
        import torch

        from crlseq.data.matrix import open_screen

        model, record = self.model, self.preprocessing
        parts = []
        with open_screen(source, record.layer) as screen, torch.no_grad():
            columns = record.columns(screen)
            for _, block in screen.blocks():
                record.check(block, screen.source)
                rows = record.apply(block)[:, columns].astype(np.float32)
                for start in range(0, max(rows.shape[0], 1), AT_ONCE):
                    x = torch.from_numpy(rows[start : start + AT_ONCE].toarray())
                    values = self.facts.in_units(model.latents(x.to(model.scm.graph.dtype)).double().numpy())
                    parts.append(values.astype(np.float32))  # of a million cells these are few, in float64 they are not
        return np.concatenate(parts)

    def annotate(self, adata: ad.AnnData) -> ad.AnnData:
        """Add crlseq's keys to an AnnData in place, and return it: the fitted one, or other cells with its genes.

        Examples
        --------
        >>> import anndata, crlseq
        >>> adata = crlseq.load("RUN").annotate(anndata.read_h5ad("screen.h5ad"))
        >>> adata.obsm["X_crlseq"].shape, adata.varm["crlseq_programs"].shape
        ((740, 3), (40, 3))
        """
        set_keys(adata, self._keys(adata))
        return adata

    def write_h5ad(self, source: str | Path | ad.AnnData, path: Path) -> None:
        """Write the annotated input; see `crlseq.run.anndata.write_annotated`."""
        write_annotated(source, path, self._keys(source))

    def _keys(self, source: str | Path | ad.AnnData) -> dict[str, dict[str, Any]]:
        from crlseq.data.matrix import open_screen

        record, programs = self.preprocessing, self.programs
        with open_screen(source, record.layer) as screen:
            cells, genes, fitted = screen.obs.index, screen.var_names, screen.genes[record.columns(screen)]
        effects = effect_matrix(self.effects) if self.facts.format >= schema.WITH_EFFECTS else None
        if tuple(fitted) != record.genes:  # other names of the same genes
            called = dict(zip(record.genes, fitted, strict=True))
            programs = programs.assign(gene=programs["gene"].map(called))
            effects = None if effects is None else effects.rename(index=called)
        known = read_cells(self.folder / "crlseq.h5ad") if self.cells is None else self.cells
        known = known.reindex(cells.astype(str))
        known["crlseq_split"] = known["crlseq_split"].astype(object).fillna("unused").astype(columns.SPLIT)
        more, latents = {"pairs": self.pairs, "second_targets": self.second_targets}, self.latents(source)
        keys = anndata_keys(self.info, self.facts, programs, self.interventions, more, genes, fitted, latents, known)
        if effects is not None:
            add_effects(keys, effects.reindex(genes))
        return keys

    @property
    def folder(self) -> Path:
        """The folder of a run that was written; InputError of one that was not."""
        if self.path is None:
            raise InputError("This run was never written to a folder.", "Give crlseq.fit an output.")
        return self.path

    def write_tables(self, folder: Path) -> None:
        """CSV tables, graph files and ``run.json``."""
        for name, table in self.tables().items():
            write_rows(folder / f"{name}.csv", table)
        (folder / "dag.graphml").write_bytes(graphml(self.dag))
        (folder / "dag.json").write_text(dag_json(self.dag), encoding="utf-8")
        (folder / "run.json").write_text(to_json(self.info), encoding="utf-8", newline="\n")

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables that the run has, by the names of their files."""
        tables = (self.programs, self.interventions, self.edges, self.history, self.evaluation)
        optional = {name: getattr(self, name) for name in files.OPTIONAL_TABLES}
        if self.facts.format >= schema.WITH_EFFECTS:
            optional["effects"] = self.effects
        own = {name: table for name, table in optional.items() if table is not None}
        return dict(zip(files.TABLES, tables, strict=True)) | own

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a run folder.

        InputError if it is not one, is unfinished, damaged, written by a newer crlseq or by one whose runs are no longer
        read, or has a link that leads out of it.
        """
        folder = Path(path)
        if not is_run(folder):
            if partial_of(folder).exists():
                hint = "Finish it with `crlseq fit ... --resume`."
                old = "".join(f" The run that it replaces is {path.name}." for path in replaced_by(folder)[:1])
                raise InputError(f"The fit {folder} is not finished.", hint + old)
            raise no_run(folder)
        refuse_links_outside(folder)
        writer = __version__
        try:
            if (folder / "run.json").stat().st_size > schema.MAX_JSON:
                raise ValueError(f"run.json has more than {schema.MAX_JSON >> 20} MiB")
            info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            if info["format"] > max(schema.READABLE):
                raise InputError(f"{folder} was written by crlseq {info['version']}, which is newer.", "Update crlseq.")
            writer = str(info["version"])
            if info["format"] not in schema.READABLE:
                raise ValueError(f"its format is {info['format']}; this version reads {min(schema.READABLE)} and later")
            facts = RunInfo.read(info)
            later = {
                "programs": columns.LATER_PROGRAMS,
                "interventions": columns.HIT | columns.AGREEMENT | columns.CONTEXT,
                "dag": columns.CONTEXT,
            }
            programs, interventions, edges, history, evaluation = (
                read_csv(folder / f"{name}.csv", columns.COLUMNS[name], later.get(name, {})) for name in files.TABLES
            )
            own: dict[str, Any] = {
                name: read_csv(folder / f"{name}.csv", kinds) for name, kinds in schema.own_tables(facts).items()
            }
            tables = {"programs": programs, "interventions": interventions, "dag": edges, **own}
            check_consistency(facts, info["preprocessing"]["genes"], tables)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            detail = in_a_line(error)
            if writer != __version__:
                raise InputError(
                    f"{folder} was written by crlseq {writer[:20]}, which version {__version__} cannot read: {detail}.",
                    "Fit again with the command in its run.json, or read it with that version.",
                ) from error
            raise InputError(f"The run folder {folder} is damaged: {detail}.", "Restore it, or fit again.") from error
        return cls(info, programs, interventions, edges, history, evaluation, path=folder, **own)
