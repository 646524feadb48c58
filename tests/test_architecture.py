"""The directions of imports, and the rules that keep generic package names safe."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "configs": set(),
    "models": set(),
    "data": {"configs"},
    "train": {"configs", "models", "data"},
    "launch": {"configs", "models", "data", "train"},
}
SOURCES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def module_names(tree: ast.AST) -> set[str]:
    """Full names of every module imported anywhere in the tree."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            names.add(node.module or "")
    return names


def ours(tree: ast.AST) -> set[str]:
    """Top-level folders of this repository that the tree imports from."""
    return {name.partition(".")[0] for name in module_names(tree)} & {*MAY_IMPORT, "tests"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_the_folders_below_it(path):
    folder = path.relative_to(ROOT).parts[0]
    forbidden = ours(ast.parse(path.read_text())) - MAY_IMPORT[folder] - {folder}
    assert not forbidden, f"{path.relative_to(ROOT)} may not import {sorted(forbidden)}"


def test_the_walk_sees_imports_inside_functions():
    tree = ast.parse(
        "import numpy.linalg\ndef f():\n    if f:\n        from launch.plan import x\n"
    )
    assert ours(tree) == {"launch"}


def test_only_the_strategy_imports_deepspeed():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name.startswith("deepspeed") for name in module_names(ast.parse(path.read_text())))
    }
    assert users <= {"train/strategy.py"}


def test_no_file_is_named_after_a_folder():
    names = [path.relative_to(ROOT) for path in SOURCES if path.stem in MAY_IMPORT]
    assert not names, f"{names} would hide a package when a file beside them is run by its path"


def test_no_test_folder_is_a_package():
    found = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("__init__.py")]
    assert not found, f"{found} would hide our packages from pytest"


def test_package_files_hold_a_docstring_and_nothing_else():
    for folder in MAY_IMPORT:
        body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
        assert len(body) == 1, f"{folder}/__init__.py must hold only a docstring"
        assert isinstance(body[0], ast.Expr)


def test_ignored_paths_start_at_the_root_so_that_no_source_folder_is_dropped():
    lines = (ROOT / ".gitignore").read_text().split()
    bare = [line for line in lines if not line.startswith(("/", "*")) and line != "__pycache__/"]
    assert not bare, f"{bare} in .gitignore must start with a slash"
