"""The converters of the installed transformers, read off: both ways, and every model type that can be built small."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimstate.derivation.derive import derive
from optimstate.derivation.transformers import Shrinking, derive_transformers, live_model, to_hub, to_live
from optimstate.errors import DerivationError
from optimstate.plan.apply.execute import execute_model
from optimstate.plan.solve.planner import plan_model
from tests.derivation.coverage import covered

transformers = pytest.importorskip("transformers")
revert_weight_conversion = pytest.importorskip("transformers.core_model_loading").revert_weight_conversion

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
    _are_equal(hub, revert_weight_conversion(model, dict(live)))
    saving, loading = derive(to_hub(model), live), derive(to_live(model), hub)
    saved = execute_model(plan_model(saving.plan, live).sections["model"], live)
    _are_equal(saved, hub)
    back = execute_model(plan_model(loading.plan, hub).sections["model"], hub)
    _are_equal(back, live)


def _are_equal(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_a_model_is_shrunk_without_a_copy_of_its_weights() -> None:
    model = small("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shrinking = Shrinking(model, to_hub)
    assert all(value.is_meta for value in shrinking.model.state_dict().values())
    given = {n: torch.empty([{32: 8}.get(size, size) for size in v.shape]) for n, v in before.items()}
    made = shrinking.at({32: 8})(given)
    assert made["model.layers.1.block_sparse_moe.experts.3.w1.weight"].shape == (48, 8)
    assert made["model.embed_tokens.weight"] is given["model.embed_tokens.weight"]
    _are_equal(model.state_dict(), before)


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


@pytest.mark.parametrize(
    ("kind", "result"), [("gte", "exact"), ("molmo2_text", "exact"), ("llama", "same"), ("align_text_model", "unbuilt")]
)
def test_a_sample_of_the_coverage(kind: str, result: str) -> None:
    """All types: `python -m tests.derivation.coverage`."""
    line = covered(kind, seconds=60)
    assert line["result"] == result, line
