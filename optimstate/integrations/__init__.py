"""Resuming changed models in trainers: a module for each trainer, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from optimstate.hooks import certify

__all__ = ["certify_once", "ignore_next_load"]


def certify_once(done: list[Any], optimizer: Any, model: Any, schedulers: Sequence[Any]) -> None:
    """Let an optimizer certify the state that it saves, with its schedulers; an optimizer in `done` does so already."""
    if not any(optimizer is each for each in done):
        done.append(optimizer)
        own = [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer]
        optimizer.register_state_dict_post_hook(certify(model, scheduler=own or None))


def ignore_next_load(live: Any) -> None:
    """Let `load_state_dict` do nothing once, because the state that a trainer loads next is loaded already."""

    def ignore(_: Any) -> None:
        del live.load_state_dict

    ignore_once: Callable[[Any], None] = ignore
    live.load_state_dict = ignore_once
