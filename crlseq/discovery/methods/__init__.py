"""Discovery methods, one per file.

To add one, write a file of its name in this folder and add the name to ``method`` in `crlseq.config.ModelConfig`. The
file fulfils `Method`; its docstring opens with the problem that is solved, its source, what it assumes and what it
identifies.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast, get_args

from crlseq.config import ModelConfig
from crlseq.discovery.result import Discovery
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import Answer

NO_EFFECT = "No perturbation has a detectable effect, so there are no programs"
NAMES: tuple[str, ...] = get_args(ModelConfig.model_fields["method"].annotation)


@dataclass(frozen=True)
class Programs:
    """Their number ``n``, why that many, and what was discovered about them; None: they are learned by gradient.

    A screen without any effect has none.
    """

    n: int
    reason: str
    discovery: Discovery | None

    @classmethod
    def of(cls, discovery: Discovery) -> Programs:
        """The programs of a discovery."""
        reason = "as asked" if discovery.choice is None else discovery.choice.reason
        return cls(len(discovery.adjacency), reason, discovery)


class Method(Protocol):
    """A file of this package."""

    AT_MOST: Answer  # the most that its theory identifies

    def find(self, task: Task) -> Programs:
        """The programs, with a verdict from `crlseq.discovery.verdict`, from the cells of each environment and the size
        of each perturbation's effect. An `InputError` if more are asked for than the screen can tell apart.
        """


def method_of(name: str) -> Method:
    """The method of a name."""
    return cast(Method, import_module(f"{__name__}.{name.replace('-', '_')}"))


def find_programs(task: Task) -> Programs:
    """By the method of the configuration; none in a screen without any effect, and by gradient where effects are those of
    combinations, which no other method learns from. An `InputError` if more programs are asked for than the screen can
    tell apart.
    """
    name: str = task.config.method
    if task.without_effect and task.config.causal_layer:  # the ablation says nothing of perturbations
        asked = task.config.n_latents
        task.note(NO_EFFECT + ("" if asked == "auto" else f" (asked for: {asked})") + ".")
        return Programs(0, f"{NO_EFFECT}.", None)
    if not task.config.causal_layer:  # the ablation without structural equations has no graph to find
        name = "gradient"
    elif name != "gradient" and not task.effect.any():
        task.note(
            "No single perturbation has a detectable effect: targets are learned by gradient, and none is claimed."
        )
        name = "gradient"
    return method_of(name).find(task)
