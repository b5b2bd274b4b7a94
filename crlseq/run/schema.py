"""What a run folder holds: ``run.json`` with types, and which tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, SkipValidation, ValidationError

from crlseq.config import FACTORS, NETWORKS
from crlseq.run import columns

FORMAT = 4
READABLE = (1, 2, 3, 4)
WITH_EFFECTS = 4  # the format from which on runs have effects on genes
MAX_JSON = 256 << 20  # bytes; that of a genome-wide screen has some 10 MiB
DETECTABLE_FDR = 0.05
PROGRAM_NUMBERS = ("variance_explained", "effect_explained", "stability")

# A path, and what quotes one, may hold undecodable bytes, which pydantic refuses in a string.
Text = SkipValidation[str]
Matrix = list[list[float]]


class _Part(BaseModel):
    """Keys that only later versions write are ignored here and kept in the raw mapping."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class DataOptions(_Part):
    """How the screen was read."""

    separator: str | None
    batch_key: str | None
    hold_out: tuple[str, ...]
    gene_sets: str | None
    covariates: tuple[str, ...] = ()


class TrainingOptions(_Part):
    """How it was trained."""

    ensemble: int


class ModelOptions(_Part):
    """How programs were looked for."""

    method: str = ""


class Options(_Part):
    """The part of the configuration that is needed after the fit."""

    preset: str
    data: DataOptions
    training: TrainingOptions
    model: ModelOptions = ModelOptions()


class Machine(_Part):
    """That the fit ran on."""

    system: str
    architecture: str
    cores: int | None


class Input(_Part):
    """The screen."""

    path: Text
    sha256: str | None
    n_cells: int
    n_genes: int
    cells_sha256: str | None = None  # of cells in memory, as they are fitted
    tables: dict[str, str | None] = {}  # SHA-256 of what options name beside the screen, by option


class PreprocessingSummary(_Part):
    """See `crlseq.data.preprocess.Preprocessing`."""

    values: str
    reason: str
    layer: str | None
    gene_choice: str


class Cells(_Part):
    """Numbers of cells by split."""

    train: int
    validation: int
    test: int
    unused: int


class Condition(_Part):
    """The control (without perturbations), a perturbation or a combination."""

    name: str
    perturbations: tuple[str, ...]
    cells: dict[str, int]  # by split


class ProgramRow(_Part):
    """A program: its raw latent in the model is ``center + scale * program``."""

    name: str
    label: str
    drivers: str
    genes: str
    scale: float
    center: float
    variance_explained: float | None
    effect_explained: float | None
    stability: float | None


class Identification(_Part):
    """Whether the data determine the graph, and why; and what the screen shows of assumptions that it breaks."""

    verdict: str
    reason: str
    warnings: tuple[str, ...] = ()


class Bootstrap(_Part):
    """Over replicates of the discovery: shares that have an edge, an ancestry, a target; stabilities (p,)."""

    replicates: int
    failed: int
    edge: Matrix  # (p, p), row -> column
    ancestor: Matrix
    program: list[float]
    perturbations: list[str]
    assignment: Matrix  # (perturbations, p)
    shift_error: list[float | None]


class PairSummary(_Part):
    """What interventions change, over all ordered pairs of programs."""

    counts: dict[str, int]  # by status
    size: float  # smallest change that "excluded" is about, in standard deviations of control cells
    edges_misfit: float  # chi-square per degree of freedom of the direct edges' fit


class NegativeControls(_Part):
    """Pseudo-perturbations of control cells, and pairs under mere shifts of control cells: how many, how many found."""

    perturbations: int = 0
    detected: int = 0
    pairs: int = 0
    ordered: int = 0


class Sensitivity(_Part):
    """What would have been found in a screen without any effect; see `crlseq.discovery.negative_controls.Sensitivity`."""

    n_cells: int
    n_control: int
    shift: float | None


class DiscoverySummary(_Part):
    """What the likelihood found, if it was used; see `crlseq.discovery.result.Discovery`."""

    intervention: str
    equations: str
    held_out: dict[str, float]
    gain_of_edges: float
    gain_error: float
    dispersion: float
    straightened: bool
    n_latents_curve: list[dict[str, float]] | None
    bootstrap: Bootstrap | None
    pairs: PairSummary | None = None


class CombinationSummary(_Part):
    """The law of combination: `crlseq.training.combinations`."""

    beta: float
    beta_error: float
    gamma: float
    gamma_error: float
    n_measured: int
    fitted: bool  # to measured combinations; else from the prior
    n_terms: int  # perturbations with a term of their own in combinations
    gain: float  # share of the squared error of left-out combinations that the terms save
    gain_error: float
    by_equations: int  # pairs of perturbations that the structural equations combine


class ContextSummary(_Part):
    """Contexts of cells, and of how many pairs of programs it was tested, and seen, that they differ."""

    key: str
    names: list[str]
    pairs_tested: int
    pairs_differ: int
    pairs_error: float | None


