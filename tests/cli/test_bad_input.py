"""Wrong input: a clear message on stderr, the documented exit code, nothing written, nothing touched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import corpus
from tests.cli.running import Outcome, run
from tests.support import digest

BAD_INPUT, PLAN, DESTINATION, CONTAINER, USAGE = 3, 4, 5, 6, 2
RENAME = ["--rename", "fc1.{p}=first.{p}"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with a good checkpoint in it, `good.pt`; afterwards every file that was there is as it was."""
    shutil.copy(corpus.case("torch/adam_named_wd").entry, tmp_path / "good.pt")
    before = digest(tmp_path / "good.pt")
    yield tmp_path
    assert digest(tmp_path / "good.pt") == before
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"


def check(outcome: Outcome, code: int, *mentions: str) -> None:
    """One or two lines: what is wrong, and what to do."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert 1 <= len(lines) <= 2, outcome.err
    assert lines[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert "Traceback" not in outcome.err
    for mention in mentions:
        assert mention in outcome.err, outcome.err


def bad_files(folder: Path) -> dict[str, Path]:
    """Things that are no checkpoint."""
    files = {
        "text": b"It was a dark and stormy night.\n" * 10,
        "empty": b"",
        "json": b'{"weight": [1, 2, 3]}',
        "html": b"<!DOCTYPE html><html>404 Not Found</html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
        "zeros": bytes(4096),
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }
    made = {}
    for name, content in files.items():
        made[name] = folder / f"{name}.pt"
        made[name].write_bytes(content)
    made["zip"] = folder / "zip.pt"
    import zipfile

    with zipfile.ZipFile(made["zip"], "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    made["folder"] = folder / "folder"
    (made["folder"] / "inner").mkdir(parents=True)
    (made["folder"] / "notes.txt").write_text("nothing here")
    made["empty folder"] = folder / "empty_folder"
    made["empty folder"].mkdir()
    made["missing"] = folder / "missing.pt"
    return made


NAMES = ["text", "empty", "json", "html", "pointer", "zeros", "picture", "zip", "folder", "empty folder", "missing"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("verb", ["inspect", "remap", "convert"])
def test_what_is_no_checkpoint_is_refused(verb: str, name: str, place: Path) -> None:
    path = bad_files(place)[name]
    before = digest(path) if path.exists() else ""
    arguments = {
        "inspect": [str(path)],
        "remap": [str(path), str(place / "out.pt"), *RENAME],
        "convert": [str(path), str(place / "out.safetensors")],
    }
    check(run(verb, *arguments[verb]), BAD_INPUT, str(path))
    assert not list(place.glob("out*"))
    assert (digest(path) if path.exists() else "") == before


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_cut_at_any_place_is_refused(suffix: str, place: Path) -> None:
    source = place / "whole"
    source.mkdir()
    whole = source / f"whole.{suffix}"
    assert run("convert", str(place / "good.pt"), str(whole)).code == 0
    data = whole.read_bytes()
    for twentieth in range(20):
        cut = place / f"cut.{suffix}"
        length = (len(data) - 1) * twentieth // 19
        cut.write_bytes(data[:length])
        check(run("inspect", str(cut)), BAD_INPUT, str(cut))
        check(run("remap", str(cut), str(place / f"out.{suffix}"), *RENAME), BAD_INPUT, str(cut))
        assert not list(place.glob("out*"))
        assert cut.read_bytes() == data[:length]


def test_a_damaged_file_in_a_folder_is_named(place: Path) -> None:
    folder = place / "checkpoint-4"
    shutil.copytree(corpus.case("transformers/llama_tied_sharded").entry, folder)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    check(run("inspect", str(folder)), BAD_INPUT, shard.name)
    shard.unlink()
    check(run("inspect", str(folder)), BAD_INPUT, shard.name)


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        (["--rename", "nowhere.{p}=somewhere.{p}"], "nowhere.{p}"),
        (["--drop", "nowhere.**"], "nowhere.**"),
        (["--duplicate", "nowhere=a,b"], "nowhere"),
        (["--rename", "fc1.{p}=fc2.{p}"], "fc2.weight"),
        (["--rename", "fc1"], "OLD=NEW"),
        (["--rename", "a.{i=b"], "{"),
        (["--plan", "missing.toml"], "missing.toml"),
    ],
)
def test_a_plan_that_does_not_fit_writes_nothing(options: list[str], mention: str, place: Path) -> None:
    out = place / "out.pt"
    for extra in ([], ["--dry-run"]):
        outcome = run("remap", str(place / "good.pt"), str(out), *options, *extra)
        assert outcome.code == PLAN, outcome
        assert outcome.out == ""
        assert mention in outcome.err
        assert all(line.startswith(("error: ", "hint: ")) for line in outcome.err.splitlines())
        assert not out.exists()


def test_a_plan_file_that_cannot_be_read_says_where(place: Path) -> None:
    plan = place / "plan.toml"
    for content, mention in (
        ("[[rule]\n", "line 1"),
        ('[[rule]]\nfrom = "a"\n', "rule 1"),
        ('[[rule]]\nfrom = "a"\nto = "b"\n\n[[rule]]\nfrm = "a"\n', "frm"),
        ('rule = "a"\n', "rule"),
    ):
        plan.write_text(content)
        check(
            run("remap", str(place / "good.pt"), str(place / "out.pt"), "--plan", str(plan)), PLAN, str(plan), mention
        )
    plan.write_bytes(b"\x80\x02")
    check(run("plan", "show", str(plan)), PLAN, str(plan), "not a plan")
    plan.write_text("# only a comment\n")
    empty = run("remap", str(place / "good.pt"), str(place / "out.pt"), "--plan", str(plan))
    assert empty.code == USAGE
    assert "plan.toml is empty" in empty.err
    assert not (place / "out.pt").exists()


def test_an_existing_destination_is_kept(place: Path) -> None:
    for verb, name, options in (("remap", "out.pt", RENAME), ("convert", "out.safetensors", [])):
        out = place / name
        out.write_bytes(b"precious")
        check(run(verb, str(place / "good.pt"), str(out), *options), DESTINATION, str(out), "--force")
        assert out.read_bytes() == b"precious"
        assert run(verb, str(place / "good.pt"), str(out), *options, "--force").code == 0
        assert out.read_bytes() != b"precious"


def test_the_source_is_no_destination(place: Path) -> None:
    good = place / "good.pt"
    (place / "alias.pt").symlink_to(good)
    (place / "hard.pt").hardlink_to(good)
    for out in (good, place / "alias.pt", place / "hard.pt", place / "." / "good.pt"):
        for force in ([], ["--force"]):
            check(run("remap", str(good), str(out), *RENAME, *force), DESTINATION, "same")
            check(run("convert", str(good), str(out), *force), DESTINATION, "same")


def test_a_source_that_cannot_be_looked_at_is_the_one_that_is_blamed(place: Path) -> None:
    (place / "loop.pt").symlink_to("loop.pt")
    for name, reason in (("loop.pt", "levels of symbolic links"), ("n" * 256, "name too long"), ("good.pt/x", "Not a")):
        out = str(place / "out.pt")
        for words in (["verify"], ["diff", str(place / "good.pt")], ["convert", out], ["remap", out, *RENAME]):
            check(run(words[0], str(place / name), *words[1:]), BAD_INPUT, reason)
    check(run("verify", ""), USAGE, "a path is empty")
    check(run("convert", str(place / "good.pt"), "", "--force"), USAGE, "a path is empty")


def test_a_link_at_the_destination_is_replaced_and_not_followed(place: Path) -> None:
    (place / "kept.pt").write_bytes(b"precious")
    (place / "link.pt").symlink_to("kept.pt")
    assert run("convert", str(place / "good.pt"), str(place / "link.pt"), "--force").code == 0
    assert not (place / "link.pt").is_symlink()
    assert (place / "kept.pt").read_bytes() == b"precious"


def test_a_folder_is_not_written_into_itself(place: Path) -> None:
    folder = place / "run"
    folder.mkdir()
    shutil.copy(place / "good.pt", folder / "model.pt")
    before = digest(folder)
    check(run("remap", str(folder), str(folder / "out"), *RENAME), DESTINATION, "inside")
    check(run("remap", str(folder / "model.pt"), str(folder), *RENAME, "--force"), DESTINATION, "contains")
    assert digest(folder) == before


def test_a_destination_without_a_folder_is_refused(place: Path) -> None:
    out = place / "no" / "such" / "out.pt"
    check(run("remap", str(place / "good.pt"), str(out), *RENAME), DESTINATION, str(out.parent))
    check(run("convert", str(place / "good.pt"), str(out)), DESTINATION, str(out.parent))


def test_a_suffix_of_another_container_stops_remap(place: Path) -> None:
    outcome = run("remap", str(place / "good.pt"), str(place / "out.safetensors"), *RENAME)
    check(outcome, CONTAINER, "optimstate convert")
    check(run("convert", str(place / "good.pt"), str(place / "out.xyz")), USAGE, "--to")


def test_what_a_container_cannot_hold_is_named_with_the_option_that_helps(place: Path) -> None:
    source = corpus.case("torch/wholeobject").entry
    out = place / "out.safetensors"
    check(run("convert", str(source), str(out)), CONTAINER, "--drop-opaque")
    assert not out.exists()
    assert run("convert", str(source), str(out), "--drop-opaque").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["remap"],
        ["remap", "a.pt", "b.pt"],
        ["remap", "a.pt", *RENAME],
        ["remap", "a.pt", "b.pt", *RENAME, "--in-place"],
        ["convert", "a.pt"],
        ["convert", "a.pt", "b.pt", "--shard-size", "many"],
        ["inspect"],
        ["inspect", "a.pt", "--unknown"],
        ["unknown"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told_on_stderr(arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == USAGE
    assert outcome.out == ""
    assert outcome.err
    assert "Traceback" not in outcome.err


def test_a_full_disk_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimstate.io import output as files

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    out = place / "out.safetensors"
    check(run("convert", str(place / "good.pt"), str(out)), DESTINATION, "No space left on device", str(out))
    assert sorted(path.name for path in place.iterdir()) == ["good.pt"]


def test_a_folder_that_cannot_be_written_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    real = os.open

    def denied(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", denied)
    check(run("remap", str(place / "good.pt"), str(place / "out.pt"), *RENAME), DESTINATION, "Permission denied")
