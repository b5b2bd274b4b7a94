"""A run in words and numbers: what each program is, and what to believe. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
import numpy as np
import pandas as pd

from crlseq.errors import few
from crlseq.run.schema import DETECTABLE_FDR, PROGRAM_NUMBERS, Bootstrap, RunInfo, Training
from crlseq.run.tables import by_program, shown

TITLE_GENES = 3
DRIVER_COLUMNS = ("perturbation", "weight", "shift", "shift_se", "support", "fdr", "n_cells")
SETTLED = 0.02  # share of the fall of the validation loss that the last fifth of the epochs may still bring
FEW_EPOCHS = 5
BASELINES = {"no_change": "no change", "mean": "mean effect", "training": "training effects"}


@dataclass(frozen=True)
class Program:
    """One program, in standard deviations of which its shifts and weights are."""

    name: str  # P3
    label: str  # its strongest perturbations
    title: str  # these and its top genes (those that are no driver's own) in one line
    # `DRIVER_COLUMNS`, those that there are: perturbations that target it, those with a detectable effect
    # first, by |shift|
    drivers: pd.DataFrame
    # ``gene, loading, total_effect``: genes that rise and fall with it, by |loading|. Changes of log expression when the
    # program rises by a standard deviation: directly, and with all that follows through the DAG.
    up: pd.DataFrame
    down: pd.DataFrame
    anchors: tuple[str, ...] | None  # genes of this program alone, by |loading|; None where the decoder is dense
    upstream: tuple[str, ...]  # programs that are declared to lie upstream, by a path of edges or by ``pairs.csv``
    downstream: tuple[str, ...]  # likewise downstream
    parents: dict[str, float]  # those upstream that a declared edge joins, with its weight
    children: dict[str, float]  # likewise downstream
    variance_explained: float  # see `crlseq.readout.explained`; NaN where it could not be measured
    effect_explained: float
    stability: float  # mean |cosine| of its loadings with those of bootstrap replicates; NaN without a bootstrap
    # ``gene_set, description, weight, n_genes``: what the encoder reads it from, by |weight| (per standard deviation of the
    # set's activity); empty where the encoder reads all genes
    pathways: pd.DataFrame
    lost_arms: tuple[str, ...]  # drivers with a detectable effect whose cells lost a part of their chromosome


def describe_programs(
    facts: RunInfo,
    programs: pd.DataFrame,
    interventions: pd.DataFrame,
    dag: nx.DiGraph[str],
    order: nx.DiGraph[str],
    pathways: pd.DataFrame | None,
    arms: pd.DataFrame | None,
) -> list[Program]:
    """Every program of a run, in topological order; the arguments are attributes of `crlseq.run.run.Run`, and its
    `crlseq.run.graph.declared_order`.
    """
    genes = dict(tuple(programs.groupby("program", sort=False)))
    detected = (interventions["fdr"] <= DETECTABLE_FDR).to_numpy()
    strongest_first = np.lexsort((-interventions["shift"].abs().to_numpy(), ~detected))
    drivers = dict(tuple(interventions.iloc[strongest_first].groupby("program", sort=False)))
    columns = ["gene_set", "description", "weight", "n_genes"]
    sets = {} if pathways is None else dict(tuple(pathways.groupby("program", sort=False)))
    lost = set() if arms is None else {*arms.loc[arms["lost"], "perturbation"]}
    found = []
    for row in facts.programs:
        own = drivers.get(row.name, interventions.iloc[:0])
        own = own[[name for name in DRIVER_COLUMNS if name in own]]
        table = genes[row.name]
        columns_of_genes = [name for name in ("gene", "symbol", "loading", "total_effect") if name in table]
        loadings = table.loc[table["loading"] != 0, columns_of_genes]
        numbers = row.model_dump(include=set(PROGRAM_NUMBERS))
        theirs = set(own["perturbation"])
        others = loadings[~(loadings["gene"].isin(theirs) | shown(loadings).isin(theirs))]
        top = shown(others)[:TITLE_GENES].tolist()
        found.append(
            Program(
                name=row.name,
                label=row.label,
                title=f"{row.label}: {', '.join(top)}" if top else row.label,  # STAT1, JAK2 +2: GBP1, PSMB9, WARS
                drivers=own.reset_index(drop=True),
                up=loadings[loadings["loading"] > 0].reset_index(drop=True),
                down=loadings[loadings["loading"] < 0].reset_index(drop=True),
                anchors=tuple(shown(table[table["anchor"]])) if "anchor" in table else None,
                upstream=_sorted(order.predecessors(row.name)),
                downstream=_sorted(order.successors(row.name)),
                parents={a: dag.edges[a, row.name]["weight"] for a in _sorted(dag.predecessors(row.name))},
                children={b: dag.edges[row.name, b]["weight"] for b in _sorted(dag.successors(row.name))},
                lost_arms=tuple(
                    own.loc[(own["fdr"] <= DETECTABLE_FDR) & own["perturbation"].isin(lost), "perturbation"]
                ),
                pathways=sets.get(row.name, pd.DataFrame(columns=columns))[columns].reset_index(drop=True),
                **{name: float("nan") if value is None else value for name, value in numbers.items()},
            )
        )
    return found


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: int(name[1:])))


@dataclass(frozen=True)
class Answer:
    """To a question: ``good``, ``fair``, ``poor`` or ``open``, in a few words, and why in sentences."""

    question: str
    grade: str
    answer: str
    reason: str


def answers(facts: RunInfo, evaluation: pd.DataFrame, history: pd.DataFrame) -> list[Answer]:
    """Is the graph identified, are predictions better than baselines, did the fit converge? Of a screen without any effect
    that alone.
    """
    if facts.without_effect:
        return [
            Answer("Does any perturbation have an effect?", "poor", "none is detectable", facts.identification.reason)
        ]
    found = facts.identification
    grade = {"identified": "good", "ancestry only": "fair", "partly identified": "fair"}.get(found.verdict, "poor")
    return [
        Answer("Is the graph identified?", grade, found.verdict, found.reason),
        Answer("Better than baselines?", *_better(evaluation)),
        Answer("Did the fit converge?", *_converged(facts.training, history, facts.by_gradient)),
    ]


def _better(evaluation: pd.DataFrame) -> tuple[str, str, str]:
    """Against the best of the simple predictions that the table has, condition by condition, by two metrics."""
    found = [_compared(evaluation, "l2", "L2 of means", -1.0), _compared(evaluation, "pearson_delta", "Pearson Δ", 1.0)]
    signs = {title: sign for title, sign, sentence in found if sentence}
    if not signs:
        return "open", "not evaluated", "No cells were held out."
    answer, grade = answer_of(signs)
    split = str(evaluation["split"].iloc[0])
    sentences = "; ".join(sentence for _, _, sentence in found if sentence)
    reason = f"On {split} cells, against the best simple prediction: {sentences}."
    if split == "validation":
        reason += " Validation cells also chose the epoch."
    return grade, answer, reason


def answer_of(signs: Mapping[str, float]) -> tuple[str, str]:
    """Answer and grade of comparisons by some metrics: 1 better, 0 no clear difference, -1 worse than the baseline."""
    words = {1.0: "better", 0.0: "no clear difference", -1.0: "worse"}
    by = {sign: [title for title, own in signs.items() if own == sign] for sign in words}
    there = [sign for sign in words if by[sign]]
    if len(there) == 1:
        return words[there[0]], {1.0: "good", 0.0: "fair", -1.0: "poor"}[there[0]]
    return ", ".join(f"{words[sign]} by {' and '.join(by[sign])}" for sign in there), "fair"


def best_baseline(evaluation: pd.DataFrame, metric: str, larger: float) -> tuple[str, pd.DataFrame]:
    """The simple prediction with the best mean, and the table where all are defined with its values as ``rival``.

    ``larger``: 1 where larger values are better, -1 where smaller ones are.
    """
    rivals = {name: f"{metric}_{name}" for name in BASELINES if f"{metric}_{name}" in evaluation}
    table = evaluation.dropna(subset=[metric, *rivals.values()])
    best = max(rivals, key=lambda name: larger * table[rivals[name]].mean())
    return best, table.assign(rival=table[rivals[best]])


def _compared(evaluation: pd.DataFrame, metric: str, title: str, larger: float) -> tuple[str, float, str]:
    """The metric, 1, 0 or -1 (better, within two standard errors, worse than the best baseline), and a sentence."""
    best, table = best_baseline(evaluation, metric, larger)
    if table.empty:
        return title, 0.0, ""
    gain, n = larger * (table[metric] - table["rival"]).to_numpy(), len(table)
    error = gain.std(ddof=1) / np.sqrt(n) if n > 1 else np.inf
    sentence = (
        f"{title} {table[metric].mean():.3g} against {table['rival'].mean():.3g} ({BASELINES[best]}), better on "
        f"{int((gain > 0).sum())} of {n} conditions"
    )
    return title, (float(np.sign(gain.mean())) if abs(gain.mean()) > 2 * error else 0.0), sentence


def _converged(training: Training, history: pd.DataFrame, from_random: bool) -> tuple[str, str, str]:
    n = training.epochs_run
    if not n:
        return "good", "yes", "No network was trained: expression is linear in what the method found."
    kept = f"the weights of epoch {training.best_epoch + 1} of {n} were kept"
    if n > 1 and training.best_epoch == 0 and from_random:
        # A fit that starts from the likelihood's solution may well be best at its start.
        return "poor", "no", f"The validation loss was lowest in the first of {n} epochs, whose weights were kept."
    if training.stopped_early:
        return "good", "yes", f"The validation loss stopped falling; {kept}."
    if n < FEW_EPOCHS:
        return "open", "unknown", f"{n} epochs are too few to tell; {kept}."
    validated = "validation_total" in history
    what, values = "validation loss" if validated else "loss", history["validation_total" if validated else "total"]
    before = values[: -max(1, n // 5)]
    share = (before.min() - values.min()) / max(values.max() - values.min(), 1e-30)
    if share > SETTLED:
        reason = f"The last fifth of the epochs still contributed {share:.0%} of the fall of the {what}."
        return "fair", "not quite", f"{reason} {kept[0].upper()}{kept[1:]}."
    return "good", "yes", f"The {what} had settled; {kept}."


def summary_table(programs: list[Program]) -> pd.DataFrame:
    """One row per program: what `describe_programs` says, short."""

    return pd.DataFrame({
        "program": [p.name for p in programs],
        "title": [p.title for p in programs],
        "n_drivers": [len(p.drivers) for p in programs],
        **{way: [", ".join(shown(getattr(p, way))[:5]) for p in programs] for way in ("up", "down")},
        **{way: [", ".join(getattr(p, way)) for p in programs] for way in ("upstream", "downstream")},
        **{name: [getattr(p, name) for p in programs] for name in PROGRAM_NUMBERS},
    })  # fmt: skip


def percent(value: float) -> str:
    """``12.3 %``; a dash for NaN."""
    return "–" if np.isnan(value) else f"{100 * value:.1f} %"


def no_effect_in_words(n_perturbations: int) -> str:
    """What a screen without any effect says, in a sentence."""
    return f"None of the {n_perturbations} perturbations has a detectable effect (FDR ≤ {DETECTABLE_FDR})."


def sensitivity_in_words(facts: RunInfo) -> str:
    """Which effect would have been detected in a screen without any; empty where that was not tried."""
    seen = facts.sensitivity
    if seen is None:
        return ""
    words = f"A perturbation has {seen.n_cells} cells (median), beside {seen.n_control} control cells:"
    if seen.shift is None:
        return f"{words} too few to say which effect would have been detected."
    return (
        f"{words} if all perturbations shifted expression by {seen.shift:.2g} SD of control cells, each in a "
        "random direction, 80 % of them would have been detected."
    )


def combinations_in_words(facts: RunInfo) -> str:
    """How single effects combine, and where that comes from; empty for models without the law."""
    law = facts.combinations
    if law is None:
        return ""
    if not law.fitted:
        few = f"{law.n_measured or 'No'} measured combination{'s were' if law.n_measured != 1 else ' was'}"
        return (
            f"Combinations: two effects of equal size give {law.beta:.2g} of their sum and {law.gamma:.2g} of the mean effect "
            f"of all perturbations, as in two published screens (each ± 0.25 in a new one). {few} in the fit, too few to learn more."
        )
    words = (
        f"Combinations: two effects of equal size give {law.beta:.2f} ± {law.beta_error:.2f} of their sum and "
        f"{law.gamma:.2f} ± {law.gamma_error:.2f} of the mean effect of all perturbations, fitted to {law.n_measured} "
        "measured combinations."
    )
    if not law.n_terms:
        return (
            f"{words} Terms of single perturbations do not surely lower the squared error of left-out combinations "
            f"({100 * law.gain:.0f} ± {100 * law.gain_error:.0f} %)."
        )
    return (
        f"{words} What recurs in the combinations of a perturbation, beside its estimated effect alone, lowers the squared error of "
        f"left-out combinations by {100 * law.gain:.0f} ± {100 * law.gain_error:.0f} %."
    )


def sets_in_words(facts: RunInfo) -> str:
    """What the sets that the encoder reads see of the programs; empty where it reads all genes."""
    sets = facts.gene_sets
    if sets is None:
        return ""
    shares = [
        f"{program.name} {percent(own)} ({percent(every)})"
        for program, own, every in zip(facts.programs, sets.explained, sets.explained_by_all_genes, strict=False)
        if own is not None and every is not None
    ]
    if not shares:
        return ""
    return (
        "Share of each program's variance over validation cells that the encoder reads from gene sets (in brackets: "
        f"read linearly from all genes): {', '.join(shares)}."
    )


def numbers_in_words(program: Program) -> list[str]:
    """What the program explains and how stable it is, as far as the run tells."""
    words = []
    if not np.isnan(program.effect_explained):
        words.append(f"explains {percent(program.effect_explained)} of the effects of perturbations")
    if not np.isnan(program.variance_explained):
        words.append(f"{percent(program.variance_explained)} of the variance of control cells")
    if not np.isnan(program.stability):
        words.append(f"stability {program.stability:.2f}")
    if program.anchors is not None:
        words.append(f"{len(program.up) + len(program.down)} genes, {len(program.anchors)} of them in no other program")
    if program.lost_arms:
        words.append(f"cells of {few(program.lost_arms)} lost chromosome arms")
    return words


def strongest(interventions: pd.DataFrame, top: int) -> tuple[pd.DataFrame, int]:
    """Perturbations with a program, by program and then shift: the `top` by \\|shift\\|; and how many more there are."""
    table = interventions[(interventions["program"] != "") & interventions["shift"].notna()]
    kept = table.loc[table["shift"].abs().sort_values(ascending=False, kind="stable").index[:top]]
    return by_program(kept, kept["shift"]).reset_index(drop=True), len(table) - len(kept)


def assignment(bootstrap: Bootstrap | None, rows: pd.DataFrame) -> np.ndarray | None:
    """(rows, p) share of bootstrap replicates that gave a perturbation to each program; None without a bootstrap."""
    if bootstrap is None:
        return None
    known = dict(zip(bootstrap.perturbations, bootstrap.assignment, strict=True))
    empty = [float("nan")] * len(bootstrap.program)
    return np.array([known.get(name, empty) for name in rows["perturbation"]], dtype=float)


def short(text: object, most: int = 24) -> str:
    """One line of at most `most` characters; what cannot be printed becomes a blank."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def controls_in_words(facts: RunInfo) -> str:
    """What was found where there is nothing to find."""
    found = facts.negative_controls
    if not found.perturbations:
        return "Negative controls: too few control cells to set some aside."
    words = (
        f"Negative controls: {found.detected} of {found.perturbations} groups of control cells have a detectable effect"
    )
    if found.pairs:
        words += f"; shifts of control cells order {found.ordered} of {found.pairs} pairs"
    return f"{words}."
