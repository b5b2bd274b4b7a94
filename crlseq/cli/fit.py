"""``crlseq fit``: a screen to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from crlseq.cli.output import FitProgress, say

DATA, GUIDES, MODEL, TRAINING = "Data", "Guides", "Model", "Training"


def _option(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


def fit(
    file: Annotated[
        Path,
        typer.Argument(
            help="The screen: an .h5ad or .h5mu file, a zarr store, or what prepare wrote.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder to write.", show_default=False)],
    preset: Annotated[str | None, typer.Option(help="default, or paper (the published model exactly).")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with tables data, model, training; flags win.")] = None,
    perturbation_key: Annotated[str | None, _option("Column of obs with the perturbations. [detected]", DATA)] = None,
    control_label: Annotated[str | None, _option("Label of control cells. [detected]", DATA)] = None,
    separator: Annotated[
        str | None, _option("Between the parts of a combination; '' for none. [detected]", DATA)
    ] = None,
    guide_key: Annotated[
        str | None, _option("Column of guides (STAT1g2), read as the genes they target.", GUIDES)
    ] = None,
    guide_counts: Annotated[
        str | None, _option("Guide counts to assign cells by: a table in obsm, or a modality of an .h5mu.", GUIDES)
    ] = None,
    guide_map: Annotated[Path | None, _option("Table of guides and genes. [by the names of guides]", GUIDES)] = None,
    guide_min_umis: Annotated[int | None, _option("Fewest UMIs of a gene that a cell has. [5]", GUIDES)] = None,
    guide_min_share: Annotated[float | None, _option("Their smallest share of a cell's UMIs. [0.8]", GUIDES)] = None,
    responders: Annotated[
        bool | None,
        _option("Leave out cells that look unperturbed; effects come out larger.", DATA, "--responders/--all-cells"),
    ] = None,
    batch_key: Annotated[
        str | None, _option("Column of experimental batches; controls come from the same batch.", DATA)
    ] = None,
    layer: Annotated[str | None, _option("Layer to use instead of X.", DATA)] = None,
    values: Annotated[str | None, _option("auto, counts, log or continuous.", DATA)] = None,
    n_top_genes: Annotated[str | None, _option("Number of most variable genes, or all. [5000]", DATA)] = None,
    genes: Annotated[Path | None, _option("File with the genes to fit, one a line.", DATA)] = None,
    min_cells: Annotated[int | None, _option("Leave out perturbations with fewer cells. [10]", DATA)] = None,
    hold_out: Annotated[list[str] | None, _option("A condition to hold out; may be repeated.", DATA)] = None,
    hold_out_cells: Annotated[float | None, _option("Share of every condition's cells to hold out. [0]", DATA)] = None,
    combinations: Annotated[
        bool | None, _option("Fit on combinations too, or hold them all out.", DATA, "--combinations/--no-combinations")
    ] = None,
    embeddings: Annotated[
        Path | None,
        _option(
            "Table of gene vectors (CSV, TSV or h5ad): `predict` then extrapolates to genes never perturbed.", DATA
        ),
    ] = None,
    streamed: Annotated[
        bool | None,
        _option(
            "Read a prepared store as training goes, or load it whole. [by its size]", DATA, "--streamed/--in-memory"
        ),
    ] = None,
    method: Annotated[
        str | None,
        _option("straighten (likelihood, then networks), linear (likelihood alone, seconds) or gradient.", MODEL),
    ] = None,
    gene_sets: Annotated[
        Path | None,
        _option("A gmt file: the encoder reads its gene sets, and each program is a combination of them.", MODEL),
    ] = None,
    n_latents: Annotated[str | None, _option("Number of programs, or auto.", MODEL)] = None,
    intervention: Annotated[str | None, _option("auto (from the data), shift, hard or soft.", MODEL)] = None,
    equations: Annotated[str | None, _option("auto (from the data), linear or nonlinear.", MODEL)] = None,
    decoder: Annotated[str | None, _option("dense, or sparse: programs that are short lists of genes.", MODEL)] = None,
    bootstrap: Annotated[
        str | None,
        _option("Replicates that say how sure edges and targets are, or auto (20 with few programs).", MODEL),
    ] = None,
    epochs: Annotated[int | None, _option("Passes over the cells, at most. [100]", TRAINING)] = None,
    batch_size: Annotated[int | None, _option("Perturbed cells of one condition in a step.", TRAINING)] = None,
    seed: Annotated[int | None, _option("Seed of everything random. [0]", TRAINING)] = None,
    ensemble: Annotated[
        int | None,
        _option("Models of consecutive seeds, trained at once; ensemble.csv says what they agree on.", TRAINING),
    ] = None,
    dtype: Annotated[
        str | None, _option("float32 or float64. [float32; float64 with the preset paper]", TRAINING)
    ] = None,
    device: Annotated[str | None, _option("auto, cpu or cuda.", TRAINING)] = None,
    threads: Annotated[int | None, _option("CPU threads. [all]", TRAINING)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished fit.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that lies at --output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors alone.")] = False,
) -> None:
    """Fit a screen: gene programs, the map from perturbations to programs, and the latent DAG."""
    from crlseq.config import make_config, read_toml
    from crlseq.training.distributed import joined

    with joined() as ranks:
        settings = make_config(
            preset,
            read_toml(config) if config else None,
            perturbation_key=perturbation_key, control_label=control_label, separator=separator, batch_key=batch_key,
            guide_key=guide_key, guide_counts=guide_counts, guide_map=None if guide_map is None else str(guide_map),
            guide_min_umis=guide_min_umis, guide_min_share=guide_min_share, responders=responders,
            layer=layer, values=values, n_top_genes=_number_or_word(n_top_genes), genes=_gene_list(genes), min_cells=min_cells,
            hold_out=tuple(hold_out) if hold_out else None, hold_out_cells=hold_out_cells, combinations=combinations,
            embeddings=None if embeddings is None else str(embeddings), streamed=streamed,
            gene_sets=None if gene_sets is None else str(gene_sets), decoder=decoder,
            method=method, n_latents=_number_or_word(n_latents), intervention=intervention, equations=equations, bootstrap=_number_or_word(bootstrap),
            epochs=epochs, batch_size=batch_size, seed=seed, ensemble=ensemble, dtype=dtype, device=device, threads=threads,
        )  # fmt: skip
        from crlseq.pipeline.fit import fit as fit_screen
        from crlseq.pipeline.fit import take_part

        if ranks.rank > 0:
            take_part(file, settings, ranks)
            return
        progress = FitProgress(quiet)
        try:
            run = fit_screen(
                file, output, config=settings, resume=resume, force=force, progress=progress.callbacks(), ranks=ranks
            )
        finally:
            progress.close()
    if not quiet:
        detected, total = run.info["metrics"]["n_detected"], len(run.interventions)
        say(f"{run.info['n_latents']} programs; {detected} of {total} perturbations have a detectable effect.")
        say(f"The graph is {run.info['identification']['verdict']}: {run.info['identification']['reason']}")
        say(f"Written to {output} in {run.info['seconds']:.0f} s. Next: crlseq inspect {output}")


def _number_or_word(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdigit() else text


def _gene_list(path: Path | None) -> tuple[str, ...] | None:
    from crlseq.errors import InputError

    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The gene list {path} cannot be read: {error}.", "Give a text file with one gene a line."
        ) from None
    found = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not found:
        raise InputError(f"The gene list {path} is empty.", "Give a text file with one gene a line.")
    return found
