"""``crlseq inspect``: what a run found, as tables."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from crlseq.cli.options import AsJson, RunFolder, load, setting
from crlseq.cli.output import say, say_paragraph, say_verdict, show_json, show_paragraph, show_table, show_text
from crlseq.cli.perturbation import arms, contexts, covariates, guides, interventions, perturbation
from crlseq.errors import InputError, UsageError, nearest, suggestion

if TYPE_CHECKING:
    import pandas as pd

    from crlseq.run.run import Run
    from crlseq.run.summary import Program


ANCHORS = 10  # that are named
# Colours of the marks of `crlseq.run.pairs`; grey is what is not known.
LOOKS = {
    "+": "bold yellow", "−": "bold cyan", "+?": "yellow", "−?": "cyan", "⇄": "bold magenta", "·": "bright_black",
}  # fmt: skip
TOLD = ("upstream", "likely", "both ways")  # statuses whose pairs are told one by one on a terminal


class _SummaryByDefault(TyperGroup):
    """``crlseq inspect RUN`` is ``crlseq inspect summary RUN``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = list(self.commands)
        if args and args[0] not in known:
            first, *words = [word for word in args if not word.startswith("-")] or [""]
            if words and words[0] in known:
                raise UsageError(f"{words[0]!r} belongs before the run.", f"Write: crlseq inspect {words[0]} {first}.")
            if words:
                raise UsageError(f"There is no table {first!r}.", suggestion(first, known, "Tables are"))
            args = ["summary", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_SummaryByDefault, no_args_is_help=True, help="Show what a run found; `inspect RUN` prints a summary."
)


@app.command()
def summary(run: RunFolder, json: AsJson = False) -> None:
    """What was found, in words; what was fitted, how well, and what to do next."""
    import pandas as pd

    from crlseq.run.advice import what_next
    from crlseq.run.findings import doubts, findings, told
    from crlseq.run.summary import answers, no_effect_in_words, sensitivity_in_words

    found = load(run)
    facts, preprocessing = found.facts, found.facts.preprocessing
    without_effect = {"sensitivity": sensitivity_in_words(facts)}
    rows = {
        "input": facts.input.path,
        "cells": ", ".join(f"{n} {name}" for name, n in facts.cells if n),
        "genes": preprocessing.gene_choice,
        "values": f"{preprocessing.values} ({preprocessing.reason})",
        "labels": facts.label_reason,
        "perturbations": no_effect_in_words(len(found.interventions))
        if facts.without_effect
        else f"{len(found.interventions)}, {facts.metrics.n_detected} with a detectable effect (FDR <= 0.05)",
        "programs": f"{facts.n_latents} ({facts.n_latents_reason})",
        **(_of_the_model(found) if not facts.without_effect else without_effect),
        "preset": f"{facts.config.preset}, seed {facts.seed}, crlseq {facts.version}",
    }
    questions = answers(facts, found.evaluation, found.history)
    steps = {one.question: step for one, step in zip(questions, what_next(found, questions), strict=True)}
    if json:
        told_as_json = {"findings": [asdict(one) for one in findings(found)], "next": steps, "doubts": doubts(found)}
        show_json(told_as_json | rows | {key: found.info[key] for key in ("notes", "metrics", "identification")})
        return
    lines = [("finding", line) for line in told(found)]
    if sys.stdout.isatty():
        for _, line in lines:
            show_paragraph(f"• {line}")
        show_text("")
        lines = []
    lines += rows.items()
    show_table(pd.DataFrame(lines, columns=["what", "value"]), str(run))
    for note in facts.notes:
        say_paragraph(f"note: {note}")
    for warning in (*facts.identification.warnings, *doubts(found)):
        say_paragraph(f"warning: {warning}")
    for question, step in steps.items():
        say_paragraph(f"next: {question} {step}")


