"""DeepSpeed in processes of its own: `python -m tests.integrations.deepspeed_worker FOLDER WORLD OPTIONS` forks them.

One rank: losses of ZeRO after each change, the example with ZeRO and without, a certified run without. Two: the example
in stage 3 and a certified run with ZeRO. What the first rank found goes to FOLDER/found.json.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.integrations.changes import CHANGES, TOKENS, Net, changed, plan
from tests.integrations.deepspeed_certified import certified
from tests.support import forked, free_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "deepspeed_load_checkpoint.py"
STEPS = 3
"""Steps before a checkpoint and after it."""


def losses_after_changes(folder: Path, options: dict[str, Any]) -> dict[str, list[float]]:
    """The losses of a run of ZeRO after each change, in the order of the changes."""
    import deepspeed

    from optimstate.integrations.deepspeed import Resume

    config: dict[str, Any] = {"train_batch_size": 2, "zero_optimization": {"stage": 2}, "gradient_clipping": 0.0}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}

    def engine(net: Net) -> Any:
        optimizer = torch.optim.AdamW(net.parameters(), **options)
        return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]

    def train(running: Any) -> None:
        for _ in range(STEPS):
            running.backward(running(TOKENS)["loss"])
            running.step()

    old = engine(Net())
    train(old)
    old.save_checkpoint(str(folder))
    found = {}
    for change in CHANGES:
        net = changed(change)
        running = engine(net)
        Resume(running, plan(change))
        running.load_checkpoint(str(folder))
        train(running)
        found[change] = net.losses
    return found


def example(folder: Path, stage: int) -> None:
    """Run the example, which holds its losses against those of a run that was changed by hand."""
    sys.argv = [str(EXAMPLE), str(folder), str(stage)]
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def work(rank: int, world: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    found: dict[str, Any] = {}
    if world == 1:
        found["losses"] = losses_after_changes(folder / "changes", options)
        for stage in (2, 0):
            example(folder / f"example-{stage}", stage)
    else:
        example(folder / "example-3", 3)
    found["said"] = certified(folder / "certified", 0 if world == 1 else 2)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def main() -> None:
    folder, world, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    warnings.simplefilter("ignore")
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer  # imported once, for all ranks

    import optimstate.integrations.deepspeed  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for several processes
    port = free_port()
    sys.exit(forked(work, [(rank, world, port, folder, options) for rank in range(world)]))


if __name__ == "__main__":
    main()
