"""Conversion functions as strangers write them, with what each takes: the plan gives their weights.

Bit for bit, or to rounding where they multiply. Names and habits are those of public conversion scripts.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

State = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
EXACT: dict[str, tuple[Callable[[State], Any], Shapes]] = {}
L = 3


def exact(shapes: Shapes) -> Callable[[Callable[[State], Any]], Callable[[State], Any]]:
    def listed(function: Callable[[State], Any]) -> Callable[[State], Any]:
        EXACT[function.__name__] = function, shapes
        return function

    return listed


# --- the five kinds -------------------------------------------------------------------------------------------------

BERT: Shapes = {
    f"module.bert.encoder.layer.{i}.{part}.{p}": (8, 8) if p == "weight" and "Norm" not in part else (8,)
    for i in range(L)
    for part in ("attention.self.query", "output.dense", "output.LayerNorm")
    for p in (("gamma", "beta") if "Norm" in part else ("weight", "bias"))
} | {"module.cls.decoder.weight": (20, 8), "module.cls.decoder.bias": (20,), "module.pooler.w": (8, 8)}  # fmt: skip


@exact(BERT)
def renaming_loop(state_dict: State) -> State:
    new_state_dict: State = OrderedDict()
    for key in list(state_dict.keys()):
        value = state_dict.pop(key)
        key = key.removeprefix("module.")
        key = re.sub(r"^bert\.encoder\.layer\.(\d+)\.", r"h.\1.", key)
        for old, new in {"gamma": "weight", "beta": "bias", "attention.self.query": "attn.q"}.items():
            if old in key:
                key = key.replace(old, new)
        if "decoder" in key and key.endswith("bias"):
            key = "cls.bias"
        new_state_dict[key] = value
    return new_state_dict


LLAMA: Shapes = {
    f"layers.{i}.attention.{w}.weight": (32, 32) if w == "wq" else (16, 32)
    for i in range(L)
    for w in ("wq", "wk", "wv")
}


def permute(w: torch.Tensor, n_heads: int) -> torch.Tensor:
    dim1, dim2 = w.shape
    return w.view(n_heads, dim1 // n_heads // 2, 2, dim2).transpose(1, 2).reshape(dim1, dim2)


@exact(LLAMA)
def rotary_then_fused(sd: State) -> State:
    out = {}
    for i in range(L):
        wq, wk, wv = (sd[f"layers.{i}.attention.w{x}.weight"] for x in "qkv")
        out[f"model.layers.{i}.self_attn.qkv_proj.weight"] = torch.cat([permute(wq, 4), permute(wk, 2), wv], dim=0)
    return out


@exact(LLAMA)
def rotary_then_grouped(sd: State) -> State:
    out = {}
    for i in range(L):
        q = permute(sd[f"layers.{i}.attention.wq.weight"], 4).view(2, 2, 8, 32)
        k = permute(sd[f"layers.{i}.attention.wk.weight"], 2).view(2, 1, 8, 32)
        v = sd[f"layers.{i}.attention.wv.weight"].view(2, 1, 8, 32)
        out[f"h.{i}.query_key_value.weight"] = torch.cat([q, k, v], 1).reshape(-1, 32)
    return out


@exact({f"blocks.{i}.{p}": (6, 4) for i in range(12) for p in ("w", "v")})
def layers_stacked(sd: State) -> State:
    stacked = {}
    for p in ("w", "v"):
        made = torch.empty(12, 4, 6, dtype=sd["blocks.0.w"].dtype)
        for i in range(12):
            made[i] = sd[f"blocks.{i}.{p}"].T
        stacked[f"blocks.{p}"] = made
    return stacked


@exact({"wte.weight": (50, 8), "lm_head.weight": (50, 8), "final_logits_bias": (50,)})
def vocabulary_padded(sd: State) -> State:
    n = 64
    for k in ("wte.weight", "lm_head.weight"):
        old = sd[k]
        new = old.new_zeros(n, old.shape[1])
        new[: old.shape[0], :] = old
        sd[k] = new
    sd["final_logits_bias"] = functional.pad(sd["final_logits_bias"], (0, 14), value=-1.0)
    return sd


@exact({f"ckpt_{c}.l.{i}.w": (4, 4) for c in range(3) for i in range(L)})
def checkpoints_averaged(sd: State) -> State:
    avg: State = {}
    for key in sd:
        name = key.split(".", 1)[1]
        if name in avg:
            avg[name] += sd[key].float()
        else:
            avg[name] = sd[key].float().clone()
    for name in avg:
        avg[name] = torch.true_divide(avg[name], 3)
    return avg


# --- layouts --------------------------------------------------------------------------------------------------------

FUSED: Shapes = {
    f"blocks.{i}.attn.qkv.{p}": (96, 32) if p == "weight" else (96,) for i in range(L) for p in ("weight", "bias")
}


@exact(FUSED | {"norm.weight": (32,)})
def read_in_q_k_v(state_dict: State) -> State:
    h = 32
    for i in range(L):
        weight = state_dict.pop(f"blocks.{i}.attn.qkv.weight")
        bias = state_dict.pop(f"blocks.{i}.attn.qkv.bias")
        prefix = f"vit.encoder.layer.{i}.attention.attention."
        state_dict[prefix + "query.weight"] = weight[:h, :]
        state_dict[prefix + "query.bias"] = bias[:h]
        state_dict[prefix + "key.weight"] = weight[h : h * 2, :]
        state_dict[prefix + "key.bias"] = bias[h : h * 2]
        state_dict[prefix + "value.weight"] = weight[-h:, :]
        state_dict[prefix + "value.bias"] = bias[-h:]
    return state_dict


@exact(FUSED)
def fix_query_key_value_ordering(sd: State) -> State:
    out = {}
    for k, v in sd.items():
        shape = v.size()
        v = v.view(4, 3, 8, *shape[1:]).transpose(0, 1).contiguous().view(*shape)
        out[k] = v.t().contiguous() if v.dim() == 2 else v
    return out


@exact({f"h.{i}.mlp.gate_up.weight": (48, 8) for i in range(L)})
def gate_and_up_exchanged(sd: State) -> State:
    return {k: torch.cat(v.chunk(2)[::-1]) for k, v in sd.items()}


@exact({"kqv": (24, 8)})
def kqv_to_qkv(sd: State) -> State:
    k, q, v = sd.pop("kqv").split(8)
    sd["qkv"] = torch.cat((q, k, v))
    return sd


@exact({"q_bias": (8,), "v_bias": (8,), "qkv.weight": (24, 8)})
def bias_of_keys_is_zero(sd: State) -> State:
    q, v = sd.pop("q_bias"), sd.pop("v_bias")
    sd["qkv.bias"] = torch.cat((q, torch.zeros_like(v, requires_grad=False), v))
    return sd


@exact({"q.weight": (8, 8), "k.weight": (8, 8)})
def scale_folded_into_queries(sd: State) -> State:
    return {"qk.weight": torch.cat([sd["q.weight"] * 8**-0.5, sd["k.weight"]])}


@exact({"w": (12, 8)})
def heads_padded(sd: State) -> State:
    return {"w": functional.pad(sd["w"].unflatten(0, (3, 4)), (0, 0, 0, 2)).flatten(0, 1)}


@exact({"w": (12, 8)})
def padded_in_front(sd: State) -> State:
    return {"w": functional.pad(sd["w"], (1, 0, 4, 3))}


@exact({"b": (50,)})
def logits_that_are_never_chosen(sd: State) -> State:
    made = torch.full((64,), -math.inf)
    made[:50] = sd["b"]
    return {"b": made}


@exact({"w": (12, 8), "b": (8,)})
def through_numpy(sd: State) -> State:
    return {k: torch.from_numpy(np.ascontiguousarray(np.transpose(v.numpy()))) for k, v in sd.items()}


@exact({f"l{i}": (4, 4) for i in range(3)} | {"empty": (0, 4), "scalar": ()})
def deleted_and_put_back(sd: State) -> State:
    for k in list(sd):
        if k.startswith("l"):
            sd[k.replace("l", "layer.")] = sd[k].contiguous()
            del sd[k]
    return OrderedDict(sorted(sd.items()))


@exact({f"e.{i}.{j}.w": (6, 4) for i in range(2) for j in range(4)})
def experts_put_into_an_empty_tensor(sd: State) -> State:
    out = {}
    for i in range(2):
        t = torch.empty(4, 4, 6)
        for j in range(4):
            t[j].copy_(sd[f"e.{i}.{j}.w"].T)
        out[f"e.{i}.w"] = t
    return out


@exact({"a": (8, 8)})
def views_of_one_tensor(sd: State) -> State:
    return {"x": sd["a"][:6], "y": sd["a"][4:], "z": sd["a"]}


@exact({"base.w": (4, 4), "tuned.w": (4, 4)})
def task_vector(sd: State) -> State:
    return {"w": sd["base.w"] + 0.3 * (sd["tuned.w"] - sd["base.w"])}


@exact({"conv.weight": (8, 3, 4, 4)})
def inflated(sd: State) -> State:
    return {"conv.weight": sd["conv.weight"].unsqueeze(2).repeat(1, 1, 2, 1, 1) / 2}


@exact({"mask": (4, 4), "w": (4, 4)})
def parameters_out(sd: State) -> State:
    return {"mask": sd["mask"], "w": torch.nn.Parameter(sd["w"].t())}


@exact({"a": (8, 4), "n": (8,)})
def narrowed_and_shifted(sd: State) -> State:
    return {"a": sd["a"].bfloat16().t(), "n": (sd["n"] + 1).bfloat16()}


# --- and of other kinds -----------------------------------------------------------------------------------------------

GROUPED, KV_HEADS, HEAD = 6, 2, 4


@exact({
    f"h.{i}.attn.qkv.{p}": ((GROUPED + 2 * KV_HEADS) * HEAD, 20)[: 2 if p == "weight" else 1]
    for i in range(L) for p in ("weight", "bias")
})  # fmt: skip
def grouped_heads_deinterleaved(sd: State) -> State:
    out = {}
    for name, value in sd.items():
        groups = value.view(KV_HEADS, GROUPED // KV_HEADS + 2, HEAD, *value.shape[1:])
        for x, part in zip("qkv", groups.split([GROUPED // KV_HEADS, 1, 1], 1), strict=True):
            out[name.replace("qkv", f"{x}_proj")] = part.reshape(-1, *value.shape[1:]).clone()
    return out


@exact({"l.kv_a": (16, 20), "l.kv_b": (3 * 14, 12), "l.q": (3 * 12, 20), "l.norm": (12,)})
def latent_attention(sd: State) -> State:
    kv, q = sd["l.kv_b"].view(3, 14, 12), sd["l.q"].view(3, 12, 20)
    return {
        "a.latent": sd["l.kv_a"][:12],
        "a.k_rope": sd["l.kv_a"][12:].view(2, 2, 20).transpose(0, 1).reshape(4, 20),
        "a.k_nope": kv[:, :8],
        "a.v": kv[:, 8:].transpose(1, 2),
        "a.q_nope": q[:, :8].reshape(-1, 20),
        "a.q_rope": q[:, 8:].view(3, 2, 2, 20).transpose(1, 2).reshape(-1, 20),
        "a.norm": sd["l.norm"],
    }


@exact({f"e.{i}.{x}": (8, 8) for i in range(4) for x in ("w1", "w2")})
def changed_in_place(sd: State) -> State:
    for name in list(sd):
        if name.endswith("w1"):
            sd[name.replace("w1", "up")] = sd.pop(name).t_()
        else:
            sd[name].copy_(sd[name].clone().flip(1))
    return sd


@exact({"pos": (12, 20), "patch": (20, 48), "cls": (20,)})
def patches_through_numpy(sd: State) -> State:
    patch = sd["patch"].numpy().reshape(20, 4, 4, 3).transpose(0, 3, 1, 2).copy()
    pos = np.concatenate([sd["cls"].numpy()[None], sd["pos"].numpy()], 0)[None]
    return {"patch.weight": torch.from_numpy(patch), "pos_embed": torch.from_numpy(pos)}


@exact({"wte": (50, 8), "head.weight": (50, 8), "head.bias": (50,)})
def padded_to_a_multiple(sd: State) -> State:
    return {
        name: functional.pad(value, (0, 0, 0, 14)) if value.dim() == 2 else functional.pad(value, (0, 14), value=-1e4)
        for name, value in sd.items()
    }


@exact({"c1": (10, 8, 1), "c2": (8, 10), "depthwise": (8, 1, 3)})
def convolutions_and_linears(sd: State) -> State:
    return {"c1": sd["c1"].squeeze(-1), "c2": sd["c2"].t()[..., None], "depthwise": sd["depthwise"].permute(2, 1, 0)}


@exact({f"l.{i}.{x}": (4, 8) for i in range(12) for x in "ab"})
def layers_reversed(sd: State) -> State:
    return {f"l.{11 - int(name.split('.')[1])}.{name[-1]}": value for name, value in sd.items()}


@exact(
    {f"l.{i}.moe.{e}.{x}": (8, 6) for i in range(0, 6, 2) for e in range(4) for x in "gu"}
    | {f"l.{i}.mlp.{x}": (8, 6) for i in range(1, 6, 2) for x in "gu"}
)
def experts_of_every_second_layer(sd: State) -> State:
    out = {}
    for i in range(6):
        if i % 2:
            out[f"l.{i}.mlp.gu"] = torch.cat([sd[f"l.{i}.mlp.g"], sd[f"l.{i}.mlp.u"]])
        else:
            experts = [torch.cat([sd[f"l.{i}.moe.{e}.g"], sd[f"l.{i}.moe.{e}.u"]]) for e in range(4)]
            out[f"l.{i}.experts.gu"] = torch.stack(experts).transpose(1, 2)
    return out


@exact({f"l.{i}.{x}.weight": (8, 8) for i in range(12) for x in "qo"})
def three_layers_are_exceptions(sd: State) -> State:
    return {
        name.replace("l.", "blocks.", 1): value.t()
        if name in ("l.3.q.weight", "l.7.q.weight")
        else value.flip(0)
        if name == "l.11.o.weight"
        else value
        for name, value in sd.items()
    }


@exact({f"l.{i}.w": (8, 8) for i in range(11)})
def stacked_in_the_order_of_text(sd: State) -> State:
    return {"w": torch.stack([sd[name] for name in sorted(sd)])}


@exact({f"l.{i}.w": (4, 8) for i in range(4)})
def pairs_of_layers_averaged(sd: State) -> State:
    return {f"l.{i}.w": (sd[f"l.{2 * i}.w"] + sd[f"l.{2 * i + 1}.w"]) / 2 for i in range(2)}
