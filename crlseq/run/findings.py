"""What a run found, as sentences made from its tables: for the end of a fit, ``inspect``, its JSON and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from crlseq.errors import few
from crlseq.run.arms import losses_in_words, programs_in_words
from crlseq.run.contexts import contexts_in_words
from crlseq.run.covariates import covariates_in_words
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR
from crlseq.run.summary import Program, no_effect_in_words, sensitivity_in_words
from crlseq.run.tables import shown

GUESS = 0.5  # support or stability below which a finding is called a guess
NAMED, GENES, EDGES = 8, 4, 5  # perturbations, genes and edges that are named
LEAST_GENE = 0.2  # share of the largest effect on a gene from which a gene is named
LEAST_SHARE = 0.005  # of the effects, from which it is told
UP_OR_DOWN = 2.0  # standard errors from which on the sign of a shift is clear
APART = 3.0  # times that shifts of one program may differ before that is said
ALIKE = 0.8  # |cosine| of total effects from which two programs move nearly the same genes
CLEAR, FEWEST, MOST = 3.0, 3, 0.9  # errors of a change of an own transcript, how many must be clear, and how many agree
FOUND, DOUBTED, UNTESTED = "found", "guess", "not resampled"


@dataclass(frozen=True)
class Finding:
    """One finding: what it is about (a program, or ``effects``, ``unseen``, ``contexts``, ``covariates``, ``graph``), how sure it is,
    and in words.
    """

    about: str
    certainty: str  # `FOUND`, `DOUBTED` or `UNTESTED`
    sentence: str


def findings(run: Run, enriched: pd.DataFrame | None = None) -> list[Finding]:
    """Everything found, most important first; ``enriched`` is what `crlseq.enrich` found of the programs."""
    facts, n = run.facts, len(run.interventions)
    of_covariates = [Finding("covariates", FOUND, words) for words in covariates_in_words(run.covariates)]
    if facts.without_effect:
        power = sensitivity_in_words(facts)
        found = [Finding("effects", FOUND, no_effect_in_words(n))]
        found += [Finding("unseen", FOUND, power)] if power else []
        return [*found, *of_covariates]
    detected, programs = facts.metrics.n_detected, facts.n_latents
    headline = f"{detected} of {n} perturbations {'has' if detected == 1 else 'have'} a detectable effect (FDR ≤ {DETECTABLE_FDR}); {count(programs, 'program')} {'describes' if programs == 1 else 'describe'} the effects."
    found = [Finding("effects", FOUND, headline)]
    verb = what_was_done(run.interventions)
    found += [of_program(run, program, verb, enriched) for program in run.described.values()]
    if unseen := not_seen(run.interventions):
        found.append(Finding("unseen", FOUND, unseen))
    if differ := contexts_in_words(run):
        found.append(Finding("contexts", FOUND, " ".join(differ)))
    return [*found, *of_covariates, Finding("graph", FOUND, of_graph(run))]


def told(run: Run, programs: int = 12) -> list[str]:
    """The findings of a run as lines for a terminal, of so many programs at most."""
    every = findings(run)
    of_programs = [one for one in every if one.about in run.described]
    left_out = {one.about for one in of_programs[programs:]}
    lines = [
        f"{one.about}: {one.sentence}" if one.about in run.described else one.sentence
        for one in every
        if one.about not in left_out
    ]
    more = f"{count(len(left_out), 'more program')} {'is' if len(left_out) == 1 else 'are'} in the report."
    return [*lines, more] if left_out else lines


def what_was_done(interventions: pd.DataFrame) -> str:
    """``Losing`` or ``Activating`` where the perturbed genes' own transcripts clearly fall or rise, else ``Perturbing``."""
    if "knock_down" not in interventions:
        return "Perturbing"
    change, error = interventions["knock_down"], interventions["knock_down_se"]
    clear = change[change.abs() > CLEAR * error]
    if len(clear) < FEWEST:
        return "Perturbing"
    return "Losing" if (clear < 0).mean() >= MOST else "Activating" if (clear > 0).mean() >= MOST else "Perturbing"


