"""How the tables of libraries describe slots and optimizers.

The kind of a slot says how it changes with its parameter. When a weight is rescaled, a slot grows with a power of the
gradient, its degree (`exp_avg` 1, `exp_avg_sq` 2), and with a power of the parameter (an average of weights 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from optimstate.record import Record, field

__all__ = [
    "COL",
    "FLAT",
    "GRADIENT",
    "MASTERS",
    "MOMENTS",
    "OPAQUE",
    "RECOMPUTED",
    "ROW",
    "SCALAR",
    "SQUARE",
    "WEIGHT",
    "Algorithm",
    "Slot",
    "SlotKind",
    "algorithm",
    "needed",
]

SlotKind = Literal["like_param", "weight", "scalar", "row", "col", "flat", "opaque"]
Shape = tuple[int, ...]


class Slot(Record):
    """One named piece of state per parameter.

    Attributes:
        kind: `like_param` has the parameter's shape; `weight` too, and is a copy or an average of the parameter;
            `scalar` is one number; `row` is the mean over the last dimension, (..., m, 1) or (..., m) for a parameter
            (..., m, n); `col` is the mean over the last but one, (..., 1, n) or (..., n); `flat` is one vector for all
            parameters; `opaque` is anything else.
        degree: The power of the gradient that it scales with; None if it is not known.
        power: The power of the parameter that it scales with.
    """

    kind: SlotKind
    degree: int | None = 0
    power: int = 0

    @property
    def is_elementwise(self) -> bool:
        """Whether it has one element for each element of the parameter."""
        return self.kind in ("like_param", "weight")


class Algorithm(Record):
    """An optimizer that can be recognised from its state dict.

    Attributes:
        name: The class.
        slots: Every slot that it can have. `precond_` stands for precond_0, precond_1, ...
        options: Options that every group has.
        lacks: Options that no group has.
        values: Options with the values that distinguish it from a similar algorithm.
        whole: Whether the update of an element depends on the other elements of its tensor. If so, fused or split
            parameters train differently, even if their state is exact.
        own: Every option that it has in any release, besides those that most optimizers have. A group with a number
            under another name is not of this algorithm. Empty if the options are not known.
        needs: The slots that a step of a parameter with state requires, each with the option or slot that requires it
            if that is not zero, or with an empty string if it is always required. Other slots may be absent.
        reads: The options that a step reads, each with its form: `number`, `numbers`, `optional` for a number that may
            be absent, `text` for a word or None, `flag`. Empty if they are not known.
    """

    name: str
    slots: Mapping[str, Slot]
    options: frozenset[str]
    lacks: frozenset[str] = frozenset()
    values: tuple[tuple[str, Any], ...] = ()
    whole: bool = False
    own: frozenset[str] = frozenset()
    needs: Mapping[str, str] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)

    def slot(self, name: str | int) -> Slot | None:
        """The slot with a name, or None."""
        found = self.slots.get(str(name)) or self.slots.get(_NUMBERED.sub("_", str(name)))
        return found or (WEIGHT if name in MASTERS else None)

    def missing(self, slots: Iterable[Any], options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The slots that the next step reads and that are missing, each with the option that requires it.

        Args:
            slots: The slots of a parameter that has state, or their names.
            options: The options of its group. An option with the name of a slot replaces the slot.
        """
        present = {str(name) for name in slots}
        on = {**options, **slots} if isinstance(slots, Mapping) else options
        for slot, option in (*self.needs.items(), *((slot, "") for slot in self._second_moment(present))):
            if slot not in present and slot not in options and (not option or on.get(option)):
                yield slot, option

    def _second_moment(self, present: Iterable[str]) -> list[str]:
        """The required slots of a factored second moment: both means if one is present, else the full one."""
        if not self.factors_every_matrix:
            return []
        means = [name for name, slot in self.slots.items() if slot.kind in ("row", "col")]
        full = [name for name, slot in self.slots.items() if slot.is_elementwise and slot.degree == 2]
        return means if any(name in present for name in means) else full

    @property
    def factors_every_matrix(self) -> bool:
        """Whether it stores the second moment of every matrix as means, and that of vectors in full."""
        return self.name in ("Adafactor", "Adafactor (transformers)", "Adafactor (pytorch_optimizer)", "CAME")

    def holds(self, name: str, rank: int) -> bool:
        """Whether a parameter with `rank` dimensions has a slot."""
        slot = self.slot(name)
        if slot is None or not self.factors_every_matrix:
            return slot is not None
        return rank >= 2 if slot.kind in ("row", "col") else rank < 2 or slot.degree != 2

    @property
    def is_flat(self) -> bool:
        """Whether it has one state for all parameters together."""
        return any(slot.kind == "flat" for slot in self.slots.values())

    def matches(self, slots: Iterable[str], options: Mapping[str, Any]) -> bool:
        """Whether state with these slots, and a group with these options, can be of this algorithm."""
        present = self.options.union(key for key, _ in self.values) <= options.keys()
        return present and self.could_be(slots, options)

    def could_be(self, slots: Iterable[str], options: Mapping[str, Any]) -> bool:
        """Whether it matches but for options that are absent."""
        return (
            all(self.slot(name) is not None for name in slots)
            and not self.lacks & options.keys()
            and all(options.get(key, value) == value for key, value in self.values)
            and not (self.own and any(self._is_foreign(key, value) for key, value in options.items()))
        )

    def _is_foreign(self, key: str, value: Any) -> bool:
        """Whether an option is a hyperparameter of another algorithm, not a value that a framework added."""
        if key in self.own or key in COMMON_OPTIONS or is_note(key):
            return False
        numbers = value if isinstance(value, list | tuple) else (value,)
        return all(item is None or isinstance(item, bool | int | float) for item in numbers)


