"""Conversion functions as strangers write them that are not layouts, or cannot be said, with the refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from tests.derivation.wild import Shapes, State

REFUSED: dict[str, tuple[Callable[[State], Any], Shapes, str]] = {}


def refused(shapes: Shapes, message: str) -> Callable[[Callable[[State], Any]], Callable[[State], Any]]:
    def listed(function: Callable[[State], Any]) -> Callable[[State], Any]:
        REFUSED[function.__name__] = function, shapes, message
        return function

    return listed


LARGE = "'a' is not a layout .* how large the values are .*'a'"
ADDS = "'a' is not a layout .* adds elements of one tensor to each other.*'a'"


@refused({"c.weight": (8, 4, 3, 3), "bn.weight": (8,), "bn.running_var": (8,)}, "'c.weight' is not a layout")
def batch_norm_folded(sd: State) -> State:
    scale = sd["bn.weight"] / torch.sqrt(sd["bn.running_var"] + 1e-5)
    return {"c.weight": sd["c.weight"] * scale[:, None, None, None]}


@refused({"g": (8, 1), "v": (8, 4)}, "'w' is not a layout")
def weight_norm_removed(sd: State) -> State:
    return {"w": sd["g"] * sd["v"] / sd["v"].norm(dim=1, keepdim=True)}


@refused({"q.weight": (8, 8), "q.lora_A": (2, 8), "q.lora_B": (8, 2)}, "'q.weight' is not a layout .*'q.weight'")
def lora_merged(sd: State) -> State:
    return {"q.weight": sd["q.weight"] + 2.0 * (sd["q.lora_B"] @ sd["q.lora_A"])}


@refused({"norm.weight": (8,), "q.weight": (8, 8)}, "'q.weight' is not a layout")
def norm_folded(sd: State) -> State:
    return {"q.weight": sd["q.weight"] * sd["norm.weight"]}


@refused({"a": (1, 17, 8)}, ADDS)
def position_embeddings_interpolated(sd: State) -> State:
    cls, grid = sd["a"][:, :1], sd["a"][:, 1:]
    grid = functional.interpolate(grid.reshape(1, 4, 4, 8).permute(0, 3, 1, 2), size=(8, 8), mode="bicubic")
    return {"a": torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)}


@refused({"a": (8, 8)}, "'a' is not a layout .* it is not linear")
def absolute(sd: State) -> State:
    return {"a": sd["a"].abs()}


@refused({"a": (8, 8)}, "'a' is not a layout .* it is not linear")
def negative_ones_cut_off(sd: State) -> State:
    return {"a": sd["a"].clamp(min=0)}


@refused({"a": (8, 8)}, LARGE)
def truncated(sd: State) -> State:
    return {"a": sd["a"].trunc()}


@refused({"a": (8, 8)}, "'a' is not a layout")
def turned_by_its_sum(sd: State) -> State:
    return {"a": sd["a"].t() if sd["a"].sum() > 0 else sd["a"]}


@refused({"a": (8, 8), "b": (8, 8)}, "names or shapes of the outputs depend on the values: 'b'")
def equal_ones_tied(sd: State) -> State:
    return {"a": sd["a"]} if torch.equal(sd["a"], sd["b"]) else sd


@refused({"a": (8, 8)}, "'a' is not a layout .* complex numbers")
def complex_rotation(sd: State) -> State:
    return {"a": torch.view_as_complex(sd["a"].view(8, 4, 2))}


@refused({"a": (8, 8)}, "'a' is not a layout .* not finite")
def not_a_number(sd: State) -> State:
    return {"a": torch.cat([sd["a"], torch.full((2, 8), math.nan)])}


@refused({"a": (8, 8), "lost": (3,)}, "no output takes 'a', 'lost'")
def everything_dropped(sd: State) -> State:
    return {}


@refused({"a": (8,)}, "returned NoneType, not a mapping")
def returns_nothing(sd: State) -> None:
    sd["b"] = sd.pop("a")


@refused({"a": (8,)}, "returned int for 'epoch', not a tensor")
def returns_more_than_tensors(sd: State) -> State:
    return sd | {"epoch": 3}


@refused({"a": (8,)}, "under 0, which is not a text")
def numbers_for_names(sd: State) -> dict[int, Any]:
    return dict(enumerate(sd.values()))


@refused({"w": (8, 8)}, "'w' is not a layout .* one number .*'w'")
def rows_of_other_signs(sd: State) -> State:
    sd["w"][::2] *= -1
    return sd


@refused({"a": (8, 8), "b": (8, 8)}, LARGE)
def outliers_clamped(sd: State) -> State:
    return {"a": sd["a"].clamp(-1000, 1000), "b": sd["b"]}


@refused({"a": (8, 8)}, LARGE)
def clamped_to_what_half_precision_holds(sd: State) -> State:
    return {"a": sd["a"].clamp(-65504, 65504)}


@refused({"a": (8, 8)}, LARGE)
def turned_where_one_is_large(sd: State) -> State:
    return {"a": sd["a"].t() if sd["a"].max() >= 1000 else sd["a"]}


@refused({"a": (8, 8)}, LARGE)
def turned_where_one_is_far_below_zero(sd: State) -> State:
    return {"a": sd["a"].t() if sd["a"].min() <= -1000 else sd["a"]}


@refused({"a": (8, 8)}, LARGE)
def tiny_ones_zeroed(sd: State) -> State:
    return {"a": torch.where(sd["a"].abs() < 1e-6, 0, sd["a"])}


@refused({"a": (8, 8), "b": (8,)}, "'flag' is not a layout .* how large")
def constant_that_tells_large_values(sd: State) -> State:
    return sd | {"flag": torch.full((2,), float(sd["b"].max() > 500))}


@refused({"a": (8, 4)}, "names or shapes of the outputs depend on the values: 'a'")
def turned_to_another_shape_where_one_is_large(sd: State) -> State:
    return {"a": sd["a"].t() if sd["a"].max() >= 1000 else sd["a"]}


@refused({"a": (8, 8)}, ADDS)
def mean_over_heads(sd: State) -> State:
    return {"a": sd["a"].view(4, 2, 8).mean(0)}


@refused({"a": (8, 8)}, ADDS)
def symmetrised(sd: State) -> State:
    return {"a": (sd["a"] + sd["a"].t()) / 2}


@refused({"a": (8, 4), "b": (8, 4)}, ADDS)
def rows_filled_with_the_mean(sd: State) -> State:
    return sd | {"a": torch.cat([sd["a"], sd["a"].mean(0).expand(4, 4)])}


@refused({"a": (8, 4)}, ADDS)
def sum_appended(sd: State) -> State:
    return {"a": torch.cat([sd["a"], sd["a"].sum(0, keepdim=True)])}


@refused({"a": (8, 8), "b": (8, 8)}, ADDS)
def symmetrised_and_averaged(sd: State) -> State:
    return {"a": (sd["a"] + sd["a"].t() + sd["b"]) / 3}


@refused({"a": (8,), "b": (8,)}, "'a' is not a layout .* one number .*'a'")
def averaged_with_another_weight_each(sd: State) -> State:
    share = torch.linspace(0.1, 0.9, 8).to(sd["a"].dtype)
    return {"a": sd["a"] * share + sd["b"] * (1 - share)}


@refused({"a": (8, 8)}, "'a' is not a layout .* it is not linear .*'a'")
def product_with_itself(sd: State) -> State:
    return {"a": sd["a"] @ sd["a"]}