def of_program(run: Run, program: Program, verb: str, enriched: pd.DataFrame | None = None) -> Finding:
    """What perturbations of a program do, to which genes, and in how many resamplings of the cells that was found again."""
    own, sure = _detected(program), sure_drivers(program)
    if own.empty:
        none = f"No perturbation with a detectable effect acts on {program.name}: it is a guess."
        return Finding(program.name, DOUBTED, none)
    rest, guess = own[own["support"] < GUESS], is_guess(program)
    main = own if sure.empty else sure
    unsure = _either_way(main)
    steered = main[~unsure]
    contradict = _contradicting(run, main) if len(main) > 1 else []
    words = []
    if len(steered):
        same_way = steered["shift"] * np.sign(steered["shift"].iloc[0]) >= 0
        words.append(_effect(program, steered[same_way], verb, _sets(program, enriched), guess, agree=not contradict))
        if not same_way.all():
            words.append(f"{verb} {listed(steered.loc[~same_way, 'perturbation'], 'or')} does the opposite.")
    if unsure.any():
        words.append(_without_direction(program, main[unsure], verb, guess, also=len(steered) > 0))
    if contradict:
        words.append(f"But the cells of {listed(contradict, 'and')} contradict the others: their effects differ.")
    words += _how_sure(run, program, main, rest, guess)
    certainty = DOUBTED if guess else UNTESTED if run.facts.bootstrap is None else FOUND
    return Finding(program.name, certainty, " ".join(words))


def _detected(program: Program) -> pd.DataFrame:
    return program.drivers[program.drivers["fdr"] <= DETECTABLE_FDR]


def sure_drivers(program: Program) -> pd.DataFrame:
    """The perturbations of a program that have a detectable effect, and support of at least a half where it was measured."""
    own = _detected(program)
    return own[~(own["support"] < GUESS)]


def _either_way(rows: pd.DataFrame) -> pd.Series:
    """Which perturbations change their program, yet do not shift it beyond the error: they may narrow or widen it, or cut edges."""
    error = rows.get("shift_se", pd.Series(0.0, rows.index)).fillna(0.0)  # without one the sign is taken as clear
    return rows["shift"].abs() < UP_OR_DOWN * error


def _without_direction(program: Program, rows: pd.DataFrame, verb: str, guess: bool, also: bool) -> str:
    """What is said of perturbations `_either_way`: the program's genes, where no other perturbation tells them."""
    genes, done = shown(_strongest(program)).tolist(), "may change" if guess else "changes"
    more = " as well" if also else f" ({listed(genes, 'and')})" if genes else ""
    return f"{verb} {listed(rows['perturbation'], 'or')} {done} {program.name}{more}, but not clearly up or down."


def is_guess(program: Program) -> bool:
    """Whether nothing sure tells of a program: neither one of its perturbations, nor the resamplings of the cells."""
    return bool(sure_drivers(program).empty or program.stability < GUESS)


def _effect(program: Program, rows: pd.DataFrame, verb: str, sets: str, guess: bool, agree: bool) -> str:
    """What perturbations that shift a program one way do to its genes."""
    genes = _genes(program, float(rows["shift"].iloc[0]))
    done = f"{verb} {listed(rows['perturbation'], 'or')}"
    done = f"A guess: {done[0].lower()}{done[1:]} may" if guess else done
    if len(rows) == 1:
        made = _genes_in_words(*genes, "make" if guess else "makes") or ("change the cells" if guess else "changes the cells")  # fmt: skip
        return f"{done} {made}{sets}."
    size = rows["shift"].abs()
    same = f"{'have' if guess else 'has'} the same effect" if agree else f"act{'' if guess else 's'} on {program.name}"
    if size.max() > APART * size.min():
        same += f", in different strength ({size.max():.1f} to {size.min():.1f} SD of the program)"
    told = _genes_in_words(*genes)
    return f"{done} {same}: {told}{sets}." if told else f"{done} {same}{sets}."


def _genes(program: Program, shift: float) -> tuple[list[str], list[str]]:
    """Genes that fall, and that rise, by a shift of the program."""
    table = _strongest(program)
    falls = table["total_effect"] * shift < 0
    return shown(table[falls]).astype(str).tolist(), shown(table[~falls]).astype(str).tolist()


