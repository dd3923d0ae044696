"""The import direction of the package, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each room may import (a room may always import itself); a name stands for all that is below it.
ALLOWED: dict[str, set[str]] = {
    room: set(below.split())
    for room, below in {
        "record": "",  # imported by all: how a value class is made
        "describe": "",  # imported by all: the one way a value of a file becomes text
        "problems": "",
        "entry_points": "",
        "errors": "problems",
        "installed_torch": "errors",
        "user_code": "errors",
        "io": "errors",
        "tensors": "errors installed_torch io",
        "tree": "errors io tensors",
        "reporting": "tree",
        "state": "problems entry_points errors installed_torch tensors tree",
        "certificates": "problems errors installed_torch tensors tree state __init__",
        "formats": "entry_points errors io tensors tree state",
        "plan": "problems errors installed_torch tensors tree state",
        "optim": "errors installed_torch state.names state.schedules",
        "surgery": "problems errors installed_torch io tensors tree reporting state certificates formats plan",
        "hooks": "problems errors installed_torch tensors tree reporting state certificates plan derivation __init__",
        "resuming": "problems errors installed_torch io tensors tree reporting state certificates formats plan hooks",
        "distributed": "problems errors installed_torch io state plan resuming",
        "derivation": "problems errors installed_torch user_code io tensors tree state formats plan",
        "rehearsal": "errors installed_torch user_code reporting state plan hooks resuming",
        "integrations": "errors problems installed_torch tensors state certificates formats plan hooks resuming",
        "demo": "problems errors installed_torch optim hooks",
        "cli": "problems errors installed_torch user_code io tensors tree reporting state "
        "formats plan surgery derivation rehearsal demo __init__",
        "__main__": "cli",
        "__init__": "errors certificates.certificate formats.registry plan.language.plan plan.language.rules optim "
        "surgery hooks resuming distributed derivation rehearsal",
    }.items()
}
# The storeys of a package, the lowest first: a module imports from its own storey and those below.
STOREYS: dict[str, tuple[set[str], ...]] = {
    "plan": ({"expressions"}, {"language"}, {"slots"}, {"solve"}, {"apply"}),
    "formats": (
        {"protocol"},
        {"registry"},  # knows the containers by name and loads one when it is asked for
        {"pickles", "pruning", "byte_sources", "checksums"},
        {"torch"},
        {"ranks"},
        {"safetensors"},
        {"dcp"},
        {"deepspeed"},
        {"archive"},
        {"numpy_files"},
        {"folder"},
        {"named_optimizers"},
        {"torch_checkpointing"},
        {"byte_kinds", "unpickled"},
    ),
    "surgery": (
        {"opening", "viewing", "shown", "slot_counts", "statistics", "text"},
        {"leaves", "reports"},
        {"inspection", "scanning", "writing"},
        {"comparison", "verification"},
        {"plans"},
    ),
    "tensors": ({"dtypes"}, {"strided"}, {"lazy"}, {"compute"}),
    "tree": ({"objects"}, {"walking"}, {"copies", "comparison", "unfolding"}),
    "io": (
        {"location", "streams"},
        {"extents", "destination"},
        {"copying", "temporary"},
        {"atomic"},
        {"checksums", "output", "directory", "folders", "linking"},
        {"together"},
        {"staging"},
        {"remote"},
        {"places", "shared"},
        {"shared_objects"},
    ),
}
MAY_IMPORT_TORCH = {"optim", "hooks", "distributed", "demo", "installed_torch"}
MAY_IMPORT_TERMINAL = {"cli"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for top, prefix in ((ROOT / "optimstate", ()), (ROOT / "hooks", ("hooks",)), (ROOT / "cli", ("cli",))):
        for path in top.rglob("*.py"):
            inner = (*prefix, *path.relative_to(top).with_suffix("").parts)
            if inner[0] in {"hooks", "cli"} and not prefix:
                continue  # a symlink to what is seen under its own name
            name = ".".join(("optimstate", *(inner[:-1] if inner[-1] == "__init__" else inner)))
            found[name] = path
    return found


MODULES = modules()


@cache
def parsed(path: Path) -> ast.Module:
    """A module's syntax tree, which several tests walk."""
    return ast.parse(path.read_text())


class Import:
    """One imported module, and where the import stands."""

    def __init__(self, target: str, late: bool, typing: bool) -> None:
        self.target, self.late, self.typing = target, late, typing


