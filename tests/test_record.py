"""Records against dataclasses: the same class written both ways behaves alike."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from optimstate.record import Record, field


class Entry(Record):
    """A record."""

    name: str
    size: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The same as a dataclass."""

    name: str
    size: int = 0
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("a",), {}),
    (("a", 2), {}),
    (("a", 2, {"k": 1}), {}),
    ((), {"name": "a", "more": {"k": 1}}),
    (("a",), {"more": {}}),
    ((), {}),
    (("a", 1, {}, 4), {}),
    (("a",), {"name": "b"}),
    (("a",), {"other": 1}),
]


@pytest.mark.parametrize(("args", "named"), CALLS)
def test_records_are_made_and_refused_like_dataclasses(args: tuple[Any, ...], named: dict[str, Any]) -> None:
    try:
        wanted = Reference(*args, **named)
    except TypeError:
        with pytest.raises(TypeError):
            Entry(*args, **named)
        return
    made = Entry(*args, **named)
    assert dataclasses.asdict(made) == made._asdict() == dataclasses.asdict(wanted)
    assert repr(made) == repr(wanted).replace("Reference", "Entry")
    assert made == Entry(*args, **named)


def test_a_record_cannot_be_changed_and_every_default_is_its_own() -> None:
    made, other = Entry("a"), Entry("a")
    with pytest.raises(AttributeError):
        made.name = "b"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del made.name
    assert made == other
    assert made.more is not other.more


def test_records_are_equal_by_class_and_fields_and_hash_by_what_is_hashable() -> None:
    class Pair(Record):
        name: str
        size: int = 0

    class Twin(Record):
        name: str
        size: int = 0

    assert Pair("a") == Pair("a", 0) != Pair("b")
    assert Pair("a") != Twin("a")
    assert len({Pair("a"), Pair("a"), Pair("b")}) == 2
    with pytest.raises(TypeError):
        hash(Entry("a"))


def test_subclasses_add_fields_and_patterns_and_replacing_see_them() -> None:
    class Longer(Entry):
        last: str = ""

    made = Longer("a", 1, {}, "z")
    match made:
        case Longer(name, size, _, last):
            assert (name, size, last) == ("a", 1, "z")
    for changed in (made._replace(name="b"), dataclasses.replace(made, name="b")):
        assert (changed.name, changed.size, changed.last) == ("b", 1, "z")
    assert [found.name for found in dataclasses.fields(Longer)] == ["name", "size", "more", "last"]
    with pytest.raises(TypeError):
        made._replace(nothing=1)


def test_planning_a_rename_imports_nothing_that_other_plans_need() -> None:
    later = ["dataclasses", "hashlib", "difflib", "ctypes", "tomllib"]
    later += [f"optimstate.plan.{name}" for name in ("language.operations", "slots.conversion", "slots.flat")]
    code = (
        "import optimstate.plan.apply.checkpoint, optimstate.plan.language.rules, sys;"
        f"print(sorted({set(later)} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