def _strongest(program: Program) -> pd.DataFrame:
    """Genes of the largest total effect that are not the program's own perturbations, the largest first."""
    table = _by_effect(program).head(GENES)
    return table[table["total_effect"].abs() >= LEAST_GENE * float(table["total_effect"].abs().max())]


def _by_effect(program: Program) -> pd.DataFrame:
    """Genes that are not the program's own perturbations, by \\|total effect\\|."""
    table = pd.concat([program.up, program.down]).dropna(subset=["total_effect"])
    own = {*program.drivers["perturbation"]}
    table = table[~(table["gene"].isin(own) | shown(table).isin(own)) & (table["total_effect"] != 0)]
    return table.sort_values("total_effect", key=lambda effect: -effect.abs(), kind="stable")


def _genes_in_words(fall: list[str], rise: list[str], made: str = "") -> str:
    """``A and B fall, and C rises``; with ``made``, such as ``makes``: ``makes A and B fall and C rise``."""
    if made:
        parts = [f"{listed(names, 'and')} {way}" for names, way in ((fall, "fall"), (rise, "rise")) if names]
        return f"{made} {' and '.join(parts)}" if parts else ""
    parts = [
        f"{listed(names, 'and')} {way}{'s' if len(names) == 1 else ''}"
        for names, way in ((fall, "fall"), (rise, "rise"))
        if names
    ]
    return ", and ".join(parts)


def _sets(program: Program, enriched: pd.DataFrame | None) -> str:
    """Gene sets of the smallest false discovery rate, in brackets: of the genes on the side of the strongest one, and of the
    perturbations.
    """
    strongest = _by_effect(program)["total_effect"]
    if enriched is None or strongest.empty:
        return ""
    own = enriched[(enriched["program"] == program.name) & (enriched["fdr"] <= DETECTABLE_FDR)]
    genes = own["direction"] == ("up" if strongest.iloc[0] > 0 else "down")
    words = []
    for what, part in (("genes", own[genes]), ("perturbations", own[own["test"] == "drivers"])):
        if len(part):
            best = part.sort_values("fdr", kind="stable").iloc[0]
            title = f"{best['gene_set']} {best['description']}".strip()
            words.append(f"{what} of {title}, FDR {_rate(best['fdr'])}")
    return f" ({'; '.join(words)})" if words else ""


def _how_sure(run: Run, program: Program, main: pd.DataFrame, rest: pd.DataFrame, guess: bool) -> list[str]:
    """Resamplings, share of the effects, and what else may belong to the program."""
    words, of = [], 0 if run.facts.bootstrap is None else run.facts.bootstrap.replicates
    support = (main["support"] * of).round().dropna().astype(int)
    if of and len(support):
        least, most = support.min(), support.max()
        if least == most:
            words.append(f"Found in {least} of {of} resamplings.")
        elif (main["support"] < GUESS).any():
            words.append(f"None is found in more than {most} of {of} resamplings.")
        else:
            words.append(f"Each is found in at least {least} of {of} resamplings.")
    if program.stability < GUESS:
        words.append(f"Its genes differ between resamplings (stability {program.stability:.2f}).")
    if LEAST_SHARE <= program.effect_explained <= 1:
        words.append(f"This is {program.effect_explained:.0%} of what all perturbations do.")
    if len(main) == 1 and not guess:
        words.append("No other perturbation confirms it.")
    if len(rest) and not guess:
        names, belong = listed(rest["perturbation"], "and"), "belongs" if len(rest) == 1 else "belong"
        most = round(rest["support"].max() * of)
        words.append(f"That {names} {belong} to this program is a guess ({most} of {of} resamplings{' at most' if len(rest) > 1 else ''}).")  # fmt: skip
    return words


def _contradicting(run: Run, rows: pd.DataFrame) -> list[str]:
    """Perturbations whose cells surely contradict the others of their program."""
    if "disagrees" not in run.interventions:
        return []
    names = run.interventions.loc[run.interventions["disagrees"] == 1, "perturbation"]
    return [str(name) for name in rows["perturbation"] if name in set(names)]


