"""MultiQC's custom content: a row of general statistics, and one of a table of crlseq's own."""

from __future__ import annotations

from pathlib import Path

from crlseq.export.registry import write_folder
from crlseq.run.run import Run
from crlseq.storage.text import to_json

COUNT = "{:,.0f}"
GENERAL: dict[str, dict[str, str]] = {
    "programs": {"title": "Programs", "description": "Causal programs", "format": COUNT, "scale": "Blues"},
    "detected": {
        "title": "Detected", "description": "Perturbations with a detectable effect (FDR 0.05)", "format": COUNT,
        "scale": "Greens",
    },
    "graph": {"title": "Graph", "description": "Whether the data determine the graph"},
}  # fmt: skip
COLUMNS: dict[str, dict[str, str]] = {
    "perturbations": {"title": "Perturbations", "format": COUNT},
    **GENERAL,
    "edges": {"title": "Edges", "format": COUNT},
    "upstream": {"title": "Upstream pairs", "format": COUNT},
    "cells": {"title": "Cells fitted", "format": COUNT},
    "unused": {"title": "Cells left out", "format": COUNT},
    "genes": {"title": "Genes", "format": COUNT},
    "pearson_delta": {"title": "Pearson Δ", "format": "{:,.3f}"},
    "evaluated_on": {"title": "Evaluated on"},
    "epochs": {"title": "Epochs", "format": COUNT},
    "seconds": {"title": "Seconds", "format": COUNT},
    "version": {"title": "crlseq"},
}


def multiqc(run: Run, path: Path) -> None:
    """Two files, with a row that is named for the run's folder, without what the run does not have."""
    sample, facts, metrics = run.folder.resolve().name, run.facts, run.facts.metrics
    values: dict[str, object] = {
        "perturbations": len(run.interventions), "programs": facts.n_latents, "detected": metrics.n_detected,
        "graph": facts.identification.verdict, "edges": metrics.n_edges,
        "cells": facts.cells.train + facts.cells.validation + facts.cells.test, "unused": facts.cells.unused,
        "genes": len(run.preprocessing.genes), "pearson_delta": metrics.pearson_delta,
        "evaluated_on": metrics.evaluated_on, "epochs": facts.training.epochs_run, "seconds": facts.seconds,
        "version": facts.version,
    }  # fmt: skip
    if run.pairs is not None:
        values["upstream"] = int((run.pairs["status"] == "upstream").sum())
    values = {name: value for name, value in values.items() if value is not None and value == value}  # NaN is not
    table = {
        "id": "crlseq", "section_name": "crlseq",
        "description": "Causal gene programs of Perturb-seq screens: what each run found, and whether its graph is determined.",
        "plot_type": "table",
        "pconfig": {"id": "crlseq_table", "title": "crlseq: runs", "namespace": "crlseq", "col1_header": "Run"},
        "headers": COLUMNS, "data": {sample: values},
    }  # fmt: skip
    general = {
        "id": "crlseq_general", "plot_type": "generalstats",
        "headers": {name: {"namespace": "crlseq", **about} for name, about in GENERAL.items()},
        "data": {sample: {name: value for name, value in values.items() if name in GENERAL}},
    }  # fmt: skip
    parts = {"crlseq_mqc.json": table, "crlseq_general_mqc.json": general}
    files = {name: to_json(part).encode() for name, part in parts.items()}
    write_folder(path, files)
