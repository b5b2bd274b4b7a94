"""What the evidence says about the graph. Every verdict and its reason come into being here, and nowhere else.

Without an objection to the likelihood, hard interventions identify the graph and soft ones identify who is upstream of
whom. With one, the pairs of programs that interventions order identify a part of it. `crlseq.discovery.discover` collects
the evidence.
"""

from dataclasses import dataclass
from typing import Literal

from crlseq.config import InterventionKind, ModelConfig
from crlseq.discovery.misfit import Misfit
from crlseq.discovery.thresholds import DECISIVE, DECLARED_SUPPORT
from crlseq.model.interventions import INTERVENTIONS
from crlseq.storage.stage_cache import cached_on_disk

Answer = Literal["identified", "ancestry only", "partly identified", "not identified"]
GRANTED: dict[str, tuple[Answer, str]] = {  # by what a kind of intervention identifies
    "edges": ("identified", "so single edges are identified"),
    "ancestry": ("ancestry only", "so ancestry is identified; single edges are less certain"),
}
BEYOND_PROGRAM = (
    0.1  # share of a score difference; one program a perturbation leaves up to .05, two at least .11 in 31 of 32 models
)
LEAST_P_VALUE = 1e-3  # of covariances under the model
RIVAL = 20.0  # difference of deviances: a likelihood 20,000 times smaller, where there are a few thousand sets
FALSE_EDGES = 0.2  # share of edges that may be false
UNTOUCHED = (
    0.25  # shift, in standard deviations of the noise, that may be on programs that are not targets: the least edge
)
NO_SURE_EDGE = "No edge differs from 0 by four standard errors."
ANY_GRAPH = "Shifts with linear equations fit equally well with any graph, including the empty one."


@dataclass(frozen=True)
class Verdict:
    """The answer, and the reason in words for users."""

    answer: Answer
    reason: str

    @property
    def grants_graph(self) -> bool:
        """Whether edges may be declared."""
        return self.answer != "not identified"

    @property
    def by_likelihood(self) -> bool:
        """Whether these are the edges that the likelihood selected."""
        return self.answer in {answer for answer, _ in GRANTED.values()}


@cached_on_disk()
@dataclass(frozen=True)
class PairCounts:
    """How many pairs of programs have each status; both ways counts a pair once, all others are ordered pairs."""

    upstream: int
    likely: int
    both_ways: int
    excluded: int
    undecided: int
    detectable: float  # smallest change that would have been seen, in the median excluded pair
    modulated: int = 0  # programs that set how strongly another is shifted


@cached_on_disk()
@dataclass(frozen=True)
class Evidence:
    """What is known of a graph selected by likelihood."""

    kind: InterventionKind  # of the interventions under which it was selected
    asked_without_graph: InterventionKind | None  # the kind that was asked for, if its likelihood fits any graph
    n_edges: int  # that what interventions change does not speak against, and of which the cells tell the direction
    gain: float  # log-likelihood of held-out cells over that of the best model without edges
    error: float  # standard error of the gain
    misfit: Misfit | None = None  # of the model with the graph; None while unknown
    support: float | None = None  # largest of a selected edge; None without a bootstrap
    pairs: PairCounts | None = None  # what interventions change; None while unknown
    n_gone: int = 0  # further edges, which it speaks against
    n_turned: int = 0  # further edges, which could point the other way
    n_open: int = 0  # programs between others whose one perturbation may be soft, unless hard ones were asked for
    n_around: int = 0  # edges around a program that soft interventions on it may stand for, unless a kind was asked for
    by_changes: bool = False  # whether the graph is to be what interventions change alone


