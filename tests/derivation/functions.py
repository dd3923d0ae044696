"""Functions from state dict to state dict, as converters are written, with the names and shapes they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

State = dict[str, Any]
FUNCTIONS: dict[str, tuple[Callable[[State], State], dict[str, tuple[int, ...]]]] = {}


def layout(shapes: dict[str, tuple[int, ...]]) -> Callable[[Callable[[State], State]], Callable[[State], State]]:
    """Put a function on the list, with what it takes."""

    def listed(function: Callable[[State], State]) -> Callable[[State], State]:
        FUNCTIONS[function.__name__] = (function, shapes)
        return function

    return listed


L = 4


@layout(
    {
        f"model.layers.{i}.self_attn.{x}_proj.weight": (32, 32) if x in "qo" else (16, 32)
        for i in range(L)
        for x in "qkvo"
    }
    | {"model.embed_tokens.weight": (40, 32), "lm_head.weight": (40, 32)}
    | {
        f"model.layers.{i}.mlp.{x}.weight": (64, 32) if x != "down_proj" else (32, 64)
        for i in range(L)
        for x in ("gate_proj", "up_proj", "down_proj")
    }
)
def llama_to_meta(sd: State) -> State:
    out = {}
    for k, v in sd.items():
        k = (
            k.replace("model.layers", "layers")
            .replace("self_attn", "attention")
            .replace("q_proj", "wq")
            .replace("k_proj", "wk")
            .replace("v_proj", "wv")
            .replace("o_proj", "wo")
            .replace("mlp.gate_proj", "feed_forward.w1")
            .replace("mlp.up_proj", "feed_forward.w3")
            .replace("mlp.down_proj", "feed_forward.w2")
            .replace("model.embed_tokens", "tok_embeddings")
            .replace("lm_head", "output")
        )
        if "wq" in k or "wk" in k:
            n = v.shape[0] // 8
            v = v.view(n, 2, 4, v.shape[1]).transpose(1, 2).reshape(v.shape)
        out[k] = v
    return out


@layout(
    {f"model.layers.{i}.self_attn.{x}_proj.weight": (32, 32) if x == "q" else (16, 32) for i in range(L) for x in "qkv"}
    | {f"model.layers.{i}.mlp.{x}_proj.weight": (64, 32) for i in range(L) for x in ("gate", "up")}
    | {"model.norm.weight": (32,)}
)
def gqa_fuse(sd: State) -> State:
    out = {}
    for i in range(L):
        p = f"model.layers.{i}."
        q, k, v = (sd[p + f"self_attn.{x}_proj.weight"] for x in "qkv")
        kv = 2
        qs = q.view(kv, 2, 8, 32)
        ks = k.view(kv, 1, 8, 32)
        vs = v.view(kv, 1, 8, 32)
        out[f"layers.{i}.qkv.weight"] = torch.cat([qs, ks, vs], 1).reshape(64, 32)
        out[f"layers.{i}.gate_up.weight"] = torch.cat([sd[p + "mlp.gate_proj.weight"], sd[p + "mlp.up_proj.weight"]])
    out["norm.weight"] = sd["model.norm.weight"]
    return out


@layout({f"l.{i}.qkv.{p}": (64, 32) if p == "weight" else (64,) for i in range(2) for p in ("weight", "bias")})
def gqa_unfuse(sd: State) -> State:
    out = {}
    for i in range(2):
        for p in ("weight", "bias"):
            t = sd[f"l.{i}.qkv.{p}"]
            r = t.shape[1:]
            t = t.view(2, 4, 8, *r)
            out[f"l.{i}.q.{p}"] = t[:, :2].reshape(32, *r)
            out[f"l.{i}.k.{p}"] = t[:, 2].reshape(16, *r)
            out[f"l.{i}.v.{p}"] = t[:, 3].reshape(16, *r)
    return out


@layout(
    {
        f"h.{i}.attention.query_key_value.{p}": (96, 32) if p == "weight" else (96,)
        for i in range(3)
        for p in ("weight", "bias")
    }
)
def neox(sd: State) -> State:
    out = {}
    for k, t in sd.items():
        r = t.shape[1:]
        t = t.view(4, 3, 8, *r)
        for n, x in enumerate("qkv"):
            out[k.replace("query_key_value", x)] = t[:, n].reshape(32, *r)
    return out


G = {
    f"h.{i}.{m}.{p}": s
    for i in range(3)
    for m, p, s in (
        ("attn.c_attn", "weight", (8, 24)),
        ("attn.c_attn", "bias", (24,)),
        ("attn.c_proj", "weight", (8, 8)),
        ("attn.c_proj", "bias", (8,)),
        ("mlp.c_fc", "weight", (8, 32)),
        ("mlp.c_proj", "weight", (32, 8)),
    )
}


@layout(G)
def conv1d(sd: State) -> State:
    return {k: v.t().contiguous() if v.dim() == 2 else v for k, v in sd.items()}


@layout(G)
def conv1d_cut(sd: State) -> State:
    out = {}
    for k, v in sd.items():
        v = v.t().contiguous() if v.dim() == 2 else v
        if "c_attn" in k:
            for x, p in zip("qkv", v.chunk(3), strict=True):
                out[k.replace("c_attn", x)] = p
        else:
            out[k] = v
    return out


@layout({f"l.{x}.weight": (16, 32) for x in "kv"} | {"l.q.weight": (32, 32), "l.o.weight": (32, 32)})
def gqa_to_mha(sd: State) -> State:
    return {
        k: v.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) if k in ("l.k.weight", "l.v.weight") else v
        for k, v in sd.items()
    }


@layout(
    {
        "visual.patch_embed.weight": (16, 48),
        "visual.pos": (5, 16),
        "visual.cls": (16,),
        "visual.ln.weight": (16,),
        "text.w": (3, 3),
        "text.b": (3,),
    }
)
def vit(sd: State) -> State:
    return {
        "patch.weight": sd["visual.patch_embed.weight"].reshape(16, 3, 4, 4),
        "pos": sd["visual.pos"][None],
        "cls": sd["visual.cls"][None, None],
        "ln.weight": sd["visual.ln.weight"],
    }


E = 8
MX = (
    {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight": (24, 16) if w != "w2" else (16, 24)
        for i in range(2)
        for e in range(E)
        for w in ("w1", "w2", "w3")
    }
    | {f"model.layers.{i}.block_sparse_moe.gate.weight": (E, 16) for i in range(2)}
    | {f"model.layers.{i}.input_layernorm.weight": (16,) for i in range(2)}
    | {"model.norm.weight": (16,)}
)


@layout(MX)
def mixtral(sd: State) -> State:
    out = {}
    for i in range(2):
        p = f"model.layers.{i}.block_sparse_moe."
        q = f"model.layers.{i}.mlp."
        out[q + "experts.gate_up_proj"] = torch.stack(
            [torch.cat([sd[p + f"experts.{e}.w1.weight"], sd[p + f"experts.{e}.w3.weight"]]) for e in range(E)]
        )
        out[q + "experts.down_proj"] = torch.stack([sd[p + f"experts.{e}.w2.weight"] for e in range(E)])
        out[q + "gate.weight"] = sd[p + "gate.weight"]
        out[f"model.layers.{i}.input_layernorm.weight"] = sd[f"model.layers.{i}.input_layernorm.weight"]
    out["model.norm.weight"] = sd["model.norm.weight"]
    return out


MXO = {k: tuple(v.shape) for k, v in mixtral({k: torch.zeros(s) for k, s in MX.items()}).items()}


@layout(MXO)
def mixtral_back(sd: State) -> State:
    out = {}
    for k, v in sd.items():
        if "gate_up" in k:
            for e in range(E):
                a, b = v[e].chunk(2)
                p = k.replace("mlp", "block_sparse_moe").replace("gate_up_proj", f"{e}.")
                out[p + "w1.weight"] = a
                out[p + "w3.weight"] = b
        elif "down" in k:
            for e in range(E):
                out[k.replace("mlp", "block_sparse_moe").replace("down_proj", f"{e}.w2.weight")] = v[e]
        else:
            out[k.replace("mlp", "block_sparse_moe")] = v
    return out


@layout(MX)
def gpt_oss(sd: State) -> State:
    out = {}
    for i in range(2):
        p = f"model.layers.{i}.block_sparse_moe."
        q = f"model.layers.{i}.mlp."
        gu = torch.stack(
            [
                torch.stack([sd[p + f"experts.{e}.w1.weight"], sd[p + f"experts.{e}.w3.weight"]], 1).reshape(48, 16)
                for e in range(E)
            ]
        )
        out[q + "experts.gate_up_proj"] = gu.transpose(1, 2).contiguous()
        out[q + "experts.down_proj"] = torch.stack([sd[p + f"experts.{e}.w2.weight"].t() for e in range(E)])
        out[q + "gate.weight"] = sd[p + "gate.weight"]
        out[f"model.layers.{i}.input_layernorm.weight"] = sd[f"model.layers.{i}.input_layernorm.weight"]
    out["model.norm.weight"] = sd["model.norm.weight"]
    return out


@layout({"a.qkv": (12, 4), "b.qkv": (12, 4)})
def many(sd: State) -> State:
    a = sd["a.qkv"].chunk(3)
    b = sd["b.qkv"].chunk(3)
    return {x: torch.cat([a[n], b[n]]) for n, x in enumerate("qkv")}


@layout({"wte.weight": (50, 8), "h.w": (8, 8)})
def vocab(sd: State) -> State:
    return {
        "wte.weight": torch.cat([sd["wte.weight"], torch.zeros(14, 8, dtype=sd["wte.weight"].dtype)]),
        "h.w": sd["h.w"],
    }


@layout({"emb": (10, 8), "w": (8, 8)})
def tied(sd: State) -> State:
    return {"emb": sd["emb"], "head": sd["emb"], "w": sd["w"] * 0.125}


@layout({"a.x": (300, 200), "b.x": (30, 200), "c.x": (3, 20)})
def bf16(sd: State) -> State:
    return {k: v.t().to(torch.bfloat16) for k, v in sd.items()}


@layout(
    {
        "a.LayerNorm.gamma": (8,),
        "a.LayerNorm.beta": (8,),
        "b.1.LayerNorm.gamma": (8,),
        "b.1.LayerNorm.beta": (8,),
        "c.w": (8, 8),
    }
)
def gammabeta(sd: State) -> State:
    return {k.replace("gamma", "weight").replace("beta", "bias"): v for k, v in sd.items()} | {
        "pos_ids": torch.arange(8)
    }


@layout({f"layers.{i}.{p}": (4, 4) for i in range(8) for p in ("w", "v")})
def everysecond(sd: State) -> State:
    return {f"layers.{i}.{p}": sd[f"layers.{2 * i}.{p}"] for i in range(4) for p in ("w", "v")}


@layout({f"layers.{i}.{p}": (4, 4) for i in range(8) for p in ("w", "v")})
def shifted(sd: State) -> State:
    return {f"layers.{i + 1}.{p}": sd[f"layers.{i}.{p}"] for i in range(8) for p in ("w", "v")} | {
        f"layers.0.{p}": sd[f"layers.0.{p}"].clone() for p in ("w", "v")
    }


@layout({f"layers.{i}.{p}": (4, 6) for i in range(8) for p in ("w", "v")})
def stacked(sd: State) -> State:
    return {f"layers.{p}": torch.stack([sd[f"layers.{i}.{p}"].t() for i in range(8)]) for p in ("w", "v")}


@layout({"a": (4, 4), "b": (4, 4)})
def plus1(sd: State) -> State:
    return {"a": sd["a"] + 1, "b": sd["b"]}


@layout({f"e.{i}": (4, 4) for i in range(4)})
def mean4(sd: State) -> State:
    return {"m": sum(sd.values()) / 4}


@layout({"w": (4, 4), "A": (2, 4), "B": (4, 2)})
def lora(sd: State) -> State:
    return {"w": sd["w"] + sd["B"] @ sd["A"]}


@layout({"a": (3,)})
def wholemean(sd: State) -> State:
    return {"b": (sd["a"][:1] + sd["a"][2:]) / 2}


@layout({"l.kv_b.weight": (4 * (8 + 12), 16)})
def mla(sd: State) -> State:
    t = sd["l.kv_b.weight"].view(4, 20, 16)
    return {"l.k_b": t[:, :8].reshape(32, 16), "l.v_b": t[:, 8:].reshape(48, 16)}


@layout({"in_proj.weight": (10 + 20 + 3 + 3 + 7, 16)})
def mamba(sd: State) -> State:
    return dict(zip(("z", "x", "B", "C", "dt"), sd["in_proj.weight"].split([10, 20, 3, 3, 7]), strict=True))


@layout(
    {f"layers.{i}.{x}": (4, 4) for i in range(12) for x in (("moe.w",) if i not in (3, 7) else ("mlp.w",))}
    | {f"layers.{i}.norm": (4,) for i in range(12)}
)
def dense37(sd: State) -> State:
    return {k.replace("moe.w", "ffn.experts.w").replace("mlp.w", "ffn.dense.w"): v for k, v in sd.items()}


@layout({"x": (6, 4)})
def flip(sd: State) -> State:
    return {"x": sd["x"].flip(0)}


@layout(
    {f"layers.{i}.mlp.experts.{e}.{w}.weight": (24, 16) for i in range(3) for e in range(4) for w in ("w1", "w3")}
    | {f"layers.{i}.mlp.experts.{e}.w2.weight": (16, 24) for i in range(3) for e in range(4)}
    | {f"layers.{i}.mlp.gate.weight": (4, 16) for i in range(3)}
)
def halves(sd: State) -> State:
    out = {k: v for k, v in sd.items() if "experts" not in k}
    for i in range(3):
        p = f"layers.{i}.mlp."
        for h, es in (("text", (0, 1)), ("vision", (2, 3))):
            pairs = [[sd[f"{p}experts.{e}.{w}.weight"] for w in ("w1", "w3")] for e in es]
            out[f"{p}{h}.gate_up"] = torch.stack([torch.cat(pair) for pair in pairs])
            out[f"{p}{h}.down"] = torch.stack([sd[f"{p}experts.{e}.w2.weight"] for e in es])
    return out


@layout({f"l.{i}.attn.qkvg.weight": (2 * (3 * 8 + 8 + 8 + 3), 12) for i in range(2)})
def grouped_with_gate(sd: State) -> State:
    """Two groups, each with three heads of queries, one of keys, one of values and three rows of a gate."""
    out = {}
    for k, v in sd.items():
        parts = v.view(2, 43, 12).split([24, 8, 8, 3], dim=1)
        out |= {k.replace("qkvg", x): part.reshape(-1, 12) for x, part in zip("qkvg", parts, strict=True)}
    return out


@layout({f"l.{i}.conv.weight": (20, 1, 4) for i in range(3)} | {f"l.{i}.conv.bias": (20,) for i in range(3)})
def depthwise(sd: State) -> State:
    return {k: v.squeeze(1) if v.dim() == 3 else v for k, v in sd.items()}


@layout({"tok.weight": (64, 8), "lm_head.weight": (64, 8), "lm_head.bias": (64,)})
def vocab_padding_cut(sd: State) -> State:
    return {k: v[:50] for k, v in sd.items()}


@layout(
    {f"h.{i}.{x}.kernel": (6, 4) for i in range(12) for x in ("q", "o")} | {f"h.{i}.ln.scale": (4,) for i in range(12)}
)
def scan(sd: State) -> State:
    return {
        f"h.{x}": torch.stack([v.t() if v.dim() == 2 else v for v in (sd[f"h.{i}.{x}"] for i in range(12))])
        for x in ("q.kernel", "o.kernel", "ln.scale")
    }


@layout(
    {f"l.{i}.mlp.{s}.{e}.w": (4, 6) for i in range(2) for s in ("experts", "shared_experts") for e in range(3)}
    | {f"l.{i}.mlp.experts_gate.w": (3, 4) for i in range(2)}
)
def two_sets_of_experts(sd: State) -> State:
    out = {k: v for k, v in sd.items() if "gate" in k}
    for i in range(2):
        out[f"l.{i}.mlp.experts.w"] = torch.stack([sd[f"l.{i}.mlp.experts.{e}.w"] for e in range(3)])
        out[f"l.{i}.mlp.shared.w"] = torch.cat([sd[f"l.{i}.mlp.shared_experts.{e}.w"].t() for e in range(3)])
    return out