def _of_the_model(found: Run) -> dict[str, str]:
    """What the summary tells of programs, graph and training."""
    from crlseq.run.pairs import counts, why_no_pairs
    from crlseq.run.summary import answers, combinations_in_words, controls_in_words, sets_in_words

    facts, metrics, training, discovery = found.facts, found.facts.metrics, found.facts.training, found.facts.discovery
    graph, better, converged = answers(facts, found.evaluation, found.history)
    epochs = f"{training.epochs_run} epochs, weights of epoch {training.best_epoch + 1} kept"
    if not training.epochs_run:
        epochs = "no epochs: expression is linear in the programs"
    likelihood = "not used: targets and graph were learned by gradient"
    if not facts.by_gradient:
        likelihood = f"not used: programs and targets are those of the method {facts.config.model.method}"
    if discovery is not None:
        likelihood = f"{discovery.intervention} interventions, {discovery.equations} equations"
        likelihood += ", latents straightened" if discovery.straightened else ""
        likelihood += f"; misfit {discovery.dispersion:.2f} (ideal 1.0)"
        likelihood += f"; {discovery.bootstrap.replicates} bootstrap replicates" if discovery.bootstrap else ""
    rows = {
        "graph": f"{graph.answer}: {graph.reason}",
        "pairs": why_no_pairs(facts) if found.pairs is None else f"{counts(found.pairs)}. {controls_in_words(facts)}",
        "likelihood": likelihood,
        "training": f"{epochs}, {facts.seconds} s on {facts.device}",
        "converged": f"{converged.answer}: {converged.reason}",
    }
    if facts.gene_sets is not None:
        rows["encoder"] = f"{facts.gene_sets.n_sets} gene sets of {facts.config.data.gene_sets}"
        rows["sets explain"] = sets_in_words(facts)
    if found.interactions is not None:
        rows["combinations"] = combinations_in_words(facts).removeprefix("Combinations: ")
    if metrics.mmd2 is not None:
        no_change = f"no change: {metrics.mmd2_no_change:.4f}"
        rows["held out"] = f"on {metrics.evaluated_on} cells: MMD2 {metrics.mmd2:.4f} ({no_change})"
        rows["baselines"] = f"{better.answer}: {better.reason}"
    return rows


@app.command()
def programs(
    run: RunFolder,
    program: Annotated[str | None, setting("One program, such as P3.", default="all")] = None,
    top: Annotated[int, setting("Genes per program; with --gene-sets, sets per program and test.", min=1)] = 20,
    gene_sets: Annotated[
        Path | None, setting("A gmt file: show enriched gene sets instead of genes.", default="none")
    ] = None,
    json: AsJson = False,
) -> None:
    """Top genes of each program, by direct loading and total effect through the DAG; or enriched gene sets."""
    if gene_sets is not None:
        from crlseq.data.genesets import check_gmt

        check_gmt(gene_sets)
    found = load(run)
    if found.facts.without_effect:
        say_verdict(found)
    if program is not None:
        _described(found, program)
    if gene_sets is None:
        table = found.programs[found.programs["rank"] <= top]
        if "anchor" in table:  # a sparse program ends
            table = table[table["loading"] != 0]
    else:
        from crlseq.readout.enrichment import enrich

        table = enrich(found, gene_sets).groupby(["program", "test"], sort=False).head(top)
    if program is not None:
        table = table[table["program"] == program]
    if json or not sys.stdout.isatty():
        show_table(table, "", json)
        return
    if gene_sets is not None:
        _show_sets(found, table)
        return
    for name, told in found.described.items():
        if program in (None, name):
            show_text("\n".join(_heading(told)))
            show_table(table[table["program"] == name].drop(columns="program"), "")
            show_text("")
    if found.described:
        say(f"For one program with its perturbations: crlseq inspect program {run} {program or found.program_names[0]}")


def _show_sets(found: Run, table: pd.DataFrame) -> None:
    columns = ["gene_set", "direction", "size", "overlap", "score", "p_value", "fdr"]
    for (name, test), part in table.assign(gene_set=_named(table)).groupby(["program", "test"], sort=False):
        shown = part[columns].drop(columns="direction" if test == "drivers" else [])
        show_table(shown, f"{name}  {found.described[str(name)].label}: {test}")
        show_text("")
    say("A pipe or --json also gets the genes of each set, and all digits.")


