"""Tar archives from other programs, read once from front to back: nothing is extracted, and all sizes are limited.

    header            512 bytes: name, size, type
    content           of a file, padded to a multiple of 512 bytes
    extended header   a header with content of its own, which gives a long name or other fields of the member after it
    zeros             at the end

`tarfile` limits neither the sizes that a header declares nor the nesting of extended headers; so it is used here only
to parse single headers. From extended headers only the name is used. Those that change a size are refused: only files
of more than 8 GB require them.
"""

import io
import tarfile
from collections.abc import Iterator

_BLOCK = 512
_PIECE = 1 << 20
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_EXTENDED = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_LINKS, _DEVICES = (tarfile.LNKTYPE, tarfile.SYMTYPE), (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_WITHOUT_CONTENT = (*_LINKS, *_DEVICES, tarfile.DIRTYPE)
_MOST_EXTENDED = 8
"""The largest number of extended headers of one member; four types are meaningful."""
_LARGEST_EXTENDED = 1 << 20
"""The largest number of bytes in all extended headers of one member."""


class TarReader:
    """The members of an archive.

        reader = TarReader(file, most_members=1000, most_bytes=1 << 29)
        for member in reader:
            if member.name == "readme":
                content = reader.read()

    **Arguments:** `file` to read from; `most_members` the largest number of members; `most_bytes` the largest number of
    bytes of one member's content.

    **Raises:** `tarfile.TarError` with the reason, from iteration and `read`: not an archive, truncated, more than the
    limits, sparse files or sizes in extended headers; also the errors of reading `file`.
    """

    def __init__(self, file: io.RawIOBase | io.BufferedIOBase, *, most_members: int, most_bytes: int):
        self._file, self._most_members, self._most_bytes = file, most_members, most_bytes
        self._remaining = self._padding = 0

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        for _ in range(self._most_members):
            if (member := self._next_member()) is None:
                return
            yield member
            self._skip(self._remaining + self._padding)
        if self._next_member() is not None:
            raise tarfile.ReadError(f"it must have at most {self._most_members:,} members, got more")

    def read(self) -> bytes:
        """The content of the current member of the iteration; empty if it has been read before."""
        content = self._read_bytes(self._remaining)
        self._remaining = 0
        return content

    def _next_member(self) -> tarfile.TarInfo | None:
        """The next member, with the name from its extended headers if they give one; None at the end."""
        name, budget = None, _LARGEST_EXTENDED
        for _ in range(_MOST_EXTENDED + 1):
            if (member := self._read_header()) is None:
                return None
            if member.type not in _EXTENDED:
                member.name = member.name if name is None else name
                self._remaining = 0 if member.type in _WITHOUT_CONTENT else member.size
                self._padding = -self._remaining % _BLOCK
                return member
            if (budget := budget - member.size) < 0:
                raise tarfile.ReadError(f"its extended headers must have at most {_LARGEST_EXTENDED:,} bytes, got more")
            content = self._read_bytes(member.size)
            self._skip(-member.size % _BLOCK)
            name = _name_from(member.type, content, name)
        raise tarfile.ReadError(f"it must have at most {_MOST_EXTENDED} extended headers to a member, got more")

    def _read_header(self) -> tarfile.TarInfo | None:
        block = self._read_bytes(_BLOCK, whole=False)
        if not block.strip(b"\0"):  # the block is empty if an archive ends without zeros
            return None
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if not 0 <= member.size <= self._most_bytes:
            raise tarfile.ReadError(f"its members must have 0 to {self._most_bytes:,} bytes, got {member.size:,}")
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"it must have no sparse files, got {member.name[:60]!r}")
        return member

    def _read_bytes(self, size: int, *, whole: bool = True) -> bytes:
        content = bytearray()
        while piece := self._file.read(min(_PIECE, size - len(content))):
            content += piece
        if whole and len(content) < size:
            raise tarfile.ReadError("it is cut off")
        return bytes(content)

    def _skip(self, size: int) -> None:
        for start in range(0, size, _PIECE):
            self._read_bytes(min(_PIECE, size - start))


def _name_from(kind: bytes, content: bytes, before: str | None) -> str | None:
    """The name from the extended headers of a member up to this one; `before` is the name from those before it."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    name = before
    if kind in _PAX:
        for key, value in _records(content):
            if key == b"size" or key.startswith(b"GNU.sparse"):
                raise tarfile.ReadError(
                    f"its extended headers must not give sizes, got {key[:60].decode(errors='replace')}"
                )
            if key == b"path" and kind != tarfile.XGLTYPE:
                name = value.decode("utf-8", "surrogateescape")
    return name


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Key and value of each record "length key=value\\n", where the length is that of the whole record."""
    start = 0
    while start < len(content) and content[start]:
        digits, space, _ = content[start : start + 10].partition(b" ")
        end = start + int(digits) if digits.isdigit() else 0
        key, equals, value = content[start + len(digits) + 1 : end - 1].partition(b"=")
        if not (space and equals) or content[end - 1 : end] != b"\n":
            raise tarfile.ReadError("its extended headers must have records of length, key and value")
        yield key, value
        start = end
