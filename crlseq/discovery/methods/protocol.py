"""What a discovery method is.

To add one, write a file of its name in this folder and add the name to ``method`` in `crlseq.config.ModelConfig`. The
file fulfils `Method`; its docstring opens with the problem that is solved, its source, what it assumes and what it
identifies. `crlseq.discovery.methods.registry` then finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from crlseq.discovery.result import Discovery
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import Answer


@dataclass(frozen=True)
class Programs:
    """Their number ``n``, why that many, and what was discovered about them; None: they are learned by gradient."""

    n: int
    reason: str
    discovery: Discovery | None

    @classmethod
    def of(cls, discovery: Discovery) -> Programs:
        """The programs of a discovery."""
        reason = "as asked" if discovery.choice is None else discovery.choice.reason
        return cls(len(discovery.adjacency), reason, discovery)


class Method(Protocol):
    """A file of this package.

    It finds programs from ``task``: the cells of each environment (`Task.data`, `Task.environments`), the size of each
    perturbation's effect, the options, seed, progress and cache.
    """

    AT_MOST: Answer  # the most that its theory identifies

    def find(self, task: Task) -> Programs:
        """The programs; a discovery's verdict comes from a function of `crlseq.discovery.verdict`.

        Raises
        ------
        InputError
            If more programs are asked for than the screen can tell apart.
        """