def judge(evidence: Evidence) -> Verdict:
    """The verdict: on the graph selected by likelihood, and where that falls, on the pairs that interventions order."""
    if objection := _objection(evidence):
        pairs = evidence.pairs
        if pairs is None or evidence.asked_without_graph is not None:
            return Verdict("not identified", objection)
        answer: Answer = "partly identified" if pairs.upstream else "not identified"
        return Verdict(answer, f"{_in_words(pairs)} {objection}")
    gain = f"(gain {evidence.gain:.0f} ± {evidence.error:.0f} log-likelihood units)"
    better = f"With edges the model predicts held-out cells better than any model without {gain}"
    kind = INTERVENTIONS[evidence.kind]
    answer, so = GRANTED[kind.graph]
    turned, n = "", evidence.n_turned
    if n:
        turned = f" {n} more {'edge fits' if n == 1 else 'edges fit'} as well when reversed and {'is' if n == 1 else 'are'} not declared."
    if kind.graph == "edges" and (doubt := _as_soft(evidence)):
        return Verdict(
            "ancestry only",
            f"{kind.reason} {better}. But {doubt}: ancestry is identified, and single edges if all interventions are hard (--intervention hard).{turned}",
        )
    return Verdict(answer, f"{kind.reason} {better}, {so}.{turned}")


def _as_soft(evidence: Evidence) -> str | None:
    """Why soft interventions could look like the hard ones of the evidence."""
    if n := evidence.n_open:
        few = f"{_of(n, 'program')} between others {'has' if n == 1 else 'have'} one perturbation alone"
        return f"{few}, and a soft intervention looks like a hard one there"
    if n := evidence.n_around:
        goes = "edge goes" if n == 1 else "edges go"
        return f"{n} {goes} around a program, and soft interventions on that program would look the same"
    return None


def _objection(evidence: Evidence) -> str | None:
    """The first reason not to believe the graph."""
    if evidence.by_changes:
        return "The method changes takes no edge from a likelihood."
    gain = f"{evidence.gain:+.0f} ± {evidence.error:.0f} log-likelihood units"
    n_kept = evidence.n_edges + evidence.n_turned
    if evidence.n_gone > n_kept:
        return f"{evidence.n_gone} of {_of(evidence.n_gone + n_kept, 'edge')} of the likelihood would have shown a change under intervention, and did not."
    if evidence.n_edges == 0 and evidence.n_turned:
        n = evidence.n_turned
        return f"{'The only edge fits' if n == 1 else f'All {n} edges fit'} as well when reversed."
    if evidence.n_edges == 0:
        return f"No edge improves the fit enough to be selected. {ANY_GRAPH}"
    if not evidence.gain > DECISIVE * evidence.error:
        return f"Edges do not predict held-out cells better (gain {gain}; more than {DECISIVE:.0f} standard errors are needed). {ANY_GRAPH}"
    if evidence.asked_without_graph is not None:
        return f"{INTERVENTIONS[evidence.asked_without_graph].reason} {ANY_GRAPH}"
    if evidence.misfit is not None and not evidence.misfit.describes:
        return f"The model fits poorly (misfit {evidence.misfit.value:.2f}; ideal 1.0), so the edges' gain ({gain}) may be an artefact."
    if evidence.pairs is not None and evidence.pairs.both_ways:
        return f"{_of(evidence.pairs.both_ways, 'pair')} of programs change each other: a hidden common cause, a cycle or nonlinear equations, which the likelihood does not know."
    if evidence.pairs is not None and evidence.pairs.modulated:
        return f"{_of(evidence.pairs.modulated, 'program sets', 'programs set')} how strongly perturbations shift another one, which the likelihood does not know."
    if evidence.support is not None and evidence.support < DECLARED_SUPPORT:
        return f"The bootstrap removed the last edge: no selected edge recurs in at least half of the replicates (highest support {evidence.support:.2f})."
    return None


def _in_words(pairs: PairCounts) -> str:
    """What interventions say about all pairs of programs."""
    total = pairs.upstream + pairs.likely + pairs.excluded + pairs.undecided + 2 * pairs.both_ways
    if pairs.upstream:
        said = f"Interventions order {_of(pairs.upstream, 'pair')} of programs"
    elif pairs.likely or pairs.both_ways:
        said = "Interventions order no pair of programs for sure"
    else:
        said = "No intervention is seen to change how two programs vary together"
    more = " more" if pairs.upstream else ""
    said += f"; {pairs.likely}{more} {'is' if pairs.likely == 1 else 'are'} likely." if pairs.likely else "."
    if pairs.excluded:
        said += (
            f" In {pairs.excluded} of {total} directions a change above {pairs.detectable:.2f} would have been seen."
        )
    if pairs.undecided:
        of = "" if pairs.excluded else f" of {total} directions"
        said += f" {pairs.undecided}{of} {'is' if pairs.undecided == 1 else 'are'} not decided."
    return said


