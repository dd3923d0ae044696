"""Unsupported kinds of tensors and those of other libraries: their names, and how to convert them to plain tensors."""

from __future__ import annotations

import re

from optimstate.record import Record

__all__ = ["FOREIGN", "Known", "known_class", "remedy_for"]


class Known(Record):
    """A known kind of tensor.

    Attributes:
        what: Its name with an article.
        remedy: A sentence that says how to get a plain tensor of it.
    """

    what: str
    remedy: str


_OF_A_RANK = "one rank's part of a tensor"
_ALL_RANKS = "Give the folder with the files of all ranks, or save the full tensor"

FOREIGN: tuple[tuple[str, Known], ...] = (
    (
        r"torch\.distributed\.(?:_tensor|tensor|_spmd)\b.*\bDTensor",
        Known(f"a DTensor, {_OF_A_RANK}", f"{_ALL_RANKS} (`tensor.full_tensor()`)."),
    ),
    (
        r"torch\.distributed\.(?:_shard|_sharded_tensor)\b.*\bSharded(?:Tensor|TensorBase)",
        Known(f"a ShardedTensor, {_OF_A_RANK}", f"{_ALL_RANKS} (FSDP's full state dict)."),
    ),
    (r"torch\.nested\.", Known("a nested tensor", "Save `tensor.unbind()`, a list of plain tensors.")),
    (r"torch\.masked\.", Known("a masked tensor", "Save `tensor.get_data()` and `tensor.get_mask()`.")),
    (
        r"torch\.sparse\.semi_structured|torch\.sparse\..*SemiStructured",
        Known("a semi-structured sparse tensor", "Save `tensor.to_dense()`."),
    ),
    (r"torch\._subclasses\.", Known("a fake tensor, without elements", "Save the tensor that it stands for.")),
    (r"torch\.ao\.", Known("a quantized tensor of torch.ao", "Save `tensor.dequantize()`.")),
    (
        r"torchao\.(?:optim|prototype\.low_bit_optim)\.",
        Known("a quantized slot of torchao's optimizers", "Save `tensor.dequantize()`, or keep a torch file."),
    ),
    (r"torchao\.", Known("a quantized tensor of torchao", "Save `tensor.dequantize()`, or keep a torch file.")),
    (
        r"bitsandbytes\.",
        Known(
            "a quantized weight of bitsandbytes",
            "Save `model.dequantize()`, or the module's state dict, which has codes and scales as plain tensors.",
        ),
    ),
    (
        r"transformer_engine\.",
        Known("a quantized tensor of Transformer Engine", "Save `tensor.dequantize()`, or keep a torch file."),
    ),
    (
        r"(?:optimum\.)?quanto\.",
        Known("a quantized tensor of quanto", "Save `tensor.dequantize()`, or keep a torch file."),
    ),
    (r"hqq\.", Known("a quantized weight of hqq", "Save `layer.dequantize()`, or keep a torch file.")),
    (r"modelopt\.", Known("a quantized tensor of modelopt", "Save `tensor.dequantize()`, or keep a torch file.")),
    (r"fbgemm_gpu\.", Known("a tensor of fbgemm", "Save its weights as plain tensors.")),
    (r"torch_xla\.", Known("a tensor of torch_xla", "Save `tensor.cpu()`, or use `xm.save`.")),
)
"""(pattern of full class names, the kind of their tensors); the first pattern that matches counts."""

_REMEDIES = {
    "a sparse tensor": "Save `tensor.to_dense()`.",
    "a quantized tensor": "Save `tensor.dequantize()`.",
    "a nested tensor": "Save `tensor.unbind()`, a list of plain tensors.",
    "a tensor of the meta device, without elements": "Load the weights before saving.",
    "a tensor of another device": "Save `tensor.cpu()`.",
    "a parameter without a shape": "Run the lazy module once before saving.",
    "a buffer without a shape": "Run the lazy module once before saving.",
    "a tensor in the shared memory of a process": "Save it with torch.save.",
    "a tensor in the memory of a process": "Save it with torch.save.",
}


def known_class(path: str) -> Known | None:
    """The kind of the tensors of a class, or None if it is unknown.

    Args:
        path: The module and name of the class, joined by a dot.
    """
    return next((known for pattern, known in FOREIGN if re.match(pattern, path)), None)


def remedy_for(kind: str) -> str:
    """How to get a plain tensor of a kind of tensor; empty if that is unknown.

    Args:
        kind: A result of `tensors.tensor_kind`.
    """
    if kind in _REMEDIES:
        return _REMEDIES[kind]
    return next((known.remedy for _, known in FOREIGN if kind.startswith(known.what)), "")
