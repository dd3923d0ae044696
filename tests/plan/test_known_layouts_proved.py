"""Rows of the table of known layouts against the code that knows them: that of transformers and of torch, as installed.

A row is right if the library computes the same with the weights it moves, or if the library's own converter moves them
alike. Rows of libraries that are not installed here (Megatron, timm, torchvision) are not proved this way.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optimstate.derivation.transformers import to_hub
from tests.plan.test_known_layouts import HEAD, KV, SMALL, WIDTH, llama, made_by, told

transformers = pytest.importorskip("transformers")

Weights = dict[str, torch.Tensor]


def drawn(module: nn.Module) -> Weights:
    """The parameters of a module, all of them different, which it has from now on."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return dict(module.named_parameters())


def moved(old: Weights, new: Weights, layout: str, head_dim: int | None = HEAD) -> Weights:
    """What `suggest` makes of the weights, by names and shapes, with a rule of that layout."""
    found = told(old, new, head_dim)
    assert not found.missing, found
    assert any(layout in item.reason for item in found.rules), [item.reason for item in found.rules]
    made = made_by(found.plan, old)
    assert made.keys() == new.keys()
    return made


def filled(module: nn.Module, weights: Weights) -> nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
    return module.eval()


def built(kind: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**{**SMALL.get(kind, {}), **options})
    return getattr(transformers, f"{kind}Model")(config).eval()


TOKENS = torch.arange(12).reshape(2, 6)


