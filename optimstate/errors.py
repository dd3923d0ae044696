"""Every exception and warning of optimstate.

    OptimStateError
    ├── CheckpointError (ValueError)            a checkpoint cannot be read; carries the file and the place in it
    │   ├── CheckpointNotFoundError (FileNotFoundError)
    │   ├── UnrecognizedFormatError             no container format claims the file
    │   ├── CorruptCheckpointError              truncated, out of range, contradictory, or a checksum that differs
    │   ├── LimitExceededError                  a declared size is beyond what this library will process
    │   └── UnsupportedCheckpointError          well-formed, but uses a feature that is not supported
    ├── RepresentationError (TypeError)         an object cannot be stored in the requested container
    ├── DestinationError (OSError)              the output cannot be written where it was asked for
    │   └── DestinationExistsError (FileExistsError)
    ├── PlanError (ValueError)                  a plan cannot be applied as written
    │   ├── PlanSyntaxError                     a template, a rule or a plan file cannot be parsed
    │   ├── MigrationError                      the plan does not fit this checkpoint; carries every problem found
    │   └── DerivationError                     a function does something that no plan says
    ├── UsageError (ValueError)                 an argument is wrong by itself: a word that is none of those known
    ├── TorchError                              the installed torch cannot do what is asked
    │   ├── MissingTorchError (ImportError)     there is none
    │   └── UnsupportedTorchError (RuntimeError) it is too old
    ├── StateMismatchError (ValueError)         state does not fit the optimizer or scheduler it is loaded into
    └── UserCodeError (RuntimeError)            a script or a function that was handed over failed; names file and line

    OptimStateWarning (UserWarning)
    ├── ParameterNameWarning                    positional loading would give state to a parameter of another name
    ├── SchedulerStateWarning                   a scheduler state is incomplete or contradicts its optimizer
    └── UntestedTorchWarning                    torch is newer than any that was tested

Each error also inherits the builtin a caller would catch who does not know this library.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

from optimstate.describe import describe, escaped
from optimstate.problems import Kind, Problem

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "DerivationError",
    "DestinationError",
    "DestinationExistsError",
    "LimitExceededError",
    "MigrationError",
    "MissingTorchError",
    "OptimStateError",
    "OptimStateWarning",
    "ParameterNameWarning",
    "PlanError",
    "PlanSyntaxError",
    "RepresentationError",
    "SchedulerStateWarning",
    "StateMismatchError",
    "TorchError",
    "UnrecognizedFormatError",
    "UnsupportedCheckpointError",
    "UnsupportedTorchError",
    "UntestedTorchWarning",
    "UsageError",
    "UserCodeError",
]


class OptimStateError(Exception):
    """Base of every error raised on purpose by optimstate.

    Args:
        message: What is wrong, naming both sides where two things disagree.
        hint: What to do next, or an empty string.
        problems: Every single problem, where it was several or code may ask for their kind.
    """

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        message = escaped(message, lines=True)  # whatever is in it of a file: errors are printed
        super().__init__(message)
        self.message = message
        self.hint = escaped(hint, lines=True)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class CheckpointError(OptimStateError, ValueError):
    """A checkpoint cannot be read.

    Args:
        message: What is wrong.
        path: The file: its name, or what is printed as its name.
        place: Where in the file: a byte offset, a record or a key; may be empty.
        hint: What to do next.

    Attributes:
        reason: The message without the file and the place.
    """

    def __init__(self, message: str, *, path: object = "", place: str = "", hint: str = "") -> None:
        self.reason = message
        self.path = str(path)
        self.place = place
        where = f"{self.path}: " if self.path else ""
        at = f" ({place})" if place else ""
        super().__init__(escaped(f"{where}{message}{at}"), hint=hint)

    def within(self, *, path: object = "", place: str = "", part: str = "") -> Self:
        """The same error, told of the file and the place that the caller knows, so that each is named once.

        Args:
            path: The file; its own where none is given.
            place: Where in the file, in the place of its own.
            part: What it is about: `tensor 'x' in rank0.pt`.
        """
        message = f"{part}: {self.reason}" if part else self.reason
        return type(self)(message, path=path or self.path, place=place or self.place, hint=self.hint)


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The path does not exist."""

    __str__ = OptimStateError.__str__