def not_seen(interventions: pd.DataFrame) -> str:
    """Perturbations without a detectable effect: those of which an effect was not seen, and those of which none could be.

    Energy distances of perturbations with at least as many cells are known as well: what was detected in fewer cells would
    have been detected.
    """
    tested = interventions[interventions["p_value"].notna()]
    found = tested[tested["fdr"] <= DETECTABLE_FDR]
    silent, untested = tested[tested["fdr"] > DETECTABLE_FDR], interventions[interventions["p_value"].isna()]
    enough = silent["n_cells"] >= (found["n_cells"].min() if len(found) else np.inf)
    words = []
    if len(seen := silent[enough]):
        like = found[found["n_cells"] <= seen["n_cells"].min()]
        weakest = like.loc[like["energy_distance"].idxmin(), "perturbation"]
        words.append(
            f"{_perturbations(seen, 'does', 'do')} nothing visible: {listed(seen['perturbation'], 'and')}. "
            f"An effect as large as that of {weakest} would have been seen."
        )
    if len(thin := silent[~enough]):
        words.append(
            f"{_perturbations(thin, 'may have', 'may have')} too few cells to show an effect: {listed(thin['perturbation'], 'and')}. "
            f"No perturbation of {thin['n_cells'].max()} cells or fewer has a detectable one."
        )
    if len(untested):
        words.append(f"{_perturbations(untested, 'was', 'were')} not tested, for want of cells of {'its' if len(untested) == 1 else 'their'} own: {listed(untested['perturbation'], 'and')}.")  # fmt: skip
    return " ".join(words)


def _perturbations(rows: pd.DataFrame, one: str, several: str) -> str:
    return f"{count(len(rows), 'perturbation')} {one if len(rows) == 1 else several}"


def of_graph(run: Run) -> str:
    """Which program acts on which, as far as the verdict grants, and what was not or could not have been seen."""
    verdict, n = run.facts.identification.verdict, run.facts.n_latents
    if n == 1:
        return "There is one program, and so no graph."
    if verdict == "not identified" or run.edges.empty:
        words = ["The data do not tell which program acts on which: no edge is claimed."]
        if len(run.edges):
            words = ["The data do not tell which program acts on which: the edges are a sketch."]
    else:
        strongest = run.edges.loc[run.edges["weight"].abs().sort_values(ascending=False, kind="stable").index[:EDGES]]
        called = {name: f"{name} ({program.drivers['perturbation'].iloc[0]})" if len(program.drivers) else name for name, program in run.described.items()}  # fmt: skip
        acts = [
            f"{called[row['source']]} {'raises' if row['weight'] > 0 else 'lowers'} {called[row['target']]}"
            + (f" in {row['context']}" if row.get("context") else "")
            + (", a guess" if row["support"] < GUESS else "")
            for row in strongest.to_dict("records")
        ]
        more = len(run.edges) - len(acts)
        words = [
            {
                "identified": "The data tell which program acts on which: ",
                "ancestry only": "The data tell which program is upstream of which, single edges less surely: ",
            }.get(verdict, "The data tell a part of which program acts on which: ")
            + "; ".join(acts)
            + (f"; and {count(more, 'more edge', 'more edges')}." if more else ".")
        ]
    return " ".join([*words, *power_of_pairs(run)])


def power_of_pairs(run: Run) -> list[str]:
    """How many ordered pairs of programs show nothing, and in how many nothing could have been seen."""
    discovery = run.facts.discovery
    if run.pairs is None or discovery is None or discovery.pairs is None or run.pairs.empty:
        return []
    size, status = discovery.pairs.size, run.pairs["status"]
    blind = (status == "undecided") & ~(run.pairs["detectable"] <= size)
    quiet, doubtful, all_ = int((status == "excluded").sum()), int(status.isin(["likely", "both ways"]).sum()), len(status)  # fmt: skip
    open_ = doubtful + int(((status == "undecided") & ~blind).sum())
    words = []
    if quiet:
        words.append(
            f"In {quiet} of {all_} directions no effect of one program on another is seen; one of {size:g} SD would have been, unless perturbations merely shift their programs."
        )
    if blind.any():
        words.append(f"In {int(blind.sum())} of {all_} directions an effect of {size:g} SD could not have been seen.")
    if open_:
        one = open_ == 1
        words.append(f"{open_} of {all_} directions {'shows' if one else 'show'} a change that something else may explain, or nearly one.")  # fmt: skip
    if words and len(run.pairs) > run.facts.n_latents * (run.facts.n_latents - 1):
        words.append("Directions in which contexts differ are counted in each.")
    return words


