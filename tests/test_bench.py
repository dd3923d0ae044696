"""The benchmark harness measures what it says, and notices a tool that does nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.bench import __main__ as bench
from tests.bench import _data, cli
from tests.bench._harness import (
    MB,
    CommandError,
    Comparison,
    Job,
    Row,
    Run,
    Spread,
    compare,
    copy_job,
    print_table,
    run_job,
    run_once,
    standard_rows,
)

# A tool that copies the bytes and adds the names a real one would write: enough to be measured.
STAND_IN = """
import pathlib, shutil, sys
if sys.argv[-1] in ("--version", "--help"):
    print("optimstate")
    sys.exit()
verb, source, *rest = sys.argv[1:]
if verb == "inspect":
    print('{"slots": ["exp_avg", "exp_avg_sq"]}')
elif verb == "convert":
    shutil.copyfile(source, rest[0])
else:
    target = source if "--in-place" in rest else shutil.copyfile(source, rest[0])
    with open(target, "ab") as file:
        file.write(b"model.layers.0.")
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tiny.pt"
    _data.write(_data.Recipe(layers=2, width=96, vocabulary=256, context=64), path)
    return path


@pytest.fixture
def setting(tiny: Path, tmp_path: Path) -> cli.Setting:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    folder = tmp_path / "out"
    folder.mkdir()
    return cli.Setting([sys.executable, str(script)], {"tiny": tiny}, {"listed": tiny}, tiny, tiny, folder, pairs=1)


def test_peak_memory_is_the_childs_own() -> None:
    # This process holds torch, far more than a bare interpreter: none of it may be counted.
    bare = run_once(python("pass")).peak
    large = run_once(python("data = b'x' * 150_000_000")).peak
    assert bare < 40 * MB
    assert 150 * MB < large < 200 * MB


def test_cpu_and_wall_time_are_told_apart() -> None:
    asleep = run_once(python("import time; time.sleep(0.3)"))
    busy = run_once(python("import time\nwhile time.process_time() < 0.3: pass"))
    assert asleep.wall >= 0.3
    assert asleep.cpu < 0.25
    assert busy.cpu >= 0.3


def test_a_failing_command_is_an_error_with_what_it_said() -> None:
    with pytest.raises(CommandError, match=r"(?s)exit code 3.*the reason"):
        run_once(python("import sys; print('the reason', file=sys.stderr); sys.exit(3)"))
    with pytest.raises(CommandError, match="could not be started"):
        run_once(["no-such-program-anywhere"])


def test_what_a_command_says_is_kept() -> None:
    assert run_once(python("print('spoken')")).said == "spoken"


def test_runs_alternate_and_clean_up_after_themselves(tmp_path: Path) -> None:
    log, output = tmp_path / "log", tmp_path / "output"

    def job(name: str) -> Job:
        code = f"open({str(log)!r}, 'a').write({name!r}); open({str(output)!r}, 'x')"
        return Job(name, python(code), outputs=[output])

    measured = compare(job("A"), job("B"), pairs=2)
    assert log.read_text() == "ABABAB"
    assert len(measured.ours) == len(measured.peer) == 2
    assert not output.exists()


def test_outputs_are_removed_when_a_check_fails(tmp_path: Path) -> None:
    output = tmp_path / "output"

    def check(said: str) -> None:
        assert output.exists()
        raise CommandError("not what was wanted")

    with pytest.raises(CommandError, match="wanted"):
        run_job(Job("job", python(f"open({str(output)!r}, 'x')"), outputs=[output], check=check))
    assert not output.exists()


def test_ratios_are_taken_pair_by_pair() -> None:
    ours = [Run(1.0, 2.0, 10 * MB), Run(3.0, 2.0, 30 * MB), Run(8.0, 4.0, 20 * MB)]
    peer = [Run(2.0, 1.0, 5 * MB), Run(3.0, 4.0, 6 * MB), Run(4.0, 4.0, 7 * MB)]
    measured = Comparison(ours, peer)
    assert measured.wall == Spread(median=1.0, low=0.5, high=2.0)
    assert measured.cpu == Spread(median=1.0, low=0.5, high=2.0)
    assert (measured.peak, measured.peer_peak) == (30.0, 7.0)
    assert measured.beyond([Run(1.0, 0, 0), Run(0.9, 0, 0), Run(5.0, 0, 0)]) == Spread(2 / 3, 0.0, 7 / 4)


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("a", Spread(1.1, 0.9, 3.0), 1.15), "ok"),
        (Row("a", Spread(1.2, 0.9, 3.0), 1.15), "MISS"),
        (Row("a", 64.0, 64.0, "MB"), "ok"),
        (Row("a", 65.0, 64.0, "MB"), "MISS"),
        (Row("a", Spread(9.0, 9.0, 9.0)), ""),
    ],
)
def test_a_verdict_is_the_median_against_the_target(row: Row, verdict: str) -> None:
    assert row.verdict == verdict


