"""Layouts of libraries: both ways, on the names of their own models where they are here, and on the elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate.errors import PlanSyntaxError
from optimstate.plan.apply.execute import execute_model
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.known import Knowledge, knowledge, read
from optimstate.plan.solve.planner import plan_model
from optimstate.plan.solve.suggest import Suggestion, suggest

Weights = dict[str, torch.Tensor]
WIDTH, KV, HEAD, MLP, WORDS = 16, 8, 4, 40, 50

SMALL: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "vocab_size": WORDS, "n_positions": 32},
    "Llama": {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": MLP, "vocab_size": WORDS,
    },
    "Phi3": {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": MLP, "vocab_size": WORDS, "pad_token_id": 0,
    },
    "Bert": {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": MLP,
        "vocab_size": WORDS, "max_position_embeddings": 32,
    },
    "DistilBert": {
        "dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": MLP, "vocab_size": WORDS,
        "max_position_embeddings": 32,
    },
    "ViT": {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": MLP,
        "image_size": 8, "patch_size": 4,
    },
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1], "layer_type": "basic"},
    "Mixtral": {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": MLP, "vocab_size": WORDS, "num_local_experts": 4,
    },
}  # fmt: skip


@cache
def live(kind: str, head: str = "Model") -> Mapping[str, torch.Tensor]:
    """The weights of a tiny model of transformers, all of them different."""
    library = pytest.importorskip("transformers")
    config = getattr(library, f"{kind}Config")(**SMALL[kind])
    with torch.device("meta"):
        names = getattr(library, f"{kind}{head}")(config).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(v.shape, generator=generator) for n, v in names.items() if v.is_floating_point()}


def gpt2() -> tuple[Weights, Weights]:
    old = dict(live("GPT2", "LMHeadModel"))
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return old, {n: v.T.contiguous() if n.endswith(turned) else v for n, v in old.items()}


def renamed(weights: Mapping[str, torch.Tensor], *pairs: tuple[str, str]) -> Weights:
    made = {}
    for name, value in weights.items():
        for one, other in pairs:
            name = name.replace(one, other)
        made[name] = value
    return made


def rotary(weight: torch.Tensor) -> torch.Tensor:
    """What transformers' conversion of Llama does to queries and keys."""
    heads = weight.shape[0] // HEAD
    return weight.view(heads, HEAD // 2, 2, WIDTH).transpose(1, 2).reshape(weight.shape)


META = (
    ("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"), ("self_attn.v_proj", "attention.wv"),
    ("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"), ("mlp.down_proj", "feed_forward.w2"),
    ("mlp.up_proj", "feed_forward.w3"), ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
    ("model.embed_tokens", "tok_embeddings"), ("lm_head", "output"), ("model.", ""),
)  # fmt: skip


def llama() -> tuple[Weights, Weights]:
    hub = dict(live("Llama", "ForCausalLM"))
    generator = torch.Generator().manual_seed(2)
    meta = {n: torch.randn(v.shape, generator=generator) for n, v in renamed(hub, *META).items()}
    back = {new: meta[next(iter(renamed({new: v}, *META)))] for new, v in hub.items()}
    return meta, {n: rotary(v) if "q_proj" in n or "k_proj" in n else v for n, v in back.items()}


def megatron() -> tuple[Weights, Weights]:
    hub = dict(live("Llama", "ForCausalLM"))
    new = {"embedding.word_embeddings.weight": hub["model.embed_tokens.weight"]}
    for i in range(2):
        old, made = f"model.layers.{i}.", f"decoder.layers.{i}."
        q, k, v = (hub[f"{old}self_attn.{x}_proj.weight"] for x in "qkv")
        groups = KV // HEAD
        parts = [x.view(groups, -1, WIDTH) for x in (q, k, v)]
        new[made + "self_attention.linear_qkv.weight"] = torch.cat(parts, 1).reshape(-1, WIDTH)
        new[made + "self_attention.linear_qkv.layer_norm_weight"] = hub[old + "input_layernorm.weight"]
        new[made + "self_attention.linear_proj.weight"] = hub[old + "self_attn.o_proj.weight"]
        new[made + "mlp.linear_fc1.layer_norm_weight"] = hub[old + "post_attention_layernorm.weight"]
        gated = [hub[f"{old}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        new[made + "mlp.linear_fc1.weight"] = torch.cat(gated)
        new[made + "mlp.linear_fc2.weight"] = hub[old + "mlp.down_proj.weight"]
    new |= {"decoder.final_layernorm.weight": hub["model.norm.weight"], "output_layer.weight": hub["lm_head.weight"]}
    return hub, new


def phi3() -> tuple[Weights, Weights]:
    fused = {n: v for n, v in live("Phi3").items() if "layers" in n}
    apart = {}
    for name, value in fused.items():
        if "qkv_proj" in name:
            parts = torch.split(value, [WIDTH, KV, KV])
            apart.update({name.replace("qkv", x): part for x, part in zip("qkv", parts, strict=True)})
        elif "gate_up" in name:
            apart.update({name.replace("gate_up", x): v for x, v in zip(("gate", "up"), value.chunk(2), strict=True)})
        else:
            apart[name] = value
    return apart, fused


def bert() -> tuple[Weights, Weights]:
    old = {n: v for n, v in live("Bert").items() if "encoder" in n}
    new = renamed(
        old, ("attention.output.dense", "attention.out_lin"), ("attention.output.LayerNorm", "sa_layer_norm"),
        ("output.LayerNorm", "output_layer_norm"), ("intermediate.dense", "ffn.lin1"), ("output.dense", "ffn.lin2"),
        ("self.query", "q_lin"), ("self.key", "k_lin"), ("self.value", "v_lin"), ("encoder.", "transformer."),
    )  # fmt: skip
    assert new.keys() == {name for name in live("DistilBert") if "layer." in name}
    return old, new


VIT = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"), ("attention.o_proj", "attn.proj"),
    ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("layers.", "blocks."), ("vit.", ""),
    ("layernorm", "norm"), ("classifier", "head"),
)  # fmt: skip
PUBLISHED = (
    ("attention.o_proj", "attention.output.dense"), ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"),
    ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"), ("vit.layers.", "vit.encoder.layer."),
)  # fmt: skip


def vit() -> tuple[Weights, Weights]:
    live_names = dict(live("ViT", "ForImageClassification"))
    timm = renamed({n: v for n, v in live_names.items() if not any(f"{x}_proj" in n for x in "qkv")}, *VIT)
    for i in range(2):
        for p in ("weight", "bias"):
            parts = [live_names[f"vit.layers.{i}.attention.{x}_proj.{p}"] for x in "qkv"]
            timm[f"blocks.{i}.attn.qkv.{p}"] = torch.cat(parts)
    return timm, live_names


def published_vit() -> tuple[Weights, Weights]:
    timm, live_names = vit()
    return timm, renamed(live_names, *PUBLISHED)


def torchvision_vit() -> tuple[Weights, Weights]:
    timm = vit()[0]
    pairs = (
        ("attn.qkv.", "self_attention.in_proj_"), ("attn.proj", "self_attention.out_proj"), ("norm1", "ln_1"),
        ("norm2", "ln_2"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"), ("patch_embed.proj", "conv_proj"),
        ("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"), ("head", "heads.head"),
        ("blocks.", "encoder.layers.encoder_layer_"),
    )  # fmt: skip
    made = renamed(timm, *pairs)
    return {n.replace("norm.", "encoder.ln.") if n.startswith("norm.") else n: v for n, v in made.items()}, timm


def resnet() -> tuple[Weights, Weights]:
    hub = dict(live("ResNet", "ForImageClassification"))
    old = {}
    for name, value in hub.items():
        parts = name.split(".")
        if "stages" in name and "shortcut" not in name:
            kind = "conv" if "convolution" in name else "bn"
            name = f"layer{int(parts[3]) + 1}.{parts[5]}.{kind}{int(parts[7]) + 1}.{parts[-1]}"
        elif "shortcut" in name:
            name = f"layer{int(parts[3]) + 1}.{parts[5]}.downsample.{int('normal' in name)}.{parts[-1]}"
        elif "embedder" in name:
            name = f"{'conv1' if 'convolution' in name else 'bn1'}.{parts[-1]}"
        else:
            name = f"fc.{parts[-1]}"
        old[name] = value
    return old, hub


def mixtral() -> tuple[Weights, Weights]:
    fused = {n: v for n, v in live("Mixtral").items() if "layers" in n}
    stored = {}
    for name, value in fused.items():
        home = name.replace("mlp.experts", "block_sparse_moe.experts").rpartition(".")[0]
        if name.endswith("gate_up_proj"):
            for e, both in enumerate(value):
                stored.update({f"{home}.{e}.{x}.weight": v for x, v in zip(("w1", "w3"), both.chunk(2), strict=True)})
        elif name.endswith("experts.down_proj"):
            stored.update({f"{home}.{e}.w2.weight": part for e, part in enumerate(value)})
        else:
            stored[name.replace("mlp.gate", "block_sparse_moe.gate")] = value
    return stored, fused


def neox() -> tuple[Weights, Weights]:
    apart = {f"layers.{i}.attention.{x}_proj.{p}": torch.randn(*s) for i in range(2) for x in "qkv"
             for p, s in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))}  # fmt: skip
    fused = {}
    for i in range(2):
        for p in ("weight", "bias"):
            parts = [apart[f"layers.{i}.attention.{x}_proj.{p}"] for x in "qkv"]
            heads = torch.stack([x.view(-1, HEAD, *x.shape[1:]) for x in parts], 1)
            fused[f"layers.{i}.attention.query_key_value.{p}"] = heads.flatten(0, 2)
    return apart, fused


def multihead() -> tuple[Weights, Weights]:
    module = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(WIDTH, 2, MLP), 2, enable_nested_tensor=False)
    fused = dict(module.state_dict())
    apart = {}
    for name, value in fused.items():
        if "in_proj" in name:
            parts = zip("qkv", value.chunk(3), strict=True)
            apart.update({name.replace("in_proj_", f"{x}_proj."): part for x, part in parts})
        else:
            apart[name] = value
    return apart, fused


