"""Training on several devices gives the numbers of one, and sums over devices once."""

import re

import pytest
from devices import run_on_devices

pytestmark = pytest.mark.rehearsal
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def on_devices():
    return run_on_devices("train_on_devices.py")


SLOW_LAYOUTS = ("2 devices", "4 devices", "1 x fsdp 2", "4 x 16 rows in turn", "2 devices, 2 x 16 rows in turn")
LAYOUTS = [
    *("8 devices", "2 x fsdp 4"),
    *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS),
]


@pytest.fixture(scope="module")
def slow_layouts():
    return run_on_devices("train_on_devices.py", *SLOW_LAYOUTS)


@pytest.fixture
def in_layout(layout, request):
    """What training in a layout showed."""
    return request.getfixturevalue("slow_layouts" if layout in SLOW_LAYOUTS else "on_devices")["layouts"][layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_gives_the_same_numbers_however_rows_are_spread(layout, in_layout):
    assert in_layout["difference"] <= (1e-6 if layout in SLOW_LAYOUTS else 1e-14)  # slow ones in float32


def test_features_of_a_perceptual_term_train_the_field_alike_on_any_devices_and_are_not_trained(on_devices):
    found = on_devices["perceptual"]
    assert found.pop("loss") > 0.1
    assert all(layout["difference"] <= 1e-6 and layout["unchanged"] for layout in found.values()), found


def test_convolutions_have_the_gradients_of_one_device(on_devices):
    assert on_devices["convolved"] <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_state_takes_the_place_of_the_old_one_wherever_it_lies(in_layout):
    assert in_layout["kept"] == 0
    assert in_layout["strayed"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["per block", "holds the parameters"])
def test_optimisers_train_with_a_state_that_is_spread(slow_layouts, name):
    found = slow_layouts["rules"][name]
    assert found["difference"] <= 1e-11  # Muon's iteration enlarges what is lost to rounding
    assert found["kept"] == 0 and found["strayed"] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_row_of_one_device_or_turn_changes_nothing_anywhere(in_layout):
    assert in_layout["unchanged"]
    assert in_layout["counted"] == [1, 1, 21, 21]


@pytest.mark.parametrize(
    ("form", "measured"),
    [("scanned", "on_devices"), *(pytest.param(form, "slow_layouts", marks=SLOW) for form in ("unrolled", "in turn"))],
)
def test_step_on_eight_devices_has_one_all_reduce_and_no_other_collective(form, measured, request):
    found = request.getfixturevalue(measured)[form]
    assert found.pop("all-reduce") == 1
    assert not any(found.values()), found


def test_shared_parameters_are_gathered_and_no_row_moves_between_devices(on_devices):
    found = on_devices["shared"]
    assert found["all-gather"] > 0
    assert found["all-to-all"] == found["collective-permute"] == 0, found


def test_batch_that_the_devices_do_not_divide_is_refused_with_the_numbers(on_devices):
    rule = r"batch must be a positive multiple of 4 .* x 8 \(data shards\) x 1 \(accumulation steps\) = 32, got 40"
    assert re.match(rule, on_devices["refused"]["40"])
    assert on_devices["refused"]["20"] == "batch must be a multiple of the 8 devices that share it, got 20"
