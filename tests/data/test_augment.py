import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mf_eqx as mfx
from mf_eqx import data

PIPE = data.EDMAugmentation()
STILL = data.Augmentation(jnp.asarray(False), *jnp.zeros(3), jnp.zeros(2))


def moved(**changes):
    """What happens, with numbers in place of arrays."""
    return STILL._replace(**{name: jnp.asarray(value, STILL._asdict()[name].dtype) for name, value in changes.items()})


apply = jax.jit(PIPE.apply)


def noise(height=16, width=12):
    return np.random.default_rng(0).uniform(-1.0, 1.0, (3, height, width)).astype(np.float32)


def blob(row, column, *, height=32, width=32, spread=3.0):
    """A bright spot with soft edges on a dark ground."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * spread**2)).astype(np.float32)[None]


def moments(x):
    """Of the light: its centre (row, column), and the second moments around it."""
    weights = np.clip(np.asarray(x[0], np.float64), 0, None)
    weights = weights / weights.sum()
    rows, columns = np.meshgrid(*(np.arange(size) for size in weights.shape), indexing="ij")
    centre = (weights * rows).sum(), (weights * columns).sum()
    rows, columns = rows - centre[0], columns - centre[1]
    return centre, ((weights * rows**2).sum(), (weights * columns**2).sum(), (weights * rows * columns).sum())


# What happens to an image. (The whole against SciPy is in tests/parity.)


def test_nothing_drawn_leaves_the_image_as_it_was():
    # The way to twice the resolution and back is the identity: sym6 is orthogonal to its even shifts.
    np.testing.assert_allclose(apply(noise(), STILL), noise(), atol=2e-6)


def test_flip_mirrors_left_and_right_exactly():
    np.testing.assert_allclose(apply(noise(), moved(flip=True)), noise()[:, :, ::-1], atol=2e-6)


@pytest.mark.parametrize(
    ("shift", "expected"), [((1.0, 0.0), (16, 20)), ((0.0, 1.0), (20, 16)), ((-0.5, 0.25), (17, 14))]
)
def test_shift_moves_right_and_down_by_an_eighth_of_the_image(shift, expected):
    centre, _ = moments(apply(blob(16, 16), moved(shift=shift)))
    np.testing.assert_allclose(centre, expected, atol=0.01)


def test_shift_goes_with_height_and_width():
    centre, _ = moments(apply(blob(8, 16, height=16, spread=1.5), moved(shift=(1.0, 1.0))))
    np.testing.assert_allclose(centre, (10, 20), atol=0.01)


def test_shift_by_whole_pixels_is_a_shift_of_the_mirrored_image():
    # 16 wide: w = 1 is two columns.
    x = noise(16, 16)
    mirrored = np.pad(x, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    np.testing.assert_allclose(apply(x, moved(shift=(1.0, 0.0))), mirrored[:, 2:-2, :-4], atol=1e-5)
    np.testing.assert_allclose(apply(x, moved(shift=(0.0, 1.0))), mirrored[:, :-4, 2:-2], atol=1e-5)


@pytest.mark.parametrize("w", [1.5, -1.5])
def test_scale_makes_larger_by_two_to_the_fifth_of_w(w):
    before, after = blob(15.5, 15.5), apply(blob(15.5, 15.5), moved(scale=w))
    factor = 2 ** (0.2 * w)
    for old, new in zip(moments(before)[1][:2], moments(after)[1][:2], strict=True):
        assert np.sqrt(new / old) == pytest.approx(factor, rel=0.02)


def test_scale_keeps_the_middle_and_moves_the_rest_away_from_it():
    centre, _ = moments(apply(blob(15.5, 19.5, spread=2.0), moved(scale=2.5)))
    np.testing.assert_allclose(centre, (15.5, 15.5 + 4 * 2**0.5), atol=0.05)


def test_stretch_makes_wider_and_flatter():
    (_, (old, *_)), (_, (rows, columns, both)) = (
        moments(x) for x in (blob(15.5, 15.5), apply(blob(15.5, 15.5), moved(stretch=2.0)))
    )
    assert np.sqrt(columns / old) == pytest.approx(2**0.4, rel=0.03)
    assert np.sqrt(rows / old) == pytest.approx(2**-0.4, rel=0.03)  # and a little blur
    assert abs(both) < 0.01


def test_stretch_at_an_angle_points_from_the_right_upwards():
    _, (rows, columns, both) = moments(apply(blob(15.5, 15.5), moved(stretch=2.0, angle=np.pi / 4)))
    assert rows == pytest.approx(columns, rel=0.02)
    assert both < -1  # rows count downwards: up and right go together


def test_flip_comes_first_and_shift_last():
    centre, _ = moments(apply(blob(15.5, 20.5, spread=2.0), moved(flip=True, scale=1.0, shift=(1.0, 0.0))))
    np.testing.assert_allclose(centre, (15.5, 15.5 - 5 * 2**0.2 + 4), atol=0.05)


def test_borders_are_mirrored_and_nothing_is_torn():
    # A ramp along the columns stays one: steps between neighbours are no larger than the stretched ramp's.
    ramp = np.broadcast_to(np.linspace(-1, 1, 32, dtype=np.float32), (1, 32, 32))
    drawn = moved(scale=-1.0, stretch=1.0, angle=0.7, shift=(0.8, -0.6))
    found = np.asarray(apply(ramp, drawn))
    step = 2 / 31
    assert max(np.abs(np.diff(found, axis=axis)).max() for axis in (1, 2)) < 2 * step
    assert np.abs(found).max() < 1.1


def test_mean_of_a_constant_image_stays():
    drawn = moved(flip=True, scale=1.0, stretch=-1.0, angle=2.0, shift=(0.7, -0.4))
    np.testing.assert_allclose(apply(np.full((1, 32, 32), 0.5, np.float32), drawn), 0.5, atol=1e-5)


# What is drawn


@functools.cache
def draws(count=20_000):
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(PIPE.draw))(jr.split(jr.key(1), count)))


def near(share, expected):
    """Within five standard deviations."""
    return abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 20_000)


def test_each_motion_has_a_coin_of_its_own():
    drawn = draws()
    happened = {"scale": drawn.scale != 0, "stretch": drawn.stretch != 0, "shift": (drawn.shift != 0).any(1)}
    assert near(np.mean(drawn.flip), 0.5)
    for name, times in happened.items():
        assert near(np.mean(times), 0.12), name
    for a, b in (("scale", "stretch"), ("stretch", "shift"), ("shift", "scale")):
        assert near(np.mean(happened[a] & happened[b]), 0.12**2), (a, b)
        assert near(np.mean(happened[a] & drawn.flip), 0.06), a


def test_both_shifts_share_a_coin_and_not_a_number():
    shift = draws().shift
    np.testing.assert_array_equal(shift[:, 0] != 0, shift[:, 1] != 0)
    shifted = shift[shift[:, 0] != 0]
    assert abs(np.corrcoef(shifted.T)[0, 1]) < 5 / np.sqrt(len(shifted))


def test_half_of_the_angles_are_zero_and_the_others_go_all_around():
    angle = draws().angle
    assert near(np.mean(angle == 0), 0.5)
    assert angle.min() < -3.1 and angle.max() > 3.1 and np.abs(angle).max() <= np.pi
    assert near(np.mean(angle > 0), 0.25)


def test_numbers_are_standard_normal_where_the_coin_allows():
    drawn = draws()
    for numbers in (drawn.scale, drawn.stretch, *drawn.shift.T):
        numbers = numbers[numbers != 0]
        assert abs(numbers.mean()) < 5 / np.sqrt(len(numbers))
        assert numbers.std() == pytest.approx(1, abs=5 / np.sqrt(2 * len(numbers)))


def test_chances_can_be_chosen():
    keys = jr.split(jr.key(2), 100)
    pipes = (data.EDMAugmentation(probability=p, flip=p, turned=p) for p in (0.0, 1.0))
    never, always = (jax.jit(jax.vmap(pipe.draw))(keys) for pipe in pipes)
    assert not any(np.any(numbers) for numbers in never)
    assert all(np.all(numbers) for numbers in always)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["probability", "flip", "turned"])
def test_chance_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], got"):
        data.EDMAugmentation(**{name: value})


# The label


def test_label_names_the_numbers_in_order():
    label = PIPE.label(moved(flip=True, scale=0.5, stretch=2.0, angle=np.pi / 6, shift=(-0.3, 0.7)))
    np.testing.assert_allclose(label, [1, 0.5, np.sqrt(3), 1, -0.3, 0.7], rtol=1e-6)


def test_label_is_zero_where_nothing_happened():
    drawn = draws()
    label = jax.jit(jax.vmap(PIPE.label))(drawn)
    np.testing.assert_array_equal(label[:, 0], drawn.flip)
    np.testing.assert_array_equal(label[:, 1] == 0, drawn.scale == 0)
    np.testing.assert_array_equal((label[:, 2:4] == 0).all(1), drawn.stretch == 0)
    np.testing.assert_array_equal(label[:, 4:], drawn.shift)
    assert not PIPE.label(moved(angle=1.0)).any()


def test_row_gets_its_image_and_a_condition_that_keeps_the_label():
    row = jax.jit(PIPE)(mfx.Batch(noise(), jnp.asarray(7), jnp.asarray(2)), jr.key(3))
    drawn = jax.jit(PIPE.draw)(jr.key(3))
    np.testing.assert_allclose(row.x, apply(noise(), drawn), atol=1e-6)
    np.testing.assert_array_equal(row.condition.augmentation, PIPE.label(drawn))
    assert isinstance(row.condition, mfx.UNetCondition)
    assert (int(row.condition.label), int(row.index)) == (7, 2)


def test_row_without_a_label_gets_only_the_numbers():
    row = jax.jit(PIPE)(mfx.Batch(noise(), None, jnp.asarray(0)), jr.key(3))
    assert row.condition.label is None and row.condition.augmentation.shape == (6,)


def test_rows_are_augmented_alike_alone_and_in_a_batch():
    pipe = data.EDMAugmentation(probability=0.7)
    x, keys = np.stack([noise(), -noise(), 0.5 * noise()]), jr.split(jr.key(4), 3)
    batch, single = mfx.Batch(x, np.arange(3)), jax.jit(pipe)
    batched = jax.jit(jax.vmap(pipe))
    together = batched(batch, keys)
    for i, key in enumerate(keys):
        alone = single(mfx.Batch(x[i], np.asarray(i), np.asarray(i)), key)
        for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(found[i], expected, atol=1e-5)
    assert np.abs(np.asarray(together.x) - x).max() > 0.1
    again = batched(batch, keys)
    np.testing.assert_array_equal(again.x, together.x)


# What is refused


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, bool])
def test_pixels_are_refused(unchecked, dtype):
    with pytest.raises(ValueError, match="x must be floating point for EDMAugmentation"):
        PIPE(mfx.Batch(jnp.ones((3, 8, 8), dtype), None, jnp.asarray(0)), jr.key(0))


@pytest.mark.parametrize("shape", [(8, 8), (3, 0, 8), (2, 3, 8, 8)])
def test_what_is_no_image_is_refused(unchecked, shape):
    with pytest.raises(ValueError, match=r"x must be \(channels, height, width\) for EDMAugmentation, none of them 0"):
        PIPE(mfx.Batch(jnp.zeros(shape), None, jnp.asarray(0)), jr.key(0))