class UnrecognizedFormatError(CheckpointError):
    """No container format claims the file, or a folder holds no checkpoint."""


class CorruptCheckpointError(CheckpointError):
    """The bytes contradict themselves: truncated, overlapping, out of range, or a wrong checksum."""


class LimitExceededError(CheckpointError):
    """A declared size or depth is beyond the limit; nothing was allocated."""


class UnsupportedCheckpointError(CheckpointError):
    """The file is well-formed but uses something this library does not handle."""


class RepresentationError(OptimStateError, TypeError):
    """An object cannot be stored in the requested container without loss."""


class DestinationError(OptimStateError, OSError):
    """The output cannot be written where it was asked for."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(escaped(message), hint=hint)

    __str__ = OptimStateError.__str__


class DestinationExistsError(DestinationError, FileExistsError):
    """The destination exists and overwriting was not asked for."""

    __str__ = OptimStateError.__str__


class PlanError(OptimStateError, ValueError):
    """A plan cannot be applied as written."""


class PlanSyntaxError(PlanError):
    """A template, a rule or a plan file cannot be parsed."""


class MigrationError(PlanError):
    """A plan does not fit the checkpoint it is applied to.

    Args:
        problems: Every problem found, each naming the rule or parameter, both sides and the remedy.
    """

    def __init__(self, problems: Sequence[Problem], *, hint: str = "") -> None:
        super().__init__("\n".join(map(str, problems)), hint=hint, problems=problems)

    @classmethod
    def of(
        cls, kind: Kind, message: str, place: str = "", names: tuple[str, ...] = (), remedy: str = "", *, hint: str = ""
    ) -> MigrationError:
        """The error of one problem.

        Args:
            kind: What kind of thing is wrong, as the others a field of `Problem`.
            message: What is wrong.
            place: Where.
            names: The parameters it is about.
            remedy: What to do next.
            hint: What to do next, on a line of its own.
        """
        return cls([Problem(kind, message, place, names, remedy)], hint=hint)


class DerivationError(PlanError):
    """No plan can be read off a function: it computes, drops what it should keep, or depends on values."""


class UsageError(OptimStateError, ValueError):
    """An argument is wrong by itself: a word that is none of those known, options that contradict each other."""

    @classmethod
    def unknown(cls, problem: str, word: str, known: Iterable[str]) -> UsageError:
        """The error for a word that is none of a list.

        Args:
            problem: What is wrong, naming the word.
            word: The word that was given.
            known: Those there are; the nearest is suggested.
        """
        from difflib import get_close_matches

        words = list(dict.fromkeys(known))
        near = get_close_matches(word.lower(), words, n=1, cutoff=0.6)
        suggestion = f"Did you mean {describe(near[0])}? " if near else ""
        return cls(problem, hint=f"{suggestion}There are: {', '.join(words)}." if words else "")


class StateMismatchError(OptimStateError, ValueError):
    """State does not fit the optimizer, scheduler or model it is loaded into."""


class UserCodeError(OptimStateError, RuntimeError):
    """Code that was handed over (a script, a function that builds a model, a loss) failed; names its file and line."""


class TorchError(OptimStateError):
    """The installed torch cannot do what is asked."""


class MissingTorchError(TorchError, ImportError):
    """What is asked needs torch, and there is none."""


class UnsupportedTorchError(TorchError, RuntimeError):
    """The installed torch is too old for what is asked."""


class OptimStateWarning(UserWarning):
    """Base of every warning issued by optimstate."""


class ParameterNameWarning(OptimStateWarning):
    """Positional loading gives state to a parameter of another name."""


class SchedulerStateWarning(OptimStateWarning):
    """A scheduler state is incomplete or contradicts its optimizer."""


class UntestedTorchWarning(OptimStateWarning):
    """The installed torch is newer than any that the tests have run with."""
