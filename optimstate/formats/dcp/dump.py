"""Writing the pickle of `.metadata` from columns, entry by entry, with the opcodes that torch writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from optimstate.formats.dcp.columns import Box, Form, Item, Metadata

__all__ = ["dump_metadata"]

_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE = "torch.distributed.checkpoint.filesystem"
_VERSION = "1.0.0"
_BATCH = 1000  # items per SETITEMS / APPENDS, as CPython writes them
_NEW = b")\x81\x94}\x94("  # an instance, and the mark before its fields


def dump_metadata(metadata: Metadata) -> bytes:
    """The pickle that torch reads."""
    return b"".join(_Writer(metadata).parts())


class _Writer:
    """Makes opcodes; equal names and texts are recalled from the memo."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self.count = 0
        self.memo: dict[object, bytes] = {}

    def parts(self) -> Iterator[bytes]:
        """The pickle in parts."""
        yield (
            b"\x80\x04" + self.named(_MODULE, "Metadata") + self.new() + self.text("state_dict_metadata") + self.table()
        )
        yield from self.batches(map(self.entry, range(len(self.metadata.order))))
        yield self.text("planner_data") + self.table()
        yield from self.batches(self.text(name) + self.path(path) for name, path in self.metadata.paths.items())
        yield self.text("storage_data") + self.table()
        yield from self.batches(self.places())
        yield self.text("storage_meta") + b"N" + self.text("version") + self.text(_VERSION) + b"ub."

    def batches(self, entries: Iterable[bytes]) -> Iterator[bytes]:
        """The entries of a dict."""
        number = -1
        for number, entry in enumerate(entries):
            if number % _BATCH == 0:
                yield b"u(" if number else b"("
            yield entry
        if number >= 0:
            yield b"u"

    # --- opcodes --------------------------------------------------------------------------------------------------

    def put(self, key: object = None) -> bytes:
        """Put the last value into the memo, so that it can be recalled by `key`."""
        if key is not None:
            self.memo[key] = b"h%c" % self.count if self.count < 256 else b"j" + self.count.to_bytes(4, "little")
        self.count += 1
        return b"\x94"

    def new(self) -> bytes:
        """A new instance of the class written before, up to its fields."""
        self.count += 2
        return _NEW

    def table(self) -> bytes:
        """An empty dict."""
        self.count += 1
        return b"}\x94"

    def text(self, text: str) -> bytes:
        """A text."""
        known = self.memo.get(text)
        if known is not None:
            return known
        data = text.encode("utf-8", "surrogatepass")
        spelled = b"\x8c%c" % len(data) if len(data) < 256 else b"X" + len(data).to_bytes(4, "little")
        return spelled + data + self.put(text)

    def named(self, module: str, name: str) -> bytes:
        """A class or function."""
        key = (module, name, "")
        known = self.memo.get(key)
        if known is not None:
            return known
        made = self.text(module) + self.text(name)
        return made + b"\x93" + self.put(key)

    def number(self, number: int) -> bytes:
        """An int."""
        if 0 <= number < 1 << 8:
            return b"K%c" % number
        if 0 <= number < 1 << 16:
            return b"M" + number.to_bytes(2, "little")
        if -1 << 31 <= number < 1 << 31:
            return b"J" + number.to_bytes(4, "little", signed=True)
        data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a%c" % len(data) + data

    def items(self, items: Sequence[bytes]) -> bytes:
        """A tuple, which is not put into the memo."""
        several = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(items))
        return b"".join(items) + several if several else b"(" + b"".join(items) + b"t"

    # --- values ---------------------------------------------------------------------------------------------------

    def constant(self, module: str, name: str, argument: str | int) -> bytes:
        """The result of a call; equal calls are one object."""
        key = (module, name, str(argument))
        known = self.memo.get(key)
        if known is not None:
            return known
        made = self.named(module, name)
        made += self.text(argument) if isinstance(argument, str) else self.number(argument)
        made += b"\x85" + self.put()
        return made + b"R" + self.put(key)

    def size(self, numbers: tuple[int, ...]) -> bytes:
        """A `torch.Size`; equal ones are one object."""
        known = self.memo.get(numbers)
        if known is not None:
            return known
        made = self.named("torch", "Size") + self.items([self.number(number) for number in numbers])
        if numbers:
            made += self.put()
        made += b"\x85" + self.put()
        return made + b"R" + self.put(numbers)

    def path(self, path: Sequence[str | int]) -> bytes:
        """The path of an item as a tuple."""
        keys = self.items([self.text(key) if isinstance(key, str) else self.number(key) for key in path])
        return keys + (self.put() if path else b"")

    def entry(self, number: int) -> bytes:
        """The name and the description of an item."""
        metadata = self.metadata
        form, name = metadata.forms[number], self.text(metadata.order[number])
        if form is None:
            return name + self.named(_MODULE, "BytesStorageMetadata") + b")\x81" + self.put()
        made = name + self.named(_MODULE, "TensorStorageMetadata") + self.new()
        made += self.text("properties") + self.properties(form)
        made += self.text("size") + self.size(form.shape) + self.text("chunks") + b"]" + self.put()
        boxes = [metadata.boxes[row] for row in metadata.rows(number)]
        for start in range(0, len(boxes), _BATCH):
            chunks = [self.chunk(box) for box in boxes[start : start + _BATCH] if box is not None]
            made += chunks[0] + b"a" if len(chunks) == 1 else b"(" + b"".join(chunks) + b"e"
        return made + b"ub"

    def properties(self, form: Form) -> bytes:
        """The `TensorProperties` of a tensor."""
        made = self.named(_MODULE, "TensorProperties") + b")\x81" + self.put() + b"("
        made += self.named("torch", form.dtype)
        made += self.constant("torch.serialization", "_get_layout", "torch.strided")
        made += b"\x88" if form.requires_grad else b"\x89"
        made += self.constant(_MODULE, "_MEM_FORMAT_ENCODING", 0)
        return made + b"\x89t" + self.put() + b"b"

    def chunk(self, box: Box) -> bytes:
        """The `ChunkStorageMetadata` of a piece."""
        made = self.named(_MODULE, "ChunkStorageMetadata") + self.new()
        made += self.text("offsets") + self.size(box[0])
        return made + self.text("sizes") + self.size(box[1]) + b"ub"

    def places(self) -> Iterator[bytes]:
        """The entries of `storage_data`."""
        metadata = self.metadata
        for number, name in enumerate(metadata.order):
            for index, row in enumerate(metadata.rows(number)):
                box = metadata.boxes[row]
                yield self.index(name, box, index) + self.info(metadata.item(row))

    def index(self, name: str, box: Box | None, index: int) -> bytes:
        """A key of `storage_data`."""
        made = self.named(_MODULE, "MetadataIndex")
        if box is None:
            return made + b")\x81" + self.put() + self.table() + self.text("fqn") + self.text(name) + b"sb"
        made += self.new() + self.text("fqn") + self.text(name) + self.text("index") + self.number(index)
        return made + self.text("offset") + self.size(box[0]) + b"ub"

    def info(self, item: Item) -> bytes:
        """A value of `storage_data`."""
        made = self.named(_STORAGE, "_StorageInfo") + self.new()
        made += self.text("relative_path") + self.text(item.file) + self.text("offset") + self.number(item.offset)
        return made + self.text("length") + self.number(item.length) + b"ub"
