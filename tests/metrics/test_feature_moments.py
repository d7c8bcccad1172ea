import dataclasses
import functools
import io
import operator
import time
import zipfile

import numpy as np
import pytest

from mf_eqx.metrics import AccumulatedMoments, FeatureMoments, load_moments, save_moments


def features(rows=60, dim=5, seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, dim)) @ generator.standard_normal((dim, dim)) + 3


def total(batches):
    return functools.reduce(operator.add, map(AccumulatedMoments.of, batches))


@pytest.mark.parametrize("bounds", [[], [1], [30], [7, 8, 41, 59]])
def test_moments_of_batches_are_those_of_the_whole(bounds):
    x = features()
    moments = total(np.split(x, bounds)).moments()
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.cov, np.cov(x, rowvar=False), rtol=1e-12)
    assert moments.count == 60


def test_order_of_addition_does_not_matter():
    a, b, c = (AccumulatedMoments.of(part) for part in np.split(features(), [11, 40]))
    left, right = (a + b) + c, c + (b + a)
    np.testing.assert_allclose(left.scatter, right.scatter, rtol=1e-12)
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-13)


def test_small_spread_far_from_zero_is_kept():
    # Sums of squares would have 1e16 in them, and lose the whole covariance to rounding.
    x = features() * 1e-3 + 1e5
    centred = x - x.mean(0)
    moments = total(np.split(x, [1, 2, 25])).moments()
    np.testing.assert_allclose(moments.cov, centred.T @ centred / 59, rtol=1e-6)


def test_float32_features_are_summed_in_float64():
    x = features().astype(np.float32)
    moments = total(np.split(x, 6)).moments()
    np.testing.assert_allclose(moments.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12)


def test_adding_leaves_the_terms_as_they_were():
    a, b = AccumulatedMoments.of(features()), AccumulatedMoments.of(features(seed=1))
    before = a.scatter.copy()
    assert (a + b) + b is not a
    np.testing.assert_array_equal(a.scatter, before)


def test_single_feature_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 for a covariance, got 1"):
        AccumulatedMoments.of(features(1)).moments()


def test_features_that_are_not_finite_are_refused():
    x = features()
    x[4, 2] = np.nan
    with pytest.raises(ValueError, match="features must be finite, got 1 values that are not"):
        AccumulatedMoments.of(x)


@pytest.mark.parametrize("name", ["mean", "cov"])
def test_moments_that_are_not_finite_are_not_saved(name, tmp_path):
    moments = AccumulatedMoments.of(features()).moments()
    moments = dataclasses.replace(moments, **{name: np.where(getattr(moments, name) == moments.cov[0, 0], 1, np.nan)})
    with pytest.raises(ValueError, match=rf"{name} must be finite, got \d+ values that are not"):
        save_moments(tmp_path / "moments.npz", moments)
    assert not list(tmp_path.iterdir())


def test_empty_batch_of_features_is_refused():
    with pytest.raises(ValueError, match=r"rows >= 1, got \(0, 5\)"):
        AccumulatedMoments.of(features()[:0])


def test_saved_moments_are_loaded_bit_for_bit(tmp_path):
    saved = AccumulatedMoments.of(features()).moments("ADM", "12ab")
    save_moments(tmp_path / "new" / "moments.npz", saved)
    loaded = load_moments(tmp_path / "new" / "moments.npz")
    np.testing.assert_array_equal(loaded.mean, saved.mean)
    np.testing.assert_array_equal(loaded.cov, saved.cov)
    assert (loaded.count, loaded.protocol, loaded.weights) == (60, "ADM", "12ab")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["moments.npz"]


def test_what_is_unknown_stays_unknown_in_a_file(tmp_path):
    save_moments(tmp_path / "moments.npz", FeatureMoments(np.zeros(2), np.eye(2)))
    loaded = load_moments(tmp_path / "moments.npz")
    assert (loaded.count, loaded.protocol, loaded.weights) == (None, None, None)


GOOD = {"mu": np.zeros(2), "sigma": np.eye(2)}


