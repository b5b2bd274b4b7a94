"""Linear causal disentanglement by maximum likelihood.

    maximise over mixing W, graph G and interventions c    sum_cells log N(y; mean_c(W, G), covariance_c(W, G))

The Gaussian likelihood of `crlseq.discovery.likelihood`, in whitened components of the cells, for targets of the
perturbations and a dense graph; edges are then selected by likelihood ratio.

Source: linear causal disentanglement via interventions (Squires et al. 2023, ICML).
Assumes: components are linear in the programs, equations are linear with Gaussian noise, every perturbation acts on one
program, and every program has a perturbation.
Identified: under hard interventions the graph; under soft ones who is upstream of whom; under mere shifts nothing,
since the decoder can absorb any graph.
"""

from crlseq.discovery.discover import discover
from crlseq.discovery.methods import Programs
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import Answer

AT_MOST: Answer = "identified"


def find(task: Task) -> Programs:
    """Targets and graph of the linear model, also where it does not describe the cells."""
    return Programs.of(discover(task))
