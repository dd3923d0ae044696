"""PPO goes on with a renamed and widened policy; the oracle is state moved by hand."""

import sys
from pathlib import Path

import gymnasium
import numpy
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from optimstate import Plan
from optimstate.integrations.stable_baselines3 import resume_algorithm

HERE, found = Path(sys.argv[1]), []


class Walk(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (3,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, **_):
        self.x = numpy.zeros(3, numpy.float32)
        return self.x, {}

    def step(self, action):
        self.x = numpy.clip(self.x + (1 if action else -1), -9, 9).astype(numpy.float32)
        return self.x, -float(abs(self.x[0] - 3)), bool(abs(self.x[0]) > 8), False, {}


def agent(layers: list[int]) -> PPO:
    return PPO("MlpPolicy", Walk(), n_steps=16, batch_size=8, seed=1, device="cpu", policy_kwargs={"net_arch": layers})


def losses(model: PPO) -> list[float]:
    found.clear()
    model.set_random_seed(2)
    model.set_logger(logger := Logger(None, []))
    logger.record = lambda key, value, *_, **__: found.extend([value] if key == "train/loss" else [])
    model.learn(32, reset_num_timesteps=False)
    return list(found)


(old := agent([8])).learn(32)
old.save(HERE / "ppo.zip")
PLAN = Plan.from_toml(
    '[[rule]]\nfrom = "mlp_extractor.{net}.0.{p}"\nto = "mlp_extractor.{net}.2.{p}"\n'
    '[[rule]]\nfresh = "mlp_extractor.*.0.*"'
)
new, hand = agent([3, 8]), agent([3, 8])
resume_algorithm(new, HERE / "ppo.zip", plan=PLAN)
parameters, was = dict(hand.policy.named_parameters()), dict(old.policy.named_parameters())
for name, p in parameters.items():
    source = was.get(name.replace(".2.", ".0.") if ".2." in name else "" if ".0." in name else name)
    if source is not None:
        p.data.copy_(source.data)
        hand.policy.optimizer.state[p] = {k: v.clone() for k, v in old.policy.optimizer.state[source].items()}
hand.num_timesteps, hand._n_updates = old.num_timesteps, old._n_updates
assert new.num_timesteps == 32
assert losses(new) == losses(hand)
print("the same losses:", found)
