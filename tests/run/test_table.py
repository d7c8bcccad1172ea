import pytest

from mf_eqx import run


def test_table_is_aligned_markdown_with_numbers_at_the_right():
    expected = """\
| method        | evaluations | distance |
| ------------- | ----------: | -------: |
| MeanFlow      |           1 |    20.13 |
| Flow Matching |          32 |        9 |"""
    rows = [["MeanFlow", 1, 20.1297], ["Flow Matching", 32, 9.0]]
    assert run.table(rows, ["method", "evaluations", "distance"]) == expected


def test_none_is_a_dash_and_leaves_a_column_numeric():
    assert run.table([[None], ["98%"]], ["read correctly"]).splitlines()[1:] == [
        "| -------------: |",
        "|              - |",
        "|            98% |",
    ]


def test_large_and_tiny_floats_stay_readable():
    lines = run.table([[123456.7], [1.234567e-7], [float("nan")]], ["x"]).splitlines()
    assert [line.strip("| ") for line in lines[2:]] == ["123457", "1.235e-07", "nan"]


def test_bars_and_newlines_cannot_break_a_row():
    lines = run.table([["a|b\nc"]], ["x"]).splitlines()
    assert len(lines) == 3 and lines[2] == r"| a\|b c |"


def test_table_without_rows_has_its_headers():
    assert run.table([], ["a", "b"]).splitlines()[0] == "|   a |   b |"


def test_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"2 cells.*got 1"):
        run.table([[1]], ["a", "b"])