def _of(n: int, noun: str, nouns: str = "") -> str:
    return f"{n} {noun if n == 1 else nouns or noun + 's'}"


def judge_nonlinear(gain: float, error: float) -> Verdict:
    """The verdict on nonlinear equations under shifts, by their gain in log-likelihood over linear ones and its error."""
    return Verdict(
        "ancestry only",
        f"Nonlinear equations predict held-out cells better than linear ones (gain {gain:.0f} ± {error:.0f} log-likelihood units) and explain at least 90% of their misfit. If expression is linear in the programs, shifts then identify ancestry.",
    )


def judge_factors(method: str) -> Verdict:
    """The verdict on a method that looks for programs alone."""
    return Verdict(
        "not identified", f"The method {method} finds programs and what perturbations do to them, and no graph."
    )


def _edges_if_hard(said: str, hard: bool) -> Verdict:
    """What changes of one row or program a perturbation leave: single edges if interventions are ``hard``, else ancestry."""
    if hard:
        return Verdict(
            "identified", f"{said}; under hard interventions, which were asked for, single edges are identified."
        )
    return Verdict(
        "ancestry only",
        f"{said}. This does not tell hard interventions from soft ones: single edges hold if all are hard (--intervention hard).",
    )


def _undescribed(p_value: float, linear: float, sets: str) -> Verdict | None:
    """The objection to a model of ``sets`` of interventions, by the p-values of its deviance and of linear equations."""
    if p_value < LEAST_P_VALUE:
        return Verdict(
            "not identified",
            f"{sets} do not describe the covariances (p = {p_value:.1e}, at least {LEAST_P_VALUE:g} is needed): perturbations act otherwise, or equations or noise are not linear and normal.",
        )
    if linear < LEAST_P_VALUE:
        return Verdict(
            "not identified",
            f"Programs depend on products of others (p = {linear:.1e}; linear equations need {LEAST_P_VALUE:g}): equations are not linear.",
        )
    return None


def judge_squires(p_value: float, linear: float, n_edges: int, hard: bool) -> Verdict:
    """The verdict on perturbations of one program each, by the p-values of the model's deviance and of ``linear`` equations; ``hard``
    if such interventions were asked for.
    """
    if objection := _undescribed(p_value, linear, "Perturbations of one program each"):
        return objection
    if not n_edges:
        return Verdict("not identified", NO_SURE_EDGE)
    return _edges_if_hard(f"Perturbations of one program each describe all covariances (p = {p_value:.2f})", hard)


def judge_scores(
    left: float, n_edges: int, n_against: int, hard: bool, described: bool = True, n_turned: int = 0
) -> Verdict:
    """The verdict on score differences of which a share ``left`` is on programs downstream of the perturbation's own, and of
    which ``n_against`` effects are as clear as those of the edges, in a direction that the order excludes: about as many of the
    edges are false. ``hard`` if such interventions were asked for; not ``described`` are cells that are not normal, and that the
    classifier does not tell apart better; ``n_turned`` further edges could point the other way.
    """
    if not described:
        return Verdict(
            "not identified",
            "Cells are not normal, and no classifier tells held-out cells apart better than normal densities: their score differences are not known.",
        )
    if left > BEYOND_PROGRAM:
        return Verdict(
            "not identified",
            f"{left:.0%} of a perturbation's score difference is on programs that it should not change, more than {BEYOND_PROGRAM:.0%}: it acts on more than one program, or the model does not hold.",
        )
    if not n_edges:
        turned = f"{_of(n_turned, 'edge')} would fit as well when reversed." if n_turned else ""
        return Verdict("not identified", turned or "No score difference shows that a program depends on another one.")
    if n_against > FALSE_EDGES * n_edges:
        return Verdict(
            "not identified",
            f"Beside {_of(n_edges, 'edge')}, {_of(n_against, 'effect')} as clear as theirs would close a cycle, more than {FALSE_EDGES:.0%}: there are too few cells, or the model does not hold.",
        )
    said = f"Each perturbation's score difference is on its program and what is upstream ({left:.0%} is elsewhere)"
    if n_turned:
        said += f"; {_of(n_turned, 'edge')} more would fit as well when reversed"
    return _edges_if_hard(said, hard)


