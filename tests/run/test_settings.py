import dataclasses

import jax
import pytest

from mf_eqx import run
from mf_eqx.run._settings import check_numbers, default_name, difference, recipe


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Config(run.Settings):
    steps: int = 10
    scale: float | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)


CHANGED = {
    "name": "a",
    "wandb": "a",
    "coordinator": "a:1",
    **dict.fromkeys(["tensorboard", "dry_run", "test_run"], True),
    **dict.fromkeys(["save_every", "keep_last", "keep_every", "log_every", "preview_every"], 7),
    **dict.fromkeys(["most_faults", "fsdp", "accumulation", "processes", "process", "workers", "wait"], 77),
}


def test_recipe_is_the_scripts_own_fields():
    assert recipe(Config()) == {"steps": 10, "scale": None, "inner": {"rate": 0.1, "sizes": [1, 2]}}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(run.Settings)])
def test_no_setting_changes_the_default_name(field):
    changed = Config(**{field: CHANGED[field]})
    assert changed != Config()
    assert default_name(changed) == default_name(Config())


@dataclasses.dataclass(frozen=True)
class Own(Config):
    remat: bool = run.setting(False)


def test_the_recipe_of_another_run_is_without_settings():
    saved = {"steps": 10, "remat": True, "save_every": 5, "gone": 1}
    assert recipe(Own(), saved) == {"steps": 10, "gone": 1}


@dataclasses.dataclass(frozen=True)
class Cells(run.CellSettings):
    steps: int = 10


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(run.CellSettings)])
def test_no_setting_of_cells_changes_the_default_name(field):
    changed = Cells(**{field: CHANGED[field]})
    assert changed != Cells()
    assert default_name(changed) == default_name(Cells())


@pytest.mark.parametrize("kind", [Config, Cells])
@pytest.mark.parametrize("field", ["save_every", "keep_last", "log_every", "most_faults", "fsdp", "workers"])
def test_a_setting_that_makes_no_run_is_refused(kind, field):
    if field in {field.name for field in dataclasses.fields(kind)}:
        with pytest.raises(ValueError, match=f"{field} must be >= 1, got 0"):
            kind(**{field: 0}).check()


def test_a_digest_is_the_same_for_equal_values_only():
    assert run.digest({"a": 1, "b": Inner()}) == run.digest({"b": Inner(), "a": 1})
    assert run.digest({"a": 1}) != run.digest({"a": 1.0}) != run.digest({"a": 2})


@pytest.mark.parametrize(
    "fields", [{"steps": 11}, {"scale": 0.0}, {"inner": Inner(rate=0.2)}, {"inner": Inner(sizes=(2, 1))}], ids=str
)
def test_every_field_of_the_recipe_changes_the_default_name(fields):
    assert default_name(Config(**fields)) != default_name(Config())


def test_the_default_name_never_changes():
    assert default_name(Config()) == "ad748f37"  # runs of before must be found


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, None),
        ({"a": 1}, {"a": 2}, "a was 1, now 2"),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, "a.b.c was 1, now 2"),
        ({"a": 1, "b": 2}, {"a": 1}, "b is only in the old one"),
        ({"a": {}}, {"a": {"b": None}}, "a.b is only in the new one"),
        ({"a": [1, 2]}, {"a": [2, 1]}, "a was [1, 2], now [2, 1]"),
        ({"a": {"b": 1}}, {"a": None}, "a was {'b': 1}, now None"),
        ({"a": 1, "b": 1}, {"a": 2, "b": 2}, "a was 1, now 2"),
    ],
)
def test_difference_is_the_first_one_with_its_path(saved, wanted, message):
    assert difference(saved, wanted) == message


def test_difference_of_whole_values_is_named():
    assert difference(3, 4, "steps") == "steps was 3, now 4"


@pytest.mark.parametrize(
    ("field", "bound"),
    [
        *[(name, 1) for name in ("save_every", "keep_last", "log_every", "most_faults", "fsdp", "accumulation")],
        *[(name, 0) for name in ("keep_every", "preview_every")],
    ],
)
def test_values_below_the_least_are_refused(field, bound):
    Config(**{field: bound}).check()
    with pytest.raises(ValueError, match=f"^{field} must be >= {bound}, got {bound - 1}$"):
        Config(**{field: bound - 1}).check()


def test_one_device_needs_no_parallelism():
    if jax.device_count() > 1:
        pytest.skip("needs a single device")
    assert run.parallelism(Config()) is None


def test_fsdp_that_does_not_divide_the_devices_is_refused():
    with pytest.raises(ValueError, match="fsdp must divide the number of devices"):
        run.parallelism(Config(fsdp=jax.device_count() + 1))


def test_a_field_that_is_left_out_is_not_compared():
    @dataclasses.dataclass(frozen=True)
    class Optional(run.Settings):
        width: int | None = None

    Optional().check(width=1)
    with pytest.raises(ValueError, match="width must be >= 1, got 0"):
        Optional(width=0).check(width=1)


def test_fields_of_the_script_are_checked_with_the_settings():
    Config(steps=3).check(steps=3)
    with pytest.raises(ValueError, match="steps must be >= 4, got 3"):
        Config(steps=3).check(steps=4)
    with pytest.raises(ValueError, match="save_every must be >= 1, got 0"):
        Config(save_every=0).check(steps=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"scale": 1e400}, "scale must be finite, got inf"),
        ({"inner": Inner(rate=-float("inf"))}, "inner.rate must be finite, got -inf"),
        ({"steps": 2**31}, r"steps must lie in \[-2147483648, 2147483647\], got 2147483648"),
        ({"inner": Inner(sizes=(1, -(10**20)))}, r"inner.sizes must lie in .* got -100000000000000000000"),
    ],
)
def test_numbers_that_nothing_computes_with_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Config(), **fields).check()


def test_the_largest_integers_pass():
    check_numbers(Config(steps=2**31 - 1, inner=Inner(sizes=(-(2**31), True))))


@dataclasses.dataclass(frozen=True)
class Named:
    model: str | None = "small"
    forms: tuple[str, ...] = ("loop", "plain")


@pytest.mark.parametrize("config", [Named(), Named(model=None), Named("large", ("plain",))])
def test_known_names_pass(config):
    run.check_among(config, model={"small": 1, "large": 2}, forms=("loop", "plain"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Named(model="huge"), "model must be among small, large; got huge"),
        (Named(model=""), "model must be among small, large; got "),
        (Named(forms=("lop", "plain", "plane")), "forms must be among loop, plain; got lop, plane"),
        (Named(forms=()), "forms must be at least one of loop, plain; got none"),
        (Named(forms=("plain", "loop", "plain")), "forms must differ from each other, got plain, loop, plain"),
    ],
)
def test_names_that_are_unknown_missing_or_repeated_are_refused(config, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        run.check_among(config, model=("small", "large"), forms=("loop", "plain"))
