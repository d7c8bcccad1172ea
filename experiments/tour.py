# %% [markdown]
# # A tour of mf_eqx
#
#     python experiments/tour.py          200 seconds of CPU time; pictures are saved in runs/tour/
#
# This file is a script and a notebook: editors such as VS Code, PyCharm and Spyder run its cells one by one, and
# `jupytext --to notebook experiments/tour.py` makes a notebook of it. `TOUR_STEPS=400` in the environment trains for
# 400 steps instead of 4000.
#
# A generative model turns noise into data. Flow Matching learns the *velocity* v(z, t) with which a point z moves at
# time t on its way from noise (t = 1) to data (t = 0), and follows it in many small steps. MeanFlow and its relatives
# learn the *average velocity* u(z, r, t) between two times r <= t: one step along u(z, 0, 1) is the whole way.

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

import mf_eqx as mfx
from mf_eqx import checkpoint, exact, measure, metrics, picture, run

run.require("flatbuffers")  # for the last cell: now rather than after the trainings

STEPS = int(os.environ.get("TOUR_STEPS", "4000"))
FOLDER = Path("runs/tour")
FOLDER.mkdir(parents=True, exist_ok=True)


def show(name):
    """The picture in a notebook; in a script, where it is."""
    if "get_ipython" in globals():
        from IPython.display import display, Image  # pyright: ignore[reportMissingImports]

        display(Image(FOLDER / name))
    else:
        print(f"picture: {FOLDER / name}")


# %% [markdown]
# ## Your own points
#
# Any array of shape (rows, 2) would do. Here it is the points of a fine grid that lie inside of two letters, with the
# number of the letter as label. A handful of points has no density, so each point is blurred a little: the data set is
# a mixture of small Gaussians. Its exact velocity has a formula, which will tell us how good a network is.


# %%
def letter(text, left):
    """Points of a grid inside of a letter that starts at x = `left` and is two units high."""
    outline = TextPath((left, -1.0), text, size=2.74, prop=FontProperties(weight="bold"))
    axis = np.arange(-2, 2, 0.08)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    return grid[outline.contains_points(grid)]


def letters():
    """The data set, in the precision that is switched on."""
    parts = [letter("M", -2.0), letter("F", 0.55)]
    label = np.repeat([0, 1], [len(part) for part in parts])
    return exact.GaussianMixture(np.concatenate(parts), std=0.04, label=label)


data = letters()
eps = jr.normal(jr.key(0), (4000, 2))  # the noise that everything below starts from
real = exact.draw(data, 4000, jr.key(1))

# %% [markdown]
# ## A network, an objective, a training
#
# A *field* is a network that takes (z, r, t). An *objective* says what it has to satisfy: on rows with r = t it is told
# the velocity, as in Flow Matching; on the others, here half of them, the equation of a method must hold. Most settings
# below are for toys in the plane. `StableTarget` estimates the velocity from 512 data points instead of one, which
# takes most of the noise out of the target. The README has settings for images; the defaults are for latents.


# %%
def network(**condition):
    return mfx.MLP(2, width=96, depth=5, condition_width=32, fourier_features=16, **condition, key=jr.key(2))


def objective(method, target, **guidance):
    return mfx.Objective(
        method,
        time_pairs=mfx.TimePairs(mfx.LogitNormalTimes(0.0, 3.0), at_data=0.1),  # near both ends; a tenth with r = 0
        boundary_times=mfx.LogitNormalTimes(-0.5, 1.5),
        identity_share=0.5,
        weight=mfx.AdaptiveWeight(1.0, 0.3),
        stable_target=target,
        **guidance,
    )