def judge_multi_node(p_value: float, linear: float, rival: float, n_edges: int, acts_on: float, hard: bool) -> Verdict:
    """The verdict on sets of programs that perturbations act on, ``acts_on`` on average: p-values of the model's deviance and of
    ``linear`` equations, and by how much the deviance of the best other sets is larger; ``hard`` if that was asked for.
    """
    if objection := _undescribed(p_value, linear, "Sets of programs that perturbations act on"):
        return objection
    if rival < RIVAL:
        return Verdict(
            "not identified",
            f"Other sets of programs for the perturbations describe the covariances nearly as well (deviance larger by {rival:.0f}, and {RIVAL:.0f} are needed): there are too few cells, or perturbations are too alike.",
        )
    if not n_edges:
        return Verdict("not identified", NO_SURE_EDGE)
    said = f"Perturbations that act on {acts_on:.1f} programs each, on average, describe all covariances (p = {p_value:.2f})"
    return _edges_if_hard(said, hard)


def judge_cauca(left: float, n_edges: int, kind: InterventionKind, asked: bool) -> Verdict:
    """The verdict on a flow with given targets and order: shifts of a size ``left``, in standard deviations of the noise, are
    on programs that nobody perturbed; the ``kind`` of intervention was ``asked`` for, or taken to be hard.
    """
    if kind != "hard":
        return Verdict(
            "not identified",
            f"Targets and order were given, but {kind} interventions leave programs mixed with those upstream.",
        )
    if left > UNTOUCHED:
        return Verdict(
            "not identified",
            f"Perturbations shift programs downstream by {left:.2f} standard deviations more than the equations say (at most {UNTOUCHED:g}): targets, order or equations do not hold.",
        )
    if not n_edges:
        return Verdict("not identified", "No program depends on one before it.")
    if not asked:
        return Verdict(
            "not identified",
            "Targets and order were given. Programs and edges are identified if all interventions are hard: say so (--intervention hard).",
        )
    return Verdict(
        "identified",
        "Targets and order were given, and under hard interventions, which were asked for, they identify each program up to a function of its own, and so its dependence on those before it.",
    )


def judge_icm_flow() -> Verdict:
    """The verdict on an autoencoder with flow equations: its theory asks for more than a screen has."""
    return Verdict(
        "not identified",
        "The theory of icm-flow asks for measured values of the causal variables, and a screen has perturbations alone: the order of programs is that of the linear likelihood.",
    )


def judge_nothing() -> Verdict:
    """The verdict on a screen without any effect."""
    return Verdict("not identified", "No perturbation has a detectable effect, so there are no programs to order.")


def judge_gradient(config: ModelConfig) -> Verdict:
    """The verdict on a graph without a discovery, under this configuration: theory and simulations leave no other."""
    kind = config.intervention
    if config.causal_layer and config.method != "gradient":
        reason = "No single perturbation has a detectable effect, so nothing can order the programs."
    elif not config.causal_layer:
        reason = "The model was fitted without structural equations, so it has no graph."
    elif config.equations != "nonlinear" and kind != "auto" and INTERVENTIONS[kind].graph == "nothing":
        reason = "With linear equations and shifts alone, the decoder can absorb any graph, including the empty one: the edges reflect the optimiser, not the data."
    else:
        reason = "In simulations, a graph learned by gradient in a single fit was no better than an empty one: treat it as a sketch, not a finding."
    return Verdict("not identified", reason)