def _named(sets: pd.DataFrame) -> pd.Series:
    """Names and descriptions of gene sets in one column."""
    return (sets["gene_set"] + " " + sets["description"]).str.rstrip()


@app.command()
def program(
    run: RunFolder,
    name: Annotated[str, typer.Argument(help="The program, such as P3.", show_default=False)],
    top: Annotated[int, setting("Largest number of genes that rise, and of genes that fall.", min=1)] = 15,
    json: AsJson = False,
) -> None:
    """One program: its drivers, the genes that rise and fall with it, and the programs up- and downstream.

    A pipe gets one table, whose first column is driver, up (a gene that rises), down (a gene that falls) or gene set (one
    that the encoder reads the program from).
    """
    import pandas as pd

    found = _described(load(run), name)
    drivers, up, down, sets = found.drivers, found.up.head(top), found.down.head(top), found.pathways.head(top)
    if json:
        parts = {"drivers": drivers, "up": up, "down": down, "gene_sets": sets}
        show_json({
            "program": found.name, "label": found.label, "title": found.title,
            **{name: part.to_dict("records") for name, part in parts.items()},
            "anchors": found.anchors, "upstream": found.upstream, "downstream": found.downstream,
            "parents": found.parents, "children": found.children, "variance_explained": found.variance_explained,
            "effect_explained": found.effect_explained, "stability": found.stability,
        })  # fmt: skip
        return
    if not sys.stdout.isatty():
        gene = "symbol" if "symbol" in up else "gene"
        rows = [
            part.rename(columns={"perturbation": "name", gene: "name", "gene_set": "name"}).assign(what=what)
            for what, part in {"driver": drivers, "up": up, "down": down, "gene set": sets}.items()
            if len(part)
        ]
        columns = ["what", "name", "weight", "shift", "support", "fdr", "n_cells", "loading", "total_effect"]
        table = pd.concat(rows).reindex(columns=columns)
        show_table(table.astype({"n_cells": "Int64"}), "")
        return
    show_text("\n".join([*_heading(found), ""]))
    show_table(drivers, "Perturbations that target it (shift of hit cells, in standard deviations of the program)")
    show_table(up, "Genes that rise with it")
    show_table(down, "Genes that fall with it")
    if len(sets):
        named = sets.assign(gene_set=_named(sets))[["gene_set", "weight", "n_genes"]]
        show_table(named, "Gene sets that the encoder reads it from")


def _described(run: Run, name: str) -> Program:
    if not run.described:
        raise InputError(f"There is no program {name!r} in {run.path}: no perturbation has a detectable effect.")
    if name not in run.described:
        raise InputError(f"There is no program {name!r} in {run.path}.", _instead(run, name))
    return run.described[name]


def _instead(run: Run, name: str) -> str:
    """A hint for what is no program: where a perturbation or a gene of that name is found, or the nearest names."""
    import numpy as np

    programs, known = run.programs, run.interventions.set_index("perturbation")["program"]
    of_gene = (programs[[column for column in ("gene", "symbol") if column in programs]] == name).any(axis=1)
    loadings = programs[of_gene].sort_values("loading", key=np.abs, ascending=False).head(3)
    told = [f"{name} is a perturbation of {known[name]}."] if known.get(name) else []
    if len(loadings):
        largest = ", ".join(f"{row.program} ({row.loading:+.2f})" for row in loadings.itertuples())
        told.append(f"{name} is a gene with its largest loadings in {largest}.")
    if told:
        return " ".join(told)
    close = nearest(name, [*run.program_names, *known.index, *programs["gene"].unique()])
    first, last = run.program_names[0], run.program_names[-1]
    return (f"Did you mean {' or '.join(map(repr, close))}? " if close else "") + f"Programs are {first} to {last}."


