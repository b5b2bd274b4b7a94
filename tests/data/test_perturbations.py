"""Labels in the wild, worked by hand; what is refused, and with which advice; real files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from crlseq.data.controls import find_controls, is_control_name, is_named, is_never, kind_of
from crlseq.data.perturbations import candidates, read_perturbations
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
    p = read_perturbations(obs)
    assert labels(p) == ["-", "control", "A", "B"]
    assert p.dropped == {"na": 1}
    assert labels(read_perturbations(obs, control_label="control")) == labels(p)


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


WRITTEN = (
    "control ctrl Ctrl_1 CONTROL NT nt NTC ntc_12 non-targeting Non_Targeting nontargeting non.target NoTarget unperturbed "
    "neg negctrl NegCtrl02 neg_ctrl negative_control-4 NT-1 NT_g3 NTg3 NTCg1 sgNT-1 sg_NTC_2 non-targeting_00025 CTRL0001 "
    "safe safe-targeting safe_targeting_3 safe-harbor-2 scramble scrambled_12 random_5 no_site NO_SITE_7 INTERGENIC1216445 "
    "one_non-gene_site ONE_INTERGENIC_SITE_5 NonTargetingControlGuideForHuman_0001 NegCtrl0_NegCtrl0 ctrl3 "
    "neg_ctrl_non-targeting_00080 NT_ACGTACGTACGTACGTACGT non-targeting_00025|non-targeting_00026"
)
CONTROLS = [*WRITTEN.split(), "non-targeting control 12", "negative control", "No Site"]
NO_CONTROLS = (
    "NTN1 NT5E NT5C2 NTF3 NTRK1 NTS NT3 NT3_g1 NTG1 SAFB SAFB2 NEGR1 CTRB1 CTRC SCRIB SCR CTRL_A control_A ctrl_A549 "
    "wild-type WT nan negative 0 AAVS1"
)


@pytest.mark.parametrize("control", CONTROLS)
def test_every_control_label_is_found(control: str) -> None:
    p = read_perturbations(table(perturbation=["A", control, "B"]))
    assert labels(p) == ["A", control, "B"]
    assert p.control_labels == (control,)
    assert is_named(control, [kind_of(control)])


@pytest.mark.parametrize("label", [*NO_CONTROLS.split(), "", "control of A"])
def test_labels_that_are_no_control(label: str) -> None:
    assert not is_control_name(label)
    assert candidates(table(perturbation=["A", label, "B"])) == []
    assert "--control-label" in refused(table(perturbation=["A", label, "B"])).hint


@pytest.mark.parametrize(
    ("column", "controls"),
    [
        ("NT1 NT2 STAT1", "NT1 NT2"),  # no gene is called so
        ("NT3 STAT1", ""),  # neurotrophin-3
        ("control NT3 STAT1", "control"),
        ("CTRL STAT1", "CTRL"),
        ("ctrl CTRL STAT1", "ctrl"),  # chymotrypsin-like protease
        ("ctrl CTRL+ctrl ctrl+ctrl", "ctrl ctrl+ctrl"),
        ("ctrl ctrl_g1 ctrl_g2 g1 A", "ctrl ctrl_g2"),  # "g1" with a control
        ("non-targeting safe-targeting_1 NT-1 STAT1", "NT-1 non-targeting safe-targeting_1"),
    ],
)
def test_other_labels_tell_genes_from_controls(column: str, controls: str) -> None:
    assert find_controls(column.split()) == controls.split()


def test_kinds_of_control_are_joined_and_named() -> None:
    cells = ["NT-1", "NT-2", "NT-10", "safe-targeting", "safe-targeting", "A", "B", "A+NT-3", "safe-targeting+B"]
    p = read_perturbations(table(target_gene=cells))
    assert labels(p) == ["NT"] * 5 + ["A", "B", "A", "B"]
    assert p.control_labels == ("NT", "safe-targeting")
    assert "its labels 'NT' (3 cells) and 'safe-targeting' (2 cells) mark control cells" in p.reason


def test_controls_that_are_given_and_others() -> None:
    obs = table(target_gene="NT-1 NT-2 safe-targeting safe-targeting A B A+safe-targeting")
    p = read_perturbations(obs, control_label="NT")
    assert labels(p) == ["NT", "NT", "-", "-", "A", "B", "A"]
    assert p.dropped == {"safe-targeting": 2}
    assert "'safe-targeting' (2 cells) is a control too and is excluded" in p.reason
    both = read_perturbations(obs, control_label=("safe-targeting", "NT-2"))
    assert labels(both) == ["-", "safe-targeting", "safe-targeting", "safe-targeting", "A", "B", "A"]
    assert both.control_labels == ("safe-targeting", "NT-2")
    assert "No cell is labelled 'typo'." in read_perturbations(obs, control_label=("NT", "typo")).reason


def test_a_given_control_is_no_stem_of_genes() -> None:
    p = read_perturbations(table(gene="A A1 A2 B"), control_label="A")
    assert labels(p) == ["A", "A1", "A2", "B"]
    p = read_perturbations(table(gene="AAVS1-1 AAVS1-2 A B"), control_label="AAVS1")
    assert labels(p) == ["AAVS1", "AAVS1", "A", "B"]


def test_empty_labels_are_controls_where_it_is_said() -> None:
    obs = table(perturbation=["", "A", "B", "control"])
    assert labels(read_perturbations(obs)) == ["-", "A", "B", "control"]
    assert labels(read_perturbations(obs, control_label="")) == ["", "A", "B", "-"]
    # In CPA's files too, unless there are other controls.
    assert labels(read_perturbations(table(guide_ids=["", "A", "B"]))) == ["", "A", "B"]
    assert labels(read_perturbations(table(guide_ids=["", "A", "B", "NT"]))) == ["-", "A", "B", "NT"]


def test_labels_that_name_no_perturbation_are_dropped_and_counted() -> None:
    never = [
        "*",
        "?",
        "<na>",
        "doublet",
        "multiple",
        "na",
        "nan",
        "negative",
        "no_guide",
        "none",
        "not-assigned",
        "null",
        "unassigned",
    ]
    assert all(map(is_never, never))
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
        "NT STAT1_g1 STAT1_g2 IRF1_g1 IRF1_g2",
        "control (+)-JQ1 17-(dimethylamino)geldanamycin Na+/K+ TP53",
        "control chr1.10050_top_two chr8.445_top_two chr8.445_second_two",
        "control HLA-A MT-CO1 H2AC6 Drug_1 Perturb_0 Perturb_1",
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
    assert read_perturbations(obs, separator="").separator is None
    assert read_perturbations(obs, separator=";").condition_names == ("control", "A", "NKX2-1", "A;B")
    assert read_perturbations(obs, separator="-").names == ("1", "A", "A;B", "NKX2")
    assert read_perturbations(table(perturbation=["control", "A B", "A"]), separator=" ").names == ("A", "B")
    p = read_perturbations(table(perturbation=["control", "A || B", "A"]), separator="||")
    assert p.condition_names == ("control", "A", "A || B")  # as detection writes it
    assert "--separator" in p.reason


@pytest.mark.parametrize("mark", ["+", " + ", " || ", "||", "|", ";", ", ", " and ", " & ", "/", "_"])
def test_every_separator_is_found_between_labels(mark: str) -> None:
    cells = ["NT", "HLA-A", "HLA_B", "A", f"A{mark}HLA-A", f"HLA-A{mark}A", f"HLA_B{mark}NT", f"NT{mark}A{mark}HLA_B"]
    p = read_perturbations(table(perturbation=cells))
    assert p.names == ("A", "HLA-A", "HLA_B")
    assert [sorted(p.names[i] for i in p.conditions[c]) for c in p.condition] == [
        [], ["HLA-A"], ["HLA_B"], ["A"], ["A", "HLA-A"], ["A", "HLA-A"], ["HLA_B"], ["A", "HLA_B"],
    ]  # fmt: skip


def test_loci_are_names_with_the_separator_inside() -> None:
    loci = ["chr1.10050_top_two", "chr8.445_top_two", "chr2.181_second_two", "chr5.1_top_two"]
    cells = ["control", *loci, f"{loci[1]}_{loci[0]}", f"{loci[0]}_{loci[2]}"]
    p = read_perturbations(table(perturbation=cells))
    assert p.names == tuple(sorted(loci))
    assert p.condition_names[-2:] == (f"{loci[0]}_{loci[2]}", f"{loci[0]}_{loci[1]}")
    again = read_perturbations(table(perturbation=cells), separator="_")
    assert again.condition_names == p.condition_names


def test_chemicals_beside_combinations() -> None:
    cells = ["control", "(+)-JQ1", "A", "B", "A+B", "17-(dimethylamino)X", "Ca2+ ionophore"]
    p = read_perturbations(table(perturbation=cells))
    assert labels(p) == ["control", "(+)-JQ1", "A", "B", "A+B", "17-(dimethylamino)X", "Ca2+ ionophore"]


@pytest.mark.parametrize(
    "cells",
    [
        "control A B C A_B_C A_B B_C D_B",  # D is no label, as in a combination or in a name of its own
        "control A B_C A_B C A_B_C",  # A and B_C, or A_B and C
        "control STAT1 IRF1 STAT1_promoter",
    ],
)
def test_labels_with_two_readings_are_refused(cells: str) -> None:
    error = refused(table(perturbation=cells))
    assert "combinations at '_' or as single perturbations" in error.message
    assert error.hint == "Choose with --separator _ or --separator ''."
    assert read_perturbations(table(perturbation=cells), separator="").names == tuple(sorted(cells.split()[1:]))


def test_a_label_with_two_readings_is_dropped_where_the_separator_is_given() -> None:
    p = read_perturbations(table(perturbation="control A B_C A_B C A_B_C A_C"), separator="_")
    assert labels(p)[:5] == ["control", "A", "B_C", "A_B", "C"]
    assert p.dropped == {"A_B_C": 1}


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
    assert refused(obs.assign(other=["NT", "A_x", "B_x", "A_y"])).hint.count("--perturbation-key") == 2


@pytest.mark.parametrize("key", ["sgrna", "perturbation"])
def test_a_column_of_genes_is_preferred_to_their_guides(key: str) -> None:
    obs = table(**{key: "NT-1 A_g1 B_g1 A_g2 NT-2"}, target="NT A B A NT")
    p = read_perturbations(obs)
    assert (p.key, labels(p)) == ("target", ["NT", "A", "B", "A", "NT"])
    assert f"Their guides are in '{key}'." in p.reason
    assert len(candidates(obs)) == 2


def test_a_column_of_genes_that_does_not_agree_with_the_guides_is_refused() -> None:
    obs = table(sgrna="NT A_g1 A_g1 B_g1 A_g2", target="NT A B B A")
    assert "group the cells differently" in refused(obs).message


def test_a_column_with_one_perturbation_is_passed_over() -> None:
    # pertpy's Papalexi: "perturbation" only says whether a cell is perturbed
    p = read_perturbations(table(perturbation="NT Perturbed Perturbed", gene_target="NT STAT1 IRF1"))
    assert p.key == "gene_target"


def test_the_control_that_was_not_given_is_no_perturbation() -> None:
    p = read_perturbations(table(perturbation="control non_targeting A B A_B"), control_label="control")
    assert labels(p) == ["control", "-", "A", "B", "A_B"]
    p = read_perturbations(table(perturbation="control NT A+NT B"), control_label="control")
    assert labels(p) == ["control", "-", "A", "B"]


def test_what_is_given_wins() -> None:
    obs = table(perturbation="control A B B", group="x y z nan")
    p = read_perturbations(obs, "group", "nan", "")
    assert (p.key, p.condition_names) == ("group", ("nan", "x", "y", "z"))
    assert p.reason.endswith("As set by --perturbation-key and --control-label and --separator.")
    assert read_perturbations(obs, control_label="x").key == "group"
    p = read_perturbations(table(perturbation="control A B C"), control_label="B")
    assert labels(p) == ["-", "A", "B", "C"]
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
    error = refused(table(perturbation="A B AAVS1"), "perturbation")
    assert "no control cells" in error.message
    assert "--control-label; labels: 'A', 'AAVS1', 'B'" in error.hint


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
