"""Tar archives from outside: each member comes with its name and content, or a refusal with the reason."""

import io
import tarfile

import pytest

from mf_eqx.data._tar import TarReader


def block(name="a", content=b"", **fields):
    """A member as it stands in an archive, also one that `tarfile` would not write."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def pax(content, kind=tarfile.XHDTYPE):
    return block("pax", content, type=kind)


def record(key, value):
    rest = f" {key}={value}\n".encode()
    length = next(n for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n)))
    return str(length).encode() + rest


def read(content, most_members=10, most_bytes=10_000):
    reader = TarReader(io.BytesIO(content), most_members=most_members, most_bytes=most_bytes)
    return [(member.name, reader.read()) for member in reader]


def test_members_come_in_order_whether_they_are_read_or_not():
    archive = block("a", b"1" * 700) + block("b", b"2" * 512) + block("c") + bytes(1024)
    assert read(archive) == [("a", b"1" * 700), ("b", b"2" * 512), ("c", b"")]
    assert [member.name for member in TarReader(io.BytesIO(archive), most_members=3, most_bytes=700)] == ["a", "b", "c"]


def test_names_are_those_of_extended_headers():
    archive = pax(record("mtime", "1.5") + record("path", "ä/b")) + block("x", b"1")
    archive += block("././@LongLink", b"long\0", type=tarfile.GNUTYPE_LONGNAME) + block("y", b"2")
    archive += pax(record("path", "nowhere"), tarfile.XGLTYPE) + block("z", b"3") + bytes(512)
    assert read(archive) == [("ä/b", b"1"), ("long", b"2"), ("z", b"3")]


def test_archive_without_zeros_at_its_end_is_read():
    assert read(block("a", b"1")) == [("a", b"1")] and read(b"") == []


def test_size_of_a_link_has_no_content():
    archive = block("link", type=tarfile.SYMTYPE, size=700) + block("b", b"1") + bytes(512)
    assert read(archive) == [("link", b""), ("b", b"1")]


NESTED = pax(record("comment", "a"))
BAD_RECORDS = [b"hello", b"3 a", b"0 a=b\n", b"99 a=b\n", b"5 ab\n", b"-6 a=b\n", b"6 a=b\n7", b"1" * 5000]


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (block(size=1 << 60), r"its members must have 0 to 10,000 bytes, got 1,152,921,504,606,846,976"),
        (block(size=-512), r"its members must have 0 to 10,000 bytes, got -512"),
        (pax(b"", tarfile.XHDTYPE) * 5000, "it must have at most 8 extended headers to a member, got more"),
        (NESTED * 9 + block("a"), "it must have at most 8 extended headers to a member, got more"),
        (pax(record("size", "9")) + block("a"), "its extended headers must not give sizes, got size"),
        (pax(record("size", "9"), tarfile.XGLTYPE) + block("a"), "its extended headers must not give sizes, got size"),
        (pax(record("GNU.sparse.map", "0,1")), "its extended headers must not give sizes, got GNU.sparse.map"),
        (block(type=tarfile.GNUTYPE_SPARSE), "it must have no sparse files, got 'a'"),
        (block() * 11, "it must have at most 10 members, got more"),
        (block(content=b"a" * 700)[:1100], "it is cut off"),
        (block("a")[:100], "truncated header"),
        (b"h" * 512, "bad checksum|invalid header"),
        *[(pax(bad), "its extended headers must have records of length, key and value") for bad in BAD_RECORDS],
    ],
    ids=range(20),
)
def test_archive_out_of_bounds_is_refused(archive, reason):
    with pytest.raises(tarfile.TarError, match=reason):
        read(archive)


def test_long_extended_headers_are_refused():
    long = pax(b"9 a=bcde\n" * 60_000)
    with pytest.raises(tarfile.TarError, match="its extended headers must have at most 1,048,576 bytes, got more"):
        read(long + long + block("a"), most_bytes=1 << 30)


def test_member_at_the_bounds_is_read():
    assert read(NESTED * 8 + block("a", bytes(10_000)) + block() * 9)[0] == ("a", bytes(10_000))
