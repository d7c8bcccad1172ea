import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mf_eqx as mfx
from mf_eqx import nn

DEPTH, WIDTH = 3, 5


class Block(eqx.Module):
    """Weights, biases and the scale of a norm."""

    linear: nn.Linear
    norm: nn.GroupNorm


def make_block(key):
    return Block(nn.Linear(WIDTH, WIDTH, key=key), nn.GroupNorm(1, WIDTH))


class Network(eqx.Module):
    """Blocks between two layers, stacked or as a tuple."""

    first: nn.Linear
    blocks: nn.Stack | tuple
    out: nn.Linear


def stacked(make_block=make_block, dtype=jnp.float32):
    def make(key):
        return Network(nn.Linear(2, WIDTH, key=key), nn.Stack(make_block, DEPTH, key=key), nn.Linear(WIDTH, 2, key=key))

    return drawn(eqx.filter_eval_shape(make, jr.key(0)), 1, dtype)


def drawn(tree, seed, dtype=None):
    """The same structure, of random numbers of another size in every block."""
    draws = np.random.default_rng(seed)

    def draw(leaf):
        sizes = np.arange(1.0, leaf.shape[0] + 1).reshape(-1, *[1] * (leaf.ndim - 1))
        return jax.device_put((sizes * draws.standard_normal(leaf.shape)).astype(dtype or leaf.dtype))

    return jax.tree.map(draw, tree)


def apart(network):
    """The same network with its stack as a tuple of blocks."""
    blocks = [jax.tree.map(lambda leaf, n=n: np.asarray(leaf)[n], network.blocks.blocks) for n in range(DEPTH)]
    return Network(network.first, tuple(blocks), network.out)


@functools.cache
def compiled(rule):
    """The functions of a rule, of which the second updates the parameters, too."""

    def update(gradient, state, parameters, **extra):
        updates, state = rule.update(gradient, state, parameters, **extra)
        return optax.apply_updates(parameters, updates), state, updates

    return jax.jit(rule.init), jax.jit(update)


def trained(rule, parameters, gradients):
    """The parameters after a step along each of the gradients, and the last updates."""
    init, update = compiled(rule)
    state, updates = init(parameters), None
    for gradient in gradients:
        parameters, state, updates = update(gradient, state, parameters)
    return parameters, updates


def both(rule, plain):
    """What `rule` makes of the stacked network and `plain` of its blocks, as tuples of blocks."""
    network = stacked(dtype=jnp.float64)
    gradients = [drawn(network, seed) for seed in (2, 3, 4)]
    found = trained(rule, network, gradients)
    expected = trained(plain, apart(network), [apart(gradient) for gradient in gradients])
    return [(apart(ours), theirs) for ours, theirs in zip(found, expected, strict=True)]


def matrices(parameters):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, parameters)


def adamw(mask):
    return optax.adamw(0.1, weight_decay=0.5, mask=mask)


PLAIN = {
    "adamw with mask": adamw(matrices),
    "muon": optax.contrib.muon(0.1),
    "lars": optax.lars(0.1, weight_decay=0.1, trust_coefficient=0.1),
    "lamb": optax.lamb(0.1),
    "adaptive clipping": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "clipping by block": optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1)),
    "centralised": optax.chain(optax.centralize(), optax.sgd(0.1)),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
}
OURS = {name: nn.per_block(rule) for name, rule in PLAIN.items()} | {
    "adamw with mask": adamw(nn.weight_mask),
    "muon": optax.contrib.muon(0.1, muon_weight_dimension_numbers=nn.muon_dimension_numbers),
}


