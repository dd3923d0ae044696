"""Where an older torch cannot serve as the oracle, because ours does what newer releases do; docs/versions.md lists it.

Each is found by asking the installed torch, as in `optimstate.installed_torch`, which has what ours does differently.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from optimstate.installed_torch import HAS_MUON, accepts, adagrad_starts_late

__all__ = [
    "ADAM_TELLS_ITS_DECAY",
    "KEEPS_TENSOR_RATES",
    "SCHEDULERS_ARE_VERBOSE",
    "SQUEEZES_BETAS",
    "SWALR_KEEPS_STRATEGY",
    "WRITES_SAFETENSORS_SHARDS",
    "adagrad_of_2_10",
    "adam_tells_its_decay",
    "muon",
    "safetensors_shards",
    "torchs_scheduler",
]


def _squeezes_betas() -> bool:
    """2.10 to 2.12: Adam takes one-element tensors of any shape as betas; before, it fails in the step."""
    betas = (torch.tensor(0.9), torch.tensor([[0.99]]))
    kept = torch.optim.Adam([torch.zeros(1)], betas=betas, capturable=True).defaults["betas"]
    return kept[1].dim() == 0


def _keeps_tensor_rates() -> bool:
    """2.10 to 2.12: sequences and the plateau fill a tensor learning rate; before, they put a number in its place."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=torch.tensor(0.1))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        plateau.step(1.0)
    return isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


def _swalr_keeps_strategy() -> bool:
    """2.10 to 2.12: SWALR's state has the name of its strategy; before, the function."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "_anneal_strategy" in torch.optim.swa_utils.SWALR(optimizer, 0.1).state_dict()


def _writes_safetensors_shards() -> bool:
    """2.9 or so: DCP writes safetensors, and Hugging Face's layout from several processes."""
    try:
        from torch.distributed.checkpoint.filesystem import SerializationFormat  # noqa: F401
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    except ImportError:
        return False
    return accepts(HuggingFaceStorageWriter, "enable_consolidation") and accepts(
        HuggingFaceStorageWriter, "save_distributed"
    )


WRITES_SAFETENSORS_SHARDS = _writes_safetensors_shards()
SQUEEZES_BETAS = _squeezes_betas()
ADAM_TELLS_ITS_DECAY = accepts(torch.optim.Adam, "decoupled_weight_decay")  # 2.7; before, AdamW's state is the same
SCHEDULERS_ARE_VERBOSE = accepts(torch.optim.lr_scheduler.StepLR, "verbose")  # until 2.7, and keep the key
KEEPS_TENSOR_RATES = _keeps_tensor_rates()
SWALR_KEEPS_STRATEGY = _swalr_keeps_strategy()


def torchs_scheduler(name: str, *, tensor_lr: bool = False, state: bool = False) -> None:
    """Skip a test of a scheduler (by its case's name) where the installed torch does otherwise."""
    if state and name.startswith("SWALR") and not SWALR_KEEPS_STRATEGY:
        pytest.skip("torch's SWALR keeps a function in its state")
    resets = name.startswith(("ReduceLROnPlateau", "sequence-")) or name == "chained-sequence"
    if tensor_lr and resets and not KEEPS_TENSOR_RATES:
        pytest.skip("torch puts a number in the place of a tensor learning rate")


adam_tells_its_decay = pytest.mark.skipif(
    not ADAM_TELLS_ITS_DECAY, reason="this torch's AdamW has the state and the options of Adam"
)
muon = pytest.mark.skipif(not HAS_MUON, reason="torch's first Muon is that of 2.9")
safetensors_shards = pytest.mark.skipif(not WRITES_SAFETENSORS_SHARDS, reason="this torch writes no safetensors shards")
adagrad_of_2_10 = pytest.mark.skipif(not adagrad_starts_late(), reason="torch's Adagrad makes no state in a step")
