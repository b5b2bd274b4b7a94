"""What would settle an open question, and what to doubt: sentences beside the answers to `crlseq.run.summary.answers`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crlseq.discovery.thresholds import DESCRIBED
from crlseq.run.findings import count, doubts, listed, sure_drivers
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR
from crlseq.run.summary import Answer


def what_next(run: Run, answers: Sequence[Answer]) -> list[str]:
    """What to do about each of the `answers`: an option, more of some cells, or nothing, in one or two sentences."""
    if run.facts.without_effect:
        return [
            "See whether the guides work: knock_down in interventions.csv is what each does to its own gene. "
            "If the screen has batches, name their column with --batch-key. More cells show smaller effects."
        ]
    _, better, converged = answers
    return [_graph(run), _better(run, better), _converged(run, converged)]


def _graph(run: Run) -> str:
    """What would settle the graph."""
    facts, verdict = run.facts, run.facts.identification.verdict
    if verdict == "identified":
        return "Fit again with another --seed. Then perturb the source of an edge, and see whether the genes of its target follow."
    if verdict == "ancestry only":
        return "For single edges, perturb so that the target is lost altogether, such as by complete knock-outs."
    if facts.discovery is None:
        if not facts.metrics.n_detected:
            return "Add cells of single perturbations: targets are found by their effects."
        return "Fit with the default preset and method: that finds targets and graph by likelihood, and judges pairs of programs."
    steps = []
    if facts.discovery.dispersion > DESCRIBED:
        key = "" if facts.config.data.batch_key else "If the screen has batches, name their column with --batch-key. "
        steps.append(f"{key}Leave out cells that their perturbation missed.")
    if more := _more_cells(run):
        steps.append(more)
    if alone := resting_on_one(run):
        steps.append(f"Perturb a second gene of {listed(alone, 'and')}.")
    return " ".join(steps) or "Perturb other genes of each program, strongly enough to abolish what they do."


def _more_cells(run: Run) -> str:
    """How many more cells would show effects of the size that pairs of programs are judged by."""
    discovery = run.facts.discovery
    if run.pairs is None or discovery is None or discovery.pairs is None:
        return ""
    size, known = discovery.pairs.size, run.pairs["detectable"]
    blind = known[(run.pairs["status"] == "undecided") & (known > size) & np.isfinite(known)]
    if blind.empty:
        return ""
    times = float(np.median(blind) / size) ** 2
    half = "the direction" if len(blind) == 1 else f"half of the {len(blind)} directions"
    return (
        f"{'More' if times < 2 else f'About {times:.0f} times as many'} cells of each perturbation would show an effect of "
        f"{size:g} SD in {half} that {'is' if len(blind) == 1 else 'are'} hidden now."
    )


def resting_on_one(run: Run) -> list[str]:
    """Programs that one perturbation alone surely targets."""
    return [program.name for program in run.described.values() if len(sure_drivers(program)) == 1]


def _better(run: Run, answer: Answer) -> str:
    """What would tell more about predictions."""
    if run.facts.metrics.evaluated_on != "test":
        if answer.grade == "poor":
            return "Predict with the simple prediction that is better here. Fit again with --hold-out-cells 0.2 to test this on cells that chose nothing."
        return "Fit again with --hold-out-cells 0.2: these cells are then compared with the model's and with simple predictions."
    if answer.grade == "poor":
        return "Predict with the simple prediction that is better here; `crlseq evaluate RUN` names it. More cells may change this."
    more = "`crlseq evaluate RUN` gives more baselines, and intervals"
    return f"{more}; with --cross-validate it tests perturbations that were never seen."


def _converged(run: Run, answer: Answer) -> str:
    """How to train further, if that is of use."""
    n = run.facts.training.epochs_run
    if answer.grade == "good":
        return "Nothing is left to do."
    if answer.grade == "poor":
        return "Fit with the default preset, which starts from the solution of the likelihood, or with another --seed."
    return f"Fit again with --epochs {max(2 * n, 20)}."


def limitations(run: Run) -> list[str]:
    """What to keep in mind with this run: of its numbers first, then of the screen, then of any."""
    facts = run.facts
    words = doubts(run)
    if alone := resting_on_one(run):
        rests = "rests on one perturbation" if len(alone) == 1 else "rest on one perturbation each"
        words.append(f"{listed(alone, 'and')} {rests}: no other confirms what it does.")
    if (n := round(DETECTABLE_FDR * facts.metrics.n_detected)) > 0:
        words.append(f"About {count(n, 'perturbation')} of the {facts.metrics.n_detected} with a detectable effect may be there by chance (FDR {DETECTABLE_FDR}).")  # fmt: skip
    words += facts.identification.warnings
    if facts.without_effect:
        return words
    return [
        *words,
        "A program is what these perturbations move together; what none of them moves is in no program.",
        "Cells are a snapshot: an edge says nothing about time, and the graph has no cycles.",
    ]