@pytest.mark.parametrize(
    "arrays",
    [
        {"ref_mu": np.zeros(2, np.float32), "ref_sigma": np.eye(2, dtype=np.float32)},
        GOOD | {"ref_mu": np.zeros(2), "ref_sigma": np.eye(2)},
        GOOD | {"mu_s": np.ones(3), "arr_0": np.array([{"an": "object"}], object)},
    ],
    ids=["other names", "both names", "more beside them, even a pickle that is not read"],
)
def test_moments_of_other_programs_are_loaded(arrays, tmp_path):
    np.savez(tmp_path / "moments.npz", **arrays)
    loaded = load_moments(tmp_path / "moments.npz")
    assert loaded.mean.dtype == loaded.cov.dtype == np.float64
    np.testing.assert_array_equal(loaded.cov, np.eye(2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sigma": np.eye(2)}, "must hold mu or ref_mu, got neither"),
        ({"mu": np.zeros(2), "cov": np.eye(2)}, "must hold sigma or ref_sigma, got neither"),
        (GOOD | {"ref_mu": np.ones(2)}, "mu and ref_mu must be equal .* but they differ"),
        (GOOD | {"ref_sigma": 2 * np.eye(2)}, "sigma and ref_sigma must be equal .* but they differ"),
        (GOOD | {"mu": np.zeros(3)}, r"got \(3,\), \(2, 2\)"),
        (GOOD | {"mu": np.zeros((1, 2))}, r"got \(1, 2\), \(2, 2\)"),
        (GOOD | {"sigma": np.ones(2)}, r"got \(2,\), \(2,\)"),
        (GOOD | {"mu": np.array([0, np.inf])}, "mu must be finite, got 1 values"),
        (GOOD | {"sigma": np.full((2, 2), np.nan)}, "sigma must be finite, got 4 values"),
        (GOOD | {"mu": np.zeros(2, int)}, "mu must be floating point, got int64"),
        (GOOD | {"mu": np.array([{}, {}], object)}, "must be an .npz file of plain arrays"),
        (GOOD | {"count": 1}, "count must be at least 2, got 1"),
        (GOOD | {"count": np.array([5])}, r"count must be a single integer, got array\(\[5\]\)"),
        (GOOD | {"protocol": 3}, r"protocol must be a single text, got array\(3\)"),
    ],
)
def test_wrong_files_of_moments_are_refused_by_name_and_reason(arrays, message, tmp_path):
    np.savez(tmp_path / "moments.npz", **arrays)
    with pytest.raises(ValueError, match=rf"moments\.npz: .*{message}"):
        load_moments(tmp_path / "moments.npz")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off", b"\x80\x04K\x01."])
def test_file_that_is_no_archive_is_refused(content, tmp_path):
    (tmp_path / "moments.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"moments\.npz: must be an \.npz file"):
        load_moments(tmp_path / "moments.npz")


def test_array_without_a_name_is_refused(tmp_path):
    np.save(tmp_path / "moments.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"moments\.npy: .*one array without a name"):
        load_moments(tmp_path / "moments.npy")


def test_damaged_moments_are_refused(tmp_path):
    path = tmp_path / "moments.npz"
    save_moments(path, AccumulatedMoments.of(features()).moments())
    content = bytearray(path.read_bytes())
    content[content.index(b"NUMPY") + 150] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"moments\.npz: .*CRC"):
        load_moments(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_moments_packed_without_a_bound_are_refused(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "moments.npz", "w", method) as archive:
        archive.writestr("mu.npy", b"a")
    with pytest.raises(ValueError, match=r"moments\.npz: .*mu.npy must be stored or deflated, and not encrypted"):
        load_moments(tmp_path / "moments.npz")


def test_moments_that_unpack_to_too_much_are_refused(tmp_path):
    save_moments(tmp_path / "moments.npz", FeatureMoments(np.zeros(2), np.eye(2)))
    content = bytearray((tmp_path / "moments.npz").read_bytes())
    entry = content.index(b"PK\1\2") + 24  # the size of the first member
    content[entry : entry + 4] = (1 << 31).to_bytes(4, "little")
    (tmp_path / "moments.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"moments\.npz: .*mu.npy must have at most 1,073,741,824 bytes"):
        load_moments(tmp_path / "moments.npz")


def test_moments_that_announce_more_than_memory_are_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 58,)})
    with zipfile.ZipFile(tmp_path / "moments.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"moments\.npz: must be an \.npz file"):
        load_moments(tmp_path / "moments.npz")


def test_saved_moments_are_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    moments = AccumulatedMoments.of(features()).moments()
    save_moments(tmp_path / "a", moments)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(2e9))
    save_moments(tmp_path / "b", moments)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_missing_file_of_moments_is_no_wrong_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_moments(tmp_path / "moments.npz")
