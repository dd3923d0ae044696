"""The wheel of torchvision on PyPI has its operators for CUDA alone: beside a torch without CUDA it is not imported.

transformers, Lightning and timm import it where it is installed and need none of them: declaring two is enough.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
if torch.version.cuda is None and find_spec("torchvision") is not None:
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