PAIRS: dict[str, Callable[[], tuple[Weights, Weights]]] = {
    make.__name__: make
    for make in (
        gpt2,
        llama,
        megatron,
        phi3,
        bert,
        vit,
        published_vit,
        torchvision_vit,
        resnet,
        mixtral,
        neox,
        multihead,
    )
}


def told(old: Weights, new: Weights, head_dim: int | None = HEAD, known: Knowledge | None = None) -> Suggestion:
    shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (old, new)]
    return suggest(*shapes, head_dim=head_dim, known=known)


def made_by(plan: Plan, old: Weights) -> Weights:
    return execute_model(plan_model(plan, old).sections["model"], old)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_a_known_layout_is_found_both_ways_by_names_and_shapes(name: str, back: bool) -> None:
    old, new = PAIRS[name]()[:: -1 if back else 1]
    found = told(old, new)
    assert (found.missing, found.unused) == ((), ()), found
    made = made_by(Plan.from_toml(found.plan.to_toml()), old)
    assert made.keys() == new.keys()
    wrong = [key for key, value in new.items() if not torch.equal(made[key], value)]
    assert not wrong, [str(item.rule) for item in found.rules]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("name", ["llama", "megatron", "neox"])
def test_the_size_of_a_head_is_asked_for_where_nothing_tells_it(name: str, back: bool) -> None:
    old, new = PAIRS[name]()[:: -1 if back else 1]
    found = told(old, new, None)
    (decision,) = [each for each in found.decisions if "attention heads" in each.about]
    assert not decision.proposed
    assert found.missing
    right = []
    for choice in decision.choices:
        rules = tuple(item.rule for item in found.rules)
        made = made_by(Plan((*choice.rules, *rules)), old)
        right += [choice.reason] if all(torch.equal(made[key], value) for key, value in new.items()) else []
    assert [reason.partition(" (")[0] for reason in right] == [f"heads of {HEAD}"]


