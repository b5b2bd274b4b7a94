"""A run in the formats of other tools: scanpy, pandas, Cytoscape, Graphviz, decoupler, GSEA, MuData, pertpy, GEARS, MultiQC.

`FORMATS` says which there are. Each is written from a run that lies in a folder, without the model or the input file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import pandas as pd

from crlseq._version import __version__
from crlseq.errors import InputError, UsageError
from crlseq.readout.enrichment import TOP_MOST, TOP_SHARE
from crlseq.run.graph import dag_json, graphml, plain_text
from crlseq.run.run import Run
from crlseq.storage.csv import to_csv
from crlseq.storage.files import written_whole

if TYPE_CHECKING:
    import anndata as ad

GUIDE_MODALITY = "guide"


@dataclass(frozen=True)
class Format:
    """What is written: by a function that is given a run and a path, and returns what a user should know."""

    what: str
    write: Callable[[Run, Path], list[str]]
    is_folder: bool = False


def write(run: Run, name: str, path: Path) -> list[str]:
    """Write a format of `FORMATS`, whole or not at all.

    Returns
    -------
    What a user should know about it.

    Raises
    ------
    InputError
        If the run has no folder, or the place cannot be written.
    UsageError
        If there is no such format, or the library for it is not installed.
    """
    if name not in FORMATS:
        raise UsageError(f"There is no format {name!r}.", f"Formats are {', '.join(FORMATS)}.")
    if run.path is None:
        raise InputError("This run was never written to a folder.", "Give crlseq.fit an output.")
    if FORMATS[name].is_folder:
        return FORMATS[name].write(run, path)
    with written_whole(path) as beside:
        return FORMATS[name].write(run, beside)


def _files(path: Path, files: dict[str, bytes]) -> None:
    """All of them or none."""
    there = path.exists()
    try:
        with ExitStack() as written:
            for name, content in files.items():
                written.enter_context(written_whole(path / name)).write_bytes(content)
    except InputError:
        if not there:
            with suppress(OSError):
                path.rmdir()
        raise


def _h5ad(run: Run, path: Path) -> list[str]:
    assert run.path is not None
    run.write_h5ad(run.path / "crlseq.h5ad", path)
    return []


def _csv(run: Run, path: Path) -> list[str]:
    _files(path, {f"{table}.csv": to_csv(rows) for table, rows in run.tables().items()})
    return [_verdict(run)]


def _graph(content: Callable[[nx.DiGraph[str]], bytes]) -> Callable[[Run, Path], list[str]]:
    def write_graph(run: Run, path: Path) -> list[str]:
        path.write_bytes(content(run.dag))
        return [_verdict(run)]

    return write_graph


def _verdict(run: Run) -> str:
    return f"The graph is {run.info['identification']['verdict']}: {run.info['identification']['reason']}"


def cyjs(graph: nx.DiGraph[str]) -> bytes:
    """The DAG as Cytoscape.js JSON, which Cytoscape imports and `networkx.cytoscape_graph` reads."""
    content = nx.cytoscape_data(graph)
    content["data"] = {"name": "crlseq", **graph.graph}  # pairs in networkx, a table of the network in Cytoscape
    for edge in content["elements"]["edges"]:
        source, target = edge["data"]["source"], edge["data"]["target"]
        edge["data"] |= {"id": f"{source}->{target}", "interaction": "causes"}
    return json.dumps({"generated_by": f"crlseq {__version__}", **content}, indent=1, ensure_ascii=False).encode()


def dot(graph: nx.DiGraph[str]) -> bytes:
    """The DAG in Graphviz' language: programs with their labels, edges with weights, a bar at the end of negative ones."""
    verdict = f"The graph is {graph.graph['identified']}."
    lines = [
        "digraph crlseq {",
        f"  graph [rankdir=TB, label={_quoted(verdict)}];",
        "  node [shape=box, style=rounded];",
    ]
    for node, values in graph.nodes(data=True):
        lines.append(f"  {_quoted(node)} [label={_quoted(node, values['label'])}];")
    for source, target, values in graph.edges(data=True):
        about = [f'label="{values["weight"]:.2f}"', f"penwidth={1 + min(abs(values['weight']), 3):.2f}"]
        about += ["arrowhead=tee"] if values["weight"] < 0 else []
        lines.append(f"  {_quoted(source)} -> {_quoted(target)} [{', '.join(about)}];")
    return ("\n".join([*lines, "}"]) + "\n").encode()


