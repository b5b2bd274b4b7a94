"""Findings, doubts and advice in words, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from crlseq.run.advice import limitations, resting_on_one, what_next
from crlseq.run.findings import (
    DOUBTED,
    FOUND,
    UNTESTED,
    doubts,
    findings,
    near_duplicates,
    not_seen,
    told,
    what_was_done,
)
from crlseq.run.run import Run
from crlseq.run.summary import answers
from tests.synthetic import found_by_bootstrap, synthetic_run, with_info, with_pairs

GENES = ["A", "B", "C", "D", "OWN"]
NAMES = ["OWN", "PERT1", "PERT2", "PERT3"]


def screen(effects: list[list[float]] | None = None, bootstrap: bool = True, **columns: list[Any]) -> Run:
    """Two programs; OWN and PERT2 target P0, PERT1 and PERT3 target P1, all with support 1 and a shift of -2."""
    run = synthetic_run(2, 4, genes=GENES, names=NAMES)
    total = np.array(effects or [[0.9, -0.5, 0.3, 0.05, 2.0], [0.1, 0.0, 0.8, 0.0, 0.0]])
    place = [GENES.index(gene) for gene in run.programs["gene"]]
    number = run.programs["program"].str[1:].astype(int)
    values = total[number, place]
    programs = run.programs.assign(loading=values, total_effect=values)
    known: dict[str, list[Any]] = {"shift": [-2.0] * 4, "support": [1.0] * 4 if bootstrap else [np.nan] * 4}
    interventions = run.interventions.assign(**(known | columns))
    rows = [row | {"effect_explained": share} for row, share in zip(run.info["programs"], (0.76, 0.04), strict=True)]
    discovery = found_by_bootstrap(2)
    if not bootstrap:
        discovery["bootstrap"] = None
    info = {**run.info, "programs": rows, "discovery": discovery}
    return replace(run, info=info, programs=programs, interventions=interventions)


def of(run: Run, about: str, enriched: pd.DataFrame | None = None) -> str:
    (sentence,) = (one.sentence for one in findings(run, enriched) if one.about == about)
    return sentence


def test_genes_fall_and_rise_by_shift_times_effect() -> None:
    """D has less than a fifth of the largest effect, and OWN is a perturbation of P0."""
    same = "Perturbing OWN or PERT2 has the same effect: A and C fall, and B rises. Found in 20 of 20 resamplings. This is 76% of what all perturbations do."
    assert of(screen(), "P0") == same
    assert of(screen(shift=[2.0] * 4), "P0").startswith("Perturbing OWN or PERT2 has the same effect: B falls, and A and C rise.")  # fmt: skip


def test_opposite_shifts() -> None:
    words = of(screen(shift=[-2.0, -2.0, 1.0, -2.0]), "P0")
    assert words.startswith(
        "Perturbing OWN makes A and C fall and B rise. Perturbing PERT2 does the opposite. Found in"
    )


def test_different_strength_is_said_from_three_times_on() -> None:
    assert "strength" not in of(screen(shift=[-3.0, -2.0, -1.0, -2.0]), "P0")
    words = of(screen(shift=[-3.1, -2.0, -1.0, -2.0]), "P0")
    assert "has the same effect, in different strength (3.1 to 1.0 SD of the program): A and C fall" in words


def test_shift_within_its_error_has_no_direction() -> None:
    """PERT2 shifts P0 by 0.3 with an error of 0.2: its cells change, and no gene is said to fall or rise by it."""
    error = {"shift_se": [0.1, 0.1, 0.2, 0.1]}
    words = of(screen(shift=[-2.0, -2.0, 0.3, -2.0], **error), "P0")
    assert words.startswith("Perturbing OWN makes A and C fall and B rise. Perturbing PERT2 changes P0 as well, but not clearly up or down. Found in")  # fmt: skip
    words = of(screen(shift=[0.1, -2.0, 0.3, -2.0], **error), "P0")
    assert words.startswith("Perturbing PERT2 or OWN changes P0 (A, B and C), but not clearly up or down. Found in")
    guess = screen(shift=[0.1, -2.0, 0.3, -2.0], support=[0.3, 1.0, 0.3, 1.0], **error)
    assert of(guess, "P0").startswith("Perturbing PERT2 or OWN may change P0 (A, B and C), but not clearly")
    assert "does the opposite" in of(screen(shift=[-2.0, -2.0, 0.41, -2.0], **error), "P0")


def test_little_support_makes_a_guess() -> None:
    partly = screen(support=[0.9, 1.0, 0.45, 1.0])
    words = of(partly, "P0")
    assert "Perturbing OWN makes" in words and "Found in 18 of 20 resamplings." in words
    assert "No other perturbation confirms it. That PERT2 belongs to this program is a guess (9 of 20 resamplings)." in words  # fmt: skip
    assert resting_on_one(partly) == ["P0"]
    whole = screen(support=[0.3, 1.0, 0.45, 1.0])
    (finding,) = (one for one in findings(whole) if one.about == "P0")
    assert finding.certainty == DOUBTED
    assert finding.sentence.startswith("A guess: perturbing OWN or PERT2 may have the same effect: A and C fall, and B rises. None is found in more than 9 of 20")  # fmt: skip
    assert doubts(whole) == [
        "P0 is a guess: too few resamplings of the cells confirm it.",
        "The programs of 2 perturbations are guesses, found in fewer than half of the resamplings: OWN and PERT2.",
    ]
    one = "The program of 1 perturbation is a guess, found in fewer than half of the resamplings: PERT2."
    assert doubts(partly) == [one]
    assert doubts(screen(support=[0.5] * 4)) == []


def test_little_stability_makes_a_guess() -> None:
    run = screen()
    rows = [row | {"stability": value} for row, value in zip(run.info["programs"], (0.49, 0.51), strict=True)]
    run = with_info(run, programs=rows)
    assert [one.certainty for one in findings(run)][1:3] == [DOUBTED, FOUND]
    assert "Its genes differ between resamplings (stability 0.49)." in of(run, "P0")


def test_without_a_bootstrap_nothing_is_counted() -> None:
    run = screen(bootstrap=False)
    assert {one.certainty for one in findings(run) if one.about in ("P0", "P1")} == {UNTESTED}
    assert "resamplings" not in " ".join(told(run))
    assert doubts(run)[0].startswith("Cells were not resampled")


def test_cells_that_contradict_share_no_effect() -> None:
    words = of(screen(disagrees=[1.0, 0.0, 0.0, 0.0]), "P0")
    assert words.startswith("Perturbing OWN or PERT2 acts on P0: A and C fall, and B rises. But the cells of OWN contradict the others: their effects differ.")  # fmt: skip


def test_a_program_without_an_effect_is_a_guess() -> None:
    run = screen(fdr=[0.01, 0.3, 0.01, 0.3])
    assert of(run, "P1") == "No perturbation with a detectable effect acts on P1: it is a guess."
    assert doubts(run) == ["P1 is a guess: no perturbation with a detectable effect acts on it."]


def test_what_was_learned_by_gradient_is_doubted() -> None:
    by_gradient = "Targets and programs were learned by gradient: another --seed may give others."
    assert by_gradient in doubts(synthetic_run(2, 4)) and by_gradient not in doubts(screen())


def test_gene_sets() -> None:
    """A, the strongest gene of P0, rises with it: sets of genes that fall with it say nothing of A."""
    rows = [
        ("P0", "rank", "down", "OTHER", "", 1e-9), ("P0", "rank", "up", "GO:1", "response", 3e-6),
        ("P0", "over-representation", "up", "GO:2", "", 2e-5), ("P1", "rank", "up", "GO:3", "", 0.06),
    ]  # fmt: skip
    columns = ["program", "test", "direction", "gene_set", "description", "fdr"]
    enriched = pd.DataFrame(rows, columns=columns)
    assert "B rises (genes of GO:1 response, FDR 3e-6). Found" in of(screen(), "P0", enriched)
    assert "(" not in of(screen(), "P1", enriched)
    drivers = pd.DataFrame([*rows, ("P0", "drivers", "", "GO:4", "", 0.0012)], columns=columns)
    assert "(genes of GO:1 response, FDR 3e-6; perturbations of GO:4, FDR 0.0012). Found" in of(screen(), "P0", drivers)


def test_what_was_done() -> None:
    def word(change: list[float], error: float = 0.1) -> str:
        return what_was_done(pd.DataFrame({"knock_down": change, "knock_down_se": error}))

    assert word([-1.0, -2.0, -0.5, np.nan]) == "Losing"
    assert word([1.0, 2.0, 3.0]) == "Activating"
    assert word([-1.0, -2.0]) == "Perturbing"  # two are too few
    assert word([-1.0, -2.0, -0.29]) == "Perturbing"  # the last is within three errors of none
    assert word([-1.0, -2.0, 1.0]) == "Perturbing"
    assert what_was_done(pd.DataFrame({"shift": [1.0]})) == "Perturbing"


def test_not_seen_and_not_to_be_seen() -> None:
    rows = [
        ("strong", 30, 5.0, 0.001), ("weak", 60, 0.5, 0.01), ("weaker", 90, 0.2, 0.04),
        ("quiet", 70, 0.0, 0.5), ("thin", 29, 0.0, 0.6),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["perturbation", "n_cells", "energy_distance", "fdr"]).assign(p_value=0.1)
    words = not_seen(table)
    # "weaker" has more cells than "quiet": that it was detected says nothing of 70 cells.
    assert "1 perturbation does nothing visible: quiet. An effect as large as that of weak would have been seen." in words  # fmt: skip
    assert "1 perturbation may have too few cells to show an effect: thin. No perturbation of 29 cells or fewer has a detectable one." in words  # fmt: skip
    assert not_seen(table[table["fdr"] <= 0.05]) == ""
    untested = table.assign(p_value=[0.1] * 4 + [np.nan], fdr=[*table["fdr"][:4], np.nan])
    assert "1 perturbation was not tested, for want of cells of its own: thin." in not_seen(untested)


def test_the_graph() -> None:
    edges = synthetic_run(3, 9, [(0, 1), (1, 2)], verdict="identified")
    (strongest, *_) = edges.described["P0"].drivers["perturbation"]
    words = of(edges, "graph")
    assert words.startswith(f"The data tell which program acts on which: P0 ({strongest}) lowers P1 (")
    doubted = replace(edges, edges=edges.edges.assign(support=[0.4, 0.9]))
    assert ", a guess; P1" in of(doubted, "graph")
    none = with_pairs(
        synthetic_run(3, 9, verdict="not identified"),
        {
            (0, 1): {"status": "undecided", "detectable": 0.6}, (1, 2): {"status": "undecided", "detectable": np.nan},
            (2, 0): {"status": "undecided", "detectable": 0.3}, (2, 1): {"status": "likely"},
        },
    )  # fmt: skip
    words = of(none, "graph")
    assert "no edge is claimed. In 2 of 6 directions no effect of one program on another is seen" in words
    assert "In 2 of 6 directions an effect of 0.3 SD could not have been seen. 2 of 6 directions show a change" in words


def test_programs_that_move_the_same_genes() -> None:
    run = screen([[1.0, 2.0, 0.0, 0.0, np.nan], [2.0, 4.0, 0.5, 0.0, 9.0]])
    # Over the four genes known of both: 10 / sqrt(5 * 20.25) = 0.9938
    assert [(a, b, round(cosine, 4)) for a, b, cosine in near_duplicates(run)] == [("P0", "P1", 0.9938)]
    assert "P0 and P1 move nearly the same genes (cosine +0.99 of their total effects)" in doubts(run)[0]
    assert near_duplicates(screen([[1.0, 1.0, 0, 0, 0], [1.0, 0.0, 0, 0, 0]])) == []  # 0.71
    joined = pd.DataFrame({"source": ["P0"], "target": ["P1"], "weight": [0.5], "support": [1.0], "identified": ["identified"]})  # fmt: skip
    assert near_duplicates(replace(run, edges=joined)) == []  # a program shares the genes of those downstream


def test_shares_beyond_the_whole() -> None:
    run = screen()
    rows = [row | {"effect_explained": 0.7} for row in run.info["programs"]]
    assert doubts(with_info(run, programs=rows)) == ["The programs' shares of the effects add up to 140%, more than there is: they contain sampling noise."]  # fmt: skip


def test_many_programs_are_cut_on_a_terminal() -> None:
    run = synthetic_run(15, 30)
    assert told(run)[-1] == "3 more programs are in the report."
    assert len([line for line in told(run) if line[0] == "P"]) == 12
    assert len([one for one in findings(run) if one.about in run.described]) == 15


# --- advice


def advice(run: Run) -> list[str]:
    return what_next(run, answers(run.facts, run.evaluation, run.history))


@pytest.mark.parametrize(
    ("verdict", "word"),
    [("identified", "--seed"), ("ancestry only", "complete knock-outs"), ("not identified", "default preset")],
)
def test_what_next_for_the_graph(verdict: str, word: str) -> None:
    assert word in advice(synthetic_run(2, 4, verdict=verdict))[0]


def test_more_cells() -> None:
    """Three hidden directions, the median detectable change is 0.6, twice the size: four times the cells."""
    hidden = {pair: {"status": "undecided", "detectable": value} for pair, value in zip([(0, 1), (1, 0), (0, 2)], (0.4, 0.6, 0.9), strict=True)}  # fmt: skip
    run = with_pairs(synthetic_run(3, 12, verdict="not identified"), hidden)
    assert "About 4 times as many cells of each perturbation would show an effect of 0.3 SD in half of the 3 directions that are hidden now." in advice(run)[0]  # fmt: skip
    assert "--batch-key" not in advice(run)[0]
    assert advice(with_info(run, discovery={"dispersion": 1.5}))[0].startswith(
        "If the screen has batches, name their column with --batch-key. Leave out cells"
    )


def test_what_next_for_predictions_and_training() -> None:
    run = synthetic_run(2, 4)
    assert "crlseq evaluate RUN" in advice(run)[1]  # on test cells
    assert "--hold-out-cells 0.2" in advice(with_info(run, metrics={"evaluated_on": "validation"}))[1]
    falling = pd.DataFrame({"epoch": range(10), "total": range(10, 0, -1), "validation_total": range(10, 0, -1)})
    more = with_info(replace(run, history=falling), training={"epochs_run": 30, "best_epoch": 29})
    assert advice(more)[2] == "Fit again with --epochs 60."


def test_limitations_start_with_the_run_itself() -> None:
    run = synthetic_run(2, 40)  # 36 of 40 detected
    words = limitations(run)
    assert "About 2 perturbations of the 36 with a detectable effect may be there by chance (FDR 0.05)." in words
    assert words.index(next(w for w in words if "by chance" in w)) < words.index(next(w for w in words if "snapshot" in w))  # fmt: skip
    assert "Beware." in limitations(with_info(run, identification={"warnings": ["Beware."]}))
