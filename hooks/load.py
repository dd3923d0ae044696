"""The hooks that run before an optimizer loads, each a few lines over the plan engine.

Names are templates of whole parameter names, as in plan files (`blocks.{i}.{rest**}`). A name without captures also
stands for a module: `"fc"` is `fc` if there is a parameter of that name, else everything below `fc.`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

from optimstate.describe import describe
from optimstate.errors import MigrationError, PlanError
from optimstate.hooks.engine.hook import LoadHook
from optimstate.hooks.engine.request import LoadRequest, Source
from optimstate.hooks.engine.rules import HookStep, below, is_module, literal, matching, ruled, templates
from optimstate.hooks.engine.slots import Casts, zeros_like_others
from optimstate.installed_torch import torch
from optimstate.plan.apply.stamps import refuse_second
from optimstate.plan.expressions.evaluate import copied
from optimstate.plan.expressions.tree import Fill
from optimstate.plan.language.base import Operation
from optimstate.plan.language.dimensions import Resize, fill_of
from optimstate.plan.language.joining import Concat, Split
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import GroupRule, Policy, Rule
from optimstate.plan.language.template import Template
from optimstate.plan.solve.reach import option_problems
from optimstate.state.optimizer import Slots

__all__ = [
    "cast_state",
    "drop_unexpected",
    "duplicate",
    "fill_missing",
    "fuse",
    "hyperparameters",
    "match_names",
    "migrate",
    "regroup",
    "rename",
    "reset",
    "resize",
    "split",
    "strip_prefix",
]


class _Matching(LoadHook):
    """A hook that adds nothing to matching by name."""

    def __init__(self, model: torch.nn.Module | None, saved: Sequence[str] | None) -> None:
        self._model, self._saved = model, saved

    def identify(self) -> tuple[torch.nn.Module | None, Sequence[str] | None]:
        return self._model, self._saved


class _Casting(LoadHook):
    """A hook that still has work to do after torch has loaded."""

    after_loading = True

    def __init__(self, casts: Casts) -> None:
        self._casts = casts

    def finish(self, optimizer: torch.optim.Optimizer, made: dict[str, Any]) -> None:
        self._casts.expect(optimizer, made)

    def __str__(self) -> str:
        return "cast_state"


def match_names(model: torch.nn.Module | None = None, *, saved: Sequence[str] | None = None) -> LoadHook:
    """Give every parameter the state of the parameter with the same name, whatever the order and the groups.

    Args:
        model: Names the live parameters, for an optimizer that was built without names.
        saved: The checkpoint's names in the order of its groups, for one that has none.

    Example:
        `optimizer.register_load_state_dict_pre_hook(hooks.match_names())`
    """
    return _Matching(model, saved)


def rename(names: Mapping[str, str]) -> LoadHook:
    """Parameters or modules that have another name now, old to new; all at once, so that two can be swapped.

    Example:
        `hooks.rename({"encoder": "blocks", "head": "classifier"})`
    """
    return ruled("rename", names, lambda old, new: Rule(templates(old), templates(new)))


def strip_prefix() -> LoadHook:
    """Remove what wrappers add to names (`module.`, `_orig_mod.`, `_fsdp_wrapped_module.`, ...), on both sides.

    The live optimizer keeps its own names. Hooks with rules that follow see the names without prefixes.

    Example:
        `hooks.strip_prefix()`
    """
    return HookStep("strip_prefix", LoadRequest.strip_prefixes)


def duplicate(names: Mapping[str, Iterable[str]]) -> LoadHook:
    """Give several parameters or modules a copy of the state of one, old to new ones.

    Example:
        `hooks.duplicate({"fc": ["fc1", "fc2"]})`
    """
    return ruled("duplicate", names, lambda old, new: Rule(templates(old), templates(*new)), several=True)


def split(names: Mapping[str, Iterable[str]], *, dim: int = 0, sizes: Sequence[int] = ()) -> LoadHook:
    """Cut the state of one parameter into that of several, old to new ones.

    Args:
        names: Old to new ones, in the order of the parts.
        dim: The dimension that is cut.
        sizes: Of the parts; equal ones without.

    Example:
        `hooks.split({"attn.qkv": ["attn.q", "attn.k", "attn.v"]}, dim=0)`
    """
    cut = Split(dim, tuple(sizes))
    return ruled("split", names, lambda old, new: Rule(templates(old), templates(*new), (cut,)), several=True)


def fuse(names: Mapping[str, Iterable[str]], *, dim: int = 0) -> LoadHook:
    """Join the state of several parameters, in order, into that of one.

    Args:
        names: The new one to the old ones, in order.
        dim: The dimension along which they are joined.

    Example:
        `hooks.fuse({"attn.qkv": ["attn.q", "attn.k", "attn.v"]}, dim=0)`
    """

    def rule(new: str, old: Iterable[str]) -> Rule:
        return Rule(templates(*old), templates(new), (Concat(dim),))

    return ruled("fuse", names, rule, several=True, flip=True)


_FILLS = ("zeros", "mean", "wrap")


def resize(
    *names: str, fill: Literal["zeros", "mean", "wrap"] | float | Mapping[str, str | float] | None = None
) -> LoadHook:
    """Cut or grow the state of parameters to the shape that they have in the live optimizer, at the end of dimensions.

    Args:
        *names: Which, by the names they have after the hooks before.
        fill: What new rows hold, for all slots or by slot: `zeros`, `mean` (of the old rows), `wrap` (the old
            rows again), or a number. Without: zeros for first moments, the mean for second ones, because a zero
            second moment beside a large step count makes the first updates of new rows several times too large.

    Example:
        `hooks.resize("embed.weight", fill={"exp_avg": "zeros", "exp_avg_sq": "mean"})`
    """
    filling = Fill(None) if fill is None else fill_of(dict(fill) if isinstance(fill, Mapping) else fill, _FILLS)
    if filling is None:
        raise PlanError(f"resize: fill is {describe(fill)}, expected {', '.join(_FILLS)}, a number, or these by slot")

    def prepare(request: LoadRequest) -> None:
        shapes = request.live.shapes()
        found = matching(names, request.names(), "resize")
        rules = []
        for name in found:
            if name not in shapes:
                raise MigrationError.of(
                    "name",
                    f"the live optimizer has no parameter {describe(name)} to take the shape of",
                    "resize",
                    (name,),
                )
            steps: tuple[Operation, ...] = tuple(
                Resize(dim, size, filling) for dim, size in enumerate(shapes[name] or ())
            )
            rules.append(literal(name, name, *steps))
        request.add(Plan(tuple(rules)))

    return HookStep("resize", prepare)


def fill_missing(with_: Literal["fresh", "zeros"] | Mapping[str, str] = "fresh") -> LoadHook:
    """Allow the live optimizer parameters that nothing in the checkpoint fills.

    Args:
        with_: `fresh` leaves them without state, as every optimizer starts a parameter. `zeros` gives them the slots
            of the others with zeros and the others' step count, as if they had been there with zero gradients. A
            mapping gives the parameters or modules it names a copy of the state of others (by the new names), and
            allows no more than these.

    Example:
        `hooks.fill_missing()`
    """
    if isinstance(with_, Mapping):
        return HookStep("fill_missing", lambda request: _fill_like(request, with_))
    if with_ not in ("fresh", "zeros"):
        raise PlanError(
            f"fill_missing({describe(with_)}): expected 'fresh', 'zeros', or a mapping of new names to others"
        )

    def prepare(request: LoadRequest) -> None:
        request.add(Plan(policy=Policy(missing="fresh")))
        if with_ == "zeros":
            options = request.state.groups[0].options if request.state.groups else {}
            request.fills.append(lambda name, tensor, slots: zeros_like_others(name, tensor, slots, options))

    return HookStep("fill_missing", prepare)


def drop_unexpected(*names: str) -> LoadHook:
    """Leave behind the state of parameters that the live optimizer does not have.

    Args:
        *names: Only these parameters or modules, each of which must be there; without any, all.

    Example:
        `hooks.drop_unexpected("old_head")`
    """
    if not names:
        return HookStep("drop_unexpected", lambda request: request.add(Plan(policy=Policy(unexpected="drop"))))

    def prepare(request: LoadRequest) -> None:
        known = request.names()
        request.add(Plan(tuple(Rule(templates(below(name, known))) for name in names)))

    return HookStep("drop_unexpected", prepare)


def regroup(
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    merge: Literal["refuse", "first", "min", "max"] = "refuse",
    step: Literal["error", "min", "max", "keep"] = "error",
) -> LoadHook:
    """Say what becomes of options and step counts when param groups are merged or split.

    Which group a parameter is in, the live optimizer decides; the options come from where its parameters were.

    Args:
        groups: For each live group a template that all its parameters match, and the options it is to have.
        merge: Which of several old groups with different options gives them: the first, or the one with the lowest or
            highest initial learning rate.
        step: Which step count a parameter gets that several become.

    Example:
        `hooks.regroup({"**.bias": {"weight_decay": 0.0}, "**": {}})`
    """
    tables = tuple(GroupRule(templates(match), dict(options)) for match, options in (groups or {}).items())
    plan = Plan(groups=tables).with_policy(merge=merge, step=step)
    return HookStep("regroup", lambda request: request.add(plan))


def hyperparameters(
    default: Source = "file", /, *, sources: Mapping[str, Source] | None = None, **values: Any
) -> LoadHook:
    """Say where the options of the param groups come from.

    Args:
        default: For options that nothing else decides. `file`: all from the checkpoint, as torch does. `live`: all as
            the live optimizer has them. `merge`: from the checkpoint, and what it lacks from the live optimizer.
        sources: The same for single options, by name.
        **values: Options with the value that they are to have in every group.

    Raises:
        PlanError: An option is decided twice.

    Example:
        `hooks.hyperparameters("live", lr=1e-4)`
    """
    given: dict[str, Source] = {**dict(sources or {}), "*": default}
    for key, source in given.items():
        if source not in ("file", "live", "merge"):
            raise PlanError(f"hyperparameters: {key} = {describe(source)}, expected 'file', 'live' or 'merge'")
    if twice := sorted(given.keys() & values.keys()):
        raise PlanError(f"hyperparameters: {twice[0]} has both a source and a value")

    def prepare(request: LoadRequest) -> None:
        options = [*(group.options for group in request.state.groups), *request.live.options]
        asked = {**values, **{key: found for key in given for found in _first(key, options)}}
        unknown = {key: None for key in given if key != "*" and key not in asked}
        if problems := list(option_problems({**asked, **unknown}, options, "hyperparameters")):
            raise MigrationError(problems)
        decided = (given.keys() | values.keys()) & (request.options.keys() | request.values.keys())
        if decided:
            raise PlanError(
                f"two hyperparameters() hooks decide on {', '.join(sorted(decided)).replace('*', 'the default')}",
                hint="Say it all in one.",
            )
        if default == "live":
            request.add(Plan(policy=Policy(hyperparameters="live")))
        request.options.update(given)
        request.values.update(values)

    return HookStep("hyperparameters", prepare)


def _first(option: str, groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The value of an option in the first group that has it."""
    return [group[option] for group in groups if option in group][:1]


