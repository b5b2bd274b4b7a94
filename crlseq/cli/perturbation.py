"""``crlseq inspect perturbation`` and its like: what perturbations do, to covariates and in contexts, their guides, and what cells lost."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from crlseq.cli.options import AsJson, RunFolder, load, setting
from crlseq.cli.output import say, show_json, show_paragraph, show_table, show_text
from crlseq.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

SUREST = 5  # genes that are shown where none surely changes


def perturbation(
    run: RunFolder,
    name: Annotated[str, typer.Argument(help="The perturbation, such as IRF1.", show_default=False)],
    top: Annotated[int, setting("Largest number of genes that rise, and of genes that fall.", min=1)] = 15,
    json: AsJson = False,
) -> None:
    """One perturbation: its program, and what it does to every gene beside what the program tells.

    A pipe gets the rows of effects.csv, the surest gene first.
    """
    from crlseq.run.perturbation import genes_of, perturbation_in_words, row_of
    from crlseq.run.schema import DETECTABLE_FDR

    found = load(run)
    row, genes = row_of(found, name), genes_of(found, name)
    if json:
        words = perturbation_in_words(found, name)
        show_json(row.to_dict() | {"findings": words, "genes": genes.to_dict("records")})
        return
    if not sys.stdout.isatty():
        show_table(genes, "")
        return
    for sentence in perturbation_in_words(found, name):
        show_paragraph(sentence)
    show_text("")
    changed = genes[genes["fdr"] <= DETECTABLE_FDR]
    if changed.empty:
        show_table(_read(genes.head(SUREST)), "No gene surely changes; the surest ones (change of log expression):")
        return
    for title, own in (("rise", changed[changed["change"] > 0]), ("fall", changed[changed["change"] < 0])):
        if len(own):
            more = f", the {top} surest of {len(own)}" if len(own) > top else ""
            show_table(_read(own.head(top)), f"Genes that {title}{more} (change of log expression)")
            show_text("")


def _read(genes: pd.DataFrame) -> pd.DataFrame:
    """Columns that are read first, without those that are empty."""
    names = ["symbol" if "symbol" in genes else "gene", "change", "se", "program_part", "log2_fold_change", "fdr"]
    return genes[names].dropna(axis="columns", how="all")


def guides(run: RunFolder, json: AsJson = False) -> None:
    """Guides beside the others of their gene, the weakest first; a weak guide does nothing, though others have an effect."""
    found = load(run)
    if found.guides is None:
        raise InputError(f"No guides were read in {run}.", "Fit with --guide-key or --guide-counts.")
    show_table(found.guides, "Guides (strength: effect over that of the gene)", json)


# Columns of interventions on a terminal; those that are empty or 1 throughout are left out.
READ = (
    "perturbation", "program", "support", "shift", "shift_se", "explained", "knock_down", "n_cells", "fdr", "contexts_differ",
)  # fmt: skip


def interventions(run: RunFolder, json: AsJson = False) -> None:
    """The program that each perturbation targets, and its effect on that program."""
    from crlseq.run.contexts import contexts_in_words, differences

    of_run = load(run)
    found = of_run.interventions
    if of_run.contexts is not None:
        found = found.assign(contexts_differ=differences(of_run))
    program = found["program"].where(found["program"] != "")  # perturbations without a claim come last
    order = program.str[1:].astype(float).sort_values(kind="stable").index
    table = found.loc[order]
    if sys.stdout.isatty() and not json:  # what is read first; a pipe has all columns
        kept = table[[name for name in READ if name in table]]
        told = kept.notna() & (kept != 1)
        table = kept.loc[:, told.any() | kept.columns.isin(("perturbation", "program", "support", "shift"))]
    show_table(table, "Interventions (shift of hit cells, in standard deviations of the program)", json)
    if not json and "disagrees" in found:
        for row in found[found["disagrees"] == 1].to_dict("records"):
            say(f"The cells of {row['perturbation']} contradict the other perturbations of {row['program']}.")
    for sentence in [] if json else contexts_in_words(of_run):
        say(sentence)


def contexts(run: RunFolder, json: AsJson = False) -> None:
    """Does a perturbation shift its program otherwise in another context? The surest difference first."""
    from crlseq.run.contexts import contexts_in_words

    found = load(run)
    if found.contexts is None:
        raise InputError(f"No contexts were told apart in {run}.", "Fit with --context-key.")
    show_table(found.contexts, "Shifts of all cells, in standard deviations of the program", json)
    for sentence in [] if json else contexts_in_words(found):
        say(sentence)


def arms(run: RunFolder, json: AsJson = False) -> None:
    """Do the genes beside each perturbation's target fall together, as where cells lost a chromosome arm? The surest first."""
    found = load(run)
    if found.arms is None:
        raise InputError(
            f"Positions of genes are not known in {run}.",
            "Fit with --gene-positions, or with chromosome and start in var.",
        )
    show_table(found.arms, "Genes beside the targets (change of log expression, beside that of other genes)", json)


def covariates(run: RunFolder, json: AsJson = False) -> None:
    """What perturbations do to covariates, such as phases of the cell cycle; those that surely differ from controls first."""
    found = load(run)
    if found.covariates is None:
        raise InputError(f"No covariates were taken off in {run}.", "Fit with --covariates, such as cell-cycle.")
    show_table(found.covariates, "Covariates (differences: numbers in SD of controls, levels in shares of cells)", json)
