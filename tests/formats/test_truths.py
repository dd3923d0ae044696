"""What is read from every fixture is what the writing framework had in memory: names, groups, slots, values."""

from __future__ import annotations

import pytest

from optimstate.formats.registry import open_checkpoint
from optimstate.surgery.inspection.inspecting import inspect
from tests import corpus
from tests.formats.truths import judge

# What a file does not hold, or holds under names of its own: nothing a reader could give back.
NOT_IN_THE_FILE = {
    "accelerate/save_state_adamw": ("model: no lm_head.weight",),  # tied: safetensors keeps one of the two
    "transformers/gpt2_adamw": ("model: no lm_head.weight",),
    "transformers/llama_tied_sharded": ("model: no lm_head.weight",),
    "transformers/peft_lora_llama": ("model: no base_model.",),  # only the adapter is saved
    "fsdp1/raw_flatparam_per_rank": ("3 parameters, the truth has 12", "no model was found"),
    "dcp/hf_storage_writer": (": no step, only",),  # tensors only, no groups, no steps
    "deepspeed/z0_ws1_bf16_adamw": ("8 parameters, the truth has 0",),  # the truth has no optimizer state either
    # Records of tensor subclasses: shown with dtype and shape, not turned into plain tensors.
    "torchao/adamw8bit": ("cannot be compared with OptimState8bit",),
}

CASES = [case for case in corpus.all_cases() if case.truth_path and not case.is_hostile]


@pytest.mark.parametrize(
    "case", [case for case in CASES if {"state", "optimizers", "model"} & set(case.truth())], ids=str
)
def test_what_is_read_is_what_was_saved(case: corpus.Case) -> None:
    verdict = judge(open_checkpoint(case.entry).tree, case.truth())
    known = NOT_IN_THE_FILE.get(case.name, ())
    unexpected = [line for line in verdict.wrong if not any(part in line for part in known)]
    assert unexpected == []
    assert bool(known) == bool(verdict.wrong), "the exception is no longer needed"
    assert verdict.parameters or verdict.tensors or known


@pytest.mark.parametrize("case", corpus.all_cases(), ids=str)
def test_inspect_lists_every_section_with_its_steps(case: corpus.Case) -> None:
    report = inspect(case.entry, parameters=True)
    truth = case.truth() if case.truth_path else {}
    optimizers = [section for section in report.sections if section.kind == "optimizer"]
    if truth.get("state") and ": no step, only" not in NOT_IN_THE_FILE.get(case.name, ()):
        assert optimizers
        expected = {
            f"{slots['step'].get('first', [slots['step'].get('value')])[0]:g}"
            for slots in truth["state"].values()
            if isinstance(slots.get("step"), dict)
        }
        assert any(expected <= set(section.steps) for section in optimizers)
        for section in optimizers:
            assert len(section.parameters) == sum(group.parameters for group in section.groups)
    assert report.to_json()
