"""``crlseq power``: how many cells a screen needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crlseq.cli.options import AsJson, Force, Quiet, load, read_config, setting, switch, takes_config
from crlseq.cli.output import refuse_no_figure, refuse_output, say, say_paragraph, show_json, show_table
from crlseq.errors import UsageError
from crlseq.storage.runfolder import is_run

if TYPE_CHECKING:
    from crlseq.experiments.power import Power

# Options that are of control cells alone: a run and a scenario have effects of their own.
READING = ("perturbation_key", "control_label", "separator", "guide_key", "batch_key", "layer", "values", "n_top_genes")


Source = Annotated[
    Path,
    typer.Argument(
        help="A screen, whose control cells are used; a run folder, whose effects are used as well; or a scenario of "
        "`crlseq benchmark`.",
        show_default=False,
    ),
]
Effects = Annotated[
    str | None,
    setting("Sizes of shifts to plant in control cells, in SDs of the program's own noise.", default="0.25,0.5,1"),
]
Perturbations = Annotated[
    int | None, setting("Perturbations with an effect to plant; as many without one are added.", default="20", min=1)
]
Programs = Annotated[int | None, setting("Programs that they target.", default="5", min=1)]
Penetrance = Annotated[float | None, setting("Share of a perturbation's cells that it hits.", default="1")]
Kind = Annotated[str | None, setting("Kind of the interventions.", choices=("hard", "soft", "shift"), default="hard")]
NControl = Annotated[int | None, setting("Control cells of a simulated screen.", default="as many as there are")]
DetectionOnly = Annotated[
    bool, switch("--detection-only", "Test perturbations and fit nothing, which is several times as fast.")
]


@takes_config(*READING)
def power(
    source: Source,
    output: Annotated[Path | None, setting("Table (CSV) to write.", "--output", "-o", default="none")] = None,
    plot: Annotated[Path | None, setting("Figure to write: .png, .svg or .pdf.", default="none")] = None,
    cells: Annotated[str, setting("Numbers of cells per perturbation.")] = "25,50,100,200,400",
    effect: Effects = None,
    perturbations: Perturbations = None,
    programs: Programs = None,
    penetrance: Penetrance = None,
    intervention: Kind = None,
    all_controls: Annotated[bool, switch("--all-controls", "Every cell of the screen is a control.")] = False,
    n_control: NControl = None,
    repeats: Annotated[int, setting("Simulated screens of each size.", min=1)] = 3,
    detection_only: DetectionOnly = False,
    seed: Annotated[int, setting("Seed of all random numbers.", min=0)] = 0,
    threads: Annotated[int | None, setting("CPU threads.", default="all", min=1)] = None,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Say which effects a screen would find, by its number of cells per perturbation.

    Screens are simulated from the noise of real control cells, tested and fitted, and judged against what was planted.
    """
    planted: dict[str, Any] = {
        "perturbations": perturbations, "programs": programs, "penetrance": penetrance, "intervention": intervention,
    }  # fmt: skip
    of_run, scenario = is_run(source), not source.exists()
    if of_run or scenario:
        others = {"effect": effect, "all_controls": all_controls or None, **planted, **given}
        _refuse("a run" if of_run else "a scenario", {**others, "n_control": n_control} if scenario else others)
    if plot is not None:
        refuse_no_figure(plot)
    for file in filter(None, (output, plot)):
        refuse_output(file, force)
    sizes, config = [int(n) for n in _numbers(cells, "cells")], read_config(given)
    from crlseq.experiments.planted import Plan
    from crlseq.experiments.power import EFFECTS
    from crlseq.experiments.power import power as simulate_power

    found = simulate_power(
        load(source) if of_run else str(source), cells=sizes,
        effects=EFFECTS if effect is None else _numbers(effect, "effect"),
        plan=Plan(**{name: value for name, value in planted.items() if value is not None}), repeats=repeats,
        detection_only=detection_only, n_control=n_control, data=config.data, every_cell=all_controls, seed=seed,
        threads=threads, note=(lambda text: None) if quiet else say,
    )  # fmt: skip
    _write(found, output, plot)
    if json:
        rows = found.table.to_dict("records")
        show_json({"source": found.title, "sentences": list(found.sentences), "table": rows})
        return
    show_table(found.table.dropna(axis=1, how="all"), f"Power: {found.title}", decimals=2)
    for sentence in found.sentences:
        say_paragraph(sentence)


def _write(found: Power, output: Path | None, plot: Path | None) -> None:
    """Table and figure, where they are asked for."""
    if output is not None:
        from crlseq.storage.csv import write_csv

        write_csv(output, found.table)
        say(f"table: {output}")
    if plot is not None:
        import matplotlib as mpl

        mpl.use("Agg")
        from crlseq.plotting.power import draw_power
        from crlseq.plotting.style import write_figure

        write_figure(draw_power(found.table, f"Power: {found.title}"), plot)
        say(f"figure: {plot}")


def _refuse(what: str, options: dict[str, Any]) -> None:
    """Options of control cells, where effects are not planted in them."""
    for name, value in options.items():
        if value not in (None, []):
            option = name.replace("_", "-")
            raise UsageError(f"--{option} is of screens, and this is {what}.", "Omit it, or give a screen.")


def _numbers(text: str, option: str) -> list[float]:
    """``25,50`` -> 25, 50; numbers of cells are whole."""
    try:
        found = [float(part) for part in text.split(",")]
        if option == "cells" and any(not n.is_integer() for n in found):  # as is none that is infinite
            raise ValueError
    except ValueError:
        hint = f"Give numbers with commas between, such as --{option} {'50,100' if option == 'cells' else '0.5,1'}."
        raise UsageError(f"--{option} is {text!r}.", hint) from None
    return found
