"""The closed set of operations a rule can name; each is one class, in `joining`, `dimensions`, `rows` or `values`.

An operation takes the tensors a rule has in hand (all that it gathered, then what the operation before gave) and gives
tensors: `concat` and `stack` make one of many, `split` and `unstack` many of one, the others change each by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimstate.describe import describe
from optimstate.errors import PlanSyntaxError
from optimstate.plan.language import dimensions, joining, rows, values
from optimstate.plan.language.base import OPERATIONS, Operation, toml_value

__all__ = ["OPERATIONS", "Operation", "parse_operation"]

# Importing them fills the table.
assert {joining.Concat, dimensions.Resize, rows.Slice, values.ScaleBy} <= set(OPERATIONS.values())


def parse_operation(key: str, value: Any, folder: Path | None = None) -> list[Operation]:
    """The operations that `key = value` of a plan file means.

    Args:
        key: Of the operation.
        value: As TOML has it.
        folder: Where the files are that it names; the current one by default.

    Raises:
        PlanSyntaxError: The value is not of the operation's form; the message shows one that is.
    """
    if key not in OPERATIONS:
        raise PlanSyntaxError(f"no operation is called {describe(key)}")
    parsed = OPERATIONS[key].parse(value, folder or Path())
    if parsed is None:
        raise PlanSyntaxError(f"`{key}` cannot be {toml_value(value)}", hint=f"For example: {OPERATIONS[key].EXAMPLE}")
    return parsed if isinstance(parsed, list) else [parsed]
