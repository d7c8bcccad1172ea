"""JSON that others may have written: read within bounds, or refused with the reason."""

import pytest

from mf_eqx._json import parse_json, read_json_object


def test_value_is_read():
    text = '{"a": [1, 2.5, "ä", null, true], "b": {"c": -1e300}}'
    assert parse_json(text.encode()) == {"a": [1, 2.5, "ä", None, True], "b": {"c": -1e300}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe1\0", "can't decode byte 0xff"),
        ("1".encode("utf-16"), "can't decode byte"),
        (b"NaN", "its numbers must be finite, got NaN"),
        (b"[-Infinity]", "its numbers must be finite, got -Infinity"),
        (b"1e999", "its numbers must be finite, got 1e999"),
        (b"1" * 5000, "Exceeds the limit"),
        (b"[" * 65 + b"]" * 65, "it is nested more than 64 times"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "it is nested more than 64 times"),
        (b"[" * 1_000_000, "it is nested more than 64 times"),
        (lambda: b"[" + b",".join([b"[]"] * 600_000) + b"]", "it has more than 1,048,576 values"),
        (lambda: b'"' + b"a" * (1 << 26) + b'"', "it has 67,108,866 bytes, more than 67,108,864"),
    ],
    ids=range(12),
)
def test_text_out_of_bounds_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parse_json(content() if callable(content) else content)


def test_depth_at_the_bound_is_read():
    assert parse_json(b"[" * 64 + b"]" * 64)


def test_numbers_that_are_not_finite_are_read_where_they_may_be():
    assert parse_json(b"[Infinity, 1e999]", finite=False) == [float("inf"), float("inf")]


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "must be JSON, but it cannot be read: Expecting"), (b"[]", "must be an object")]
)
def test_file_of_anything_but_an_object_is_refused_by_name(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json: {message}"):
        read_json_object(tmp_path / "a.json")
