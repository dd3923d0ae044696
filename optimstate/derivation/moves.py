"""What a function does to tensors as moves of the plan language, and the plan that says them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from optimstate.derivation.layout import Blocks, Program, Wanted, blocked, core, cut, joined
from optimstate.derivation.probe import Combined, Function, Moved, New, Probe, Source, Unexplained, probe
from optimstate.derivation.proof import Terms, differences, roundings
from optimstate.derivation.templates import Moves, drops, generalised
from optimstate.describe import describe
from optimstate.errors import DerivationError
from optimstate.plan.expressions.tree import Fill
from optimstate.plan.language.base import Operation
from optimstate.plan.language.operations import OPERATIONS
from optimstate.plan.language.plan import Plan
from optimstate.record import Record

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["Derivation", "Derived", "source_of"]

Shape = tuple[int, ...]
Resize = OPERATIONS["resize"]


class Derived(Record):
    """A plan that was read off a function.

    Attributes:
        plan: What the function does, in the plan language.
        dropped: Sources that no output takes.
        new: Outputs that depend on no source: they start fresh.
        notes: What deserves attention though nothing is wrong.
        calls: How often the function was called.
        untouched: Those of `new` that a copying script leaves as the new model has them.
    """

    plan: Plan
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    notes: tuple[str, ...]
    calls: int
    untouched: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.plan.to_toml()


def source_of(value: Any) -> Source:
    """What a function is given for a tensor, a shape, or a source."""
    if isinstance(value, Source):
        return value
    if hasattr(value, "shape"):
        return Source(tuple(value.shape), str(value.dtype).removeprefix("torch."))
    return Source(tuple(value))


class _Component(Record):
    """Sources and outputs that share elements."""

    sources: tuple[str, ...]
    outputs: tuple[str, ...]


class Derivation:
    """One derivation: what was found, as moves of a first pass and of a second.

    Args:
        function: From state dict to state dict.
        sources: What it is given.
        allow_drop: Whether sources may go nowhere.
        probing: What says where the elements of its outputs come from.
        live: Values of the live model, where outputs may keep them.
        shared: Sources that are the same tensor as another, with that one: nothing is lost where no output takes them.
    """

    def __init__(
        self,
        function: Function,
        sources: Mapping[str, Source],
        allow_drop: bool,
        *,
        probing: Callable[[Function, Mapping[str, Source]], Probe] = probe,
        live: Mapping[str, Any] | None = None,
        shared: Mapping[str, str] | None = None,
    ) -> None:
        self.function, self.sources, self.allow_drop = function, sources, allow_drop
        self.probing, self.live, self.shared = probing, live, shared or {}
        self.first: list[Moves] = []
        self.second: list[Moves] = []
        self.notes: list[str] = []
        self.dropped: tuple[str, ...] = ()
        self.new: tuple[str, ...] = ()
        self.untouched: tuple[str, ...] = ()
        self.random: tuple[str, ...] = ()
        self.calls = 0
        self._known: dict[Any, Any] = {}
        self._sums: dict[tuple[str, str], list[str]] = {}

    def run(self) -> Derived:
        """The plan, proved.

        Raises:
            DerivationError: No plan says what the function does.
        """
        self.explain()
        plan = self.plan()
        self.prove(plan)
        return self.derived(plan)

    def derived(self, plan: Plan) -> Derived:
        """What was found, with the plan that says it."""
        return Derived(plan, self.dropped, self.new, tuple(self.notes), self.calls, self.untouched)

    def explain(self) -> None:
        """Find the moves.

        Raises:
            DerivationError: There are none that do what the function does.
        """
        found = self.probing(self.function, self.sources)
        self.calls = found.calls
        self._refuse(found)
        moved = {name: origin for name, origin in found.outputs.items() if isinstance(origin, Moved)}
        owners = _Owners(found, moved)
        components = owners.components()
        for component in components:
            self._explain(component, moved, owners)
        used = {name for component in components for name in component.sources}
        for name, origin in found.outputs.items():
            if isinstance(origin, Combined):
                used |= self._sum(name, origin, found, used)
        used |= self._empty(found, used)
        self.dropped = tuple(name for name in self.sources if name not in used)
        lost = [name for name in self.dropped if name not in self.shared]
        if lost and not self.allow_drop:
            raise DerivationError(
                f"no output takes {_listed(lost)}",
                hint="If they are to be left out, allow it: allow_drop=True, or --allow-drop.",
            )
        made = {name: origin for name, origin in found.outputs.items() if isinstance(origin, New)}
        self.new = tuple(made)
        self.untouched = tuple(name for name, origin in made.items() if origin.untouched)
        self.random = tuple(name for name, origin in moved.items() if origin.fill == "random")
        self._note([name for name, origin in moved.items() if origin.fill == "live"])

    def _note(self, live: Sequence[str]) -> None:
        """What deserves attention: sums, random rows, and outputs that keep some of the live model's values."""
        for (what, state), names in self._sums.items():
            self.notes.append(f"{what} of tensors: {_listed(names)}; weights are exact, optimizer state is {state}")
        if self.random:
            self.notes.append(
                f"a part of {_listed(self.random)} is drawn at random; the plan fills it with the mean of the rest"
            )
        if live:
            self.notes.append(f"a part of {_listed(live)} keeps the live model's values: resume with this plan")

    def _refuse(self, found: Probe) -> None:
        wrong = []
        for name, origin in found.outputs.items():
            if isinstance(origin, Unexplained):
                of = f" (it depends on {', '.join(map(describe, origin.sources))})" if origin.sources else ""
                wrong.append(f"{describe(name)} is not a layout of the sources: {origin.reason}{of}")
        if wrong:
            raise DerivationError("\n".join(wrong))

    def _sum(self, name: str, origin: Combined, found: Probe, used: set[str]) -> set[str]:
        """Several tensors added, each times a number: they are averaged as they are, and then laid out."""
        terms = tuple(found.owner(int(part.reshape(-1)[0])) for part, _ in origin.parts)
        shared = sorted(used & set(terms))
        if shared:
            raise DerivationError(f"{describe(shared[0])} is part of the sum {describe(name)} and of another output")
        shape = self.sources[terms[0]].shape
        parts = [part.reshape(-1) - found.starts[term] for term, (part, _) in zip(terms, origin.parts, strict=True)]
        layouts = {(self.sources[term].shape, tuple(part.tolist())) for term, part in zip(terms, parts, strict=True)}
        program = self._cut(shape, [Wanted(tuple(origin.parts[0][0].shape), parts[0])]) if len(layouts) == 1 else None
        if program is None:
            raise DerivationError(
                f"{describe(name)} is a sum of {len(terms)} tensors that are laid out in different ways"
            )
        factors = [factor for _, factor in origin.parts]
        equal = all(abs(factor * len(factors) - 1) < 1e-6 for factor in factors) and len(factors) > 1
        joins = OPERATIONS["mean"](0) if equal else OPERATIONS["average"](tuple(map(_short, factors)))
        extra = self._extras(Moved(origin.parts[0][0], 1.0, origin.shift, 0.0, origin.dtype), terms)
        self.first.append(Moves(terms, (name,), (joins, *program[0], *extra)))
        kept = "approximate" if min(factors) >= 0 and abs(sum(factors) - 1) < 1e-6 else "left behind"
        self._sums.setdefault(("means" if equal else "sums", kept), []).append(name)
        return set(terms)

    def _empty(self, found: Probe, used: set[str]) -> set[str]:
        """Tensors without elements, which carry no tags: told by name, or by shape where one is renamed."""
        empty = {name: s.shape for name, s in self.sources.items() if not prod(s.shape) and name not in used}
        outputs = [name for name, o in found.outputs.items() if isinstance(o, Moved) and not o.ids.numel()]
        taken: set[str] = set()
        for name in sorted(outputs, key=lambda name: name not in empty):
            origin = found.outputs[name]
            assert isinstance(origin, Moved)
            shape = tuple(origin.ids.shape)
            source = next((key for key in (name, *empty) if empty.get(key) in (shape, shape[::-1])), None)
            if source is not None:
                turned = () if empty[source] == shape else (OPERATIONS["transpose"](),)
                del empty[source]
                taken.add(source)
                self._add((source,), (name,), (*turned, *self._extras(origin, [source])))
        return taken

    # --- one component ----------------------------------------------------------------------------------------------

    def _explain(self, component: _Component, moved: Mapping[str, Moved], owners: _Owners) -> None:
        if len(component.sources) == 1 or len(component.outputs) > 1:
            self._refuse_factors(component, moved)
        if len(component.sources) == 1:
            self._fan_out(component.sources[0], component.outputs, moved, owners)
        elif len(component.outputs) == 1:
            self._gather(component.sources, component.outputs[0], moved, owners)
        else:
            self._across(component, moved, owners)

    def _refuse_factors(self, component: _Component, moved: Mapping[str, Moved]) -> None:
        for name in component.outputs:
            if moved[name].factors is not None:
                of = ", ".join(map(describe, component.sources[:4]))
                reason = "its elements are not all multiplied by one number"
                raise DerivationError(f"{describe(name)} is not a layout of the sources: {reason} (it depends on {of})")

    def _fan_out(self, source: str, outputs: Sequence[str], moved: Mapping[str, Moved], owners: _Owners) -> None:
        shape = self.sources[source].shape
        wanted = [owners.relative(name, source) for name in outputs]
        alike = {(*map(str, self._extras(moved[name], [source])), moved[name].fill) for name in outputs}
        found = self._cut(shape, wanted) if len(alike) == 1 else None
        if found is not None:
            program, order = found
            program = self._finished(program, moved[outputs[0]], [source])
            self._add((source,), tuple(outputs[number] for number in order), program)
            return
        if len(outputs) == 1:
            raise self._unsayable(outputs[0], [source])
        copies = tuple(f"{name}.copy" for name in outputs)
        self.first.append(Moves((source,), copies))
        for name, copy, item in zip(outputs, copies, wanted, strict=True):
            single = self._cut(shape, [item])
            if single is None:
                raise self._unsayable(name, [source])
            self.second.append(Moves((copy,), (name,), self._finished(single[0], moved[name], [source])))

    def _gather(self, sources: Sequence[str], output: str, moved: Mapping[str, Moved], owners: _Owners) -> None:
        found = self._joined(sources, output, moved, owners) if moved[output].factors is None else None
        if found is None:
            self._assemble(sources, output, moved, owners)
            return
        program, order = found
        self._add(tuple(sources[number] for number in order), (output,), program)

    def _assemble(self, sources: Sequence[str], output: str, moved: Mapping[str, Moved], owners: _Owners) -> None:
        """Sources that are laid out each in its own way, and then joined in a stage; zeros between are grown."""
        origin = moved[output]
        ids, owner = owners.split(output, sources)
        found = (
            (blocks, self._parts(blocks, sources, origin, ids)) for blocks in blocked(tuple(origin.ids.shape), owner)
        )
        blocks, parts = next(((blocks, parts) for blocks, parts in found if parts), (None, None))
        if blocks is None or parts is None:
            raise self._unsayable(output, sources)
        taken = []
        for source, layout in parts:
            whole = self._finished(layout, origin._replace(dtype=self.sources[source].dtype), [source])
            opening = whole if isinstance(origin.fill, str) else whole[: len(layout)]
            taken.append(f"{source}.part" if opening else source)
            if opening:
                self.first.append(Moves((source,), (taken[-1],), opening))
        closing = self._extras(origin, sources)
        if isinstance(origin.fill, str):  # the parts are scaled already
            closing = tuple(step for step in closing if step.KEY == "cast")
        self.second.append(Moves(tuple(taken), (output,), (*blocks.joining, *closing)))

    def _parts(
        self, blocks: Blocks, sources: Sequence[str], origin: Moved, ids: torch.Tensor
    ) -> list[tuple[str, Program]] | None:
        """For each block its source and what makes the block of it."""
        parts: list[tuple[str, Program]] = []
        for number, block in blocks.parts:
            inside = ids.reshape(blocks.shape)[block]
            wanted = Wanted(tuple(inside.shape), inside.reshape(-1))
            found = self._cut(self.sources[sources[number]].shape, [wanted])
            factor = _factor(origin, blocks.shape, block, wanted)
            if found is None or factor is None:
                return None
            parts.append((sources[number], (*found[0], *_scaled(factor))))
        return parts

    def _across(self, component: _Component, moved: Mapping[str, Moved], owners: _Owners) -> None:
        """Many to many: every source is cut into the parts that outputs take, and these are joined in a stage."""
        from optimstate.installed_torch import torch

        pieces: dict[tuple[str, str], str] = {}
        for source in component.sources:
            takers = [name for name in component.outputs if source in owners.sources_of(name)]
            if len(takers) == 1:
                pieces[source, takers[0]] = source
                continue
            wanted = []
            for name in takers:
                ids = owners.own_ids(name, source).sort().values
                wanted.append(_block(self.sources[source].shape, ids))
            found = self._cut(self.sources[source].shape, wanted)
            if found is None:
                raise self._unsayable(takers[0], [source])
            program, order = found
            names = tuple(f"{source}.part{number}" for number in range(len(order)))
            for place, number in enumerate(order):
                pieces[source, takers[number]] = names[place]
            self.first.append(Moves((source,), names, program))
        for name in component.outputs:
            sources = owners.sources_of(name)
            shapes, owner, ids = [], torch.zeros(0), torch.zeros(0)
            owner = torch.full((moved[name].ids.numel(),), -1, dtype=torch.int64)
            ids = torch.full_like(owner, -1)
            for number, source in enumerate(sources):
                mine = owners.mask(name, source)
                own = owners.own_ids(name, source)
                if pieces[source, name] == source:
                    shapes.append(self.sources[source].shape)
                    ids[mine] = own
                else:
                    inside = own.sort().values
                    shapes.append(_block(self.sources[source].shape, inside).shape)
                    ids[mine] = torch.searchsorted(inside, own)
                owner[mine] = number
            item = Wanted(tuple(moved[name].ids.shape), ids)
            if len(sources) == 1:
                single = self._cut(shapes[0], [item])
                result: tuple[Program, tuple[int, ...]] | None = None if single is None else (single[0], (0,))
            else:
                result = joined(shapes, item, owner)
            if result is None:
                raise self._unsayable(name, sources)
            program, order = result
            taken = tuple(pieces[sources[number], name] for number in order)
            self.second.append(Moves(taken, (name,), self._finished(program, moved[name], sources)))

    def _joined(
        self, sources: Sequence[str], output: str, moved: Mapping[str, Moved], owners: _Owners
    ) -> tuple[Program, tuple[int, ...]] | None:

        shapes = [self.sources[name].shape for name in sources]
        ids, owner = owners.split(output, sources)
        key = ("joined", tuple(shapes), tuple(moved[output].ids.shape), _digest(ids, owner))
        if key not in self._known:
            whole = Wanted(tuple(moved[output].ids.shape), ids)
            inner, growth = core(whole)
            found = None if bool((inner.ids < 0).any()) else joined(shapes, inner, owner[ids >= 0])
            self._known[key] = None if found is None else ((*found[0], *growth), found[1])
        found = self._known[key]
        return None if found is None else (self._finished(found[0], moved[output], sources), found[1])

    def _cut(self, shape: Shape, wanted: Sequence[Wanted]) -> tuple[Program, tuple[int, ...]] | None:
        key = ("cut", shape, tuple(item.shape for item in wanted), _digest(*(item.ids for item in wanted)))
        if key not in self._known:
            self._known[key] = cut(shape, wanted)
        found: tuple[Program, tuple[int, ...]] | None = self._known[key]
        return found

    def _finished(self, program: Program, origin: Moved, sources: Sequence[str]) -> Program:
        """A layout with what it is filled with where it grows, a factor and another dtype."""
        extra = self._extras(origin, sources)
        if isinstance(origin.fill, str):  # values that are not to be scaled
            fill = Fill("live") if origin.fill == "live" else Fill(None, {"param": "mean"})
            return (*extra, *_filled(program, fill))
        value = _short((origin.fill - origin.shift) / origin.scale)
        return (*_filled(program, Fill(None, {"param": value}) if value else Fill(0.0)), *extra)

    def _extras(self, origin: Moved, sources: Sequence[str]) -> tuple[Operation, ...]:
        """What is done beside the layout: a factor, another dtype."""
        extra: list[Operation] = []
        extra += _scaled(origin.scale)
        if origin.shift:
            extra.append(OPERATIONS["shift"](_short(origin.shift)))
        if {self.sources[name].dtype for name in sources} != {origin.dtype}:
            extra.append(OPERATIONS["cast"]({"param": origin.dtype}))
        return tuple(extra)

    def _unsayable(self, output: str, sources: Sequence[str]) -> DerivationError:
        of = ", ".join(map(describe, list(sources)[:4]))
        return DerivationError(
            f"{describe(output)} is made of elements of {of}, in an order that no operations of the plan language give"
        )

    def _add(self, sources: tuple[str, ...], targets: tuple[str, ...], program: Program) -> None:
        if sources != targets or program:
            self.first.append(Moves(sources, targets, program))

    # --- the plan ---------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The moves as rules."""
        names, dropped = list(self.sources), set(self.dropped)
        rules = [*drops(self.dropped, names), *generalised(self.first, [name for name in names if name not in dropped])]
        taken = {name for move in self.first for name in move.sources}
        kept = [name for name in names if name not in taken and name not in dropped]
        between = [*kept, *(name for move in self.first for name in move.targets)]
        stages = (tuple(generalised(self.second, between)),) if self.second else ()
        plan = Plan(tuple(rules), stages)
        return plan.with_policy(missing="fresh") if self.new else plan

    def prove(self, plan: Plan) -> None:
        """Compare a plan with the function, and note what the function rounds.

        Raises:
            DerivationError: They differ.
        """
        self.compare(plan)
        rounded, wrong = roundings(plan, self.function, self.sources, self._terms())
        if wrong:
            raise DerivationError(
                "what the function does depends on the values, not on their places alone:\n" + "\n".join(wrong[:5])
            )
        if rounded:
            self.notes.append(f"the function rounds values on the way, the plan keeps them: {rounded[0]}")

    def _terms(self) -> Terms:
        return Terms(self.new, self.random, self.live, self.shared)

    def compare(self, plan: Plan) -> None:
        """Compare a plan with the function.

        Raises:
            DerivationError: They differ.
        """
        wrong = differences(plan, self.function, self.sources, self._terms())
        if wrong:
            raise DerivationError(
                "the plan that was found does not do what the function does:\n" + "\n".join(wrong[:5]),
                hint="Please report this with the function.",
            )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - 5
    return ", ".join(map(describe, names[:5])) + (f" and {more} more" if more > 0 else "")