@pytest.mark.parametrize("kind", SMALL)
def test_a_model_beside_itself_with_another_vocabulary_is_not_taken_for_another_layout(kind: str) -> None:
    old = dict(live(kind))
    new = {name: torch.empty(WORDS + 3, WIDTH) if value.shape[0] == WORDS else value for name, value in old.items()}
    found = told(old, new)
    assert all("resize" in str(item.rule) for item in found.rules), [str(item.rule) for item in found.rules]


def test_a_file_of_ones_own_layouts(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[[layout]]\nname = "ours"\n[[layout.rule]]\nfrom = "net.{i}.{x=one|two}.weight"\n'
        'to = "net.{i}.{x=a|b}.weight"\n[[same]]\ninside = ["core"]\n[same.names]\nq = ["ask", "want"]\n'
    )
    old = {f"net.{i}.{x}.weight": torch.randn(4, 4) for i in range(2) for x in ("one", "two")}
    new = {name.replace("one", "a").replace("two", "b"): value for name, value in old.items()}
    assert told(old, new).rules == ()
    found = told(old, new, known=read(path))
    assert [item.reason for item in found.rules] == ["a known layout: ours"]
    assert read(path).same.items() > knowledge().same.items()
    for text, message in (("[", r"wrong\.toml"), ("[x]", "unknown key"), ("[[layout]]\nname = 1\n", "not a file")):
        (tmp_path / "wrong.toml").write_text(text)
        with pytest.raises(PlanSyntaxError, match=message):
            read(tmp_path / "wrong.toml")
    with pytest.raises(PlanSyntaxError, match="cannot be read"):
        read(tmp_path / "nowhere.toml")
