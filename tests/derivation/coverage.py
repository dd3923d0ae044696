"""Every model type of the installed transformers, derived both ways: `python -m tests.derivation.coverage [TYPE ...]`.

A type is built on the meta device from its default configuration, with few layers and experts, as the class that the
library trains where there is one. `derive_transformers` gives both plans; each is then held against the library's own
converters: on random weights of the real shapes, bit for bit, where they have at most 2**26 elements, otherwise every
shape. Prints a line for each type and, at the end, the table of the documentation; `--results FILE` keeps the lines as
JSON and goes on where it stopped. A type that is not exact is listed with its reason and fails nothing: what the
library can build is its own affair. A plan that differs from the converters is a fault: exit code 1.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch

from optimstate.derivation.transformers import derive_transformers, live_model, to_live
from optimstate.errors import OptimStateError
from optimstate.plan.apply.execute import execute_model
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.planner import plan_model

__all__ = ["covered", "kinds", "reduced"]

LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SEVERAL = 4  # layers and experts: enough for a dense layer, a sparse one and what changes between them
MOST_ELEMENTS = 1 << 26
State = dict[str, Any]


class Differs(Exception):
    """A derived plan that does not do what the converters do."""


def kinds() -> list[str]:
    """Every model type that the installed library knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def reduced(kind: str) -> Any:
    """The default configuration of a type with few layers and experts, in its parts too."""
    import transformers

    config = transformers.AutoConfig.for_model(kind)
    for part in _parts(config):
        layers = {name: value for name in LAYERS if isinstance(value := getattr(part, name, None), int)}
        for name, value in layers.items():
            _set(part, name, min(value, SEVERAL))
        for name, value in list(vars(part).items()):
            if isinstance(value, list) and value and len(value) in layers.values():
                _set(part, name, value[:SEVERAL])
        for name in EXPERTS:
            if isinstance(value := getattr(part, name, None), int) and value > SEVERAL:
                _set(part, name, SEVERAL)
        dense = getattr(part, "first_k_dense_replace", None)
        if isinstance(dense, int) and dense >= SEVERAL - 1:
            _set(part, "first_k_dense_replace", 1)
        for name in ("n_group", "topk_group"):
            if hasattr(part, name):
                _set(part, name, 1)
    config.architectures = _class_of(kind)
    return config


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type"):
            yield from _parts(value)


def _set(config: Any, name: str, value: object) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError, ValueError):  # a property without a setter
        return


def _class_of(kind: str) -> list[str] | None:
    """The class that a run trains: with a head where the library lists one."""
    from transformers.models.auto import modeling_auto

    for task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "PRETRAINING", "MASKED_LM"):
        found = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(kind)
        if found:
            return [found] if isinstance(found, str) else list(found)[:1]
    return None


def covered(kind: str, seconds: float) -> dict[str, Any]:
    """What came of one type: `result` is "same", "exact" or "refused", with `reason` where it is not exact.

    Raises:
        Differs: A plan was derived and does something else than the library.
    """
    started = time.process_time()
    line: dict[str, Any] = {"type": kind}
    model = None
    try:
        with _limit(seconds):
            try:
                model = live_model(reduced(kind))
            except Exception:  # noqa: BLE001 - the reduction may not fit the type
                import transformers

                whole = transformers.AutoConfig.for_model(kind)
                whole.architectures = _class_of(kind)
                model = live_model(whole)
            line |= _both_ways(model)
    except Differs:
        raise
    except TimeoutError:
        line |= {"result": "refused", "reason": f"not within {seconds:.0f} s"}
    except OptimStateError as error:
        line |= {"result": "unbuilt" if model is None else "refused", "reason": error.message.splitlines()[0][:200]}
    except Exception as error:  # noqa: BLE001 - whatever the library says of its own type
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        line |= {"result": "unbuilt" if model is None else "refused", "reason": what}
    return line | {"seconds": round(time.process_time() - started, 1)}


def _both_ways(model: Any) -> dict[str, Any]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    live = {name: value.to("meta") for name, value in model.state_dict().items() if name not in tied}
    saved = _saving(model)
    hub = dict(saved(dict(live)))
    line = {"live": len(live), "hub": len(hub)}
    if _same(live, hub) and _same(hub, dict(to_live(model)(dict(hub)))):
        return line | {"result": "same", "rules": [0, 0]}
    rules = []
    for to, given, function in (("hub", live, saved), ("live", hub, to_live(model))):
        plan = derive_transformers(model, to=to, shapes=given).plan  # type: ignore[arg-type]
        rules.append(len(list(plan.all_rules())))
        _compare(plan, function, given)
    return line | {"result": "exact", "rules": rules}


def _saving(model: Any) -> Any:
    """What the library itself does when it saves a model."""
    from transformers.core_model_loading import revert_weight_conversion

    return lambda state: revert_weight_conversion(model, state)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether every tensor stands where it stood."""
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


def _compare(plan: Plan, function: Any, given: Mapping[str, Any]) -> None:
    values = sum(prod(value.shape) for value in given.values()) <= MOST_ELEMENTS
    generator = torch.Generator().manual_seed(0)
    tensors = dict(given)
    if values:
        tensors = {
            name: torch.randint(1, 127, value.shape, generator=generator).to(value.dtype)
            for name, value in given.items()
        }
    expected = dict(function(dict(tensors)))
    planned = plan_model(plan, tensors).sections["model"]
    if values:
        made = execute_model(planned, tensors)
        wrong = {name for name in expected.keys() | made.keys() if name not in expected or name not in made}
        wrong |= {name for name in expected.keys() & made.keys() if not torch.equal(expected[name], made[name])}
    else:
        shapes = {move.target: move.expression.shape for move in planned.moves if move.expression is not None}
        wrong = {
            name for name in expected.keys() | shapes.keys()
            if name not in expected or shapes.get(name) != tuple(expected[name].shape)
        }  # fmt: skip
    if wrong:
        raise Differs(f"{min(wrong)} and {len(wrong) - 1} more differ")


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Processor time that may pass."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def table(lines: list[dict[str, Any]]) -> str:
    """The results for the documentation, in Markdown."""
    counts = Counter(line["result"] for line in lines)
    shown = [line for line in lines if line["result"] == "exact"]
    made = [
        f"| {len(lines)} types | {counts['same']} one layout | {counts['exact']} exact both ways |"
        f" {counts['refused']} refused | {counts['unbuilt']} not built |",
        "",
        "| type | tensors live, hub | rules to hub, to live |",
        "|---|---|---|",
        *(f"| {i['type']} | {i['live']}, {i['hub']} | {i['rules'][0]}, {i['rules'][1]} |" for i in shown),
        "",
        *(f"- `{i['type']}`: {i['reason']}" for i in lines if i["result"] == "refused"),
    ]
    return "\n".join(made)


def main() -> int:
    """Go through the types that are asked for, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--seconds", type=float, default=120, help="processor time for one type")
    parser.add_argument("--results", type=Path, help="a file of JSON lines, kept between runs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines: list[dict[str, Any]] = []
    if options.results is not None and options.results.exists():
        lines = [json.loads(text) for text in options.results.read_text().splitlines()]
    known = {line["type"] for line in lines}
    wrong = 0
    for kind in options.types or kinds():
        if kind in known:
            continue
        try:
            line = covered(kind, options.seconds)
        except Differs as error:
            wrong += 1
            line = {"type": kind, "result": "differs", "reason": str(error)}
        lines.append(line)
        print(json.dumps(line), flush=True)
        if options.results is not None:
            with options.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
    print(table(sorted(lines, key=lambda line: str(line["type"]))))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
