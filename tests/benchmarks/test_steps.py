"""The steps that benchmarks compare: the formula of their operations against XLA's count, and what they are made of."""

import fractions
import types

import jax
import numpy as np
import pytest

from mf_eqx import measure

NAMES = (
    "MeanFlow on every row", "MeanFlow", "stopped JVP", "finite difference", "guided on every row", "guided",
    "ConsistencyTraining", "EulerianSelfDistillation", "ImprovedMeanFlow", "ModularMeanFlow", "RecursiveConsistency",
)  # fmt: skip


@pytest.fixture(scope="module")
def steps(benchmark_script):
    return benchmark_script("steps")


@pytest.fixture(scope="module")
def setting(steps):
    return steps.Setting("tiny")


def relative_flops(steps, setting, name):
    """To Flow Matching's, by formula."""
    step, base = (steps.formula_flops(setting, n) for n in (name, "Flow Matching"))
    return step / base


def test_every_cost_is_tested(steps):
    assert ("Flow Matching", *NAMES) == steps.COMPARED


def test_every_method_is_a_variant(steps):
    import mf_eqx as mfx

    found = set(mfx.identities_in(vars(mfx), steps=1))
    assert found - set(steps.VARIANTS) == {"AlphaFlow"}  # its cost changes while it trains


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_formula_is_what_xla_counts(steps, setting, name):
    counted = steps.xla_flops("tiny", name) / steps.xla_flops("tiny", "Flow Matching")
    np.testing.assert_allclose(relative_flops(steps, setting, name), counted, rtol=0.01)


def test_flow_matching_by_formula_is_what_xla_counts(steps, setting):
    counted = steps.xla_flops("tiny", "Flow Matching")
    formula = steps.formula_flops(setting, "Flow Matching")
    np.testing.assert_allclose(formula, counted, rtol=0.02)  # and 1% that is not a product


def test_blocks_beyond_the_second_count_as_the_second(steps, monkeypatch):
    def compile_program(function, field, *inputs, options):
        depth = jax.tree.leaves(field.stack)[0].shape[0]
        return types.SimpleNamespace(cost=types.SimpleNamespace(flops=10.0 + 3.0 * depth))

    monkeypatch.setattr(measure, "compile_program", compile_program)
    assert steps.xla_flops.__wrapped__("S/4", "Flow Matching") == 10 + 3 * 12


@pytest.mark.parametrize("model", ["tiny", "B/4"])
@pytest.mark.parametrize(("name", "gate"), [("MeanFlow", 1.09), ("MeanFlow on every row", 1.345), ("guided", 1.51)])
def test_formula_stays_below_the_gates(steps, setting, model, name, gate):
    assert 1 < relative_flops(steps, setting._replace(model=model), name) <= gate


@pytest.mark.parametrize(("model", "multiply_adds"), [("B/4", 5.56e9), ("B/2", 23.0e9), ("XL/2", 118.6e9)])
def test_forward_passes_cost_what_the_literature_says(steps, model, multiply_adds):
    np.testing.assert_allclose(steps.count_passes(model).forward, 2 * multiply_adds, rtol=0.01)


@pytest.mark.parametrize(("model", "tokens"), [("tiny", 64), ("B/4", 64), ("XL/2", 256)])
def test_tangent_passes_cost_the_attentions_products_once_more(steps, model, tokens):
    size, (forward, tangent) = steps.DITS[model], steps.count_passes(model)
    attention = 2 * size.depth * 2 * tokens**2 * size.width
    np.testing.assert_allclose(tangent - 1, attention / forward, rtol=1e-6)


@pytest.mark.parametrize("remat", ["products", "full"])
def test_remat_costs_what_it_does_again(steps, setting, remat):
    plain, more = (steps.formula_flops(setting._replace(remat=value), "MeanFlow") for value in ("none", remat))
    forward, tangent = steps.count_passes("tiny")
    # The products of attention, or a forward pass but for patches and embedding.
    again, tolerance = {"products": (tangent - 1, 1e-6), "full": (1, 0.02)}[remat]
    np.testing.assert_allclose(more - plain, setting.batch * forward * again, rtol=tolerance)


UNET = "U-Net tiny"


@pytest.mark.slow
def test_unet_by_formula_is_what_xla_counts(steps):
    counted = {name: steps.xla_flops(UNET, name, 0.75) for name in ("Flow Matching", "MeanFlow")}
    unet = steps.Setting(UNET, share=0.75)
    formula = {name: steps.formula_flops(unet, name) for name in counted}
    np.testing.assert_allclose(counted["Flow Matching"], formula["Flow Matching"], rtol=0.03)
    np.testing.assert_allclose(
        counted["MeanFlow"] / counted["Flow Matching"], formula["MeanFlow"] / formula["Flow Matching"], rtol=0.01
    )


@pytest.mark.slow
def test_a_unet_keeps_its_convolutions_unless_remat_is_full(steps):
    _, tangent = steps.count_passes(UNET)
    np.testing.assert_allclose(steps.count_again(UNET, "products"), tangent - 1)
    assert 0.6 < steps.count_again(UNET, "full") < 0.9  # nothing needs a block's last convolution again


@pytest.mark.parametrize(
    ("model", "form", "blocks"),
    [
        ("tiny", "default", None),
        ("tiny", "scan", 1),
        ("tiny", "unroll", 2),
        ("U-Net", "default", 5),
        ("U-Net", "scan", 1),
    ],
)
def test_forms_are_a_loop_or_none(steps, model, form, blocks):
    field = steps.shapes_of(steps.Setting(model, form=form))
    assert (field.stack if model == "tiny" else field.up[0]).unroll == blocks


def test_share_is_that_of_rows_with_tangents_split_or_not(steps):
    split, every = (steps.variants(0.75)[name].objective for name in ("MeanFlow", "MeanFlow on every row"))
    assert split.identity_share == fractions.Fraction(3, 4)
    assert every.identity_share == 1
    assert (split.time_pairs.equal, every.time_pairs.equal) == (0, 0.25)
