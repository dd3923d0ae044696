"""The four bytes that a CRC-32 tells."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from optimstate.io.checksums import bytes_of_crc


@given(st.binary(min_size=4, max_size=4))
def test_a_checksum_tells_four_bytes(data: bytes) -> None:
    assert bytes_of_crc(zlib.crc32(data)) == data
