"""All discovery methods by name, and the one that finds the programs of a screen."""

from __future__ import annotations

from importlib import import_module
from typing import cast, get_args

from crlseq.config import ModelConfig
from crlseq.discovery.methods.protocol import Method, Programs
from crlseq.discovery.task import Task

NAMES: tuple[str, ...] = get_args(ModelConfig.model_fields["method"].annotation)
METHODS = {name: cast(Method, import_module(f"crlseq.discovery.methods.{name}")) for name in NAMES}


def find_programs(task: Task) -> Programs:
    """By the method of the configuration; by gradient where no other can find anything.

    Raises
    ------
    InputError
        If more programs are asked for than the screen can tell apart.
    """
    name: str = task.config.method
    if not task.config.causal_layer:  # the ablation without structural equations has no graph to find
        name = "gradient"
    elif name != "gradient" and not task.effect.any():
        task.note("No single perturbation has a detectable effect: targets are learned by gradient, without claims.")
        name = "gradient"
    return METHODS[name].find(task)