def test_a_table_has_target_and_spread_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    measured = Comparison([Run(1.0, 1.0, 10 * MB)] * 2, [Run(2.0, 4.0, 20 * MB)] * 2)
    print_table("title", standard_rows("ours / cp", measured, wall=0.4, peak=64.0))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "title"
    assert lines[3:] == [
        "  ours / cp: wall                     <= 0.4  0.5 (0.5-0.5) x     MISS",
        "  ours / cp: cpu                              0.25 (0.25-0.25) x",
        "  ours / cp: peak memory (peer's 20)  <= 64   10 MB               ok",
    ]


def test_a_recipe_is_a_checkpoint_that_torch_loads(tiny: Path) -> None:
    loaded = torch.load(tiny, weights_only=True)
    names = [name for group in loaded["optimizer"]["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(loaded["model"])
    assert len(loaded["optimizer"]["state"]) == len(names) == 2 + 2 * 12 + 2
    model = torch.nn.ParameterDict({name.replace(".", "-"): value for name, value in loaded["model"].items()})
    groups = [
        {"params": [(n, model[n.replace(".", "-")]) for n in group["param_names"]]}
        for group in loaded["optimizer"]["param_groups"]
    ]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(loaded["optimizer"])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert 2_500_000 < tiny.stat().st_size < 4_000_000
    assert [path.name for path in tiny.parent.iterdir()] == [tiny.name]


def test_many_parameters_and_the_flat_form(tmp_path: Path) -> None:
    from safetensors import safe_open

    recipe = _data.Recipe(scalars=250)
    _data.write(recipe, tmp_path / "many.safetensors")
    with safe_open(tmp_path / "many.safetensors", "pt") as file:
        assert len(file.keys()) == 1000
    _data.write(recipe, tmp_path / "many.pt")
    loaded = torch.load(tmp_path / "many.pt", weights_only=True)
    assert len(loaded["optimizer"]["state"]) == 250
    assert len(loaded["optimizer"]["param_groups"]) == 1
    storages = {value.untyped_storage().data_ptr() for value in loaded["model"].values()}
    assert len(storages) == 250


def test_the_large_recipes_are_as_large_as_their_names() -> None:
    def size(recipe: _data.Recipe) -> int:
        return sum(12 * torch.Size(shape).numel() for _, shape in recipe.shapes())

    assert size(_data.RECIPES["3MB"]) == pytest.approx(3e6, rel=0.05)
    assert size(_data.RECIPES["1GB"]) == pytest.approx(1e9, rel=0.05)
    assert 1.02 * 2**32 < size(_data.RECIPES["4.4GB"]) < 4.5e9
    assert sum(4 for _ in _data.RECIPES["20000-tensors"].shapes()) == 80_000


def test_every_part_prints_its_table(setting: cli.Setting, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(True, setting=setting)
    printed = capsys.readouterr().out
    for part in cli.PARTS:
        assert f"optimstate {part}\n" in printed
    assert "tiny / cp: wall " in printed
    assert "tiny / cp and sync: wall " in printed
    assert "tiny safetensors to pt --no-checksums --no-sync / cp: peak memory" in printed
    assert list(setting.folder.iterdir()) == []


@pytest.mark.parametrize("part", cli.PARTS)
def test_a_tool_that_does_nothing_is_not_measured(
    part: str, setting: cli.Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = replace(setting, tool=python("import sys"))
    assert not cli.main(True, only=[part], setting=idle)
    printed = capsys.readouterr().out
    assert f"optimstate {part}: " in printed
    assert any(found in printed for found in ("names no slot", "nothing was written", "does not mention", "no version"))


def test_a_copy_keeps_its_old_names_and_is_found_out(setting: cli.Setting, tmp_path: Path) -> None:
    target = tmp_path / "copy.pt"
    job = replace(copy_job(setting.tiny, target), check=cli.wrote(target, setting.tiny, mentions=cli.NEW_NAME))
    with pytest.raises(CommandError, match=r"does not mention model\.layers\.0\."):
        run_job(job)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "nothing"])
    with pytest.raises(SystemExit, match="no such part"):
        cli.main(True, only=["nothing"])


def test_a_bench_that_is_not_there_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "BENCHES", ("absent",))
    assert bench.main(["--only", "absent"]) == 0
    assert "absent: not in this checkout, skipped" in capsys.readouterr().out
