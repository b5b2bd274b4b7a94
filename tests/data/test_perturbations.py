"""Labels in the wild, worked by hand; what is refused, and with which advice; real files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from crlseq.data.perturbations import CONTROL_LABELS, NEVER_PERTURBATIONS, candidates, read_perturbations
from crlseq.errors import InputError
from tests.support import labels, table


def refused(obs: pd.DataFrame, *args: Any, **kwargs: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read_perturbations(obs, *args, **kwargs)
    assert caught.value.exit_code == 3
    assert caught.value.message.endswith(".")
    assert caught.value.hint.endswith(".")
    return caught.value


# --- one test for each row of the table "Labels in the wild"


@pytest.mark.parametrize("control", ["control", "NT", "non-targeting"])
@pytest.mark.parametrize("mark", ["+", "_"])
def test_pertpy_and_scperturb(control: str, mark: str) -> None:
    p = read_perturbations(table(perturbation=[f"KLF1{mark}BAK1", "KLF1", control, "BAK1", f"BAK1{mark}KLF1", control]))
    assert (p.key, p.control_label, p.separator, p.style) == ("perturbation", control, mark, "pertpy/scPerturb")
    assert p.names == ("BAK1", "KLF1")
    assert p.conditions == ((), (0,), (1,), (0, 1))
    assert p.condition_names == (control, "BAK1", "KLF1", f"BAK1{mark}KLF1")
    assert p.condition.dtype == np.int64
    assert p.condition.tolist() == [3, 2, 0, 1, 3, 0]
    assert p.is_control.tolist() == [False, False, True, False, False, True]
    assert p.dropped == {}


def test_cpa_has_the_empty_string_as_control() -> None:
    p = read_perturbations(table(guide_ids=["", "AHR", "FEV,AHR", "", "KLF1", None]))
    assert (p.key, p.control_label, p.separator, p.style) == ("guide_ids", "", ",", "CPA")
    assert p.names == ("AHR", "FEV", "KLF1")
    assert p.conditions == ((), (0,), (2,), (0, 1))
    assert p.condition_names == ("", "AHR", "KLF1", "AHR,FEV")
    assert p.condition.tolist() == [0, 1, 3, 0, 2, -1]
    assert p.dropped == {"missing": 1}


def test_cpa_combinations_need_no_singles() -> None:
    assert read_perturbations(table(guide_ids=["", "A,B", "C,D"])).names == ("A", "B", "C", "D")


def test_gears_in_both_orders() -> None:
    p = read_perturbations(table(condition="ctrl A+ctrl ctrl+A A+B B+A ctrl+C ctrl+ctrl"))
    assert (p.key, p.control_label, p.separator, p.style) == ("condition", "ctrl", "+", "GEARS")
    assert p.names == ("A", "B", "C")
    assert p.conditions == ((), (0,), (2,), (0, 1))
    assert p.condition_names == ("ctrl", "A", "C", "A+B")
    assert p.condition.tolist() == [0, 1, 1, 3, 3, 2, 0]


@pytest.mark.parametrize("key", ["target_gene", "gene"])
def test_cell_eval(key: str) -> None:
    p = read_perturbations(table(**{key: "non-targeting TP53 NKX2-1 HLA-A"}))
    assert (p.key, p.control_label, p.separator, p.style) == (key, "non-targeting", None, "cell-eval")
    assert p.condition_names == ("non-targeting", "HLA-A", "NKX2-1", "TP53")


def cellxgene(*cells: tuple[str | None, str]) -> pd.DataFrame:
    ids, strategies = zip(*cells, strict=True)
    return table(genetic_perturbation_id=ids, genetic_perturbation_strategy=strategies)


def test_cellxgene_marks_controls_in_a_second_column() -> None:
    screen = "CRISPR knockout screen"
    p = read_perturbations(
        cellxgene(
            ("KARS-1", screen),
            ("CERS6-2 || KARS-1", screen),
            ("safe-1", "control"),
            ("safe-1 || safe-2", "control"),
            ("CERS6-2 || safe-2", screen),  # a target and a control guide
            ("na", screen),
            ("safe-3", "control"),
        )
    )
    assert (p.key, p.control_label, p.separator, p.style) == ("genetic_perturbation_id", "control", " || ", "CELLxGENE")
    assert p.names == ("CERS6-2", "KARS-1")
    assert p.condition_names == ("control", "CERS6-2", "KARS-1", "CERS6-2 || KARS-1")
    assert p.condition.tolist() == [2, 3, 0, 0, 1, -1, 0]
    assert p.dropped == {"na": 1}
    assert "genetic_perturbation_strategy" in p.reason


def test_cellxgene_cells_without_perturbation_are_controls_where_there_are_no_others() -> None:
    obs = cellxgene(("na", "no perturbations"), (None, "no perturbations"), ("A", "s"), ("B", "s"), ("na", "s"))
    p = read_perturbations(obs)
    assert p.control_label == "no perturbations"
    assert labels(p) == ["no perturbations", "no perturbations", "A", "B", "-"]
    obs = cellxgene(("na", "no perturbations"), ("c", "control"), ("A", "s"), ("B || c", "s"))
    assert "--control-label control or --control-label 'no perturbations'" in refused(obs).hint
    p = read_perturbations(obs, control_label="control")
    assert labels(p) == ["-", "control", "A", "B"]


def test_cellxgene_without_strategies_is_read_like_any_other_column() -> None:
    p = read_perturbations(table(genetic_perturbation_id=["control", "A || B", "A"]))
    assert p.condition_names == ("control", "A", "A || B")


# --- parts, names, labels of all types


def test_combinations_of_three_and_more_come_last_by_size() -> None:
    p = read_perturbations(table(perturbation="control C+B+A A+C A D+A+C+B B+C B+A A+C+B"))
    assert p.names == ("A", "B", "C", "D")
    assert p.conditions == ((), (0,), (0, 1), (0, 2), (1, 2), (0, 1, 2), (0, 1, 2, 3))
    assert p.condition_names == ("control", "A", "A+B", "A+C", "B+C", "A+B+C", "A+B+C+D")
    assert p.condition.tolist() == [0, 5, 3, 1, 6, 4, 2, 5]


def test_a_part_twice_is_one_part() -> None:
    p = read_perturbations(table(perturbation="control A+A B+A+B B A+B"))
    assert labels(p) == ["control", "A", "A+B", "B", "A+B"]


def test_other_words_for_control_inside_combinations() -> None:
    assert labels(read_perturbations(table(perturbation="control A+NT A B+ctrl"))) == ["control", "A", "A", "B"]


def test_control_labels_that_hold_the_separator() -> None:
    p = read_perturbations(table(perturbation="neg_ctrl A_neg_ctrl A neg_ctrl_B B A_B"))
    assert labels(p) == ["neg_ctrl", "A", "A", "B", "B", "A_B"]


@pytest.mark.parametrize("control", sorted(CONTROL_LABELS | {"Non-Targeting", "CTRL", "nt"}))
def test_every_control_label_is_found(control: str) -> None:
    assert read_perturbations(table(perturbation=["A", control, "B"])).control_label == control


@pytest.mark.parametrize("label", ["NTg7", "non-targeting_0001", "wild-type", "WT", "", "nan", "negative", "0"])
def test_labels_that_are_no_control(label: str) -> None:
    assert candidates(table(perturbation=["A", label, "B"])) == []
    assert "--control-label" in refused(table(perturbation=["A", label, "B"])).hint


def test_labels_that_name_no_perturbation_are_dropped_and_counted() -> None:
    never = sorted(NEVER_PERTURBATIONS)
    cells = ["A", "control", "B", "A+B", *never, "NaN", "Doublet", "A+nan", "unassigned", "", None, np.nan, " "]
    p = read_perturbations(table(perturbation=cells))
    assert labels(p) == ["A", "control", "B", "A+B"] + ["-"] * (len(cells) - 4)
    expected = dict.fromkeys([*never, "NaN", "Doublet", "A+nan"], 1) | {"unassigned": 2, "missing": 4}
    assert p.dropped == expected
    assert list(p.dropped) == sorted(expected)
    assert p.names == ("A", "B")


@pytest.mark.parametrize("dtype", ["object", "string", "category"])
def test_missing_values_of_every_type(dtype: str) -> None:
    column = pd.Series(["A", "control", None, "B", "nan"], dtype=dtype)
    p = read_perturbations(pd.DataFrame({"perturbation": column}))
    assert labels(p) == ["A", "control", "-", "B", "-"]
    assert p.dropped == {"missing": 1, "nan": 1}


def test_unused_levels_do_not_count() -> None:
    levels = ["control", "NT", "A", "B", "C", "A_B", "D_E"]
    p = read_perturbations(table(perturbation=pd.Categorical(["B", "control", "A"], categories=levels)))
    assert (p.names, p.condition_names) == (("A", "B"), ("control", "A", "B"))
    obs = table(perturbation=pd.Categorical(["B", "A", "C"], categories=levels))
    assert "no control cells" in refused(obs, "perturbation").message


def test_bytes_numbers_and_mixtures_are_read_as_text() -> None:
    assert labels(read_perturbations(table(perturbation=[b"A", b"control", "A", 7]))) == ["A", "control", "A", "7"]
    p = read_perturbations(table(guide=[0, 2, 10, 2]), "guide", "0")
    assert p.condition_names == ("0", "10", "2")
    p = read_perturbations(table(guide=[0, 2, np.nan, 10.0]), "guide", "0")
    assert labels(p) == ["0", "2", "-", "10"]
    p = read_perturbations(table(guide=pd.Categorical([3, 1, 2])), "guide", "1")
    assert labels(p) == ["3", "1", "2"]


def test_odd_names_are_names() -> None:
    odd = ["A/B", "it's", 'say "so"', "β-catenin", "干扰素", "<script>alert(1)</script>", "a b", "x|y", "(a"]
    p = read_perturbations(table(perturbation=["control", *odd, "A/B+it's"]))
    assert p.names == tuple(sorted(odd))
    assert labels(p) == ["control", *odd, "A/B+it's"]


def test_blanks_around_labels_and_parts_do_not_count() -> None:
    p = read_perturbations(table(perturbation=["control ", "A + B", "B+A", " A"]))
    assert labels(p) == ["control", "A+B", "A+B", "A"]


# --- separators


@pytest.mark.parametrize(
    "cells",
    [
        "control NKX2-1 HLA-A NKX2-5",
        "control HLA_A HLA_B TP53",
        "NT STAT1_1 STAT1_2 IRF1_1 IRF1_2",
        "NT STAT1_g1 STAT1_g2 IRF1_g1 IRF1_g2 NT_g1 NT_g2",
        "NT NT_1 NT_2 A B",
        "control 2,4-D 1,2-diol water",
        "control CD4+ CD8+ TP53",
        "control chr1_100_200 chr1_200_300 chr2_100_300",
        "control 1_2 2_3 3_1",
        "control HLA_A A_B",
    ],
)
def test_names_that_are_never_split(cells: str) -> None:
    p = read_perturbations(table(perturbation=cells))
    assert p.separator is None
    assert p.names == tuple(sorted(cells.split()[1:]))


@pytest.mark.parametrize(
    "cells", ["control A_B B_C C_A", "control A B C A_B C_A_B", "ctrl A_ctrl B_ctrl A_B B_C C_ctrl"]
)
def test_underscore_with_evidence_is_a_separator(cells: str) -> None:
    p = read_perturbations(table(perturbation=cells))
    assert (p.separator, p.names) == ("_", ("A", "B", "C"))


def test_plus_beside_names_with_other_separators() -> None:
    p = read_perturbations(table(perturbation="control HLA_A+NKX2-1 HLA_A NKX2-1 a,b"))
    assert (p.separator, p.names) == ("+", ("HLA_A", "NKX2-1", "a,b"))


def test_two_separators_are_refused() -> None:
    obs = table(perturbation="control A B C A+B A_C")
    error = refused(obs)
    assert "'+'" in error.message
    assert "'_'" in error.message
    assert error.hint == "Choose with --separator + or --separator _."
    assert read_perturbations(obs, separator="+").names == ("A", "A_C", "B", "C")
    assert read_perturbations(obs, separator="_").names == ("A", "A+B", "B", "C")
    assert read_perturbations(obs, separator="").condition_names == ("control", "A", "A+B", "A_C", "B", "C")


@pytest.mark.parametrize("cells", ["control A B A_B HLA_C", "control A_B CD4+ A+B"])
def test_labels_that_only_in_part_look_like_combinations_are_refused(cells: str) -> None:
    error = refused(table(perturbation=cells))
    assert "combinations" in error.message
    assert "single perturbations" in error.message
    assert error.hint.endswith("or --separator ''.")


def test_any_separator_can_be_given() -> None:
    obs = table(perturbation=["control", "A;B", "A", "NKX2-1"])
    assert read_perturbations(obs).separator is None
    assert read_perturbations(obs, separator=";").condition_names == ("control", "A", "NKX2-1", "A;B")
    assert read_perturbations(obs, separator="-").names == ("1", "A", "A;B", "NKX2")
    assert read_perturbations(table(perturbation=["control", "A B", "A"]), separator=" ").names == ("A", "B")
    p = read_perturbations(table(perturbation=["control", "A || B", "A"]), separator="||")
    assert p.condition_names == ("control", "A", "A || B")  # as detection writes it
    assert "--separator" in p.reason


# --- columns


def test_known_names_with_the_same_groups_are_preferred_in_the_order_of_the_table() -> None:
    gene = "non-targeting KIAA1804 B B+C"
    obs = table(condition="ctrl MAP3K21+ctrl ctrl+B B+C", other="NT 1 2 3", gene=gene, perturbation="control A B B_C")
    assert [c.key for c in candidates(obs[["condition", "other", "gene"]])] == ["condition", "gene", "other"]
    p = read_perturbations(obs[["other", "gene", "condition"]])
    assert p.key == "condition"
    assert p.reason.endswith("The same groups of cells are in 'gene'.")


def test_names_that_carry_the_cell_line_are_no_candidates() -> None:
    obs = table(
        condition_name="A549_ctrl_1 A549_A+ctrl_1+1 A549_A+B_1+1 A549_C+ctrl_1+1",
        condition_cell_type="ctrl_A549 A+ctrl_A549 A+B_A549 C+ctrl_A549",
        condition="ctrl A+ctrl A+B C+ctrl",
        dose_val="1 1+1 1+1 1+1",
    ).assign(control=[1, 0, 0, 0])
    assert [c.key for c in candidates(obs)] == ["condition"]
    assert read_perturbations(obs).key == "condition"


def test_a_known_name_beats_others_that_disagree() -> None:
    p = read_perturbations(table(treatment="control control IFNG IFNB", gene="non-targeting A B A"))
    assert p.key == "gene"


@pytest.mark.parametrize(
    ("gene", "difference"),
    [
        ("A non-targeting B C C", "which cells are control"),
        ("non-targeting A A C C", "group the cells differently"),
        ("non-targeting A B C nan", "group the cells differently"),
        ("non-targeting A B nan nan", "how many perturbations cells carry"),
        ("non-targeting A B A+B A+B", "how many perturbations cells carry"),
    ],
)
def test_known_names_that_disagree_are_refused(gene: str, difference: str) -> None:
    obs = table(perturbation="control A B C C", gene=gene)
    error = refused(obs)
    assert "'perturbation'" in error.message
    assert "'gene'" in error.message
    assert difference in error.message
    assert error.hint == "Choose with --perturbation-key perturbation or --perturbation-key gene."
    assert read_perturbations(obs, "gene").key == "gene"


def test_columns_without_known_names() -> None:
    obs = table(donor="d1 d2 d1 d2", target="NT A B A", same="ctrl x y x")
    p = read_perturbations(obs)
    assert (p.key, p.style) == ("target", "plain")
    assert refused(obs.assign(sgrna=["NT", "A_1", "B_1", "A_2"])).hint.count("--perturbation-key") == 2


def test_a_column_with_one_perturbation_is_passed_over() -> None:
    # pertpy's Papalexi: "perturbation" only says whether a cell is perturbed
    p = read_perturbations(table(perturbation="NT Perturbed Perturbed", gene_target="NT STAT1 IRF1"))
    assert p.key == "gene_target"


def test_two_control_labels_are_refused() -> None:
    obs = table(perturbation="control non-targeting A B control")
    error = refused(obs)
    assert error.message == (
        "Column 'perturbation' has more than one control label: 'control' (2 cells) and 'non-targeting' (1 cells)."
    )
    assert error.hint == "Choose with --control-label control or --control-label non-targeting."
    assert len(candidates(obs)) == 2
    p = read_perturbations(obs, control_label="control")
    assert p.condition_names == ("control", "A", "B", "non-targeting")


def test_the_control_label_that_was_not_chosen_is_a_perturbation() -> None:
    p = read_perturbations(table(perturbation="control non_targeting A B A_B"), control_label="control")
    assert p.condition_names == ("control", "A", "B", "non_targeting", "A_B")
    p = read_perturbations(table(perturbation="control NT A+NT"), control_label="control")
    assert p.condition_names == ("control", "NT", "A+NT")


def test_what_is_given_wins() -> None:
    obs = table(perturbation="control A B B", group="x y z nan")
    p = read_perturbations(obs, "group", "nan", "")
    assert (p.key, p.condition_names) == ("group", ("nan", "x", "y", "z"))
    assert p.reason.endswith("As set by --perturbation-key and --control-label and --separator.")
    assert read_perturbations(obs, control_label="x").key == "group"
    assert read_perturbations(obs, control_label="B").condition_names == ("B", "A", "control")
    assert labels(read_perturbations(table(g=["", "A", "B"]), "g", "")) == ["", "A", "B"]


# --- what is refused


def test_no_such_column() -> None:
    obs = table(**{f"column{i}": "a b" for i in range(12)}, perturbation="control A")
    error = refused(obs, "perturbaton")
    assert error.message == "The cells have no column 'perturbaton' for --perturbation-key."
    assert error.hint.startswith("Columns: 'perturbation', 'column0'")
    assert error.hint.endswith("'column6' and 5 more.")


def test_no_such_control_label() -> None:
    error = refused(table(perturbation="Control A B"), "perturbation", "control")
    assert error.message == "Column 'perturbation' has no control cells: none is labelled 'control'."
    assert "--control-label; labels: 'Control'" in error.hint
    assert "'xyz'" in refused(table(perturbation="control A B"), control_label="xyz").message


def test_no_control_that_can_be_recognised() -> None:
    error = refused(table(perturbation="A B NTg1"), "perturbation")
    assert "no control cells" in error.message
    assert "--control-label; labels: 'A', 'B', 'NTg1'" in error.hint


@pytest.mark.parametrize("key", [None, "perturbation"])
def test_fewer_than_two_perturbations(key: str | None) -> None:
    assert "only the perturbation 'A'" in refused(table(perturbation="control A A+control nan"), key).message
    assert "no perturbation" in refused(table(perturbation="control control"), key).message


@pytest.mark.parametrize(
    "obs", [table(x="a b"), table(n=[1, 2]), pd.DataFrame(index=["c1"]), table(perturbation=[]), table(x=[None, None])]
)
def test_no_candidate_at_all(obs: pd.DataFrame) -> None:
    assert candidates(obs) == []
    error = refused(obs)
    assert error.message == "No column has a known control label."
    assert "--perturbation-key" in error.hint
    assert "--control-label" in error.hint


def test_candidates_carry_a_reason() -> None:
    (found,) = candidates(table(condition="ctrl A+ctrl A+B B+A ctrl C+ctrl"))
    reason = "Column 'condition' (as in GEARS files) holds the perturbations, its label 'ctrl' marks control cells, "
    reason += "and labels are split at '+'."
    assert (found.key, found.control_label, found.separator, found.style) == ("condition", "ctrl", "+", "GEARS")
    assert (found.names, found.is_control.sum(), found.reason) == (("A", "B", "C"), 2, reason)
    assert found.conditions == ((), (0,), (2,), (0, 1))
