"""The size of a model's attention heads, as the configuration beside a checkpoint has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimstate.io.location import Place

__all__ = ["head_size"]

_FILES = ("config.json", "params.json")
_UP_TO = 1 << 20
"""Bytes of a configuration; more is something else."""


def head_size(place: Place) -> int | None:
    """The size of a head as transformers' `config.json` or Meta's `params.json` beside a checkpoint has it, or None."""
    if not isinstance(place, Path):
        return None
    folder = place if place.is_dir() else place.parent
    for name in _FILES:
        path = folder / name
        try:
            if path.is_file() and path.stat().st_size <= _UP_TO:
                found = _size(json.loads(path.read_text(encoding="utf-8")))
                if found is not None:
                    return found
        except (OSError, ValueError):
            continue
    return None


def _size(config: Any) -> int | None:
    if not isinstance(config, Mapping):
        return None
    if isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    known = config.get("head_dim")
    if _is_count(known):
        return int(known)
    for width, heads in (("hidden_size", "num_attention_heads"), ("dim", "n_heads"), ("n_embd", "n_head")):
        size, count = config.get(width), config.get(heads)
        if _is_count(size) and _is_count(count) and size % count == 0:
            return int(size // count)
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