def _heading(program: Program) -> list[str]:
    """A program in a few lines: title, what it explains, what is up- and downstream."""
    from crlseq.run.summary import numbers_in_words

    lines = [f"{program.name}  {program.title}"]
    if numbers := numbers_in_words(program):
        lines.append("    " + ", ".join(numbers))
    weights = program.parents | program.children
    for what, names in (("upstream", program.upstream), ("downstream", program.downstream)):
        if names:
            told = [f"{name} ({weights[name]:+.2f})" if name in weights else name for name in names]
            lines.append(f"    {what}: {', '.join(told)}")
    if program.anchors:
        more = f" +{len(program.anchors) - ANCHORS}" if len(program.anchors) > ANCHORS else ""
        lines.append(f"    anchors: {', '.join(program.anchors[:ANCHORS])}{more}")
    return lines


for command in (perturbation, guides, arms, covariates, contexts, interventions):
    app.command()(command)


@app.command()
def dag(run: RunFolder, json: AsJson = False) -> None:
    """The graph of the programs, as text and as a table, and whether the data determine it."""
    from crlseq.run.graph import dag_text
    from crlseq.run.pairs import told

    found = load(run)
    if json:
        import networkx as nx

        own = {} if found.pairs is None else {"pairs": told(found.pairs, found.facts).to_dict("records")}
        show_json(nx.node_link_data(found.dag, edges="edges") | own)
        return
    if sys.stdout.isatty():
        show_text(dag_text(found.dag))
    if len(found.edges) or not sys.stdout.isatty():
        show_table(found.edges, "Declared edges (weight: standard deviations of the target per one of the source)")
    else:
        show_text("No edge is declared.")
    if sys.stdout.isatty():
        show_text("")
        _show_matrix(found)
    say_verdict(found)


def _show_matrix(run: Run) -> None:
    """Marks of all pairs of programs, and what they mean."""
    from crlseq.run.pairs import legend, matrix, why_no_pairs

    if run.pairs is None:
        show_paragraph(why_no_pairs(run.facts))
        return
    marks = matrix(run.pairs, run.program_names)
    show_table(marks.reset_index(names=""), "Pairs of programs (source in the row, target in the column)", looks=LOOKS)
    for mark, status, means in legend(run.pairs):
        show_paragraph(f"{mark}  {status}: {means}")
    show_text("")


@app.command()
def pairs(run: RunFolder, json: AsJson = False) -> None:
    """Every ordered pair of programs: whether the source is upstream of the target, and how surely."""
    import pandas as pd

    from crlseq.run.columns import PAIR_COLUMNS
    from crlseq.run.pairs import STATUSES, by_status, told, why_no_pairs

    found = load(run)
    if found.pairs is None:
        say(why_no_pairs(found.facts))
    table = pd.DataFrame(columns=list(PAIR_COLUMNS)) if found.pairs is None else told(found.pairs, found.facts)
    if json:
        show_table(table, "", json)
        return
    if not sys.stdout.isatty():
        show_table(table.drop(columns="sentence", errors="ignore"), "")
        return
    for status, part in by_status(table).items():
        about = STATUSES[status]
        show_paragraph(f"{status} ({len(part)}): {about.means} {about.means_not}")
        for sentence in part["sentence"] if status in TOLD else ():
            show_paragraph(f"• {sentence}")
        show_table(part.drop(columns=["status", "sentence"]), "")
        show_text("")
    say_verdict(found)


@app.command()
def ancestry(run: RunFolder, json: AsJson = False) -> None:
    """Which program is upstream of which: declared, likely, or found in at least a tenth of the bootstrap replicates."""
    show_table(load(run).ancestry, "Ancestry (support: share of the bootstrap replicates)", json)


@app.command()
def history(run: RunFolder, json: AsJson = False) -> None:
    """Every loss term by epoch."""
    table = load(run).history
    if sys.stdout.isatty() and not json:  # two blocks of columns that a terminal holds
        short = {"reconstruction": "recon.", "temperature": "temp.", "validation": "val."}
        table = table.rename(columns=lambda name: "_".join(short.get(word, word) for word in name.split("_")))
        validation = [name for name in table if str(name).startswith("val.")]
        show_table(table.drop(columns=validation), "Loss terms by epoch", decimals=4)
        if validation:
            show_table(table[["epoch", *validation]], "Over validation cells", decimals=4)
        return
    show_table(table, "", json)
