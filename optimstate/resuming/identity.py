"""Whether processes that load together were given the same checkpoint, wherever each of them finds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256

from optimstate.errors import StateMismatchError
from optimstate.io.folders import listed
from optimstate.io.location import Location
from optimstate.io.places import open_source
from optimstate.plan.language.plan import Plan
from optimstate.record import Record

__all__ = ["Identity", "identity_of", "refuse_different"]

_TAIL = 1 << 16  # bytes; the directory of a zip file has the checksums of its tensors
_SUFFIXES = (".metadata", ".distcp", ".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_ENDS = 2  # files at either end of the list that are looked at


class Identity(Record):
    """What a process loads.

    Attributes:
        place: The place of the checkpoint.
        digest: The digest of a part of it that differs between saves.
        plan: The digest of the plan.
    """

    place: str
    digest: str
    plan: str


def identity_of(path: Location, plan: Plan) -> Identity:
    """The identity of a file or folder, from the ends of a few of its files, which are the same in every copy."""
    files = list(_files(path))
    digest = sha256()
    for file in dict.fromkeys([*files[:_ENDS], *files[-_ENDS:]]):
        source = open_source(file)
        length = min(source.size, _TAIL)
        name = file.name if file is not path else ""
        digest.update(f"{name} {source.size} ".encode(errors="surrogateescape"))
        digest.update(source.read(source.size - length, length))
    return Identity(str(path), digest.hexdigest(), plan.digest)


def _files(path: Location, depth: int = 1) -> Iterator[Location]:
    """The files with tensors, those of a distributed checkpoint's metadata first."""
    if not path.is_dir():
        yield path
        return
    for file in listed(path):
        if file.name == ".metadata" or file.suffix in _SUFFIXES:
            yield file
        elif depth and file.is_dir():
            yield from _files(file, depth - 1)


def refuse_different(found: Sequence[Identity | None]) -> None:
    """Refuse different checkpoints or plans, of which every process would load its own parts.

    Args:
        found: What each process was given; None for one that has it in memory.

    Raises:
        StateMismatchError: They differ.
    """
    known = [(rank, each) for rank, each in enumerate(found) if each is not None]
    for rank, other in known[1:]:
        first, own = known[0]
        if other.digest != own.digest:
            raise StateMismatchError(
                f"rank {first} loads {own.place} and rank {rank} {other.place}, which are different checkpoints",
                hint="Give all processes the same one. Pipeline stages with checkpoints of their own pass "
                "process_group=..., the processes of their stage.",
            )
        if other.plan != own.plan:
            raise StateMismatchError(
                f"rank {first} and rank {rank} load {own.place} by different plans",
                hint="Give all processes the same one.",
            )
