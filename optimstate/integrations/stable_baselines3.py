"""Stable-Baselines3: an algorithm with a changed policy continues from a file that `model.save` wrote.

```python
model = PPO("MlpPolicy", env, policy_kwargs=...)
resume_algorithm(model, "ppo.zip", plan="plan.toml")
model.learn(10_000, reset_num_timesteps=False)
```
"""

from __future__ import annotations

import json
import zipfile
from os import PathLike
from pathlib import Path
from typing import Any

from optimstate.hooks import certify
from optimstate.plan.language.plan import Plan
from optimstate.resuming import Resumed, resume
from optimstate.resuming.certified import Given

__all__ = ["certify_algorithm", "resume_algorithm"]


def certify_algorithm(algorithm: Any) -> None:
    """Certify the policy and its optimizer in every later `algorithm.save`.

    Args:
        algorithm: PPO, A2C and others whose policy has one optimizer.
    """
    policy = algorithm.policy
    policy.optimizer.register_state_dict_post_hook(certify(policy))


def resume_algorithm(
    algorithm: Any,
    path: str | PathLike[str],
    *,
    plan: Plan | str | PathLike[str] | None = None,
    saved: Any = None,
    certificate: Given = False,
) -> Resumed:
    """Load the policy, its optimizer and the number of steps.

    Args:
        algorithm: A new algorithm: PPO, A2C and others whose policy has one optimizer.
        path: A file that `algorithm.save` wrote; nothing in it is executed.
        plan: What has changed, as a plan or the path of a plan file.
        saved: Names for the file's optimizer, in the order of its groups, if it has none.
        certificate: Check that policy and optimizer are the certified ones: `True` for the certificate in the file, or
            the path of one. Call `certify_algorithm(model)` before `model.save` to write it.

    Raises:
        OptimStateError: Any error of `optimstate.resume`; nothing is changed.
    """
    policy = algorithm.policy
    file = Path(path) if Path(path).suffix or Path(path).is_file() else Path(path).with_suffix(".zip")
    found = resume(
        file,
        model={"policy.pth": policy},
        optimizer={"policy.optimizer.pth": policy.optimizer},
        plan=plan,
        saved=saved,
        certificate=certificate,
    )
    with zipfile.ZipFile(file) as archive:
        data = json.loads(archive.read("data"))
    for key in ("num_timesteps", "_n_updates", "_episode_num"):
        if isinstance(data.get(key), int) and hasattr(algorithm, key):
            setattr(algorithm, key, data[key])
    return found
