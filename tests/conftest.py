"""One guard for the whole suite: our five generic package names must be ours; and who runs what."""

from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _origin(name: str) -> Path | None:
    spec = find_spec(name)
    return Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None


for _name in ("configs", "data", "launch", "models", "train"):
    if _origin(_name) != ROOT / _name / "__init__.py":
        raise ImportError(
            f"package {_name!r} must be {ROOT / _name}, found {_origin(_name)}; another "
            "distribution owns this name: uninstall it, or run from the root of the repository"
        )


RANKS = {"exact", "faults", "forecast_held", "lora", "nodes", "strategy", "watchdog"}
"""Files whose tests start many processes; two of them at a time would starve each other."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, a file stays in one, and so do all of `RANKS`."""
    for item in items:
        name = item.path.stem.removeprefix("test_")
        item.add_marker(pytest.mark.xdist_group("ranks" if name in RANKS else str(item.path)))