def _filled(program: Program, fill: Fill) -> Program:
    return tuple(step._replace(fill=fill) if isinstance(step, Resize) else step for step in program)


def _short(number: float) -> float:
    """A number as a person writes it, where rounding alone has given it more digits."""
    return float(f"{number:.7g}") if abs(float(f"{number:.4g}") - number) <= 1e-6 * abs(number) else number


def _scaled(scale: float) -> tuple[Operation, ...]:
    return () if scale == 1 else (OPERATIONS["scale"](_short(scale), 1 / _short(scale)),)


def _factor(origin: Moved, shape: Shape, block: tuple[slice, ...], wanted: Wanted) -> float | None:
    """What all elements of a block are multiplied by; None where it is not one number."""
    if origin.factors is None:
        return 1.0
    factors = origin.factors.reshape(shape)[block].reshape(-1)[wanted.ids >= 0]
    close = bool(((factors - factors[0]).abs() <= factors[0].abs() * 1e-6).all())
    return float(factors[0]) if close else None


def _block(shape: Shape, ids: torch.Tensor) -> Wanted:
    """A part of a source, its elements in the source's order, in the shape that follows the source's where it can."""
    rows = shape[0] if shape else 1
    width = prod(shape[1:])
    whole = ids.numel() % width == 0 if width else False
    return Wanted((ids.numel() // width, *shape[1:]) if rows and whole and shape else (ids.numel(),), ids)


def _digest(*tensors: torch.Tensor) -> str:
    from hashlib import sha256

    made = sha256()
    for tensor in tensors:
        made.update(tensor.numpy().tobytes())
    return made.hexdigest()


class _Owners:
    """Which source each element of each output belongs to."""

    def __init__(self, found: Probe, moved: Mapping[str, Moved]) -> None:
        from optimstate.installed_torch import torch

        self.names = list(found.sources)
        self.starts = torch.tensor([found.starts[name] for name in self.names], dtype=torch.int64)
        self._flat = {name: origin.ids.reshape(-1) for name, origin in moved.items()}
        self._shapes = {name: tuple(origin.ids.shape) for name, origin in moved.items()}
        self._owner = {
            name: torch.where(flat >= 0, torch.searchsorted(self.starts, flat, right=True) - 1, -1)
            for name, flat in self._flat.items()
        }
        self._sources = {
            name: [self.names[number] for number in owner.unique().tolist() if number >= 0]  # type: ignore[no-untyped-call]
            for name, owner in self._owner.items()
        }
        self._number = {name: number for number, name in enumerate(self.names)}

    def sources_of(self, output: str) -> list[str]:
        """The sources that an output takes elements of, in order."""
        return self._sources[output]

    def mask(self, output: str, source: str) -> torch.Tensor:
        """Which elements of an output, flat, are the source's."""
        return self._owner[output] == self._number[source]

    def own_ids(self, output: str, source: str) -> torch.Tensor:
        """For those elements, in the output's order, the place in the source."""
        number = self._number[source]
        return self._flat[output][self._owner[output] == number] - int(self.starts[number])

    def split(self, output: str, sources: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """For every element of an output, flat, its place in its source and the source's number among those given."""
        from optimstate.installed_torch import torch

        numbers = torch.full((len(self.names) + 1,), -1, dtype=torch.int64)  # the last is of elements from nowhere
        numbers[[self._number[name] for name in sources]] = torch.arange(len(sources))
        owner = self._owner[output]
        ids = torch.where(owner >= 0, self._flat[output] - self.starts[owner.clamp(min=0)], -1)
        return ids, numbers[owner]

    def relative(self, output: str, source: str) -> Wanted:
        """An output of one source alone."""
        from optimstate.installed_torch import torch

        flat = self._flat[output]
        start = int(self.starts[self._number[source]])
        return Wanted(self._shapes[output], torch.where(flat >= 0, flat - start, -1))

    def components(self) -> list[_Component]:
        """Sources and outputs that share elements, in the order of the sources."""
        parent: dict[str, str] = {name: name for name in self.names}

        def root(name: str) -> str:
            while parent[name] != name:
                parent[name] = parent[parent[name]]
                name = parent[name]
            return name

        for sources in self._sources.values():
            for name in sources[1:]:
                one, other = root(sources[0]), root(name)
                if one != other:
                    parent[max(one, other, key=self._number.__getitem__)] = min(
                        one, other, key=self._number.__getitem__
                    )
        members: dict[str, list[str]] = defaultdict(list)
        outputs: dict[str, list[str]] = defaultdict(list)
        for output, sources in self._sources.items():
            if sources:
                outputs[root(sources[0])].append(output)
        for name in self.names:
            members[root(name)].append(name)
        return [_Component(tuple(members[key]), tuple(outputs[key])) for key in members if key in outputs]
