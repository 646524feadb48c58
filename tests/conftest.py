"""One guard for the whole suite: our five generic package names must be ours."""

from importlib.util import find_spec
from pathlib import Path

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