@cache
def imports(name: str) -> list[Import]:
    """Every import of a module; of `from x import y` the module `x.y` where there is one, else `x`."""
    found: list[Import] = []

    def visit(node: ast.AST, late: bool, typing: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                continue
            inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            checked = typing or (isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING")
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, late, typing) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: relative imports hide the direction"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    found.append(Import(whole if whole in MODULES else str(child.module), late, typing))
            visit(child, inside, checked)

    visit(parsed(MODULES[name]), False, False)
    return found


def room(name: str) -> str:
    """The first part of a module's name inside the package."""
    return name.split(".")[1] if "." in name else "__init__"


def storey(name: str) -> int | None:
    """The number of a module's storey in its package, where the package has storeys."""
    parts = name.split(".")[1:]
    if len(parts) < 2 or parts[0] not in STOREYS:
        return None
    found = [number for number, members in enumerate(STOREYS[parts[0]]) if parts[1] in members]
    assert found, f"{name} stands on no storey of {parts[0]}"
    return found[0]


def imports_only_what_stands_below_it(name: str) -> None:
    part = room(name)
    assert part in ALLOWED, f"{part} is not on the plan of the house"
    for found in imports(name):
        root = found.target.split(".")[0]
        assert root not in {"hooks", "cli"}, f"{name}: import optimstate.{root}"
        if root != "optimstate":
            continue
        inner = found.target.removeprefix("optimstate.") if "." in found.target else "__init__"
        allowed = {part, "describe", "record", *ALLOWED[part]}
        assert any(inner == p or inner.startswith(f"{p}.") for p in allowed), f"{name} imports {found.target}"
        if room(found.target) == part and not found.typing and None not in (storey(name), storey(found.target)):
            assert storey(name) >= storey(found.target), f"{name} imports {found.target}, which stands above it"  # type: ignore[operator]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        name: {i.target for i in imports(name) if i.target in MODULES and not i.typing and i.target != name}
        for name in MODULES
    }
    graph["optimstate"] = set()  # its names are loaded on first use
    state: dict[str, int] = {}

    def visit(name: str, way: tuple[str, ...]) -> None:
        state[name] = 1
        for target in sorted(graph[name]):
            assert state.get(target) != 1, f"a circle: {' -> '.join((*way, name, target))}"
            if target not in state:
                visit(target, (*way, name))
        state[name] = 2

    for name in sorted(graph):
        if name not in state:
            visit(name, ())


# A drop-in has both names of torch's: `torch.optim._functional` from ever, `torch.optim.functional` since 2.15.
ALIKE = [("optim", "_functional", "functional")]


def test_no_two_files_of_a_package_are_told_apart_by_an_s_or_an_underscore() -> None:
    by_package: dict[str, list[str]] = {}
    for name in MODULES:
        package, _, module = name.removeprefix("optimstate.").rpartition(".")
        by_package.setdefault(package, []).append(module)
    alike = [
        (package, one, other)
        for package, modules in by_package.items()
        for one, other in combinations(sorted(modules), 2)
        if one.replace("_", "").rstrip("s") == other.replace("_", "").rstrip("s")
    ]
    assert alike == ALIKE


def takes_no_private_names_of_other_packages(name: str) -> None:
    package = name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(parsed(MODULES[name])):
        if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("optimstate"):
            continue
        parts = f"{node.module}.{node.names[0].name}".split(".")
        private = next((at for at, part in enumerate(parts) if part.startswith("_") and not part.endswith("__")), None)
        if private is not None:
            home = ".".join(parts[:private])
            assert package == home or f"{package}.".startswith(f"{home}."), f"{name} imports {'.'.join(parts)}"
        taken = [alias.name for alias in node.names if f"{node.module}.{alias.name}" not in MODULES]
        hidden = [alias for alias in taken if alias.startswith("_") and not alias.endswith("__")]
        assert not hidden, f"{name} imports the private names {hidden} of {node.module}"


def has_heavy_packages_where_they_belong(name: str) -> None:
    part = room(name)
    roots = {found.target.split(".")[0] for found in imports(name) if not found.late and not found.typing}
    if part not in MAY_IMPORT_TORCH:
        assert not roots & {"torch", "numpy"}, f"{name} imports torch or numpy at module level"
        early = {found.target for found in imports(name) if not found.late and not found.typing}
        assert "optimstate.installed_torch" not in early, f"{name} imports torch at module level"
        late = {found.target for found in imports(name) if found.late}
        assert "torch" not in late, f"{name}: from optimstate.installed_torch import torch, which says if it is missing"
    everywhere = {found.target.split(".")[0] for found in imports(name)}
    if part not in MAY_IMPORT_TERMINAL:
        assert not everywhere & {"typer", "rich"}, f"{name} renders"


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    code = "import optimstate, sys; print(sorted({'torch', 'numpy', 'typer', 'rich'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_every_package_is_named_for_the_build() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        file.parent.relative_to(ROOT) for top in ("optimstate", "hooks", "cli") for file in (ROOT / top).rglob("*.py")
    }
    named = {".".join(f.parts if f.parts[0] == "optimstate" else ("optimstate", *f.parts)) for f in folders}
    assert sorted(named) == listed