def cast_state(dtypes: Mapping[str, str | torch.dtype] | str | torch.dtype) -> LoadHook:
    """Say which dtype floating-point slots have after loading; torch gives them their parameter's, except `step`.

    Args:
        dtypes: For every slot, or by slot name with `*` for the others: a dtype or its name, `file` for the
            checkpoint's, `param` for the parameter's. Whether the optimizer can step with it is its own affair: torch's
            for-loop kernels, for one, want moments in the parameter's dtype.

    Example:
        `hooks.cast_state({"exp_avg": "bfloat16"})`
    """
    return _Casting(Casts(dtypes))


def reset(*names: str) -> LoadHook:
    """Let parameters or modules start without state, although the checkpoint has some.

    Args:
        *names: Which, by the names they have after the hooks before; `all` for every one, `none` for none.

    Raises:
        PlanError: No name is given, or `all` or `none` among others.

    Example:
        `hooks.reset("head")`
    """
    if not names or (len(names) > 1 and {"all", "none"} & set(names)):
        raise PlanError(f"reset{names}: expected names, or 'all', or 'none'")

    def prepare(request: LoadRequest) -> None:
        if names == ("none",):
            return
        known = request.names()
        texts = ["**"] if names == ("all",) else [below(name, known) for name in names]
        request.add(Plan(tuple(Rule(templates(text), fresh=True) for text in texts)))

    return HookStep("reset", prepare)


