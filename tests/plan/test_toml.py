"""Plan files: what they say, and where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.plan import Plan

EVERYTHING = """\
optimizer = "AdamW"

[guard]
has = ["encoder.**"]
lacks = ["blocks.**"]
once = true

[policy]
missing = "fresh"
step = "max"

[slots]
hidden = { kind = "like_param", degree = 2 }

[[rule]]
from = "encoder.layers.{i}.attn.{x=q|k|v}_proj.{p}"
to = "blocks.{i}.attn.qkv.{p}"
concat = 0

[[rule]]
from = ["a.{p}", "b.{p}"]
to = "ab.{p}"
stack = -1

[[rule]]
drop = "head.**"

[[rule]]
to = "new.{p=weight|bias}"
fresh = true
group = 1

[[rule]]
from = "w"
to = ["v.{e=0..3}", "u"]
ops = [
  { transpose = true }, { permute = [1, 0, 2] },
  { reshape = { dim = 0, from = [4, 2], to = [8] } }, { reshape = [2, -1] },
  { slice = { dim = 0, start = 1, stop = 3 } },
  { resize = { dim = 0, size = 9, fill = { default = "mean", param = 0.0 } } },
  { repeat = { dim = 1, times = 2, each = true } }, { scale = 0.5 }, { cast = "bfloat16" },
  { split = { dim = 0, sizes = [1, 2, 2, 2, 2] } },
]

[[stage]]
[[stage.rule]]
from = "u"
to = "t"

[[group]]
match = "**.weight"
[[group]]
match = ["**"]
like = 0
set = { weight_decay = 0.0, betas = [0.9, 0.95] }
"""


def test_a_plan_survives_being_written() -> None:
    plan = Plan.from_toml(EVERYTHING)
    assert Plan.from_toml(plan.to_toml()) == plan
    assert len(plan.rules) == 5
    assert len(plan.rules[4].operations) == 10
    assert plan.groups[1].set == {"weight_decay": 0.0, "betas": [0.9, 0.95]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[rule]]\nform = "a"\nto = "b"', "plan:2: rule 1: unknown key 'form'\nDid you mean `from`?"),
        ('[[rule]]\nfrom = "a"\nto = "b"\n\n[[rule]]\nfrom = "c"', "plan:6: rule 2: needs `to`, `drop` or `fresh`"),
        ('[[rule]]\nfrom = "{i}.w"\nto = "w"', "plan:2: rule 1: {i}.w -> w: {i} is captured"),
        ('[[rule]]\nfrom = "a"\nto = "b{"', "plan:3: rule 1: template 'b{': unbalanced '{'"),
        ('[[rule]]\nfrom = "a"\nto = "b"\nsplit = "x"', 'plan:4: rule 1: `split` cannot be "x"'),
        ('[[rule]]\nfrom = "a"\nto = "b"\nconcat = 0\nscale = 2', "plan:4: rule 1: `concat` and `scale` in one rule"),
        ('[[rule]]\nfrom = "a"\nto = "b"\nops = [{ splitt = 0 }]', "plan:4: rule 1: unknown operation 'splitt'"),
        ('[policy]\nmissing = "maybe"', "plan:2: policy: `missing` is one of error, fresh, not 'maybe'"),
        ('[polcy]\nmissing = "fresh"', "unknown key 'polcy'\nDid you mean `policy`?"),
        ("[[group]]\nlike = 1", "plan:1: group 1: needs `match`"),
        ('[[group]]\nmatch = "a"\nnumber = 1', "plan:3: group 1: `number` cannot be combined with `match`"),
        ("[scheduler]\npath = 'a'", "plan:1: scheduler 1: needs `set`, a table of arguments"),
        ("[[scheduler]]\nset = { a = 1 }\nlength = 3", "plan:3: scheduler 1: unknown key 'length'"),
        ("[slots]\nx = 3", "plan:2: slots: `x` does not say what kind of slot it is"),
        ('[[rule]]\nfrom = "{e}.w"\nto = "w"\nstack = 0', "nothing says in which order"),
        ('[[rule]]\nfrom = ["a", "b"]\nto = "c"', "several sources, but nothing joins them"),
        ('[[rule]]\nfrom = "{x=a|b}"\nto = "{x=c|d|e}"', "has 3 choices on one side and 2 on the other"),
        ("[[rule]]\nfrom = ?\n", "plan: Invalid value (at line 2"),
        ('[[rule]]\nfrom = "**"\nto = "b"', "* has no name to produce from"),
        ('[[rule]]\nto = "b"', "plan:2: rule 1: needs `from`"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_key(text: str, said: str) -> None:
    with pytest.raises(PlanSyntaxError) as raised:
        Plan.from_toml(text)
    assert said in str(raised.value)


def test_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    with pytest.raises(PlanSyntaxError, match="cannot be read"):
        Plan.from_file(path)
    path.write_text('[[rule]]\nfrom = "a"\nto = 3\n')
    with pytest.raises(PlanSyntaxError, match=r"plan\.toml:3: rule 1: `to` must be a template"):
        Plan.from_file(path)
    path.write_text(EVERYTHING)
    assert Plan.from_file(path) == Plan.from_toml(EVERYTHING)


def test_one_liners() -> None:
    plan = Plan.from_options(rename=["a.{p}=b.{p}"], duplicate=["m={e=0..1}.m"], drop=["h.**"], fresh=["x"])
    assert [str(rule) for rule in plan.rules] == ["a.{p} -> b.{p}", "m -> {e=0..1}.m", "drop h.**", "fresh x"]
    for options in ({"rename": ["a"]}, {"rename": ["a=b,c"]}, {"duplicate": ["=b"]}):
        with pytest.raises(PlanSyntaxError):
            Plan.from_options(**options)
