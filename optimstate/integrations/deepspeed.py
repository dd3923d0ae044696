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

from optimstate.certificates.certificate import Certificate, refuse
from optimstate.certificates.digests import digest
from optimstate.errors import StateMismatchError
from optimstate.formats.deepspeed import universal
from optimstate.formats.deepspeed.zero import MASTER
from optimstate.formats.registry import open_checkpoint
from optimstate.formats.torch import zip as torch_zip
from optimstate.integrations import ignore_next_load
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
"""The name of a certificate's file in the folder of a checkpoint."""

_fragments: Any = import_module("deepspeed.utils")


class Resume:
    """Loads in place of `engine.load_checkpoint`, which loads everything else: counters, client state, scheduler.

    With ZeRO the checkpoint is migrated to a universal checkpoint, which DeepSpeed then loads, so that only the tensor
    that is being written is whole in memory. DeepSpeed has one step count for all parameters of a param group, so new
    parameters start with zero moments and the step of the others. Without ZeRO, `optimstate.resume` loads the
    checkpoint; the model's optimizer must not be wrapped (fp32).

    Args:
        engine: The engine, whose `load_checkpoint` is replaced.
        plan: What has changed, as a plan or the path of a plan file.
        schedule: `live` if, without ZeRO, the scheduler keeps its arguments and takes only the position.
        folder: Where the migrated checkpoint is written, on a disk that all ranks can read; by default next to the
            original. It is removed after loading.
        certificate: Certify the run in `save_checkpoint`, and check that the resumed run is the certified one: `True`
            for the file `certificate.json` in the checkpoint's folder, or the path of one. It certifies the whole
            parameters in the files, so the number of ranks does not matter. With ZeRO and without a plan, the engine's
            master weights and moments are also compared after loading.

    Attributes:
        notes: Remarks on the last migration that need attention.
        resumed: The outcome of the last resumption without ZeRO.
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
        """Restore the engine's own `load_checkpoint` and `save_checkpoint`."""
        self._engine.load_checkpoint, self._engine.save_checkpoint = self._load, self._save

    def _save_certified(self, save_dir: str, tag: str | None = None, *rest: Any, **options: Any) -> Any:
        """Call `save_checkpoint`; afterwards the first rank writes the certificate of the whole checkpoint."""
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
        """Check that the files are what was certified."""
        if not self._certifying:
            return None
        path = folder / CERTIFICATE if self._certificate is True else Path(str(self._certificate))
        if not path.is_file():
            raise StateMismatchError(
                f"{folder} has no certificate" if self._certificate is True else f"there is no certificate {path}",
                hint="Save with Resume(engine, certificate=True), or leave out the argument certificate.",
            )
        certificate = Certificate.read(path)

        def require() -> str:
            certificate.require(_certificate_of(folder, [group.names for group in certificate.groups]))
            return ""

        _from_first(require)
        return certificate

    def _check_live(self, certificate: Certificate) -> None:
        """Check that the engine has the certified master weights and moments."""
        problems = []
        for parameter, name in self._engine.param_names.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ds_shape: the whole, if ZeRO has sharded it
            for slot, wanted in certificate.state.get(name, {}).items():
                if slot == MASTER:
                    live = _fragments.safe_get_full_fp32_param(parameter)
                elif isinstance(wanted, str) and wanted.startswith("float"):
                    live = _fragments.safe_get_full_optimizer_state(parameter, slot)
                else:
                    continue
                if live is not None and digest(live.reshape(shape)) != wanted:
                    problems.append(Problem("certificate", f"{slot} is not what was certified", name, (name,)))
        refuse(problems)

    def __call__(self, load_dir: str, tag: str | None = None, **options: Any) -> tuple[Any, Any]:
        """Load a checkpoint, and return what `load_checkpoint` returns.

        Raises:
            StateMismatchError: There is no checkpoint, or without ZeRO the optimizer is wrapped.
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
        # The engine itself loads DeepSpeed's own schedulers, which are not torch's.
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
        """Write a checkpoint that the live engine can load. The first rank writes it; all provide new parameters.

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
        """The live fp32 value of a parameter, gathered from all ranks."""
        parameter = next(p for p, its in self._engine.param_names.items() if its == name)
        return _fragments.safe_get_full_fp32_param(parameter).detach().cpu().contiguous()


def _unwrapped(engine: Any) -> Any:
    """The optimizer of an engine without ZeRO.

    Raises:
        StateMismatchError: DeepSpeed has wrapped it.
    """
    from optimstate.installed_torch import torch

    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        raise StateMismatchError(
            f"DeepSpeed without ZeRO wraps the optimizer in a {type(engine.optimizer).__name__}",
            hint='Set "zero_optimization": {"stage": 1} in the configuration, with which every precision resumes.',
        )
    return engine.optimizer


def _certificate_of(folder: Path, names: Sequence[Sequence[str]]) -> Certificate:
    """The certificate of the files of a checkpoint.

    Args:
        folder: The folder of the checkpoint.
        names: The names of the optimizer's parameters, by group, for files that have none.
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
    """The options of a checkpoint's param groups; empty if the live optimizer has another number of groups."""
    groups = tree["optimizer"]["param_groups"]
    kept = tuple({key: value for key, value in group.items() if key != "params"} for group in groups)
    return kept if len(kept) == count else ()


def _with_new(made: Any, names: Iterable[str], values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A migrated tree with the live values of new parameters, and with zero moments at the step of their group."""
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
    """The result of a function that only the first rank calls, in all ranks.

    Raises:
        StateMismatchError: The first rank failed; raised in all other ranks.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    result: list[Any] = [None, None]  # the value, and the message of an error
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result[0] = make()
        except Exception as error:  # noqa: BLE001  # the other ranks have to be informed first
            failure, result[1] = error, str(error)
    dist.broadcast_object_list(result)
    if failure is not None:
        raise failure
    if result[1] is not None:
        raise StateMismatchError(f"rank 0 could not migrate the checkpoint: {result[1]}")
    return str(result[0])