COMMON_OPTIONS = frozenset(
    [
        "params",
        "param_names",
        "lr",
        "weight_decay",
        "maximize",
        "foreach",
        "capturable",
        "differentiable",
        "fused",
        "decoupled_weight_decay",
        "bias_correction",
        "correct_bias",
        "adam_w_mode",
        "grad_averaging",
        "set_grad_none",
        "max_grad_norm",
        "default_config",
        "step",
    ]
)
"""Options that many optimizers have, and those of the fused kernels of apex, DeepSpeed and Megatron."""

_NOTES = ("_lr", "lr_scale", "_mult", "name", "_momentum", "_id", "_index", "_type", "is_expert_parallel")
"""Suffixes of the options that schedulers, trainers and users add to groups."""


def is_note(option: str) -> bool:
    """Whether an option of a group was added by a scheduler, a trainer or a user, and is not a hyperparameter."""
    return str(option).endswith(_NOTES)  # str, because some programs use numbers as keys


RECOMPUTED = frozenset({"RMS"})
"""Slots that an optimizer recomputes at every step."""

MASTERS = frozenset({"fp32_param", "param"})
"""Slots that hold the parameter itself in full precision, for mixed-precision training: DeepSpeed's and Megatron's."""

_NUMBERED = re.compile(r"_\d+$")

GRADIENT, SQUARE, WEIGHT = Slot("like_param", 1), Slot("like_param", 2), Slot("weight", 0, 1)
SCALAR, FLAT, OPAQUE = Slot("scalar"), Slot("flat"), Slot("opaque")
ROW, COL = Slot("row", 2), Slot("col", 2)
MOMENTS: Mapping[str, Slot] = {"step": SCALAR, "exp_avg": GRADIENT, "exp_avg_sq": SQUARE}


def algorithm(
    name: str, slots: Mapping[str, Slot], options: str, lacks: str = "", *, whole: bool = False, **values: Any
) -> Algorithm:
    """An algorithm, with options as words separated by spaces; see `Algorithm` for the arguments."""
    return Algorithm(name, slots, frozenset(options.split()), frozenset(lacks.split()), tuple(values.items()), whole)


def needed(words: str) -> dict[str, str]:
    """`Algorithm.needs` from words: ``slot``, or ``slot:option`` for a slot that an option requires."""
    return {slot: option for slot, _, option in (word.partition(":") for word in words.split())}
