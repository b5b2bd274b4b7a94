"""Targets and graph learned together with the networks, by gradient: nothing is discovered beforehand.

    minimise over all weights    reconstruction + KL + MMD(predicted, observed cells) + penalty on G

The objective of `crlseq.training.objective`, from random weights; each perturbation's target is a softmax that hardens.

Source: Zhang et al. 2023, "Identifiability guarantees for causal disentanglement from soft interventions",
arXiv 2307.06250.
Assumes: every perturbation acts on one program; for the published theory also nonlinear equations or interventions
that are more than shifts.
Identified: nothing that is declared. In simulations the graph of a single fit was no better than an empty one.
"""

from crlseq.discovery.methods import Programs
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import Answer
from crlseq.errors import InputError

AT_MOST: Answer = "not identified"


def find(task: Task) -> Programs:
    """The number of programs alone."""
    asked, k = task.config.n_latents, len(task.effect)
    if asked == "auto":
        return Programs(k, "one per perturbation, as published", None)
    if asked > k:
        raise InputError(
            f"{asked} programs were asked for, but only {k} perturbations are fitted.",
            "Each program needs a perturbation of its own: ask for fewer programs.",
        )
    return Programs(asked, "as asked", None)
