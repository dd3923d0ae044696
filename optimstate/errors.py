"""Every exception and warning of optimstate.

    OptimStateError
    ├── CheckpointError (ValueError)            a checkpoint cannot be read; has the file and the place in it
    │   ├── CheckpointNotFoundError (FileNotFoundError)
    │   ├── UnrecognizedFormatError             the file has no known format
    │   ├── CorruptCheckpointError              truncated, out of range, contradictory, or a checksum that differs
    │   ├── LimitExceededError                  a declared size is beyond what this library will process
    │   └── UnsupportedCheckpointError          well-formed, but uses a feature that is not supported
    ├── RepresentationError (TypeError)         an object cannot be stored in the requested container
    ├── DestinationError (OSError)              the output cannot be written where it was asked for
    │   ├── DestinationExistsError (FileExistsError)
    │   └── ProcessEndedError                   another of the processes that write it together ended with an error
    ├── PlanError (ValueError)                  a plan cannot be applied as written
    │   ├── PlanSyntaxError                     a template, a rule or a plan file cannot be parsed
    │   ├── MigrationError                      the plan does not fit this checkpoint; has every problem found
    │   └── DerivationError                     a function does something that no plan can express
    ├── UsageError (ValueError)                 an argument is wrong in itself, such as an unknown word
    ├── TorchError                              the installed torch cannot do what is requested
    │   ├── MissingTorchError (ImportError)     torch is not installed
    │   └── UnsupportedTorchError (RuntimeError) torch is too old
    ├── StateMismatchError (ValueError)         state does not fit the optimizer or scheduler that is to load it
    └── UserCodeError (RuntimeError)            a script or function of the user failed; names its file and line

    OptimStateWarning (UserWarning)
    ├── ParameterNameWarning                    positional loading would give state to a parameter of another name
    ├── SchedulerStateWarning                   a scheduler's state is incomplete or contradicts its optimizer
    └── UntestedTorchWarning                    torch is newer than any tested release

Each error also inherits from the builtin error that callers would catch without knowing this library.
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
    "ProcessEndedError",
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
    """Base of every error that optimstate raises on purpose.

    Args:
        message: What is wrong; if two things disagree, it names both.
        hint: What to do next, or an empty string.
        problems: The single problems, if there are several or code needs their kinds.
    """

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        message = escaped(message, lines=True)  # it may contain text of a file, and errors are printed
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
        path: The file, or the name that is printed for it.
        place: The place in the file: a byte offset, a record or a key; may be empty.
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
        """The same error with the file and place that the caller knows, so that each is named once.

        Args:
            path: The file; empty to keep the error's own.
            place: The place in the file; empty to keep the error's own.
            part: The affected part: `tensor 'x' in rank0.pt`.
        """
        message = f"{part}: {self.reason}" if part else self.reason
        return type(self)(message, path=path or self.path, place=place or self.place, hint=self.hint)


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The path does not exist."""

    __str__ = OptimStateError.__str__


class UnrecognizedFormatError(CheckpointError):
    """The file has no known format, or the folder contains no checkpoint."""


class CorruptCheckpointError(CheckpointError):
    """The file is damaged or contradictory: truncated, overlapping, out of range, or a wrong checksum."""


class LimitExceededError(CheckpointError):
    """A declared size or depth is beyond the limit; nothing was allocated."""


class UnsupportedCheckpointError(CheckpointError):
    """The file is well-formed but uses a feature that is not supported."""


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


class ProcessEndedError(DestinationError):
    """Another of the processes that write it together has ended with an error.

    Attributes:
        code: Its exit code.
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class PlanError(OptimStateError, ValueError):
    """A plan cannot be applied as written."""


class PlanSyntaxError(PlanError):
    """A template, a rule or a plan file cannot be parsed."""


class MigrationError(PlanError):
    """A plan does not fit the checkpoint.

    Args:
        problems: Every problem found, each with the rule or parameter, both sides and the remedy.
    """

    def __init__(self, problems: Sequence[Problem], *, hint: str = "") -> None:
        super().__init__("\n".join(map(str, problems)), hint=hint, problems=problems)

    @classmethod
    def of(
        cls, kind: Kind, message: str, place: str = "", names: tuple[str, ...] = (), remedy: str = "", *, hint: str = ""
    ) -> MigrationError:
        """The error for one problem; the arguments are the fields of `Problem`, and a hint on a separate line."""
        return cls([Problem(kind, message, place, names, remedy)], hint=hint)


class DerivationError(PlanError):
    """No plan can be derived from a function: it computes, drops tensors, or depends on their values."""


class UsageError(OptimStateError, ValueError):
    """An argument is wrong in itself: an unknown word, or options that contradict each other."""

    @classmethod
    def unknown(cls, problem: str, word: str, known: Iterable[str]) -> UsageError:
        """The error for a word that is not in a list.

        Args:
            problem: What is wrong; contains the word.
            word: The word.
            known: The known words, of which the most similar is suggested.
        """
        from difflib import get_close_matches

        words = list(dict.fromkeys(known))
        near = get_close_matches(word.lower(), words, n=1, cutoff=0.6)
        suggestion = f"Did you mean {describe(near[0])}? " if near else ""
        return cls(problem, hint=f"{suggestion}There are: {', '.join(words)}." if words else "")

    @classmethod
    def refuse_other(cls, what: str, value: object, known: Iterable[str]) -> None:
        """Refuse the value of an argument that is not one of some words.

        Args:
            what: The argument.
            value: Its value.
            known: The words.

        Raises:
            UsageError: It is none of them.
        """
        words = list(known)
        if not isinstance(value, str) or value not in words:
            raise cls(f"{what} is {describe(value)}, it must be one of {', '.join(words)}")


class StateMismatchError(OptimStateError, ValueError):
    """State does not fit the optimizer, scheduler or model that is to load it."""


class UserCodeError(OptimStateError, RuntimeError):
    """Code of the user (a script, a function that builds a model, a loss) failed; the message has its file and line."""


class TorchError(OptimStateError):
    """The installed torch cannot do what is requested."""


class MissingTorchError(TorchError, ImportError):
    """The request needs torch, which is not installed."""


class UnsupportedTorchError(TorchError, RuntimeError):
    """The installed torch is too old for the request."""


class OptimStateWarning(UserWarning):
    """Base of every warning issued by optimstate."""


class ParameterNameWarning(OptimStateWarning):
    """Positional loading gives state to a parameter of another name."""


class SchedulerStateWarning(OptimStateWarning):
    """A scheduler's state is incomplete or contradicts its optimizer."""


class UntestedTorchWarning(OptimStateWarning):
    """The installed torch is newer than any tested release."""