def migrate(plan: Plan | str | PathLike[str]) -> LoadHook:
    """Apply a plan.

    Args:
        plan: A plan, or the path of a plan file.

    Raises:
        PlanError: The plan cannot be read.

    Example:
        `hooks.migrate("plan.toml")`
    """
    found = Plan.of(plan)

    def prepare(request: LoadRequest) -> None:
        refuse_second(found, request.state.node)
        request.add(found.forward())

    return HookStep("migrate", prepare)


def _fill_like(request: LoadRequest, names: Mapping[str, str]) -> None:
    """Declare parameters new, and remember whose state they get a copy of."""
    known = {name for group in request.live.names for name in group}
    like: dict[str, str] = {}
    for new, old in names.items():
        wide = is_module(new, known)
        source, target = Template(f"{new}.{{rest**}}" if wide else new), Template(f"{old}.{{rest}}" if wide else old)
        matches = {name: captures for name in known if (captures := source.match(name)) is not None}
        if not matches:
            raise MigrationError.of(
                "unmatched", f"{describe(new)} matches no parameter of the live optimizer", "fill_missing"
            )
        like.update({name: next(iter(target.produce(captures))) for name, captures in matches.items()})
    request.add(Plan(tuple(Rule((), (Template.literal(name),), fresh=True) for name in like)))

    def fill(name: str, parameter: torch.Tensor, slots: Mapping[str, Slots | None]) -> tuple[Slots, str] | None:
        if name not in like:
            return None
        other = like[name]
        if other not in slots:
            raise MigrationError.of(
                "name",
                f"{describe(name)} is to be like {describe(other)}, which the live optimizer lacks",
                "fill_missing",
            )
        found = slots[other]
        if found is None:
            return None
        shape = dict(request.live.pairs())[other].shape
        if shape != parameter.shape:
            raise MigrationError.of(
                "shape",
                f"{describe(name)} has shape {list(parameter.shape)}, {describe(other)} has {list(shape)}",
                "fill_missing",
            )
        return {key: copied(value) for key, value in found.items()}, f"a copy of the state of {other}"

    request.fills.append(fill)
