"""Text for values of files, bounded in length and in work, and safe to print.

A checkpoint can contain integers of a million digits, lists of two references to lists of two references, and names
that move a terminal's cursor. So `repr` and `str` of such values are used nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["bounded", "describe", "escaped", "exact", "few"]

LENGTH = 200
_ITEMS = 8  # shown of a container
_DEPTH = 4  # of containers within one another
_NODES = 64  # looked at in all
_DIGITS = 60

# Controls, line ends, marks that turn the direction of text, and halves of surrogate pairs.
_UNSAFE = r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
_UNSAFE_IN_LINES = _UNSAFE.replace(r"\x00-\x1f", r"\x00-\x09\x0b-\x1f")
_NAMED = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}


def escaped(text: str, *, lines: bool = False) -> str:
    """A text in which characters that could control a terminal, end a line or change its direction are escaped.

    Args:
        text: Any text; escapes in it are not escaped again.
        lines: Keep line ends, for texts of several lines that were joined from escaped ones.
    """
    if (text.replace("\n", "") if lines else text).isprintable():  # nearly all texts: nothing to escape
        return text
    return re.sub(_UNSAFE_IN_LINES if lines else _UNSAFE, _spelled, text)


def _spelled(found: re.Match[str]) -> str:
    character = found[0]
    code = ord(character)
    return _NAMED.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def describe(value: Any, limit: int = LENGTH) -> str:
    """A value in about `limit` characters: as Python writes it if it is short, else shortened, or only its class."""
    if type(value) is str and limit > 0:  # nearly all values are keys of paths
        return _quoted(value, max(limit, 16))
    writer = _Writer(limit)
    writer.add(value, _DEPTH)
    return writer.text()


def few(texts: Sequence[str], count: int = 3, separator: str = ", ") -> str:
    """The first `count` texts joined, and the number of the others: `a, b, c and 4 more`."""
    more = f" and {len(texts) - count} more" if len(texts) > count else ""
    return separator.join(texts[:count]) + more


def bounded(value: Any) -> Any:
    """The value itself if it and everything in it is small and plain, else its description."""
    return value if _Count().is_small(value, _DEPTH + 2) else describe(value)


def exact(value: Any) -> str:
    """A value as Python writes it, in full if it is small, so that different values differ; else its description."""
    return repr(value) if bounded(value) is value else describe(value, 1000)


class _Count:
    def __init__(self) -> None:
        self.left = 1000

    def is_small(self, value: Any, depth: int) -> bool:
        self.left -= 1
        if self.left < 0:
            return False
        kind = type(value)
        if kind is int:
            return bool(value.bit_length() <= 4096)
        if kind is str or kind is bytes:
            return len(value) <= 100_000
        if kind in (list, tuple):
            return depth > 0 and all(self.is_small(item, depth - 1) for item in value)
        if kind is dict:
            return depth > 0 and all(
                self.is_small(key, depth - 1) and self.is_small(item, depth - 1) for key, item in value.items()
            )
        return True


class _Writer:
    def __init__(self, limit: int) -> None:
        self._parts: list[str] = []
        self._room = limit
        self._nodes = _NODES

    def text(self) -> str:
        return "".join(self._parts)

    def _put(self, text: str) -> None:
        self._parts.append(text)
        self._room -= len(text)

    def add(self, value: Any, depth: int) -> None:
        kind = type(value)
        self._nodes -= 1
        if self._room <= 0 or self._nodes < 0:
            self._put("...")
        elif value is None or kind in (bool, float, complex):
            self._put(repr(value))
        elif kind is int:
            self._put(_integer(value))
        elif kind is str:
            self._put(_quoted(value, max(self._room, 16)))
        elif kind in (bytes, bytearray):
            self._put(repr(bytes(value[:32])) + (f"... ({len(value)} bytes)" if len(value) > 32 else ""))
        elif isinstance(value, BaseException):
            self._error(value, depth)
        elif kind in _BRACKETS or isinstance(value, dict):
            self._container(value, depth)
        elif hasattr(kind, "__describe__"):
            self._put(escaped(kind.__describe__(value))[: max(self._room, 60)])
        elif kind.__module__ == "torch" and hasattr(value, "numel") and value.numel() <= 1:  # of a live optimizer
            self._put(repr(value))
        elif isinstance(value, type):
            self._put(f"<{escaped(value.__module__)}.{escaped(value.__qualname__)}>")
        else:
            self._put(f"<{escaped(kind.__qualname__)}>")

    def _container(self, value: Any, depth: int) -> None:
        is_mapping = isinstance(value, dict)
        begin, end = "{}" if is_mapping else _BRACKETS[type(value)]
        if not depth and len(value):
            self._put(f"{begin}...{end}")
            return
        self._put(begin)
        for number, item in enumerate(value):
            if number:
                self._put(", ")
            if number == _ITEMS or self._room <= 0:
                self._put(f"... ({len(value)} in all)")
                break
            self.add(item, depth - 1)
            if is_mapping:
                self._put(": ")
                self.add(value[item], depth - 1)
        self._put(",)" if type(value) is tuple and len(value) == 1 else end)

    def _error(self, error: BaseException, depth: int) -> None:
        """An error of a library: its class and its first argument, shortened."""
        self._put(type(error).__name__)
        if error.args:
            self._put(": ")
            first = error.args[0]
            if type(first) is str and not isinstance(error, KeyError):
                self._put(escaped(first[: max(self._room, 16)]))
            else:
                self.add(first, depth)


_BRACKETS: dict[type, Sequence[str]] = {list: "[]", tuple: "()", set: "{}", frozenset: ("frozenset({", "})")}


def _integer(value: int) -> str:
    bits = value.bit_length()
    return repr(value) if bits <= _DIGITS * 3 else f"<an integer of {bits} bits>"


def _quoted(text: str, limit: int) -> str:
    """A text as `repr` writes it, shortened in the middle if it is long."""
    if len(text) > limit:
        half = max(limit // 2 - 2, 8)
        text = f"{text[:half]}...{text[-half:]}"
    quote = '"' if "'" in text and '"' not in text else "'"
    return quote + escaped(text.replace("\\", "\\\\").replace(quote, "\\" + quote) if quote == "'" else text) + quote
