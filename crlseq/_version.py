"""The version, and those of what results depend on. Imports only the standard library."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"
PACKAGES = ("torch", "numpy", "scipy", "pandas", "anndata", "scanpy", "scikit-learn")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a vendored or renamed build: the fit does not depend on the number
            found[name] = "unknown"
    return found
