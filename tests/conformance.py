"""What every container format must pass. A test class inherits `Conformance` and names its format."""

from __future__ import annotations

import gc
import os
import shutil
import stat
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optimstate
from optimstate.errors import CheckpointError, DestinationError, OptimStateError, RepresentationError
from optimstate.formats.protocol import HEAD_BYTES, Claim, Format, WriteOptions
from optimstate.formats.registry import FORMATS, detect, get_format, open_checkpoint
from optimstate.formats.torch import zip as torch_zip
from optimstate.io.extents import FileSource
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import difference, tensors
from tests.support import digest

QUICK = WriteOptions(sync=False)


def live_tree() -> dict[Any, Any]:
    """Everything a checkpoint without foreign objects can hold."""
    base = torch.arange(24.0)
    state = OrderedDict(w=torch.ones(2, 3), b=torch.zeros(3))
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    narrow = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint16]
    return {
        "model": state,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}, 1: {}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1], "param_names": ["w", "b"]}],
        },
        "aliases": [base, base[4:10], base.view(4, 6), base],
        "strides": [torch.arange(6.0).view(2, 3).t(), torch.ones(1).expand(3, 2), torch.arange(10)[::3]],
        "dtypes": [torch.arange(5).to(dtype) for dtype in narrow],
        "odd": [torch.tensor([True, False]), torch.tensor([1 + 2j]), torch.tensor(1j, dtype=torch.complex128)],
        "shapes": [torch.tensor(7), torch.empty(0), torch.empty(2, 0, 3), torch.ones(1, 1, 1)],
        "kinds": [torch.nn.Parameter(torch.ones(2)), torch.ones(1, requires_grad=True)],
        "numbers": [0, -1, 2**80, True, 0.1, float("inf"), float("-inf"), float("nan"), -0.0, 1 - 2j],
        "text": ["", "ä\u2603\U0001f600", "line\nline", "$tensor"],
        "bytes": [b"", bytes(range(256)), bytearray(b"x")],
        "containers": [(), (1,), [[]], {}, {1, 2}, frozenset({"a"}), OrderedDict(), None],
        "keys": {1: "a", "1": "b", None: "c", (1, "x"): "d", 1.5: "e", False: "f", "": "g", "$tuple": "h"},
        0: "root key",
    }


def lazy(live: Any, folder: Path) -> Any:
    """The tree of a live object."""
    folder.mkdir(exist_ok=True)
    torch.save(live, folder / "live.pt")
    return torch_zip.read(folder / "live.pt").tree


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.booleans(), inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4).map(OrderedDict)
        | st.sets(st.integers() | st.text(max_size=2), max_size=4)
    ),
    max_leaves=15,
)


