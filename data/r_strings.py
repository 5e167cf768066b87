"""Texts in packages of R: the character vectors of a lazy-load database (data/Rdata.rdb)."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

HEADER = 23
"""Bytes before an object: format, three versions and the name of the encoding, UTF-8."""

STRINGS = 16
"""R's type of a vector of strings, in the lowest byte of the four before its length."""


def character_vectors(file: Path) -> Iterator[str]:
    """The vectors of strings in an R lazy-load database, in order, each as one text with a line per string.

    The file is a row of zlib streams, each after its length; a stream holds one object as R's `serialize` writes it
    (version 3, big endian). Objects of other types are skipped.
    """
    content = file.read_bytes()
    while content:
        stream = zlib.decompressobj()
        serialized = stream.decompress(content[4:])
        content = stream.unused_data
        if serialized[HEADER + 3] == STRINGS:
            yield "\n".join(_strings(serialized))


def _strings(serialized: bytes) -> Iterator[str]:
    (count,) = struct.unpack_from(">i", serialized, HEADER + 4)
    offset = HEADER + 8
    for _ in range(count):
        (length,) = struct.unpack_from(">i", serialized, offset + 4)  # -1 stands for a missing string
        yield serialized[offset + 8 : offset + 8 + max(length, 0)].decode()
        offset += 8 + max(length, 0)
