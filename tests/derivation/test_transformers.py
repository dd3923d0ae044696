"""The converters of the installed transformers, read off: both ways, and every model type that can be built small."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimstate.derivation.derive import derive
from optimstate.derivation.transformers import derive_transformers, live_model, to_hub, to_live
from optimstate.errors import DerivationError
from optimstate.plan.apply.execute import execute_model
from optimstate.plan.solve.planner import plan_model
from tests.derivation.coverage import covered

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip


def small(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind, **SMALL, **MIXTURES.get(kind, {}))
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", [*MIXTURES, "llama", "gpt2"])
def test_both_layouts_are_derived_and_give_the_librarys_own_tensors(kind: str) -> None:
    torch.manual_seed(0)
    model = small(kind)
    live = {name: value for name, value in model.state_dict().items() if name in dict(model.named_parameters())}
    hub = dict(to_hub(model)(dict(live)))
    saving, loading = derive(to_hub(model), live), derive(to_live(model), hub)
    saved = execute_model(plan_model(saving.plan, live).sections["model"], live)
    assert saved.keys() == hub.keys()
    assert all(torch.equal(saved[name], value) for name, value in hub.items())
    back = execute_model(plan_model(loading.plan, hub).sections["model"], hub)
    assert back.keys() == live.keys()
    assert all(torch.equal(back[name], value) for name, value in live.items())


def test_mixtral_takes_three_rules_each_way() -> None:
    for to in ("live", "hub"):
        assert len(list(derive_transformers(small("mixtral"), to=to).plan.all_rules())) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_a_checkpoint_in_the_layout_that_is_asked_for_is_told(kind: str) -> None:
    model = small(kind)
    live = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    hub = {name: tuple(value.shape) for name, value in to_hub(model)(dict(model.state_dict())).items()}
    for to, stored, other in (("live", live, hub), ("hub", hub, live)):
        derived = derive_transformers(model, to=to, shapes=stored)  # type: ignore[arg-type]
        assert derived.plan == derive_transformers(model, to=to, shapes=other).plan  # type: ignore[arg-type]
        told = any(f"stands in the {to} layout already" in note for note in derived.notes)
        assert told is (kind == "mixtral"), "Llama has one layout"


def test_a_folder_without_a_configuration_is_refused(tmp_path: Any) -> None:
    with pytest.raises(DerivationError, match="transformers builds no model"):
        live_model(tmp_path)


def test_a_model_of_47_billion_elements_is_derived_without_any_of_them() -> None:
    config = transformers.MixtralConfig(architectures=["MixtralForCausalLM"], num_hidden_layers=3)
    model = live_model(config)
    live = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    hub = {name: tuple(value.shape) for name, value in to_hub(model)(dict(model.state_dict())).items()}
    for to, sources, targets in (("hub", live, hub), ("live", hub, live)):
        derived = derive_transformers(model, to=to)  # type: ignore[arg-type]
        assert len(list(derived.plan.all_rules())) == 3
        with torch.device("meta"):
            given = {name: torch.empty(shape) for name, shape in sources.items()}
        moves = plan_model(derived.plan, given).sections["model"].moves
        assert {move.target: move.expression.shape for move in moves if move.expression} == targets
        assert any("shrunk dimensions" in note for note in derived.notes)


@pytest.mark.parametrize(("kind", "result"), [("gte", "exact"), ("llama", "same"), ("align_text_model", "unbuilt")])
def test_a_sample_of_the_coverage(kind: str, result: str) -> None:
    """All types: `python -m tests.derivation.coverage`."""
    line = covered(kind, seconds=60)
    assert line["result"] == result, line
