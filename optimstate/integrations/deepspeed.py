"""DeepSpeed: `engine.load_checkpoint` of a changed model, in every stage of ZeRO and on any number of ranks.

```python
Resume(engine, plan="plan.toml")
engine.load_checkpoint("checkpoints")
```
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from optimstate.certificates.certificate import Certificate
from optimstate.certificates.digests import digest
from optimstate.errors import StateMismatchError
from optimstate.formats.deepspeed import universal
from optimstate.formats.deepspeed.zero import MASTER
from optimstate.formats.registry import open_checkpoint
from optimstate.formats.torch import zip as torch_zip
from optimstate.integrations.accelerate import ignore_next_load
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.migration import Like, Target
from optimstate.problems import Problem
from optimstate.resuming import Resumed, resume
from optimstate.state.names import names_in
from optimstate.state.sections import find_sections
from optimstate.tensors.compute import filled, to_torch
from optimstate.tensors.lazy import LazyTensor

__all__ = ["CERTIFICATE", "Resume"]

CERTIFICATE = "certificate.json"
"""The file of a certificate in the folder of a checkpoint."""

_fragments: Any = import_module("deepspeed.utils")


class Resume:
    """Loads in place of `engine.load_checkpoint`, which goes on with everything else: counters, client state, schedule.

    With ZeRO the checkpoint is migrated to a universal one, which DeepSpeed then loads on its own: nothing but what is
    written is ever whole in memory. DeepSpeed keeps one step for the parameters of a param group, so new ones have
    moments of zero and the step of the others. Without ZeRO it is `optimstate.resume`, for a model whose optimizer is
    not wrapped (fp32).

    Args:
        engine: On which it takes the place of `load_checkpoint`.
        plan: What has changed, as a plan or the path of a plan file.
        schedule: Without ZeRO, `live` lets the schedule keep its arguments and take the position alone.
        folder: Where the migrated checkpoint is written, on a disk that all ranks see; beside the other by default. It
            is removed after loading.
        certificate: Let `save_checkpoint` certify the run, and demand that what is resumed is what was certified:
            `True` for the file `certificate.json` in the checkpoint's folder, or the path of one. It speaks of the
            files, whole parameters at a time, so that the number of ranks does not matter; with ZeRO and without a
            plan the engine's masters and moments are compared too after loading.

    Attributes:
        notes: What deserves attention in the last migration.
        resumed: What the last resumption without ZeRO did.
    """

    notes: tuple[str, ...] = ()
    resumed: Resumed | None = None

    def __init__(
        self,
        engine: Any,
        plan: Plan | str | PathLike[str] | None = None,
        *,
        schedule: Literal["checkpoint", "live"] | None = None,
        folder: str | PathLike[str] | None = None,
        certificate: Literal[False, True] | str | PathLike[str] = False,
    ) -> None:
        self._engine, self._plan, self._schedule, self._folder = engine, Plan.of(plan), schedule, folder
        self._certificate, self._certifying = certificate, certificate is not False
        self._load, self._save = engine.load_checkpoint, engine.save_checkpoint
        engine.load_checkpoint = self
        if self._certifying:
            engine.save_checkpoint = self._save_certified

    def remove(self) -> None:
        """Let the engine load and save by itself again."""
        self._engine.load_checkpoint, self._engine.save_checkpoint = self._load, self._save

    def _save_certified(self, save_dir: str, tag: str | None = None, *rest: Any, **options: Any) -> Any:
        """What `save_checkpoint` returns; the first rank writes the certificate of what all have written."""
        tag = str(tag if tag is not None else f"global_step{self._engine.global_steps}")
        found = self._save(save_dir, tag, *rest, **options)
        folder = Path(save_dir, tag)

        def write() -> str:
            engine = self._engine
            names = () if engine.zero_optimization() else names_in(_unwrapped(engine), engine.module)
            _certificate_of(folder, names).write(folder / CERTIFICATE)
            return ""

        _from_first(write)
        return found

    def _check(self, folder: Path) -> Certificate | None:
        """Demand that the files are what was certified."""
        if not self._certifying:
            return None
        path = folder / CERTIFICATE if self._certificate is True else Path(str(self._certificate))
        if not path.is_file():
            raise StateMismatchError(
                f"{folder} has no certificate" if self._certificate is True else f"there is no certificate {path}",
                hint="Save it with Resume(engine, certificate=True), or leave certificate out.",
            )
        certificate = Certificate.read(path)

        def require() -> str:
            certificate.require(_certificate_of(folder, [group.names for group in certificate.groups]))
            return ""

        _from_first(require)
        return certificate

    def _check_live(self, certificate: Certificate) -> None:
        """Demand that the engine has the masters and moments that were certified."""
        wrong = []
        for parameter, name in self._engine.param_names.items():
            for slot, wanted in certificate.state.get(name, {}).items():
                if slot == MASTER:
                    live = _fragments.safe_get_full_fp32_param(parameter)
                elif isinstance(wanted, str) and wanted.startswith("float"):
                    live = _fragments.safe_get_full_optimizer_state(parameter, slot)
                else:
                    continue
                if (
                    live is not None
                    and digest(live.reshape(parameter.ds_shape if _is_sharded(parameter) else parameter.shape))
                    != wanted
                ):
                    wrong.append(Problem("certificate", f"{slot} is not what was certified", name, (name,)))
        if wrong:
            raise StateMismatchError(
                "the resumed run is not the one that was certified:\n" + "\n".join(map(str, wrong)), problems=wrong
            )

    def __call__(self, load_dir: str, tag: str | None = None, **options: Any) -> tuple[Any, Any]:
        """What `load_checkpoint` returns.

        Raises:
            StateMismatchError: There is no checkpoint, or the optimizer is wrapped though there is no ZeRO.
            MigrationError: The plan does not fit; nothing is changed.
        """
        latest = Path(load_dir, "latest")
        if tag is None and latest.is_file():
            tag = latest.read_text(encoding="utf-8").strip()
        if tag is None or not Path(load_dir, tag).is_dir():
            raise StateMismatchError(f"there is no checkpoint {tag or 'latest'} in {load_dir}")
        certificate = self._check(Path(load_dir, tag))
        if not self._engine.zero_optimization():
            return self._without_zero(load_dir, tag, options)
        beside = Path(self._folder or load_dir)
        place = Path(_from_first(lambda: tempfile.mkdtemp(prefix=f".{tag}-", dir=beside)))
        config = self._engine._config
        before = config.load_universal_checkpoint
        try:
            buffers = self._migrate(Path(load_dir, tag), place / "migrated")
            config.load_universal_checkpoint = True
            found: tuple[Any, Any] = self._load(str(place), tag="migrated", **options)
            for name, live in self._engine.module.named_buffers():
                if isinstance(value := buffers.get(name), LazyTensor):
                    live.copy_(to_torch(value))
            if certificate is not None and self._plan == Plan():
                self._check_live(certificate)
            return str(Path(load_dir, tag)), found[1]
        finally:
            config.load_universal_checkpoint = before
            _from_first(lambda: _removed(place))

    def _without_zero(self, load_dir: str, tag: str, options: dict[str, Any]) -> tuple[Any, Any]:
        from optimstate.installed_torch import torch

        engine = self._engine
        optimizer = _unwrapped(engine)
        saved: Any = next(iter(open_checkpoint(Path(load_dir, tag)).tree.values()))
        # DeepSpeed's own schedules are none of torch's, and the engine loads them itself.
        is_torchs = isinstance(engine.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
        has_schedule = is_torchs and bool(saved.get("lr_scheduler"))
        self.resumed = resume(
            Path(load_dir, tag),
            model=engine.module,
            optimizer=optimizer,
            scheduler=engine.lr_scheduler if has_schedule else None,
            plan=self._plan,
            schedule=self._schedule,
        )
        ignore_next_load(optimizer)
        if has_schedule:
            ignore_next_load(engine.lr_scheduler)
        engine.load_module_state_dict = lambda *_, **__: delattr(engine, "load_module_state_dict")
        found: tuple[Any, Any] = self._load(load_dir, tag=tag, **options)
        return found

    def _migrate(self, source: Path, destination: Path) -> dict[str, Any]:
        """Write what the live engine can load; the first rank writes, and all give it the values of what is new.

        Returns:
            The buffers, which DeepSpeed does not load.
        """
        groups = self._engine._get_zero_param_shapes()
        shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        tree = open_checkpoint(source).tree
        target = Target(tuple(map(tuple, groups)), _options(tree, len(groups)), shapes)
        made, _, notes = apply_plan(self._plan, tree, like=Like(tuple(shapes), {"optimizer": target}))
        values = {name: self._master(name) for name in shapes if name not in made["model"]}
        zero = {
            **made["optimizer"]["zero"],
            "zero_stage": self._engine.zero_optimization_stage(),
            "partition_count": self._engine.dp_world_size,
        }

        def write() -> str:
            whole = _with_new(made, shapes, values, destination.parent)
            whole["optimizer"] = {**whole["optimizer"], "zero": zero}
            notes.extend(universal.write(whole, destination))
            return ""

        _from_first(write)
        self.notes = tuple(notes)
        return {name: value for name, value in made["model"].items() if name not in shapes}

    def _master(self, name: str) -> Any:
        """The live fp32 value of a parameter, put together from all ranks."""
        parameter = next(p for p, its in self._engine.param_names.items() if its == name)
        return _fragments.safe_get_full_fp32_param(parameter).detach().cpu().contiguous()


def _unwrapped(engine: Any) -> Any:
    """The optimizer of an engine without ZeRO.

    Raises:
        StateMismatchError: It is wrapped.
    """
    from optimstate.installed_torch import torch

    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        raise StateMismatchError(
            f"DeepSpeed without ZeRO wraps the optimizer in a {type(engine.optimizer).__name__}",
            hint='Set "zero_optimization": {"stage": 1} in the configuration, with which every precision resumes.',
        )
    return engine.optimizer


def _is_sharded(parameter: Any) -> bool:
    """Whether ZeRO has cut a parameter, which then has another shape than it is."""
    return hasattr(parameter, "ds_shape")


def _certificate_of(folder: Path, names: Sequence[Sequence[str]]) -> Certificate:
    """What the files of a checkpoint hold.

    Args:
        folder: Of the checkpoint.
        names: Of the optimizer's parameters, by group, for files that have none.
    """
    tree = open_checkpoint(folder).tree
    sections = {section.kind: section for section in reversed(find_sections(tree))}
    state = sections["optimizer"].optimizer()
    if not state.is_named:
        state = state.named([name for group in names for name in group])
    files = [tree, *(node for node in tree.values() if isinstance(node, Mapping))]
    schedule = next((node["lr_scheduler"] for node in files if node.get("lr_scheduler")), None)
    weights = sections["model"].tensors() if "model" in sections else None
    return Certificate.of_parts(weights, state, schedule=schedule)


def _options(tree: Any, count: int) -> tuple[Mapping[str, Any], ...]:
    """The options of the param groups of a checkpoint, where the live optimizer has as many."""
    groups = tree["optimizer"]["param_groups"]
    kept = tuple({key: value for key, value in group.items() if key != "params"} for group in groups)
    return kept if len(kept) == count else ()


def _with_new(made: Any, names: Iterable[str], values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A migrated tree with the live values of new parameters, and moments of zero at the step of their group."""
    from optimstate.installed_torch import torch

    optimizer = made["optimizer"]
    weights, state = dict(made["model"]), dict(optimizer["state"])
    if values:
        torch.save(dict(values), folder / "new.pt")
        weights |= torch_zip.read(folder / "new.pt").tree
    group_of = {name: group["params"] for group in optimizer["param_groups"] for name in group["params"]}
    for name in names:
        beside = next((state[other] for other in group_of[name] if state.get(other)), None)
        beside = beside or next((slots for slots in state.values() if slots), {})
        if not state.get(name):
            state[name] = {slot: _zero(value, weights[name]) for slot, value in beside.items() if slot != MASTER}
            state[name][MASTER] = weights[name]
    order = [*names, *(name for name in weights if name not in group_of)]
    return {**made, "model": {name: weights[name] for name in order}, "optimizer": {**optimizer, "state": state}}


def _zero(value: Any, weight: LazyTensor) -> Any:
    moment = isinstance(value, LazyTensor) and value.shape
    return filled(weight, weight.shape, 0.0) if moment else value


def _removed(folder: Path) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    return str(folder)


def _from_first(make: Callable[[], str]) -> str:
    """What the first rank makes, in all of them; a failure is raised in all.

    Raises:
        StateMismatchError: The first rank failed.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    said: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            said[0] = make()
        except Exception as error:  # noqa: BLE001  # the others wait to be told
            failure, said[1] = error, str(error)
    dist.broadcast_object_list(said)
    if failure is not None:
        raise failure
    if said[1] is not None:
        raise StateMismatchError(f"rank 0 could not migrate the checkpoint: {said[1]}")
    return str(said[0])