def doubts(run: Run) -> list[str]:
    """What the tables themselves warn of: guesses, programs that are nearly the same, shares above the whole."""
    words = []
    guesses = [name for name, program in run.described.items() if is_guess(program)]
    idle = [name for name in guesses if _detected(run.described[name]).empty]
    for names, why in (
        ([name for name in guesses if name not in idle], "too few resamplings of the cells confirm"),
        (idle, "no perturbation with a detectable effect acts on"),
    ):
        if names:
            is_, them = ("is a guess", "it") if len(names) == 1 else ("are guesses", "them")
            words.append(f"{listed(names, 'and')} {is_}: {why} {them}.")
    rows = [row for program in run.described.values() for row in _detected(program).to_dict("records")]
    if weak := sorted(str(row["perturbation"]) for row in rows if row["support"] < GUESS):
        which = "The program of 1 perturbation is a guess" if len(weak) == 1 else f"The programs of {len(weak)} perturbations are guesses"  # fmt: skip
        words.append(f"{which}, found in fewer than half of the resamplings: {listed(weak, 'and')}.")
    if run.facts.n_latents and run.facts.by_gradient:
        words.append("Targets and programs were learned by gradient: another --seed may give others.")
    elif run.facts.n_latents and run.facts.bootstrap is None:
        words.append("Cells were not resampled, so nothing tells how surely programs would be found again.")
    words += [
        f"{a} and {b} move nearly the same genes (cosine {_signed(cosine, 2)} of their total effects): one program may be split in two, or one acts on the other. Fewer programs (--n-latents) would tell the first."
        for a, b, cosine in near_duplicates(run)
    ]
    words += [*losses_in_words(run.arms), *programs_in_words(run.arms, run.interventions)]
    total = sum(program.effect_explained for program in run.described.values())
    if total > 1 + LEAST_SHARE:
        words.append(
            f"The programs' shares of the effects add up to {total:.0%}, more than there is: they contain sampling noise."
        )
    return words


def near_duplicates(run: Run) -> list[tuple[str, str, float]]:
    """Pairs of programs whose total effects have an \\|cosine\\| above 0.8, over genes that are known of both.

    Those that are declared up- and downstream of each other share genes by the graph, and are left out.
    """
    if not run.facts.n_latents:
        return []
    wide = run.programs.pivot(index="program", columns="gene", values="total_effect").reindex(run.program_names)
    effects = wide.fillna(0.0).to_numpy(float)
    known = wide.notna().to_numpy().astype(float)
    length = np.sqrt((effects**2) @ known.T)  # of a program in the other's genes
    product = effects @ effects.T
    cosine = np.divide(product, length * length.T, out=np.zeros_like(product), where=length * length.T > 0)
    names = run.program_names
    pairs = [(names[i], names[j], float(cosine[i, j])) for i, j in np.argwhere(np.triu(np.abs(cosine) > ALIKE, 1))]
    return [
        pair for pair in pairs if pair[1] not in run.described[pair[0]].downstream + run.described[pair[0]].upstream
    ]


def count(n: int, one: str, several: str = "") -> str:
    """``1 edge``, ``2 edges``."""
    return f"{n} {one if n == 1 else several or one + 's'}"


def listed(names: Sequence[str] | pd.Series, last: str) -> str:
    """``A, B or C``; of many names the first, and how many more."""
    every = [str(name) for name in names]
    if len(every) > NAMED:
        return few(every, NAMED)
    return every[0] if len(every) == 1 else f"{', '.join(every[:-1])} {last} {every[-1]}"


def _signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")


def _rate(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value < 0.001 else f"{value:.2g}"