def _quoted(*lines: str) -> str:
    """Lines as a string of the DOT language, in which backslashes, quotes and what looks like an HTML entity mean more."""
    safe = (plain_text(line).replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") for line in lines)
    return '"' + "\\n".join(re.sub(r"&(?=#?\w+;)", "&amp;", line) for line in safe) + '"'


def network_table(run: Run) -> pd.DataFrame:
    """``source, target, weight``: every program's loadings that are not 0, as decoupler's methods take networks."""
    table = run.programs[run.programs["loading"] != 0]
    return pd.DataFrame({"source": table["program"], "target": table["gene"], "weight": table["loading"]})


def _network(run: Run, path: Path) -> list[str]:
    path.write_bytes(to_csv(network_table(run)))
    return []


def _field(text: str) -> str:
    return re.sub(r"[\t\r\n]", " ", text)


def _gmt(run: Run, path: Path) -> list[str]:
    """Two sets a program: its strongest genes that rise and that fall with it."""
    lines = []
    for program in run.info["programs"]:
        own = run.programs[run.programs["program"] == program["name"]]
        most = min(TOP_MOST, max(1, round(TOP_SHARE * len(own))))
        for direction, sign in (("up", 1.0), ("down", -1.0)):
            ordered = own.assign(strength=sign * own["loading"]).sort_values("strength", ascending=False, kind="stable")
            genes = [str(gene) for gene in ordered.loc[ordered["strength"] > 0, "gene"][:most]]
            if genes:
                lines.append("\t".join(map(_field, [f"{program['name']}_{direction}", program["label"], *genes])))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return []


def _rnk(run: Run, path: Path) -> list[str]:
    """A ranking of all genes a program, by signed loading."""
    files = {}
    for name in run.program_names:
        own = run.programs[run.programs["program"] == name].sort_values("loading", ascending=False, kind="stable")
        rows = (
            f"{_field(str(gene))}\t{value!r}\n"
            for gene, value in zip(own["gene"], own["loading"].tolist(), strict=True)
        )
        files[f"{name}.rnk"] = "".join(rows).encode()
    _files(path, files)
    return []


def _annotated(run: Run) -> ad.AnnData:
    import anndata as ad

    from crlseq.data.matrix import open_store, readable

    assert run.path is not None
    path = run.path / "crlseq.h5ad"
    with open_store(path), readable(str(path), "the file"):
        return ad.read_h5ad(path)


def _labelled(run: Run) -> tuple[ad.AnnData, list[tuple[str, ...]], list[str]]:
    """Cells that carry a perturbation or are control, log-normalised as for the fit, and what each of them carries."""
    from crlseq.data.matrix import as_csr
    from crlseq.data.perturbations import read_perturbations
    from crlseq.data.preprocess import Preprocessing

    adata, record = _annotated(run), Preprocessing.from_json(run.info["preprocessing"])
    separator = run.info["config"]["data"]["separator"]
    labels = read_perturbations(adata.obs, run.info["perturbation_key"], run.info["control_label"], separator)
    known = np.flatnonzero(labels.condition >= 0)
    left = adata.n_obs - len(known)
    notes = [f"{left} cells carry no known perturbation and are left out."] if left else []
    adata = adata[known].copy()
    if record.layer is not None:
        adata.X = adata.layers[record.layer].copy()
    if record.values == "counts":
        counts = as_csr(adata.X)
        adata.layers["counts"] = counts.astype(np.float32)
        adata.X = record.apply(counts).astype(np.float32)
    parts = [tuple(labels.names[i] for i in condition) for condition in labels.conditions]
    return adata, [parts[c] for c in labels.condition[known]], notes


def _pertpy(run: Run, path: Path) -> list[str]:
    """``obs["perturbation"]``: ``control``, ``A`` or ``A+B``; ``obs["nperts"]``; counts in ``layers["counts"]``."""
    adata, carried, notes = _labelled(run)
    adata.obs["perturbation"] = pd.Categorical(["+".join(parts) or "control" for parts in carried])
    adata.obs["nperts"] = [len(parts) for parts in carried]
    adata.write_h5ad(path, compression="gzip")
    return notes


def _gears(run: Run, path: Path) -> list[str]:
    """``obs["condition"]``: ``ctrl``, ``A+ctrl`` or ``A+B``; ``obs["cell_type"]`` and ``var["gene_name"]``."""
    from crlseq.data.inspection import SYMBOL_COLUMNS

    adata, carried, notes = _labelled(run)
    few = np.array([len(parts) <= 2 for parts in carried])
    if not few.all():
        notes.append(f"{(~few).sum()} cells carry more than two perturbations, which GEARS has no words for: left out.")
        adata, carried = adata[few].copy(), [parts for parts, kept in zip(carried, few, strict=True) if kept]
    adata.obs["condition"] = pd.Categorical(["+".join([*parts, "ctrl"][:2]) if parts else "ctrl" for parts in carried])
    if "cell_type" not in adata.obs:
        adata.obs["cell_type"] = pd.Categorical(["cell"] * adata.n_obs)
    if "gene_name" not in adata.var:
        symbols = next((adata.var[key] for key in SYMBOL_COLUMNS if key in adata.var), adata.var_names)
        adata.var["gene_name"] = np.asarray(symbols, dtype=object).astype(str)
    adata.write_h5ad(path, compression="gzip")
    return notes


def _h5mu(run: Run, path: Path) -> list[str]:
    """``rna`` with crlseq's keys, and ``guide`` with the counts by which cells were assigned, if they were."""
    if find_spec("mudata") is None:
        raise UsageError("MuData files need mudata, which is not installed.", "pip install 'crlseq[mudata]'.")
    import anndata as ad
    import mudata

    adata, notes = _annotated(run), list[str]()
    modalities = {"rna": adata}
    guides = run.info.get("guides") or {}
    if "obsm" in guides or "modality" in guides:
        from crlseq.data.guides import guide_counts
        from crlseq.data.matrix import open_screen

        source: Any = adata if "obsm" in guides else run.info["input"]["path"]
        try:
            with open_screen(source) as screen:
                counts, names, _ = guide_counts(screen, source, guides.get("obsm") or guides["modality"])
        except InputError as error:
            notes.append(f"The guide counts are left out: {error}")
        else:
            modality = ad.AnnData(counts.astype(np.float32), obs=pd.DataFrame(index=adata.obs_names))
            modality.var_names = names
            modality.var["perturbation"] = [guides["genes"].get(name, "") for name in names]
            modalities[GUIDE_MODALITY] = modality
    # What became the rule in 0.4, without a warning about it.
    with nullcontext() if hasattr(mudata, "settings") else mudata.set_options(pull_on_update=False):
        mudata.MuData(modalities).write_h5mu(path)
    return notes


def _multiqc(run: Run, path: Path) -> list[str]:
    """Two files of MultiQC's custom content: a row of general statistics, and one of a table of crlseq's own."""
    info, metrics = run.info, run.info["metrics"]
    assert run.path is not None
    sample = run.path.resolve().name
    shared = {
        "programs": info["n_latents"],
        "detected": metrics["n_detected"],
        "graph": info["identification"]["verdict"],
    }
    headers = {
        "programs": {"title": "Programs", "description": "Causal programs", "format": "{:,.0f}", "scale": "Blues"},
        "detected": {
            "title": "Detected", "description": "Perturbations with a detectable effect (FDR 0.05)",
            "format": "{:,.0f}", "scale": "Greens",
        },
        "graph": {"title": "Graph", "description": "Whether the data determine the graph"},
    }  # fmt: skip
    values: dict[str, Any] = {
        "perturbations": len(run.interventions), **shared, "edges": metrics["n_edges"],
        "cells": sum(n for name, n in info["cells"].items() if name != "unused"),
        "unused": info["cells"].get("unused", 0), "genes": len(run.programs) // max(info["n_latents"], 1),
        "pearson_delta": metrics.get("pearson_delta"), "evaluated_on": metrics.get("evaluated_on"),
        "epochs": info["training"].get("epochs_run"), "seconds": info.get("seconds"), "version": info["version"],
    }  # fmt: skip
    titles = {
        "perturbations": "Perturbations", "edges": "Edges", "cells": "Cells fitted", "unused": "Cells left out",
        "genes": "Genes", "pearson_delta": "Pearson Δ", "evaluated_on": "Evaluated on", "epochs": "Epochs",
        "seconds": "Seconds", "version": "crlseq",
    }  # fmt: skip
    numbers = dict.fromkeys(("perturbations", "edges", "cells", "unused", "genes", "epochs", "seconds"), "{:,.0f}")
    numbers["pearson_delta"] = "{:,.3f}"
    columns = {
        name: headers.get(name) or {"title": titles[name], **({"format": numbers[name]} if name in numbers else {})}
        for name in values
    }
    table = {
        "id": "crlseq", "section_name": "crlseq",
        "description": "Causal gene programs of Perturb-seq screens: what each run found, and whether its graph is determined.",
        "plot_type": "table",
        "pconfig": {"id": "crlseq_table", "title": "crlseq: runs", "namespace": "crlseq", "col1_header": "Run"},
        "headers": columns, "data": {sample: _present(values)},
    }  # fmt: skip
    general = {
        "id": "crlseq_general", "plot_type": "generalstats",
        "headers": {name: {"namespace": "crlseq", **about} for name, about in headers.items()},
        "data": {sample: _present(shared)},
    }  # fmt: skip
    _files(
        path,
        {
            "crlseq_mqc.json": json.dumps(table, indent=1, ensure_ascii=False).encode(),
            "crlseq_general_mqc.json": json.dumps(general, indent=1, ensure_ascii=False).encode(),
        },
    )
    return []


def _present(values: dict[str, Any]) -> dict[str, Any]:
    """Without what a run does not have."""
    return {k: v for k, v in values.items() if v is not None and not (isinstance(v, float) and math.isnan(v))}


FORMATS: dict[str, Format] = {
    "h5ad": Format("the annotated input, for scanpy", _h5ad),
    "csv": Format("a folder of all tables", _csv, is_folder=True),
    "graphml": Format("the DAG, for Cytoscape and others", _graph(graphml)),
    "json": Format("the DAG, for networkx", _graph(lambda graph: dag_json(graph).encode())),
    "cyjs": Format("the DAG, for Cytoscape", _graph(cyjs)),
    "dot": Format("the DAG, for Graphviz", _graph(dot)),
    "network": Format("loadings as a network, for decoupler (CSV)", _network),
    "gmt": Format("strongest genes of each program as gene sets", _gmt),
    "rnk": Format("a folder with a ranking of genes a program, for GSEA", _rnk, is_folder=True),
    "h5mu": Format("the annotated input and guide counts, for muon", _h5mu),
    "pertpy": Format("log-normalised cells labelled as pertpy has them (h5ad)", _pertpy),
    "gears": Format("log-normalised cells labelled as GEARS has them (h5ad)", _gears),
    "multiqc": Format("a folder with crlseq_mqc.json, for MultiQC", _multiqc, is_folder=True),
}
