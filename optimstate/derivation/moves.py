"""From the origins of a function's outputs to moves, and from these to a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from optimstate.derivation.blocks import Blocks, blocked
from optimstate.derivation.derived import Derived
from optimstate.derivation.families import Moves
from optimstate.derivation.finishing import extras, finished, one_factor, scaling, shortest
from optimstate.derivation.layout import Search, joined
from optimstate.derivation.origins import Combined, Function, Moved, New, Probe, Source, Unexplained
from optimstate.derivation.owners import Component, Owners, taken_in_part
from optimstate.derivation.probe import probe
from optimstate.derivation.programs import Program, Wanted
from optimstate.derivation.proof import Terms, differences, roundings
from optimstate.derivation.templates import drops, generalised
from optimstate.derivation.threads import few_threads
from optimstate.describe import describe, few
from optimstate.errors import DerivationError
from optimstate.plan.language.base import Operation
from optimstate.plan.language.operations import OPERATIONS
from optimstate.plan.language.plan import Plan

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["Derivation"]

Shape = tuple[int, ...]


class Derivation:
    """One derivation, whose results are moves of a first and of a second pass.

    Args:
        function: From state dict to state dict.
        sources: Its sources.
        allow_drop: Whether sources may be in no output.
        probing: Finds the origins of the elements of its outputs.
        live: Values of the live model, if outputs may keep them.
        shared: Sources that are the same tensor as another -> that one; they may be in no output.
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
        self._search = Search()
        self._sums: dict[tuple[str, str], list[str]] = {}

    def run(self) -> Derived:
        """The plan, with a proof.

        Raises:
            DerivationError: No plan is equivalent to the function.
        """
        self.explain()
        plan = self.plan()
        self.prove(plan)
        return self.derived(plan)

    def derived(self, plan: Plan) -> Derived:
        """The result with a plan."""
        return Derived(plan, self.dropped, self.new, tuple(self.notes), self.calls, self.untouched)

    def explain(self) -> None:
        """Find the moves.

        Raises:
            DerivationError: There are none that do what the function does.
        """
        with few_threads(self.sources):
            self._explain_all(self.probing(self.function, self.sources))

    def _explain_all(self, found: Probe) -> None:
        self.calls = found.calls
        self._refuse(found)
        moved = {name: origin for name, origin in found.outputs.items() if isinstance(origin, Moved)}
        owners = Owners(found, moved)
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
        if part := taken_in_part(found):
            self.notes.append(f"a part of {_listed(part)} goes nowhere")

    def _note(self, live: Sequence[str]) -> None:
        """Add notes on sums, random rows, and outputs that keep some of the live model's values."""
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
        """A weighted sum of several tensors: they are averaged first, and then moved; returns the sources."""
        terms = tuple(found.owner(int(part.reshape(-1)[0])) for part, _ in origin.parts)
        shared = sorted(used & set(terms))
        if shared:
            raise DerivationError(f"{describe(shared[0])} is part of the sum {describe(name)} and of another output")
        shape = self.sources[terms[0]].shape
        parts = [part.reshape(-1) - found.starts[term] for term, (part, _) in zip(terms, origin.parts, strict=True)]
        layouts = {(self.sources[term].shape, tuple(part.tolist())) for term, part in zip(terms, parts, strict=True)}
        program = (
            self._search.cut(shape, [Wanted(tuple(origin.parts[0][0].shape), parts[0])]) if len(layouts) == 1 else None
        )
        if program is None:
            raise DerivationError(
                f"{describe(name)} is a sum of {len(terms)} tensors that are laid out in different ways"
            )
        factors = [factor for _, factor in origin.parts]
        equal = all(abs(factor * len(factors) - 1) < 1e-6 for factor in factors) and len(factors) > 1
        joins = OPERATIONS["mean"](0) if equal else OPERATIONS["average"](tuple(map(shortest, factors)))
        extra = self._extras(Moved(origin.parts[0][0], 1.0, origin.shift, 0.0, origin.dtype), terms)
        self.first.append(Moves(terms, (name,), (joins, *program[0], *extra)))
        kept = "approximate" if min(factors) >= 0 and abs(sum(factors) - 1) < 1e-6 else "left behind"
        self._sums.setdefault(("means" if equal else "sums", kept), []).append(name)
        return set(terms)

    def _empty(self, found: Probe, used: set[str]) -> set[str]:
        """Match tensors without elements, which have no tags, by name or else by shape; returns the sources."""
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

    def _explain(self, component: Component, moved: Mapping[str, Moved], owners: Owners) -> None:
        if len(component.sources) == 1 or len(component.outputs) > 1:
            self._refuse_factors(component, moved)
        if len(component.sources) == 1:
            self._fan_out(component.sources[0], component.outputs, moved, owners)
        elif len(component.outputs) == 1:
            self._gather(component.sources, component.outputs[0], moved, owners)
        else:
            self._across(component, moved, owners)

    def _refuse_factors(self, component: Component, moved: Mapping[str, Moved]) -> None:
        for name in component.outputs:
            if moved[name].factors is not None:
                of = ", ".join(map(describe, component.sources[:4]))
                reason = "its elements are not all multiplied by one number"
                raise DerivationError(f"{describe(name)} is not a layout of the sources: {reason} (it depends on {of})")

    def _fan_out(self, source: str, outputs: Sequence[str], moved: Mapping[str, Moved], owners: Owners) -> None:
        shape = self.sources[source].shape
        wanted = [owners.relative(name, source) for name in outputs]
        alike = {(*map(str, self._extras(moved[name], [source])), moved[name].fill) for name in outputs}
        found = self._search.cut(shape, wanted) if len(alike) == 1 else None
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
            single = self._search.cut(shape, [item])
            if single is None:
                raise self._unsayable(name, [source])
            self.second.append(Moves((copy,), (name,), self._finished(single[0], moved[name], [source])))

    def _gather(self, sources: Sequence[str], output: str, moved: Mapping[str, Moved], owners: Owners) -> None:
        found = self._joined(sources, output, moved, owners) if moved[output].factors is None else None
        if found is None:
            self._assemble(sources, output, moved, owners)
            return
        program, order = found
        self._add(tuple(sources[number] for number in order), (output,), program)

    def _assemble(self, sources: Sequence[str], output: str, moved: Mapping[str, Moved], owners: Owners) -> None:
        """Sources that are moved separately, with growth for elements between them, and joined in a second stage."""
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
        if isinstance(origin.fill, str):  # the parts were scaled before
            closing = tuple(step for step in closing if step.KEY == "cast")
        self.second.append(Moves(tuple(taken), (output,), (*blocks.joining, *closing)))

    def _parts(
        self, blocks: Blocks, sources: Sequence[str], origin: Moved, ids: torch.Tensor
    ) -> list[tuple[str, Program]] | None:
        """For each block its source and the operations that make it; None if there are none."""
        parts: list[tuple[str, Program]] = []
        for number, block in blocks.parts:
            inside = ids.reshape(blocks.shape)[block]
            wanted = Wanted(tuple(inside.shape), inside.reshape(-1))
            found = self._search.cut(self.sources[sources[number]].shape, [wanted])
            factor = one_factor(origin, blocks.shape, block, wanted)
            if found is None or factor is None:
                return None
            parts.append((sources[number], (*found[0], *scaling(factor))))
        return parts

    def _across(self, component: Component, moved: Mapping[str, Moved], owners: Owners) -> None:
        """Many to many: every source is cut into the parts of outputs, which are joined in a second stage."""
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
            found = self._search.cut(self.sources[source].shape, wanted)
            if found is None:
                raise self._unsayable(takers[0], [source])
            program, order = found
            names = tuple(f"{source}.part{number}" for number in range(len(order)))
            for place, number in enumerate(order):
                pieces[source, takers[number]] = names[place]
            self.first.append(Moves((source,), names, program))
        for name in component.outputs:
            sources = owners.sources_of(name)
            shapes: list[Shape] = []
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
                single = self._search.cut(shapes[0], [item])
                result: tuple[Program, tuple[int, ...]] | None = None if single is None else (single[0], (0,))
            else:
                result = joined(shapes, item, owner)
            if result is None:
                raise self._unsayable(name, sources)
            program, order = result
            taken = tuple(pieces[sources[number], name] for number in order)
            self.second.append(Moves(taken, (name,), self._finished(program, moved[name], sources)))

    def _joined(
        self, sources: Sequence[str], output: str, moved: Mapping[str, Moved], owners: Owners
    ) -> tuple[Program, tuple[int, ...]] | None:
        shapes = [self.sources[name].shape for name in sources]
        ids, owner = owners.split(output, sources)
        found = self._search.grown(shapes, Wanted(tuple(moved[output].ids.shape), ids), owner)
        return None if found is None else (self._finished(found[0], moved[output], sources), found[1])

    def _finished(self, program: Program, origin: Moved, sources: Sequence[str]) -> Program:
        return finished(program, origin, self._dtypes(sources))

    def _extras(self, origin: Moved, sources: Sequence[str]) -> tuple[Operation, ...]:
        return extras(origin, self._dtypes(sources))

    def _dtypes(self, sources: Sequence[str]) -> set[str]:
        return {self.sources[name].dtype for name in sources}

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
    return few(list(map(describe, names)), 5)


def _block(shape: Shape, ids: torch.Tensor) -> Wanted:
    """A part of a source with its elements in order; if possible it differs only in the first dimension."""
    rows = shape[0] if shape else 1
    width = prod(shape[1:])
    whole = ids.numel() % width == 0 if width else False
    return Wanted((ids.numel() // width, *shape[1:]) if rows and whole and shape else (ids.numel(),), ids)