class Positions(_Part):
    """Of genes on chromosomes, for ``arms.csv``."""

    source: str
    n_tested: int  # perturbations with a stretch of genes beside their target


class Training(_Part):
    """How the training ended; see `crlseq.training.trainer.Fit`."""

    epochs_run: int
    best_epoch: int
    stopped_early: bool
    bandwidth: float
    kept_seed: int
    parts_of_steps: int
    seed_losses: list[float | None]


class GeneSetSummary(_Part):
    """Sets that the encoder reads, and the share of each program that it reads from them."""

    n_sets: int
    explained: list[float | None] = []
    explained_by_all_genes: list[float | None] = []


class Metrics(_Part):
    """Those after ``n_edges`` are of fits with cells to evaluate on."""

    n_detected: int
    n_edges: int
    evaluated_on: str | None = None
    mmd2: float | None = None
    mmd2_no_change: float | None = None
    pearson_delta: float | None = None
    l2: float | None = None
    l2_no_change: float | None = None


class RunInfo(_Part):
    """``run.json``, whose keys docs/formats.md describes."""

    format: int
    version: str
    command: Text
    started: str
    finished: str
    seconds: float
    processes: int
    seed: int
    device: str
    threads: int
    packages: dict[str, str]
    machine: Machine | None
    config: Options
    input: Input
    perturbation_key: str
    control_label: str
    control_labels: list[str] = []  # absent in earlier runs, which had one
    label_reason: str
    guides: dict[str, Any] | None
    gene_sets: GeneSetSummary | None
    preprocessing: PreprocessingSummary
    cells: Cells
    conditions: list[Condition]
    notes: list[Text]
    n_latents: int
    n_latents_reason: str
    programs: list[ProgramRow]
    adjacency: Matrix
    identification: Identification
    negative_controls: NegativeControls = NegativeControls()
    sensitivity: Sensitivity | None = None
    discovery: DiscoverySummary | None
    combinations: CombinationSummary | None = None
    training: Training
    metrics: Metrics
    embeddings: dict[str, Any] | None
    positions: Positions | None = None  # where genes lie, if that is known
    contexts: ContextSummary | None = None  # where cells are in several

    @property
    def controls(self) -> tuple[str, ...]:
        """Labels of control cells, the one of virtual cells first."""
        return tuple(dict.fromkeys([self.control_label, *self.control_labels]))

    @classmethod
    def read(cls, info: Mapping[str, Any]) -> RunInfo:
        """The typed content of ``run.json``; ValueError if a key is missing or a value is of another kind."""
        try:
            return cls.model_validate(info)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            missing = first["type"] == "missing"
            what = f"run.json lacks {where!r}" if missing else f"{where} in run.json: {first['msg']}"
            raise ValueError(what) from None

    @property
    def without_effect(self) -> bool:
        """Whether no perturbation has a detectable effect: there are no programs, and no network was trained."""
        return self.n_latents == 0

    def in_units(self, raw: np.ndarray) -> np.ndarray:
        """Raw latents (cells, p) of the model in standard deviations of the programs."""
        center, scale = (np.array([getattr(row, name) for row in self.programs]) for name in ("center", "scale"))
        return np.asarray((raw - center) / scale)

    @property
    def bootstrap(self) -> Bootstrap | None:
        """Of the graph; None without one."""
        return None if self.discovery is None else self.discovery.bootstrap

    @property
    def by_gradient(self) -> bool:
        """Whether targets and graph were learned with the networks."""
        return self.discovery is None and self.config.model.method not in (*FACTORS, *NETWORKS)


def own_tables(facts: RunInfo) -> dict[str, dict[str, type]]:
    """The columns of the tables that this run has and others have not, by name."""
    ordered = facts.discovery is not None and facts.discovery.pairs is not None
    there: dict[str, tuple[dict[str, type], bool]] = {
        "ensemble": (columns.ENSEMBLE_COLUMNS, facts.config.training.ensemble > 1),
        "pathways": (columns.PATHWAY_COLUMNS, facts.gene_sets is not None),
        "pairs": (columns.PAIR_COLUMNS if facts.contexts is None else columns.PAIR_COLUMNS | columns.CONTEXT, ordered),
        "second_targets": (columns.SECOND_COLUMNS, ordered),
        "interactions": (
            columns.INTERACTION_COLUMNS,
            facts.combinations is not None and facts.combinations.n_measured > 0,
        ),
        "guides": (columns.GUIDE_COLUMNS, "n_compared" in (facts.guides or {})),
        "arms": (columns.ARM_COLUMNS, facts.positions is not None),
        "covariates": (columns.COVARIATE_COLUMNS, bool(facts.config.data.covariates)),
        "contexts": (columns.CONTEXT_COLUMNS, facts.contexts is not None),
    }
    return {name: own for name, (own, has) in there.items() if has}