class Conformance:
    """The tests; a class says which format it is of, and what that format cannot hold.

    Attributes:
        name: The format's name in the registry.
        suffix: An ending of its files or folders.
        writes_folders: Whether a checkpoint is a folder.
        cannot_hold: Entries of `live_tree` that do not come back as they were: the writer must refuse each of them, or
            say what becomes of it.
        strides, aliases: Whether strides, and which tensors share memory, come back.
        plain: Trees of plain values that it can hold.
        roots: The types that the whole of a checkpoint may have.
    """

    name: str
    suffix: str
    writes_folders = False
    cannot_hold: frozenset[Any] = frozenset()
    strides = aliases = True
    plain: st.SearchStrategy[Any] = PLAIN
    roots: tuple[type, ...] = (torch.Tensor, dict, list, type(None), int)

    @property
    def format(self) -> Format:
        return get_format(self.name)

    def live(self) -> dict[Any, Any]:
        """What the tests write."""
        return {key: value for key, value in live_tree().items() if key not in self.cannot_hold}

    def expected(self, tree: Any) -> Any:
        """What comes back of what was written."""
        return tree

    def differ(self, left: Any, right: Any) -> str | None:
        return difference(left, right, strides=self.strides, aliases=self.aliases)

    @pytest.fixture
    def tree(self, tmp_path: Path) -> Any:
        return lazy(self.live(), tmp_path / "source")

    @pytest.fixture
    def written(self, tree: Any, tmp_path: Path) -> Path:
        """The tree in this container, alone in its folder."""
        folder = tmp_path / "written"
        folder.mkdir()
        self.format.write(tree, folder / f"file{self.suffix}", like=None, options=QUICK)
        return folder / f"file{self.suffix}"

    def read(self, path: Path) -> Any:
        """Read everything: the tree, and every byte of every tensor."""
        tree = self.format.read(path).tree
        for _, tensor in tensors(tree):
            assert len(tensor.tobytes()) == tensor.nbytes
        return tree

    # --- contents

    def test_a_rich_tree_returns_equal(self, tree: Any, written: Path) -> None:
        document = self.format.read(written)
        assert document.format == self.name
        assert document.path == written
        assert self.differ(self.expected(tree), document.tree) is None

    def test_what_it_cannot_hold_is_refused_or_named(self, tmp_path: Path) -> None:
        """One by one, so that each has its own refusal or its own note."""
        kept = {key: value for key, value in self.live().items() if key in ("model", "optimizer")}
        self.format.write(lazy(kept, tmp_path / "kept"), tmp_path / f"kept{self.suffix}", like=None, options=QUICK)
        usual = self.format.write(lazy(kept, tmp_path / "k"), tmp_path / f"k{self.suffix}", like=None, options=QUICK)
        for number, key in enumerate(sorted(self.cannot_hold - kept.keys(), key=str)):
            tree = lazy({**kept, key: live_tree()[key]}, tmp_path / f"source{number}")
            path = tmp_path / f"file{number}{self.suffix}"
            try:
                notes = self.format.write(tree, path, like=None, options=QUICK)
            except RepresentationError:
                assert not path.exists()
            else:
                same = self.differ(self.expected(tree), self.read(path)) is None
                assert same or set(notes) - set(usual), f"{key!r} changes without a word"

    def test_writing_twice_gives_the_same_bytes(self, tree: Any, written: Path, tmp_path: Path) -> None:
        again = tmp_path / "again" / written.name
        again.parent.mkdir()
        self.format.write(tree, again, like=None, options=QUICK)
        assert digest(again) == digest(written)

    def test_a_second_pass_changes_nothing(self, written: Path, tmp_path: Path) -> None:
        document = self.format.read(written)
        before = digest(written)
        for like in (document, None):
            again = tmp_path / f"again{like is None}{self.suffix}"
            self.format.write(document.tree, again, like=like, options=QUICK)
            assert self.differ(document.tree, self.read(again)) is None
        assert digest(written) == before

    def test_it_passes_through_torch(self, tree: Any, written: Path, tmp_path: Path) -> None:
        torch_zip.write(self.format.read(written).tree, tmp_path / "back.pt", options=QUICK)
        assert self.differ(self.expected(tree), torch_zip.read(tmp_path / "back.pt").tree) is None

    @settings(max_examples=60)
    @given(data=st.data())
    def test_any_plain_tree_returns_equal(self, tmp_path: Path, data: st.DataObject) -> None:
        tree = data.draw(self.plain)
        path = tmp_path / f"plain{self.suffix}"
        self.format.write(tree, path, like=None, options=QUICK)
        assert self.differ(tree, self.read(path)) is None

    def test_a_bare_tensor_and_an_empty_tree_return(self, tmp_path: Path) -> None:
        for live in (torch.ones(2, 2), {}, [], None, 3):
            path = tmp_path / f"bare{self.suffix}"
            tree = lazy(live, tmp_path / "bare")
            if type(live) not in self.roots:
                with pytest.raises(RepresentationError):
                    self.format.write(tree, path, like=None, options=QUICK)
                continue
            self.format.write(tree, path, like=None, options=QUICK)
            assert self.differ(tree, self.read(path)) is None

    # --- the file

    def test_every_extent_lies_in_the_file(self, written: Path) -> None:
        for _, tensor in tensors(self.format.read(written).tree):
            for piece in tensor.storage.pieces:
                if isinstance(piece.source, FileSource):
                    assert piece.source.path in files(written)
                    assert 0 <= piece.offset <= piece.offset + piece.length <= piece.source.path.stat().st_size

    def test_it_is_recognised_and_by_no_other_format(self, written: Path, tmp_path: Path) -> None:
        found = detect(written)
        assert found is not None
        assert self.name == found.NAME
        head = b"" if self.writes_folders else written.read_bytes()[:HEAD_BYTES]
        claims = {name: get_format(name).sniff(written, head) for name in FORMATS}
        surest = claims.pop(self.name)
        assert surest > max(claims.values())
        registered = FORMATS[self.name]
        assert registered.may_be(written, head, is_folder=self.writes_folders)
        assert set(registered.suffixes) == set(self.format.SUFFIXES)
        other = tmp_path / f"text{self.suffix}x"
        other.write_bytes(b"hello, world\n" * 10)
        assert self.format.sniff(other, other.read_bytes()[:HEAD_BYTES]) is Claim.NO

    def test_every_verb_knows_it(self, written: Path, tmp_path: Path) -> None:
        info = optimstate.inspect(written)
        assert info.format == self.name
        assert {"model", "optimizer"} <= {section.kind for section in info.sections}
        optimstate.convert(written, tmp_path / "there.pt", options=QUICK)
        optimstate.convert(tmp_path / "there.pt", tmp_path / f"back{self.suffix}", to=self.name, options=QUICK)
        back = open_checkpoint(tmp_path / f"back{self.suffix}").tree
        assert self.differ(open_checkpoint(written).tree, back) is None

    # --- writing

    def test_an_older_file_is_replaced_and_its_mode_kept(self, tree: Any, tmp_path: Path) -> None:
        path = tmp_path / f"old{self.suffix}"
        if self.writes_folders:
            path.mkdir()
            (path / "stale").touch()
        else:
            path.write_bytes(b"old")
            path.chmod(0o640)
        self.format.write(tree, path, like=None, options=WriteOptions())
        assert self.differ(self.expected(tree), self.read(path)) is None
        assert self.writes_folders or stat.S_IMODE(path.stat().st_mode) == 0o640
        assert not (path / "stale").exists()

    @pytest.mark.parametrize("old", [None, b"precious"])
    def test_an_interrupted_write_leaves_the_old_file_or_none(
        self, old: bytes | None, tree: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "target"
        folder.mkdir()
        path = folder / f"file{self.suffix}"
        if old is not None:
            put(path, old, folder=self.writes_folders)
        for error in (KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()):
            outcomes = set()
            for allowed in range(12):
                with monkeypatch.context() as patch:
                    patch.setattr(os, "write", failing(os.write, allowed, error))
                    patch.setattr(os, "copy_file_range", failing(os.copy_file_range, allowed, error))
                    expected = DestinationError if isinstance(error, OSError) else type(error)
                    try:
                        self.format.write(tree, path, like=None, options=QUICK)
                    except expected:
                        outcomes.add("stopped")
                    else:
                        remove(path) if old is None else put(path, old, folder=self.writes_folders)
                assert [found.name for found in folder.iterdir()] == ([path.name] if old is not None else [])
                if old is not None:
                    assert files(path)[0].read_bytes() == old
            assert "stopped" in outcomes

    def test_a_write_that_cannot_take_its_name_leaves_nothing(self, tree: Any, tmp_path: Path) -> None:
        if self.writes_folders:
            pytest.skip("a folder takes the place of whatever was there")
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / f"taken{self.suffix}").mkdir()
        with pytest.raises(DestinationError):
            self.format.write(tree, folder / f"taken{self.suffix}", like=None, options=QUICK)
        assert [found.name for found in folder.iterdir()] == [f"taken{self.suffix}"]

    def test_progress_counts_what_is_copied(self, tmp_path: Path) -> None:
        kept = {key: value for key, value in self.live().items() if key in ("model", "optimizer")}
        tree = lazy({**kept, "large": torch.arange(1 << 20), "small": torch.ones(3)}, tmp_path / "source")
        seen: list[int] = []
        options = WriteOptions(sync=False, progress=seen.append)
        self.format.write(tree, tmp_path / f"file{self.suffix}", like=None, options=options)
        assert 8 << 20 <= sum(seen) <= sum(file.stat().st_size for file in files(tmp_path / f"file{self.suffix}"))

    # --- reading what is damaged

    def test_a_file_cut_anywhere_is_refused_by_name(self, written: Path, tmp_path: Path) -> None:
        for number, file in enumerate(files(written)):
            data = file.read_bytes()
            points = {len(data) * n // 40 for n in range(40)} | {1, 7, 8, 9, len(data) - 1, len(data) - 9}
            for length in sorted(points if number == 0 else [0, 9, len(data) // 2, len(data) - 1]):
                file.write_bytes(data[:length])
                with pytest.raises(CheckpointError) as caught:
                    self.read(written)
                assert str(written) in str(caught.value), length
                assert file.read_bytes() == data[:length]
            file.write_bytes(data)

    @settings(max_examples=120)
    @given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
    def test_flipped_bytes_are_refused_or_read(self, changes: Any, small: dict[str, bytes], tmp_path: Path) -> None:
        path = tmp_path / f"flipped{self.suffix}"
        for name, data in small.items():
            file = path / name if self.writes_folders else path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        file = files(path)[len(changes) % len(small)]
        data = bytearray(file.read_bytes())
        for where, value in changes:
            data[int(where * len(data))] ^= value
        file.write_bytes(data)
        try:
            tree = self.read(path)
        except OptimStateError as error:
            refusal = error
            assert isinstance(refusal, CheckpointError)
            return
        assert difference(tree, tree) is None

    def small_tree(self) -> Any:
        return {"model": OrderedDict(w=torch.ones(2, 3)), "epoch": 3, "lr": (0.1, None), "view": torch.ones(2, 2).t()}

    @pytest.fixture
    def small(self, tmp_path: Path) -> dict[str, bytes]:
        folder = tmp_path / "small"
        path = folder / f"file{self.suffix}"
        self.format.write(lazy(self.small_tree(), folder), path, like=None, options=QUICK)
        return {str(file.relative_to(path)): file.read_bytes() for file in files(path)}

    def test_a_file_that_shrinks_while_it_is_used_is_noticed(self, written: Path) -> None:
        tree = self.format.read(written).tree
        for file in files(written):
            os.truncate(file, 100)
        with pytest.raises(CheckpointError):
            b"".join(tensor.tobytes() for tensor in contiguous(tree))

    def test_no_descriptor_stays_open(self, written: Path) -> None:
        if not Path("/proc/self/fd").exists():
            pytest.skip("this system does not list descriptors")
        gc.collect()
        gc.disable()  # a file must not stay open until its tree happens to be collected
        try:
            before = len(list(Path("/proc/self/fd").iterdir()))
            for _ in range(20):
                self.format.read(written)
            assert len(list(Path("/proc/self/fd").iterdir())) == before
        finally:
            gc.enable()

    def test_missing_files_are_not_found(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            self.format.read(tmp_path / f"missing{self.suffix}")


def contiguous(tree: Any) -> Iterator[LazyTensor]:
    """Tensors that are read without mapping the file, whose loss the system would tell by a signal."""
    return (tensor for _, tensor in tensors(tree) if tensor.is_contiguous())


def files(path: Path) -> list[Path]:
    """The file, or the files of a folder."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def put(path: Path, content: bytes, *, folder: bool) -> None:
    """What stood there before a write."""
    if path.exists():
        remove(path)
    if folder:
        path.mkdir()
    (path / "old" if folder else path).write_bytes(content)


def failing(real: Any, allowed: int, error: BaseException) -> Any:
    """A system call that fails after some successes."""
    calls = iter(range(10**9))

    def call(*arguments: Any) -> Any:
        if next(calls) >= allowed:
            raise error
        return real(*arguments)

    return call