QUICK = ("adamw with mask", "muon", "lars", "adaptive clipping")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PLAIN]
)
def test_stack_is_optimised_as_its_blocks_are(x64, name):
    for found, expected in both(OURS[name], PLAIN[name]):
        for result, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(result, leaf, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_rule_that_is_given_stacks_as_they_are_mixes_blocks(x64, name):
    (found, expected), _ = both(PLAIN[name], PLAIN[name])
    block, reference = found.blocks[0].linear, expected.blocks[0].linear
    differences = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (block, reference)), strict=True)]
    assert max(differences) > 1e-3
    np.testing.assert_allclose(found.first.weight, expected.first.weight, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw with mask", "muon"])
def test_rules_with_a_mask_of_ranks_are_right_per_block_too(x64, name):
    (found, expected), _ = both(nn.per_block(PLAIN[name]), PLAIN[name])
    for result, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(result, leaf, rtol=1e-12, atol=1e-14)


# Which arrays are what


def test_weights_are_told_from_biases_and_norms():
    network = stacked()
    mask = nn.weight_mask(network)
    assert jax.tree.structure(mask) == jax.tree.structure(network)
    block = mask.blocks.blocks
    assert mask.first.weight and mask.out.weight and block.linear.weight
    assert not (mask.first.bias or mask.out.bias or block.linear.bias or block.norm.weight or block.norm.bias)


def test_axes_of_a_stacked_matrix_follow_the_one_that_counts_blocks():
    numbers = nn.muon_dimension_numbers(stacked())
    assert numbers.first.weight == (0, 1)
    assert numbers.blocks.blocks.linear.weight == (1, 2)
    assert numbers.blocks.blocks.linear.bias is None and numbers.blocks.blocks.norm.weight is None


class Equinox(eqx.Module):
    """Layers of Equinox, whose weights have outputs first and whose biases and norms may have any rank."""

    linear: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose1d
    norm: eqx.nn.LayerNorm
    free: jax.Array

    def __init__(self, key):
        self.linear = eqx.nn.Linear(3, 7, key=key)
        self.conv = eqx.nn.Conv2d(2, 4, 3, key=key)
        self.up = eqx.nn.ConvTranspose1d(2, 4, 3, key=key)
        self.norm = eqx.nn.LayerNorm((2, 5))
        self.free = jnp.zeros((2, 3, 4))


@pytest.mark.parametrize("depth", [None, 2])
def test_layers_of_equinox_have_outputs_first(depth):
    make = Equinox if depth is None else lambda key: nn.Stack(Equinox, depth, key=key)
    parameters = eqx.filter(eqx.filter_eval_shape(make, jr.key(0)), is_shape)
    mask, numbers = nn.weight_mask(parameters), nn.muon_dimension_numbers(parameters)
    first = 0 if depth is None else 1
    mask, numbers = (mask, numbers) if depth is None else (mask.blocks, numbers.blocks)
    assert mask.linear.weight and mask.conv.weight and mask.up.weight and mask.free
    assert not (mask.linear.bias or mask.conv.bias or mask.up.bias or mask.norm.weight or mask.norm.bias)
    axes = {"linear": (1,), "conv": (1, 2, 3), "up": (1, 2)}
    for name, inputs in axes.items():
        layer = getattr(numbers, name)
        assert layer.weight == (tuple(first + axis for axis in inputs), first) and layer.bias is None
    assert numbers.norm.weight is None and numbers.free is None


def test_muon_turns_a_weight_of_equinox_as_it_turns_its_transpose(x64):
    # Its scale depends on which axis has the outputs.
    gradient, updates = np.random.default_rng(0).standard_normal((3, 7)), []
    for kind, slope in ((nn.Linear, gradient), (eqx.nn.Linear, gradient.T)):
        shapes = eqx.filter_eval_shape(lambda kind=kind: kind(3, 7, key=jr.key(0)))
        layer = jax.tree.map(lambda leaf: jnp.asarray(np.ones(leaf.shape)), eqx.filter(shapes, is_shape))
        slopes = eqx.tree_at(lambda layer: layer.weight, layer, jnp.asarray(slope))
        updates.append(trained(OURS["muon"], layer, [slopes])[1].weight)
    np.testing.assert_allclose(updates[0], updates[1].T, rtol=1e-12)


def test_stacks_in_stacks_are_blocks_of_blocks(x64):
    def nested(key):
        return nn.Stack(make_block, 2, key=key)

    network = stacked(nested, jnp.float64)
    inside = nn.muon_dimension_numbers(network).blocks.blocks.blocks.linear
    assert inside.weight == (2, 3) and inside.bias is None
    gradient, rule = drawn(network, 2), optax.lars(0.1)
    found = trained(nn.per_block(rule), network, [gradient])[1].blocks.blocks.blocks.linear.weight
    weight, slope = (tree.blocks.blocks.blocks.linear.weight for tree in (network, gradient))
    weight, slope = np.asarray(weight), np.asarray(slope)
    for n in np.ndindex(DEPTH, 2):
        np.testing.assert_allclose(found[n], trained(rule, weight[n], [slope[n]])[1], rtol=1e-12)


def test_functions_serve_where_optax_masks_parameters(x64):
    rule = optax.partition({True: nn.per_block(optax.lars(0.1)), False: optax.sgd(0.5)}, nn.weight_mask)
    plain = optax.partition({True: optax.lars(0.1), False: optax.sgd(0.5)}, matrices)
    for found, expected in both(rule, plain):
        for result, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(result, leaf, rtol=1e-12, atol=1e-14)


def test_rule_is_given_what_the_caller_adds():
    rule = nn.per_block(optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    network = stacked()
    init, update = compiled(rule)
    state = init(network)
    for _ in range(4):
        _, state, updates = update(network, state, network, value=jnp.float32(1.0))
    for found, gradient in zip(*map(jax.tree.leaves, (updates, network)), strict=True):
        np.testing.assert_allclose(found, 0.5**3 * np.asarray(gradient), rtol=1e-6)


def test_rule_needs_no_parameters_if_it_asks_for_none():
    rule, network = nn.per_block(optax.clip_by_block_rms(0.1)), stacked()
    updates, _ = jax.jit(rule.update)(network, rule.init(network))
    rms = np.sqrt(np.mean(np.asarray(updates.blocks.blocks.linear.weight) ** 2, axis=(1, 2)))
    np.testing.assert_allclose(rms, 0.1, rtol=1e-5)


# In training


RECIPES = re.search(r"weight decay for weights only.*", nn._per_block.__doc__, re.DOTALL).group()


def recipes():
    """Those of the docstring that are a rule on one line."""
    lines = re.findall(r"^    (optax\.(?:adamw|contrib\.muon|chain)\(.*\))$", RECIPES, re.MULTILINE)
    code = re.search(r"^    def hidden.*?None\)\)$", RECIPES, re.MULTILINE | re.DOTALL).group()
    names = {"optax": optax, "nn": nn, "eqx": eqx}
    exec(re.sub(r"^    ", "", code, flags=re.MULTILINE), names)
    return {line: eval(line, names) for line in lines}


def dit(seed=0):
    size = mfx.DiTSize(depth=2, width=8, heads=2, patch=2)
    return mfx.DiT((1, 4, 4), size, labels=3, unroll=1, key=jr.key(seed))


def test_docstring_has_a_recipe_for_decay_muon_clipping_and_muon_within():
    assert len(recipes()) == 4


@pytest.mark.parametrize("recipe", recipes())
def test_recipes_fit_the_training_step_of_a_transformer(recipe):
    rule = recipes()[recipe]
    step = mfx.TrainStep(mfx.Objective(identity=None, identity_share=0), rule)
    state = eqx.filter_eval_shape(lambda: mfx.init_state(dit(), rule, key=jr.key(1)))
    rows = mfx.Batch(jnp.zeros((4, 1, 4, 4)), jnp.zeros(4, jnp.int32))
    after, _ = eqx.filter_eval_shape(step, state, rows)
    assert eqx.tree_equal(*(eqx.filter(s, is_shape) for s in (state, after)))


def is_shape(leaf):
    return isinstance(leaf, jax.ShapeDtypeStruct)


def test_recipe_of_the_docstring_leaves_ends_and_embeddings_to_adam():
    (rule,) = (rule for line, rule in recipes().items() if "hidden" in line)
    state = eqx.filter_eval_shape(lambda: rule.init(eqx.filter(dit(), eqx.is_inexact_array)))
    nodes = jax.tree.leaves(state, is_leaf=is_muon)
    (muon,) = filter(is_muon, nodes)
    held = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(muon.mu)}
    blocks = {".attention.qkv", ".attention.out", ".hidden", ".out", ".modulation"}
    assert held == {f".stack.blocks{name}.weight" for name in blocks} | {".modulation.weight"}


def is_muon(node):
    return isinstance(node, optax.contrib.MuonState)
