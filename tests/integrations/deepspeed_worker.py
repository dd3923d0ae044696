"""DeepSpeed in a process of its own: `python -m tests.integrations.deepspeed_worker FOLDER OLD MORE OPTIONS`.

Prints the losses of a run of ZeRO after each change, and runs the example with ZeRO and without.
"""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.integrations.changes import CHANGES, TOKENS, Net, changed, plan

EXAMPLE = Path(__file__).parents[2] / "examples" / "deepspeed_load_checkpoint.py"


def main() -> None:
    folder, old_steps, more, options = sys.argv[1:]
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops

    from optimstate.integrations.deepspeed import Resume

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for several processes
    config: dict[str, Any] = {"train_batch_size": 2, "zero_optimization": {"stage": 2}, "gradient_clipping": 0.0}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}

    def engine(net: Net) -> Any:
        optimizer = torch.optim.AdamW(net.parameters(), **json.loads(options))
        return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]

    def train(running: Any, steps: int) -> None:
        for _ in range(steps):
            running.backward(running(TOKENS)["loss"])
            running.step()

    old = engine(Net())
    train(old, int(old_steps))
    old.save_checkpoint(folder)
    found = {}
    for change in CHANGES:
        net = changed(change)
        running = engine(net)
        Resume(running, plan(change))
        running.load_checkpoint(folder)
        train(running, int(more))
        found[change] = net.losses
    for stage in ("2", "0"):
        sys.argv = [str(EXAMPLE), str(Path(folder, f"example-{stage}")), stage]
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    print("losses", json.dumps(found))


if __name__ == "__main__":
    main()
