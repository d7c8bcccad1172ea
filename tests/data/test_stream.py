"""A batch follows from the seed and the number of its step alone, and what a source should not return is refused."""

import itertools
import json
import threading
import time

import jax
import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx.data import AbstractSource, ArraySource, JoinedSource, Rows, Stream

pytest.importorskip("grain")

ROWS, BATCH = 20, 6
X = np.arange(2 * ROWS, dtype=np.float32).reshape(ROWS, 2)
LABEL = np.arange(ROWS) % 3


def source(x=X, label=LABEL, **options):
    return ArraySource(x, label, name="digits", **options)


def stream(batch=BATCH, **options):
    return Stream(source(), batch, **options)


def same(batch, other):
    leaves = zip(*map(jax.tree.leaves, (batch, other)), strict=True)
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in leaves)


def first(number, stream, start=0):
    return list(itertools.islice(stream.batches(start), number))


# The order


def order(stream, number):
    """The first row numbers, so many that whole batches have them all."""
    return np.concatenate([stream.rows(step) for step in range(-(-number // stream.batch))])[:number]


@pytest.mark.parametrize("batch", [1, 6, 20])
def test_every_row_comes_once_in_an_epoch_wherever_batches_end(batch):
    epochs = order(stream(batch, seed=3), 4 * ROWS).reshape(4, ROWS)
    np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(ROWS), (4, ROWS)))


def test_every_epoch_has_an_order_of_its_own():
    epochs = order(stream(seed=3), 4 * ROWS).reshape(4, ROWS)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(ROWS))}) == 5


def test_batch_may_hold_the_end_of_an_epoch_and_the_start_of_the_next():
    found, numbers = stream(seed=3), order(stream(seed=3), 24)
    np.testing.assert_array_equal(found.rows(3), numbers[18:])
    np.testing.assert_array_equal(found[3].x, X[numbers[18:]])


def test_order_of_rows_does_not_depend_on_the_size_of_the_batch():
    np.testing.assert_array_equal(order(stream(5, seed=1), 60), order(stream(6, seed=1), 60))


def test_other_seeds_give_other_orders():
    assert len({tuple(order(stream(seed=seed), ROWS)) for seed in range(5)}) == 5


def test_same_seed_gives_the_same_order():
    np.testing.assert_array_equal(order(stream(seed=2), 60), order(stream(seed=2), 60))


def test_without_shuffling_rows_come_in_the_order_of_the_source():
    np.testing.assert_array_equal(order(stream(shuffle=False, seed=3), 60), np.tile(np.arange(ROWS), 3))


def test_rows_late_in_a_long_run_are_found_at_once():
    """A step is not reached by going through those before."""
    rows = stream(seed=1).rows(10**15)  # one at a time they would take years
    assert len(set(rows)) >= BATCH // 2  # of at most two epochs


# The batches


def test_batch_has_the_rows_of_its_step_with_label_and_index():
    found = stream(seed=1)
    for step in (0, 5, 17):
        rows = found.rows(step)
        assert same(found[step], mfx.Batch(X[rows], LABEL[rows].astype(np.int32), np.arange(BATCH, dtype=np.int32)))


def test_source_without_labels_gives_batches_without_condition():
    assert Stream(source(label=None), BATCH)[0].condition is None


@pytest.mark.parametrize("start", [0, 1, 4, 100])
def test_iteration_from_any_step_gives_the_batches_of_these_steps(start):
    found = stream(seed=1, threads=3, ahead=2)
    for step, batch in enumerate(first(5, found, start), start):
        assert same(batch, found[step])


def test_iteration_gives_batches_on_the_device():
    (batch,) = first(1, stream())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(stream()[0]))


def test_iteration_on_a_mesh_gives_the_same_batches_spread_over_it():
    parallelism = mfx.Parallelism(devices=jax.devices()[:1])
    found = stream(seed=1, parallelism=parallelism)
    for step, batch in enumerate(first(3, found)):
        assert same(batch, stream(seed=1)[step])
        assert batch.x.sharding == parallelism.rows


def test_threads_and_what_they_read_ahead_change_no_batch():
    several = [first(8, stream(seed=1, threads=threads, ahead=ahead)) for threads, ahead in ((1, 1), (4, 3))]
    assert all(itertools.starmap(same, zip(*several, strict=True)))


@pytest.mark.parametrize(("start", "stop", "number"), [(0, 3, 3), (2, 3, 1), (3, 3, 0), (5, 3, 0), (0, 0, 0)])
def test_iteration_ends_before_the_step_where_it_is_to_stop(start, stop, number):
    batches = list(stream(seed=1).batches(start, stop))
    assert len(batches) == number
    assert all(same(batch, stream(seed=1)[step]) for step, batch in enumerate(batches, start))


def test_iteration_goes_on_for_ever_by_default():
    assert len(first(50, stream())) == 50


class Watched(AbstractSource):
    """Counts how often it is asked."""

    def __init__(self):
        self.name, self.row_shape, self.dtype, self.labels = "watched", (2,), X.dtype, None
        self.taken, self.threads = 0, set()

    def __len__(self):
        return ROWS

    def take(self, rows):
        self.taken += 1
        self.threads.add(threading.get_ident())
        return Rows(X[rows])