def train(name, field, loss, draw):
    """Train in ten parts, print the mean squared errors of both kinds of rows, return the averaged network."""
    rate = optax.warmup_cosine_decay_schedule(0, 2e-3, 100, max(STEPS, 101), 2e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    step = mfx.TrainStep(loss, optimizer, [mfx.ExponentialAverage(0.995)])
    state = mfx.init_state(field, step.optimizer, step.averages, key=jr.key(3))
    for part in range(10):
        state, found = mfx.scan_steps(step, state, draw, STEPS // 10)
        if part in (0, 4, 9):
            errors = [f"{float(found[key].value):.4f}" for key in ("boundary_error", "identity_error")]
            print(f"{name}, step {int(state.step)}: error at r = t {errors[0]}, of the equation {errors[1]}")
    return state.averages[0]


references = mfx.StableTarget(exact.draw(data, 1 << 15, jr.key(4)), number=512)
field = train("MeanFlow", network(), objective(mfx.MeanFlow(), references), exact.Draw(data, 256))

# %% [markdown]
# ## Samples
#
# `mfx.sample` makes one sample from one draw of noise; `jax.vmap` makes it many. One evaluation of the network is
# enough. The velocity alone, which the same network knows as u(z, t, t), needs many: its single step ends in the middle
# of everything.


# %%
def samples(field, evaluations, sampler=mfx.sample):
    return jax.vmap(lambda eps: sampler(field, eps, times=mfx.uniform_times(evaluations)))(eps)


panels = {
    "noise": eps,
    "u, 1 evaluation": samples(field, 1),
    "u, 2 evaluations": samples(field, 2),
    "v, 1 evaluation": samples(field, 1, mfx.sample_euler),
    "v, 8 evaluations": samples(field, 8, mfx.sample_euler),
    "data": real,
}
picture.save_point_panels(FOLDER / "samples.png", panels, limit=2.4, columns=3)
show("samples.png")
for name in list(panels)[1:-1]:
    distance = float(metrics.sliced_wasserstein(panels[name], real, key=jr.key(10)))
    print(f"{name}: sliced Wasserstein distance to the data {distance:.3f}")

# %% [markdown]
# ## How far is it from the truth?
#
# `exact.AverageVelocity` integrates the exact velocity into the exact average velocity u*. The error is E|u - u*|² in
# units of E|u*|²: over all pairs (r, t), at r = t, and at (0, 1), which one-step sampling evaluates.

# %%
path, pairs = mfx.LinearInterpolant(), mfx.TimePairs(mfx.UniformTimes())
truth = exact.AverageVelocity(exact.MarginalVelocity(data, path), rtol=1e-5, atol=1e-5)
known = metrics.field_truth(truth, data.sample, path, pairs, 1000, key=jr.key(5))


def report(name, field):
    errors = metrics.field_errors(field, known)
    found = [f"{float(error.value):.4f}" for error in (errors.overall, errors.diagonal, errors.one_step)]
    print(f"{name}: error of u {found[0]}, at r = t {found[1]}, at (0, 1) {found[2]}")


report("MeanFlow", field)

# %% [markdown]
# ## A method of your own
#
# MeanFlow's equation follows from differentiating (t - r) u(z_t, r, t) in t. Let us differentiate in r instead, the
# end that the step leads to: the step ends at z_r = z - (t - r) u, and there it must have the velocity of the flow,
#
#     u(z, r, t) = v(z_r, r) + (t - r) du/dr.
#
# A method is one class. `facts` says what holds of it: v is learnt from rows with r = t alone, without which u = 0
# would do.


# %%
class EndVelocity(mfx.AbstractIdentity):
    @property
    def facts(self):
        return mfx.Facts(degenerate=True, trains_velocity=False, uses_velocity=False)

    def residual(self, field, row):
        u, dudr = jax.jvp(lambda r: row.evaluate(field, row.z, r, row.t), (row.r,), (jnp.ones_like(row.r),))
        end = row.z - (row.t - row.r) * u
        v = row.evaluate(field, end, row.r, row.r)
        return u - jax.lax.stop_gradient(v + (row.t - row.r) * dudr)


# %% [markdown]
# Is the equation right? The exact field must satisfy it. In double precision nothing but rounding is left. An equation
# that is wrong, such as MeanFlow's with the derivative along z alone, shows at once.

# %%
with jax.enable_x64(True):
    velocity = exact.MarginalVelocity(letters(), path)
    z, r, t = metrics.draw_states(letters().sample, path, pairs, 20, key=jr.key(6))
    v = jax.vmap(velocity)(z, t)
    for method in (EndVelocity(), mfx.MeanFlow(), mfx.MeanFlow(tangent_t=0)):
        left = metrics.relative_identity_residual(method, exact.AverageVelocity(velocity), z, v, r, t)
        print(f"{method}: the exact field leaves {float(left):.1e}")

# %% [markdown]
# It trains like any other. Its single step draws the letters sharper than MeanFlow's, with a few points far from them,
# so that its error is larger. The exact field shows what a single step can do: x = eps - u*(eps, 0, 1) are the data.

# %%
mine = train("EndVelocity", network(), objective(EndVelocity(), references), exact.Draw(data, 256))
report("EndVelocity", mine)
one_step = known.one_step
panels = {
    "noise": one_step.z,
    "MeanFlow": samples(field, 1)[:1000],
    "EndVelocity": samples(mine, 1)[:1000],
    "the exact field": one_step.z - one_step.u,
}
picture.save_point_panels(FOLDER / "methods.png", panels, limit=2.4, columns=4, title="one evaluation")
show("methods.png")

# %% [markdown]
# ## What does it cost?
#
# Matrix products of loss and gradient, in units of those of Flow Matching with the same network and batch.

# %%
for method in (mfx.MeanFlow(), EndVelocity(), mfx.Shortcut()):
    cost = measure.relative_cost(objective(method, references), network(), mfx.Batch(real[:256]))
    print(f"{type(method).__name__}: a step costs {cost:.3f} of Flow Matching's")

# %% [markdown]
# ## Labels and guidance
#
# With labels a sample can be asked for. Guidance exaggerates what distinguishes a label from the rest; here it is built
# into the target, so that guided samples cost one evaluation, too. Our own method needs no further line for it. For a
# tenth of the rows the label is replaced by "no label", which is the label 2. Look at the sides where the letters meet:
# at scale 1.3 each keeps away from the other.

# %%
labelled = mfx.StableTarget(*jax.vmap(lambda key: data.labelled_sample(key=key))(jr.split(jr.key(7), 1 << 15)), 512)
guidance = {"label_dropout": mfx.LabelDropout(0.1, null=2), "guidance": mfx.Guidance(1.3)}
loss = objective(EndVelocity(), labelled, **guidance)
guided = train("guided", network(labels=2), loss, exact.DrawLabelled(data, 256))
label = jnp.arange(4000) % 2
x = mfx.Generator(guided, jr.key(8), (2,), labels=2).from_noise(eps, label)
panels = {"label 0, guided": x[label == 0], "label 1, guided": x[label == 1], "data": real}
picture.save_point_panels(FOLDER / "guided.png", panels, limit=2.4, columns=3)
show("guided.png")

# %% [markdown]
# ## Guidance that is chosen at sampling
#
# One network can learn all scales. They are drawn for each row and given to the network (improved MeanFlow), so that
# the scale is chosen when samples are made, still at one evaluation. Each panel is made of the same noise. The exact
# guided field says how well each scale was learnt, of this network and, at 1.3, of the one above.

# %%
drawn = guidance | {"guidance": mfx.DrawnGuidance(mfx.PowerLawScales(largest=4.0), middle=None)}
loss_of_all = objective(mfx.ImprovedMeanFlow(), labelled, **drawn)
every = train("all scales", network(labels=2, guidance=True), loss_of_all, exact.DrawLabelled(data, 256))


def error_at(scale, field):
    """E|u - u*|² / E|u*|² at (0, 1), u* the exact average of the guided velocity."""
    velocity = exact.GuidedVelocity(exact.MarginalVelocity(data, path), scale)
    guided_truth = exact.AverageVelocity(velocity, rtol=1e-5, atol=1e-5)
    u, wanted = (jax.vmap(lambda z, c, u=u: u(z, 0.0, 1.0, c))(eps[:300], label[:300]) for u in (field, guided_truth))
    return float(jnp.mean((u - wanted) ** 2) / jnp.mean(wanted**2))


panels = {}
for scale in (1.0, 1.3, 2.0, 4.0):
    at_scale = mfx.WithGuidance(every, scale)
    x_at_scale = mfx.Generator(at_scale, jr.key(8), (2,), labels=2).from_noise(eps, label)
    panels[f"label 0, scale {scale:g}"] = x_at_scale[label == 0]
    print(f"all scales, at {scale:g}: error of u at (0, 1) {error_at(scale, at_scale):.4f}")
print(f"guided, at 1.3: error of u at (0, 1) {error_at(1.3, guided):.4f}")
picture.save_point_panels(FOLDER / "scales.png", panels, limit=2.4, columns=4, title="the same noise")
show("scales.png")

# %% [markdown]
# ## Save, load, generate, export
#
# Weights are a safetensors file. The `Generator` makes numbered samples, too, the same ones whatever the batch or the
# devices. An exported sampler is a single file that needs nothing but JAX.

# %%
checkpoint.save_weights(FOLDER / "weights.safetensors", guided, notes=checkpoint.Notes(trained=loss.trained))
again = checkpoint.load_weights(FOLDER / "weights.safetensors")

for batch in mfx.Generator(again, jr.key(8), (2,), labels=2).batches(1000, 500, mfx.Parallelism()):
    print(f"generated {batch.shape}")

checkpoint.export_sampler(FOLDER / "sampler.jaxexport", again, (2,), condition=0)
program = jax.export.deserialize(bytearray((FOLDER / "sampler.jaxexport").read_bytes()))
same = jnp.max(jnp.abs(jax.jit(program.call)(eps[:100], label[:100]) - x[:100]))
print(f"the exported sampler agrees to {float(same):.1e}")

# %% [markdown]
# ## Where next
#
# - `python experiments/toy_2d.py --quick --data points.npy --identity mine.py`: your points and your method beside all
#   others, in one table.
# - `python experiments/digits.py`: a small transformer on real images, five minutes on two cores.
# - The README beside this file: a command for each task.
