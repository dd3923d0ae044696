"""Optimizers whose state is keyed by name, as `torch_checkpointing` has them, in torch's form and back.

Their groups have `param_names` but no `params`, and a version says that they are of this form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, RepresentationError, UnsupportedCheckpointError
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
        CheckpointError: Names and state do not fit together, or the form is of another version.
    """
    if not isinstance(tree, dict):
        return tree
    if FORM_VERSION not in tree:
        made = {key: numbered(value, item, path) for key, value in tree.items() if isinstance(value, dict)}
        changed = any(tree[key] is not value for key, value in made.items())
        return rebuilt_mapping(tree, {**tree, **made}) if changed else tree
    try:
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
            raise ValueError("a name is there twice")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"names and state of the optimizer do not fit together: {describe(error)}"[:300]
        raise CorruptCheckpointError(message, path=path, place=item) from None
    rest = {key: value for key, value in tree.items() if key not in ("state", "param_groups", FORM_VERSION)}
    return {"state": state, "param_groups": groups, **rest}


def is_optimizer(node: Any) -> bool:
    """Whether a node is an optimizer in torch's form."""
    groups = node.get("param_groups") if isinstance(node, Mapping) else None
    return (
        isinstance(groups, list)
        and isinstance(node.get("state"), Mapping)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
    )


def by_name(node: Any, item: str, notes: list[str]) -> Any:
    """The item with its optimizers in the form in which they can be given to any number of ranks, keyed by name.

    Args:
        node: The item; not changed.
        item: Its name, for notes and errors.
        notes: What had to stay in torch's form is added.

    Raises:
        RepresentationError: There is state of a parameter that is in no param group.
    """
    if not isinstance(node, dict):
        return node
    if not is_optimizer(node):
        inner = {key: by_name(value, item, notes) for key, value in node.items() if isinstance(value, dict)}
        changed = any(node[key] is not value for key, value in inner.items())
        return rebuilt_mapping(node, {**node, **inner}) if changed else node
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
    alike = isinstance(names, list | tuple) and len(names) == len(group["params"])
    return names if alike and all(type(name) is str for name in names) else ()