def test_no_more_batches_are_read_than_are_asked_for_ahead():
    watched = Watched()
    batches = Stream(watched, BATCH, threads=1, ahead=2).batches()
    for taken in (1, 2, 3):
        next(batches)
        time.sleep(0.05)
        assert taken <= watched.taken <= taken + 2 + 2 + 1  # on the device, on the host, in the thread's hands


def test_other_threads_read():
    watched = Watched()
    first(8, Stream(watched, BATCH, threads=2))
    assert threading.get_ident() not in watched.threads


# Several processes


class Process:
    """Stands in for the `Parallelism` of one of several processes."""

    def __init__(self, *positions):
        self._positions = np.array(positions)

    def positions(self, rows):
        assert rows == BATCH
        return self._positions


@pytest.mark.parametrize("parts", [((0, 1, 2), (3, 4, 5)), ((0, 3), (1, 4), (2, 5))])
def test_processes_read_together_what_one_process_reads(unchecked, parts):
    whole, streams = stream(seed=1), [stream(seed=1, parallelism=Process(*part)) for part in parts]
    for step in (0, 3, 7):
        seen = np.concatenate([found[step].index for found in streams])
        assert sorted(seen) == list(range(BATCH))
        for found, part in zip(streams, parts, strict=True):
            expected = jax.tree.map(lambda leaf, part=part: leaf[list(part)], whole[step])
            assert same(found[step], expected)
            np.testing.assert_array_equal(found.rows(step), whole.rows(step))


def test_process_reads_no_more_rows_than_it_needs(unchecked):
    taken = []

    class Noted(Watched):
        def take(self, rows):
            taken.append(len(rows))
            return super().take(rows)

    Stream(Noted(), BATCH, parallelism=Process(4, 5))[0]
    assert taken == [2]


# What a source should not return


class Faulty(AbstractSource):
    """Returns what it is told to, whatever it says of itself."""

    def __init__(self, change, labels=3):
        self.name, self.row_shape, self.dtype, self.labels = "faulty.npy", (2,), X.dtype, labels
        self.change = change

    def __len__(self):
        return ROWS

    def take(self, rows):
        return self.change(rows, X[rows].copy(), LABEL[rows].astype(np.int32))


def put(row, value):
    def change(rows, x, label):
        x[rows == row, 1] = value
        return Rows(x, label)

    return change


def relabel(row, value):
    return lambda rows, x, label: Rows(x, np.where(rows == row, value, label).astype(np.int32))


