"""Where real screens, simulations and the published model's numbers lie on a machine that has them."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


def shared(name: str) -> Path:
    """A file of the shared folder, or a skip that says which."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not on this machine")
    return path
