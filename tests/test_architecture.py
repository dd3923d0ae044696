"""The import direction of the package, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "optimstate"

# What each part of optimstate may import (a part may always import itself).
ALLOWED = {
    "errors": set(),
    "record": set(),
    "io": {"errors"},
    "tensors": {"errors", "io"},
    "tree": {"errors", "io", "tensors"},
    "state": {"record", "errors", "tensors", "tree"},
    "formats": {"errors", "io", "tensors", "tree", "state"},
    "plan": {"record", "errors", "tensors", "tree", "state"},
    "optim": {"errors", "state.names"},
    "surgery": {"record", "errors", "io", "tensors", "tree", "state", "formats", "plan"},
    "distributed": {"errors", "tensors", "tree", "state", "plan", "formats"},
    "hooks": {"errors", "tensors", "tree", "state", "plan"},
    "resuming": {"errors", "io", "tensors", "tree", "state", "plan", "formats", "hooks"},
    "cli": {"errors", "io", "tensors", "tree", "state", "surgery", "formats", "plan", "demo"},
    "demo": {"errors", "optim", "hooks"},
    "__init__": {"errors", "hooks", "optim", "surgery", "formats.registry", "plan.language.rules", "resuming"},
}
MAY_IMPORT_TORCH = {"optim", "hooks", "distributed", "demo"}
MAY_IMPORT_TERMINAL = {"cli"}


def sources() -> list[tuple[str, Path]]:
    """Every source file with the part it belongs to; symlinked packages are seen once, under their import name."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")) + sorted(
        p for link in ("hooks", "cli") for p in (ROOT / link).rglob("*.py")
    ):
        relative = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT)
        found.append((relative.with_suffix("").parts[0], path))
    return sorted(set(found))


def imports(path: Path, *, module_level: bool) -> set[str]:
    """Dotted names imported by a file; with `module_level`, those outside functions and TYPE_CHECKING only."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if module_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if module_level and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative imports hide the direction"
                names.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


@pytest.mark.parametrize(("part", "path"), sources(), ids=lambda value: str(getattr(value, "name", value)))
def test_a_part_imports_only_what_stands_below_it(part: str, path: Path) -> None:
    assert part in ALLOWED, f"{part} is not on the plan of the house"
    for name in imports(path, module_level=False):
        root = name.split(".")[0]
        assert root not in {"hooks", "cli"}, f"{path}: import optimstate.{root}"
        if root != "optimstate" or name.startswith("optimstate.__"):
            continue
        inner = name.removeprefix("optimstate.")
        target = inner.split(".")[0]
        permitted = {part, *ALLOWED[part]}
        assert target in permitted or any(inner.startswith(p) for p in permitted), f"{path} imports {name}"


@pytest.mark.parametrize(("part", "path"), sources(), ids=lambda value: str(getattr(value, "name", value)))
def test_heavy_packages_stay_where_they_belong(part: str, path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path, module_level=True)}
    if part not in MAY_IMPORT_TORCH:
        assert not roots & {"torch", "numpy"}, f"{path} imports torch or numpy at module level"
    everywhere = {name.split(".")[0] for name in imports(path, module_level=False)}
    if part not in MAY_IMPORT_TERMINAL:
        assert not everywhere & {"typer", "rich"}, f"{path} renders"


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    code = "import optimstate, sys; print(sorted({'torch', 'numpy', 'typer', 'rich'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_public_names_are_sorted_and_resolve() -> None:
    import optimstate

    assert optimstate.__all__ == sorted(optimstate.__all__)
    for name in optimstate.__all__:
        assert getattr(optimstate, name) is not None
