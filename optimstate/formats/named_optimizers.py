"""Converting optimizers between the form of `torch_checkpointing`, keyed by name, and that of `torch.optim`.

In the named form groups have `param_names` but no `params`, and `FORM_VERSION` is a key of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.errors import RepresentationError, UnsupportedCheckpointError
from optimstate.formats.protocol import malformed
from optimstate.io.location import Location
from optimstate.tree import rebuilt_mapping

__all__ = ["FORM_VERSION", "by_name", "is_optimizer", "numbered"]

FORM_VERSION = "_optimizer_state_format_version"


def numbered(tree: Any, item: str, path: Location) -> Any:
    """The tree with its optimizers in the form that `torch.optim` loads, keyed by number.

    Args:
        tree: An item of a checkpoint; not changed.
        item: Its name, for errors.
        path: The checkpoint.

    Raises:
        CheckpointError: Names and state do not fit together, or the version of the form is unknown.
    """
    return _with_optimizers(tree, lambda node: FORM_VERSION in node, lambda node: _numbered(node, item, path))


def _with_optimizers(
    tree: Any, is_one: Callable[[dict[Any, Any]], bool], converted: Callable[[dict[Any, Any]], Any]
) -> Any:
    """The tree with its optimizers converted; the same object where it has none."""
    if not isinstance(tree, dict):
        return tree
    if is_one(tree):
        return converted(tree)
    inner = {key: _with_optimizers(value, is_one, converted) for key, value in tree.items() if isinstance(value, dict)}
    changed = any(tree[key] is not value for key, value in inner.items())
    return rebuilt_mapping(tree, {**tree, **inner}) if changed else tree


def _numbered(tree: dict[Any, Any], item: str, path: Location) -> Any:
    with malformed("names and state of the optimizer do not fit together", path=path, place=item):
        if tree[FORM_VERSION] != 1:
            what = f"an optimizer of form {describe(tree[FORM_VERSION])}"
            raise UnsupportedCheckpointError(what, path=path, place=item)
        numbers: dict[str, int] = {}
        groups = []
        for group in tree["param_groups"]:
            names = list(map(str, group["param_names"]))
            groups.append({**group, "params": list(range(len(numbers), len(numbers) + len(names)))})
            numbers.update(zip(names, groups[-1]["params"], strict=True))
        state = {numbers[name]: slots for name, slots in tree["state"].items()}
        if len(numbers) != sum(len(group["params"]) for group in groups):
            raise ValueError("two parameters have the same name")
    rest = {key: value for key, value in tree.items() if key not in ("state", "param_groups", FORM_VERSION)}
    return {"state": state, "param_groups": groups, **rest}


def is_optimizer(node: Any) -> bool:
    """Whether a node is the state dict of an optimizer, keyed by number."""
    groups = node.get("param_groups") if isinstance(node, Mapping) else None
    return (
        isinstance(groups, list)
        and isinstance(node.get("state"), Mapping)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
    )


def by_name(node: Any, item: str, notes: list[str]) -> Any:
    """The item with its optimizers keyed by name, so that any number of ranks can load them.

    Args:
        node: The item; not changed.
        item: Its name, for notes and errors.
        notes: Gets a note for each optimizer that stays in torch's form because its parameters have no names.

    Raises:
        RepresentationError: An optimizer has state of a parameter that is in none of its groups.
    """
    return _with_optimizers(node, is_optimizer, lambda optimizer: _by_name(optimizer, item, notes))


def _by_name(node: dict[Any, Any], item: str, notes: list[str]) -> Any:
    groups = node["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    names = [name for group in groups for name in _names(group)]
    plain = all(type(key) in (int, str) for key in keys) and not node.keys() - {"state", "param_groups"}
    if not plain or len(names) != len(keys) or len(set(names)) != len(names):
        notes.append(
            f"{item}: an optimizer whose parameters have no names is written in torch's form, "
            "which torch_checkpointing cannot give to other ranks; `optimstate name` gives names"
        )
        return node
    rename = dict(zip(keys, names, strict=True))
    orphans = [key for key in node["state"] if key not in rename]
    if orphans:
        raise RepresentationError(f"{item}: state of {describe(orphans[0])}, which is in no param group")
    made = []
    for group in groups:
        options = {key: value for key, value in group.items() if key != "params"}
        made.append({**options, "param_names": list(_names(group))})
    return {"state": {rename[key]: s for key, s in node["state"].items()}, "param_groups": made, FORM_VERSION: 1}


def _names(group: Mapping[str, Any]) -> Sequence[str]:
    names = group.get("param_names", group["params"])
    fits = isinstance(names, list | tuple) and len(names) == len(group["params"])
    return names if fits and all(type(name) is str for name in names) else ()
