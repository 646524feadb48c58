"""Which code runs: the commit of the checkout, and versions of packages."""

import logging
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]


@cache
def package_version(package: str) -> str:
    """Version of an installed package, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@cache
def code_version(root: Path = ROOT) -> dict[str, Any]:
    """`commit` of a checkout and whether files differ from it (`dirty`).

    Where there is none, or git cannot tell, `version` of the installed package. A process asks git
    once: it runs the code that it began with.
    """
    if (root / ".git").exists():
        try:
            commit = _git(root, "rev-parse", "HEAD")
            changes = _git(root, "status", "--porcelain", "--untracked-files=no")
        except (OSError, subprocess.CalledProcessError) as error:
            log.warning("git cannot tell the commit of %s (%s)", root, error)
        else:
            return {"commit": commit, "dirty": bool(changes)}
    return {"version": package_version("pafukv")}


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