FAULTS = {
    "nan": (put(13, np.nan), "faulty.npy: x must be finite, got NaN or infinity in row 13"),
    "infinity": (put(0, -np.inf), "faulty.npy: x must be finite, got NaN or infinity in row 0"),
    "label": (relabel(17, 3), r"faulty.npy: label must lie in \[0, 2\], got 3 in row 17"),
    "negative label": (relabel(17, -1), r"faulty.npy: label must lie in \[0, 2\], got -1 in row 17"),
    "shape": (
        lambda rows, x, label: Rows(x[:, :1], label),
        r"faulty.npy: x must be float32 of shape \(6, 2\), got float32 of shape \(6, 1\)",
    ),
    "dtype": (
        lambda rows, x, label: Rows(x.astype(np.float64), label),
        r"faulty.npy: x must be float32 of shape \(6, 2\), got float64 of shape \(6, 2\)",
    ),
    "rows": (
        lambda rows, x, label: Rows(x[1:], label[1:]),
        r"faulty.npy: x must be float32 of shape \(6, 2\), got float32 of shape \(5, 2\)",
    ),
    "fewer labels": (
        lambda rows, x, label: Rows(x, label[1:]),
        r"faulty.npy: label must be integers of shape \(6,\), got int32 of shape \(5,\)",
    ),
    "no labels": (lambda rows, x, label: Rows(x), "faulty.npy: label must be given if and only if labels is"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_trained_on_is_refused_with_source_and_row(change, message):
    found = Stream(Faulty(change), BATCH)
    with pytest.raises(ValueError, match=message):
        for step in range(4):
            found[step]


@pytest.mark.parametrize("name", ["nan", "label", "shape", "dtype"])
@pytest.mark.parametrize("threads", [1, 4])
def test_refusal_in_a_reading_thread_reaches_whoever_asks_for_batches(name, threads):
    change, message = FAULTS[name]
    found = Stream(Faulty(change), BATCH, threads=threads)
    with pytest.raises(ValueError, match=message):
        first(4, found)


def test_other_rows_of_a_source_with_a_bad_one_are_not_refused():
    found = Stream(Faulty(put(13, np.nan)), BATCH)
    bad = [step for step in range(3) if 13 in found.rows(step)]
    for step in {0, 1, 2} - {*bad}:
        assert np.isfinite(found[step].x).all()


# The fingerprint


def changed(array, row):
    array = array.copy()
    array[row] += 1
    return array


def test_equal_streams_have_equal_fingerprints():
    again = Stream(source(X.copy(), LABEL.copy()), BATCH, threads=4, ahead=1)
    assert again.fingerprint() == stream().fingerprint()


def test_name_of_the_source_is_not_part_of_the_fingerprint():
    """Files may be moved between the parts of a run."""
    assert Stream(ArraySource(X, LABEL, name="elsewhere"), BATCH).fingerprint() == stream().fingerprint()


OTHERS = {
    "seed": lambda: stream(seed=1),
    "batch": lambda: stream(5),
    "order": lambda: stream(shuffle=False),
    "number of rows": lambda: Stream(source(X[:-1], LABEL[:-1]), BATCH),
    "order of rows": lambda: Stream(source(X[::-1]), BATCH),
    "shape": lambda: Stream(source(X.reshape(ROWS, 1, 2)), BATCH),
    "dtype": lambda: Stream(source(X.astype(np.float16)), BATCH),
    "no labels": lambda: Stream(source(label=None), BATCH),
    "number of labels": lambda: Stream(source(labels=4), BATCH),
    "one label": lambda: Stream(source(label=np.where(np.arange(ROWS) == 11, 0, LABEL)), BATCH),
    "one row": lambda: Stream(source(changed(X, 11)), BATCH),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_stream_of_other_batches_has_another_fingerprint(other):
    assert other().fingerprint() != stream().fingerprint()


def test_fingerprint_of_a_source_in_memory_has_all_of_its_rows():
    x, label = np.zeros((10_000, 1), np.float32), np.zeros(10_000, np.int32)
    expected = Stream(ArraySource(x, label, labels=2), BATCH).fingerprint()
    for row in (0, 17, 9_999):
        assert Stream(ArraySource(changed(x, row), label, labels=2), BATCH).fingerprint() != expected
        assert Stream(ArraySource(x, changed(label, row), labels=2), BATCH).fingerprint() != expected


def test_fingerprint_of_a_long_source_has_its_ends():
    x = np.zeros((10_000, 1), np.float32)

    def fingerprint(x):
        return Stream(JoinedSource([ArraySource(x)], name="joined"), BATCH).fingerprint()

    for row in (0, 9_999):
        assert fingerprint(changed(x, row)) != fingerprint(x)


def test_unshuffled_streams_of_all_seeds_are_the_same():
    found = [stream(shuffle=False, seed=seed).fingerprint() for seed in (0, 1)]
    assert found[0] == found[1]


def test_fingerprint_can_be_written_as_json():
    found = stream().fingerprint()
    assert json.loads(json.dumps(found)) == found


# Refusals


def test_batch_that_the_source_cannot_fill_is_refused():
    with pytest.raises(ValueError, match=r"batch must lie in \[1, 20\], the rows of digits, got 21"):
        stream(21)


@pytest.mark.parametrize(
    ("name", "value", "least"), [("batch", 0, 1), ("batch", -1, 1), ("seed", -1, 0), ("threads", 0, 1), ("ahead", 0, 1)]
)
def test_numbers_below_the_least_are_refused(name, value, least):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= {least}, got {value}"):
        stream(**{name: value})


@pytest.mark.parametrize("read", [lambda s: s[-1], lambda s: s.rows(-1), lambda s: next(s.batches(-2))])
def test_negative_step_is_refused(read):
    with pytest.raises(ValueError, match="step must be an integer >= 0, got -"):
        read(Stream(ArraySource(np.zeros((9, 1), np.float32)), 3))


@pytest.mark.parametrize("value", [2.5, 2.0, True, "2", None])
@pytest.mark.parametrize("name", ["batch", "seed", "threads", "ahead"])
def test_what_is_no_integer_is_refused_when_the_stream_is_made(unchecked, name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= {int(name != 'seed')}, got {value!r}"):
        stream(**{name: value})


def test_integers_of_numpy_count_like_those_of_python():
    """A step times a batch would overflow eight bits."""
    small = stream(np.int8(6), seed=np.int8(1), threads=np.int8(1), ahead=np.int8(1))
    assert same(small[np.int8(100)], stream(seed=1)[100])
    assert small.fingerprint() == stream(seed=1).fingerprint()


@pytest.mark.parametrize("read", [lambda s: s[1.5], lambda s: s.rows(1.5), lambda s: next(s.batches(1.5))])
def test_step_that_is_no_integer_is_refused(unchecked, read):
    with pytest.raises(ValueError, match=r"step must be an integer >= 0, got 1.5"):
        read(stream())


@pytest.mark.parametrize("dtype", [np.int16, np.int64, bool, np.longdouble])
def test_source_of_a_dtype_that_is_never_trained_on_is_refused_when_the_stream_is_made(dtype):
    x = X.astype(dtype)
    with pytest.raises(ValueError, match=f"digits: x must be uint8 or floating point .* got {x.dtype}"):
        Stream(source(x), BATCH)


def test_float64_rows_that_are_infinite_on_the_device_are_refused():
    x = X.astype(np.float64)
    x[13] = 1e39
    with pytest.raises(ValueError, match=r"digits: x must be finite as float32, .* got 1e\+39 in row 13"):
        first(4, Stream(source(x), BATCH))
