"""Licences of what crlseq needs at run time, as installed: permissive, or the exit code is 1.

With ``pip-audit`` installed and its service reachable, known vulnerabilities are looked up as well.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec

from packaging.requirements import Requirement

# SPDX names, classifiers and the free words of older packages, in lower case.
PERMISSIVE = re.compile(
    r"\b(mit|mit-cmu|bsd|apache|isc|psf|python software foundation|python-2\.0|cnri-python|zlib|hpnd|mozilla public|mpl|0bsd|cc0|unlicense|zpl|openssl)\b"
)
COPYLEFT = re.compile(r"\b(a|l)?gpl|\bgnu\b")


def needed(name: str, found: dict[str, Distribution], extras: frozenset[str] = frozenset()) -> None:
    """Collect a distribution and all that it needs at run time here."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found and not extras:
        return
    try:
        found[key] = distribution(name)
    except PackageNotFoundError:
        return
    for line in found[key].requires or []:
        requirement = Requirement(line)
        wanted = [{"extra": extra} for extra in extras] or [{"extra": ""}]
        if requirement.marker is None or any(requirement.marker.evaluate(environment) for environment in wanted):
            needed(requirement.name, found, frozenset(requirement.extras))


def licence(package: Distribution) -> str:
    """What a package says of itself, in lower case: its SPDX expression, else classifiers and the free field's line."""
    about = package.metadata
    classifiers = [line.removeprefix("License :: ") for line in about.get_all("Classifier", []) if "License ::" in line]
    free = (about.get("License") or "").strip().partition("\n")[0]
    return str(about.get("License-Expression") or " / ".join(filter(None, [*classifiers, free]))).lower()


def main() -> int:
    """Print the packages with their licences, those that are not permissive last."""
    found: dict[str, Distribution] = {}
    needed("crlseq", found)
    refused = []
    for name, package in sorted(found.items()):
        said = licence(package)
        print(f"{name} {package.version}: {said[:100] or 'unknown'}")
        if COPYLEFT.search(said) or not PERMISSIVE.search(said):
            refused.append(name)
    if refused:
        print(f"Not known to be permissive: {', '.join(refused)}.", file=sys.stderr)
    if find_spec("pip_audit") is None:
        print("pip-audit is not installed: vulnerabilities were not looked up.", file=sys.stderr)
    else:
        code = subprocess.run([sys.executable, "-m", "pip_audit", "--local", "--progress-spinner", "off"]).returncode
        if code:
            print("pip-audit found something, or its service cannot be reached; see above.", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