def test_public_names_are_sorted_and_resolve() -> None:
    import optimstate

    assert optimstate.__all__ == sorted(optimstate.__all__)
    for name in optimstate.__all__:
        assert getattr(optimstate, name) is not None


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("optimstate.plan.expressions.tree", "from optimstate.plan.solve.planner import plan_migration"),
        ("optimstate.formats.pickles.pickle", "from optimstate.formats.torch import zip"),
        ("optimstate.state.names", "from optimstate.plan.language.rules import Plan"),
        ("optimstate.tree", "import optimstate.cli.app"),
    ],
)
def test_a_wrong_import_is_seen(place: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(f"def late():\n    {line}\n")
    monkeypatch.setitem(MODULES, place, wrong)
    imports.cache_clear()
    try:
        with pytest.raises(AssertionError):
            imports_only_what_stands_below_it(place)
    finally:
        imports.cache_clear()


# Where values of files do not come: the face, optimizers, the demo, and what describes. And modules that need Python's
# own form: numbers of plan files, digests of what a certificate proves, the spelling of a path.
WITHOUT_FILES = {"__init__", "describe", "record", "optim", "demo", "installed_torch"}
NEED_PYTHONS_FORM = {
    "optimstate.certificates.digests",
    "optimstate.plan.apply.schedulers",
    "optimstate.plan.language.base",
}


def turns_values_of_files_into_text_in_one_way(name: str) -> None:
    """`describe` is bounded in length and work; `repr` of what a file holds is neither."""
    if room(name) in WITHOUT_FILES or name in NEED_PYTHONS_FORM:
        return
    found = [f"line {line}: {what}" for line, what in python_forms(parsed(MODULES[name]))]
    assert not found, f"{name}: {found}"


def python_forms(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every place where a value is turned into text as Python writes it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue) and node.conversion in (ord("r"), ord("a")):
            yield node.lineno, f"!{chr(node.conversion)}"
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in ("repr", "ascii", "reprlib"):
            yield node.lineno, node.id
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant):
            text = node.left.value
            if isinstance(text, str) and ("%r" in text or "%a" in text):
                yield node.lineno, "%r"


def test_pythons_form_of_a_value_is_seen() -> None:
    for line in ("f'{x!r}'", "f'{x=}'", "repr(x)", "map(repr, x)", "'%r' % x", "ascii(x)"):
        assert list(python_forms(ast.parse(line))), line
    assert not list(python_forms(ast.parse("f'{describe(x)}' + str(x)")))


# A NamedTuple is for what is made by the hundred thousand: one for every tensor, stored record or piece of one.
ONE_FOR_EVERY_TENSOR = {
    "optimstate.derivation.strides": {"_Digit", "_Part"},
    "optimstate.formats.dcp.columns": {"Chunk", "Form", "Item"},
    "optimstate.formats.dcp.layout": {"Part"},
    "optimstate.formats.deepspeed.zero": {"_Slice"},
    "optimstate.formats.pickles.mentions": {"Mention"},
    "optimstate.formats.ranks.shards": {"ShardRecord"},
    "optimstate.formats.ranks.tiles": {"Tile"},
    "optimstate.formats.safetensors.file": {"Entry"},
    "optimstate.formats.torch.legacy": {"_View"},
    "optimstate.formats.torch.zip_directory": {"Record", "_Run"},
    "optimstate.io.checksums": {"Recorded"},
    "optimstate.io.extents": {"Extent"},
    "optimstate.io.shared": {"Range"},
    "optimstate.optim._ops": {"Ops"},  # these are made and used where torch.compile traces
    "optimstate.optim._step": {"Rule", "Setting"},
    "optimstate.plan.expressions.tree": {"Leaf"},
    "optimstate.plan.slots.outcomes": {"Outcome"},
    "optimstate.plan.solve.resolve": {"Resolved"},
    "optimstate.state.optimizer": {"Member"},
    "optimstate.tensors.dtypes": {"DType"},
    "optimstate.tree.objects": {"OpaqueFile"},
}


def makes_records_but_for_one_a_tensor_and_for_what_changes(name: str) -> None:
    """The rule that `record.py` states."""
    tuples: set[str] = set()
    for node in ast.walk(parsed(MODULES[name])):
        if not isinstance(node, ast.ClassDef):
            continue
        if any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in node.bases):
            tuples.add(node.name)
        made_by = [ast.unparse(decorator) for decorator in node.decorator_list]
        assert not any("frozen=True" in decorator for decorator in made_by), f"{name}.{node.name} is a frozen dataclass"
    assert tuples == ONE_FOR_EVERY_TENSOR.get(name, set())


def broken(rule: Callable[[str], None], name: str) -> str | None:
    """How a module breaks a rule."""
    try:
        rule(name)
    except AssertionError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "rule",
    [
        imports_only_what_stands_below_it,
        takes_no_private_names_of_other_packages,
        has_heavy_packages_where_they_belong,
        turns_values_of_files_into_text_in_one_way,
        makes_records_but_for_one_a_tensor_and_for_what_changes,
    ],
)
def test_every_module(rule: Callable[[str], None]) -> None:
    found = {name: broken(rule, name) for name in sorted(MODULES)}
    assert {name: how for name, how in found.items() if how is not None} == {}