def agree(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.std() > 1e-3
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Linears(nn.Module):
    """GPT-2 with an `nn.Linear` in the place of every Conv1D."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for name, module in list(model.named_modules()):
            if isinstance(module, transformers.pytorch_utils.Conv1D):
                rows, columns = module.weight.shape
                model.set_submodule(name, nn.Linear(rows, columns))


def test_gpt2_with_linear_layers_computes_what_conv1d_does() -> None:
    old, new = built("GPT2"), Linears(built("GPT2")).model
    weights = moved(drawn(old), dict(new.named_parameters()), "Conv1D")
    agree(old(TOKENS).last_hidden_state, filled(new, weights)(TOKENS).last_hidden_state)


@pytest.mark.parametrize("back", [False, True])
def test_phi3_computes_what_llama_does(back: bool) -> None:
    kinds = ("Phi3", "Llama") if back else ("Llama", "Phi3")
    same = {"rms_norm_eps": 1e-6, "max_position_embeddings": 64, "hidden_act": "silu", "pad_token_id": None}
    old, new = (built(kind, **same) for kind in kinds)
    weights = moved(drawn(old), dict(new.named_parameters()), "as Phi-3 has them")
    agree(old(TOKENS).last_hidden_state, filled(new, weights)(TOKENS).last_hidden_state)


def test_distilbert_computes_what_bert_does() -> None:
    old, new = built("Bert"), built("DistilBert")
    taken = {name: value for name, value in drawn(old).items() if name.startswith("encoder.")}
    wanted = {name: value for name, value in new.named_parameters() if name.startswith("transformer.")}
    weights = moved(taken, wanted, "BERT and DistilBERT")
    filled(new, {**dict(new.named_parameters()), **weights})
    hidden = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(2))
    agree(old.encoder(hidden).last_hidden_state, new.transformer(hidden).last_hidden_state)


def test_multihead_attention_of_torch_computes_the_same_with_one_weight_and_with_three() -> None:
    attention = nn.MultiheadAttention(WIDTH, 2)
    home = "layers.0.self_attn"
    fused = drawn(nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": attention})])}))
    wanted = {f"{home}.out_proj.weight": torch.empty(WIDTH, WIDTH), f"{home}.out_proj.bias": torch.empty(WIDTH)}
    for x in "qkv":
        wanted |= {f"{home}.{x}_proj.weight": torch.empty(WIDTH, WIDTH)}
        wanted |= {f"{home}.{x}_proj.bias": torch.empty(WIDTH)}
    apart = moved(fused, wanted, "as nn.MultiheadAttention has them")
    x = torch.randn(6, 2, WIDTH, generator=torch.Generator().manual_seed(2))
    q, k, v = (apart[f"{home}.{each}_proj.weight"] for each in "qkv")
    made, _ = F.multi_head_attention_forward(
        x, x, x, WIDTH, 2, None, torch.cat([apart[f"{home}.{each}_proj.bias"] for each in "qkv"]), None, None, False,
        0.0, apart[f"{home}.out_proj.weight"], apart[f"{home}.out_proj.bias"], use_separate_proj_weight=True,
        q_proj_weight=q, k_proj_weight=k, v_proj_weight=v,
    )  # fmt: skip
    agree(attention(x, x, x)[0], made)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(
    ("kind", "options", "layout"),
    [
        ("Mixtral", {}, "Mixtral as it is published"),
        (
            "Qwen3Moe",
            {**SMALL["Llama"], "num_experts": 4, "moe_intermediate_size": 8, "head_dim": HEAD},
            "experts one by one",
        ),
    ],
)
def test_experts_are_moved_as_the_librarys_converters_move_them(
    kind: str, options: dict[str, Any], layout: str, back: bool
) -> None:
    model = built(kind, **options)
    live = drawn(model)
    hub = dict(to_hub(model)(dict(live)))
    old, new = (live, hub) if back else (hub, live)
    made = moved(old, new, layout)
    assert all(torch.equal(made[name], value) for name, value in new.items())


@pytest.mark.parametrize("back", [False, True])
def test_rotary_halves_are_moved_as_the_librarys_converter_moves_them(back: bool) -> None:
    loading = pytest.importorskip("transformers.core_model_loading")
    old, new = llama()[:: -1 if back else 1]
    made = moved(old, new, "rotary")
    for i in range(2):
        for meta, hub, rows in (("wq", "q_proj", WIDTH), ("wk", "k_proj", KV)):
            names = f"layers.{i}.attention.{meta}.weight", f"model.layers.{i}.self_attn.{hub}.weight"
            given, got = (old[names[1]], made[names[0]]) if back else (old[names[0]], made[names[1]])
            config = transformers.LlamaConfig(num_attention_heads=rows // HEAD)
            converted = loading.PermuteForRope(inverse=back).convert({"a": given}, ["a"], ["b"], config)["b"]
            assert torch.equal(got, converted)
            assert not torch.equal(got, given)


def test_queries_keys_and_values_are_cut_head_by_head_as_gpt_neox_and_bloom_cut_them() -> None:
    neox = built(
        "GPTNeoX", hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8, vocab_size=20,
        attn_implementation="eager",
    )  # fmt: skip
    attention = neox.layers[0].attention
    weights = {f"layers.0.attention.{n}": v for n, v in drawn(attention).items() if n.startswith("query")}
    wanted = {
        f"layers.0.attention.{x}_proj.{p}": torch.empty(s)
        for x in "qkv"
        for p, s in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
    }
    apart = moved(weights, wanted, "head by head")
    x = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(2))
    own = {each: apart[f"layers.0.attention.{each}_proj.weight"] for each in "qkv"}
    bias = {each: apart[f"layers.0.attention.{each}_proj.bias"] for each in "qkv"}
    q, k, v = (F.linear(x, own[e], bias[e]).view(1, 6, 4, HEAD).transpose(1, 2) for e in "qkv")
    # One position with no rotation: queries and keys meet as they are.
    turns = torch.ones(1, 6, attention.rotary_ndims), torch.zeros(1, 6, attention.rotary_ndims)
    made, _ = attention(x, attention_mask=None, position_embeddings=turns)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 6, WIDTH)
    agree(made, attention.dense(mixed))

    bloom = built("Bloom", hidden_size=WIDTH, n_layer=1, n_head=4, vocab_size=20)
    fused = attention.query_key_value(x)
    for mine, theirs in zip((q, k, v), bloom.h[0].self_attention._reshape(fused), strict=True):
        torch.testing.assert_close(mine, theirs)
