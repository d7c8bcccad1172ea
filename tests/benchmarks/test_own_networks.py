"""A network and a method of one's own in the benchmarks."""

import json

import jax
import numpy as np
import pytest

MINE = """
import equinox as eqx
import jax
import jax.numpy as jnp
import mf_eqx as mfx

class Net(mfx.AbstractField):
    first: eqx.nn.Conv2d
    last: eqx.nn.Conv2d

    def __init__(self, shape, *, key):
        self.first, self.last = (eqx.nn.Conv2d(3 + i, 3, 3, padding=1, key=key) for i in (2, 0))

    def __call__(self, z, r, t, condition=None, *, key=None):
        times = jnp.broadcast_to(jnp.stack([r, t])[:, None, None], (2, *z.shape[1:]))
        return self.last(jax.nn.silu(self.first(jnp.concatenate([z, times]))))

class Single(Net):
    def __call__(self, z, r, t, condition=None, *, key=None):
        return jnp.float32(1) * super().__call__(z.astype(jnp.float32), r, t).astype(jnp.float32)

class Mix(mfx.AbstractIdentity):
    facts = mfx.Facts(group=1)

    def residual(self, field, row):
        return (mfx.MeanFlow().residual(field, row) + mfx.Shortcut().residual(field, row)) / 2

class Triples(mfx.AbstractIdentityWithLoss):
    facts = mfx.Facts(group=3)

    def residual_and_loss(self, field, rows):
        return rows.v, 0.0
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(MINE)
    return str(path)


@pytest.fixture(scope="module")
def asked(mine):
    return {"network": f"{mine}:Net", "shape": (3, 8, 8), "identity": f"{mine}:Mix", "variant": ("MeanFlow",)}


def test_formula_counts_the_program_of_a_method_that_does_not_state_its_passes(benchmark_script, mine):
    steps = benchmark_script("steps")
    base = steps.formula_flops(steps.Setting("tiny"), "Flow Matching")
    _, tangent = steps.count_passes("tiny")
    # MeanFlow's tangent pass; Shortcut's three passes, of which one has a gradient.
    passes = 3 + 0.25 * (tangent + 2 + 3)
    found = steps.formula_flops(steps.Setting("tiny"), f"{mine}:Mix") / base
    np.testing.assert_allclose(found, passes / 3, rtol=0.003)


def test_programs_of_ones_own_stand_beside_those_that_are_asked_for(benchmark_script, asked):
    compile_time = benchmark_script("compile_time")
    cells = compile_time.chosen(compile_time.Config(**asked))
    assert [cell.variant for cell in cells] == ["MeanFlow", asked["identity"]]
    assert {cell[1:3] for cell in cells} == {("default", "none")}
    assert {str(cell.model) for cell in cells} == {f"{asked['network']} on 3 x 8 x 8"}


def test_a_network_of_ones_own_is_compiled_for_a_device_as_it_is(benchmark_script, asked):
    compile_for = benchmark_script("compile_for")
    config = compile_for.Config(**asked, share=0.5, form="unroll")
    assert config.variants == ("MeanFlow", asked["identity"])
    own = compile_for.own_network(asked["network"], asked["shape"])
    assert compile_for.chosen(config) == compile_for.Setting(own, 256, share=0.5)


@pytest.mark.slow
def test_a_step_of_ones_own_is_timed_and_counted(finished, asked):
    directory = finished("jvp_overhead", **asked, batch=(4,), rounds=2)
    records = {record["variant"]: record for record in json.loads((directory / "results.json").read_text())}
    assert list(records) == ["Flow Matching", "MeanFlow", asked["identity"]]
    flops = [record["flops"] / records["Flow Matching"]["flops"] for record in records.values()]
    # MeanFlow by the formula, Mix by its program: a pass costs 5 + 3 (channels that the layers take), a row of Flow
    # Matching 2 x 5 + 3 x 3, since the input needs no gradient. Mix adds a tangent pass and what Shortcut does: one
    # evaluation with a gradient and two without.
    once, trained = 5 + 3, 2 * 5 + 3 * 3
    mix = (trained + once + trained + 2 * once) / trained
    np.testing.assert_allclose(flops, [1, 1 + 1 / 12, 1 + (mix - 1) / 4], rtol=1e-3)


@pytest.mark.slow
def test_a_step_of_ones_own_is_compiled(finished, asked):
    directory = finished("compile_time", **asked, batch=4, repeats=1)
    records = json.loads((directory / "results.json").read_text())
    assert all(record["compile_seconds"] > 0 for record in records) and len(records) == 2


@pytest.mark.slow
def test_derivative_of_a_network_of_ones_own_is_held_against_float64(finished, asked):
    own = {name: asked[name] for name in ("network", "shape")}
    directory = finished("jvp_accuracy", **own, rows=4, steps=(1e-2,), shown_step=1e-2)
    records = json.loads((directory / "results.json").read_text())
    errors = {record["engine"]: record["median"] for record in records}
    assert errors["fused JVP"] < 1e-5 < errors["central difference"] < 0.1
    assert {record["precision"] for record in records} == {"its own"}


def test_a_network_that_stays_in_float32_has_no_reference(benchmark_script, mine):
    script = benchmark_script("jvp_accuracy")
    config = script.Config(network=f"{mine}:Single", shape=(3, 8, 8), rows=2)
    with pytest.raises(ValueError, match=r"network must compute in float64 where .*, got float32"):
        script.reference(config, None, script.make_rows(config))
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("script", ["jvp_overhead", "jvp_accuracy", "compile_time", "compile_for"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": "Net"}, r"shape must be given with network, and only with it, got shape \(\), network .*Net"),
        ({"shape": (3, 8, 8)}, r"shape must be given with network, .*, got shape \(3, 8, 8\), network None"),
        ({"network": "Net", "shape": (3, 0)}, r"shape must be positive numbers, got \(3, 0\)"),
        (
            {"network": "Net", "shape": (2,)},
            r"network must be a class that can be called as Net\(2, key=key\)\(z, r, t",
        ),
        ({"network": "Mix", "shape": (2,)}, r"network must name a subclass of AbstractField in .*; got Mix"),
    ],
)
def test_networks_that_cannot_be_are_refused(benchmark_script, mine, script, values, message):
    place = {"network": f"{mine}:{values['network']}"} if "network" in values else {}
    with pytest.raises(ValueError, match=message):
        benchmark_script(script).Config(**{**values, **place})


@pytest.mark.parametrize(("script", "batch"), [("jvp_overhead", (16,)), ("compile_time", 16), ("compile_for", 16)])
def test_batch_must_suit_a_method_of_ones_own(benchmark_script, mine, script, batch):
    with pytest.raises(ValueError, match=r"batch must be .* 12 .*, got 16"):
        benchmark_script(script).Config(identity=f"{mine}:Triples", batch=batch)


def test_axes_of_other_networks_are_refused_for_ones_own(benchmark_script, asked):
    with pytest.raises(ValueError, match="network must come with the default dtype, form, remat and attention"):
        benchmark_script("jvp_overhead").Config(**asked, dtype=("bfloat16",))
