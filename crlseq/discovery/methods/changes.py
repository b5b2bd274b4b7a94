"""Who is upstream of whom by what interventions change, without a likelihood's graph.

    E[k, i] = Cov(x_k, x_i | do(i)) - Cov(x_k, x_i | controls) = -(Omega T)[k, i],      k != i,

in coordinates x in which the mean shifts of the perturbations of program i lie along axis i: an intervention that cuts i off
from its parents takes their covariance with it (`crlseq.discovery.changes`). A pair is ordered where E is seen one way and
every other explanation is excluded (`crlseq.discovery.pairs`). Targets are those of the linear method.

Source: this project; that covariances of interventional data identify a linear latent graph is due to Squires et al. 2023.
Assumes: components and equations are linear; every perturbation acts mainly on one program, whose mean it shifts. Background,
measurement noise, escaped cells and hidden common causes may be there.
Identified: pairs of programs that are in an order, and direct edges among them; nothing under mere shifts.
"""

from crlseq.discovery.discover import discover
from crlseq.discovery.methods import Programs
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import Answer

AT_MOST: Answer = "partly identified"


def find(task: Task) -> Programs:
    """Targets by likelihood, and the pairs that interventions order."""
    return Programs.of(discover(task, by_changes=True))
