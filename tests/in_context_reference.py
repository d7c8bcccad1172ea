"""The networks of improved MeanFlow and pixel MeanFlow in NumPy, written for the eye from their descriptions, without
the package. Pixel MeanFlow's has two convolutions for patches, learned positions, and rotary positions in a grid.

Parameters are a flat dictionary with the names of the authors' released files, in which images are H W C. Everything is
analytic in z and in the numbers, so that an imaginary step of 1e-30 gives derivatives to the last digit.
"""

import numpy as np


def linear(p, name, x):
    return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0.0)


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(p, name, x):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * p[f"{name}/kernel"]


def number(p, name, s):
    angles = s * 10_000.0 ** (-np.arange(128) / 128)
    x = np.concatenate([np.cos(angles), np.sin(angles)])
    return linear(p, f"{name}/mlp/layers_2/_flax_linear", silu(linear(p, f"{name}/mlp/layers_0/_flax_linear", x)))


def turned(x, position):
    """One head of one token: pairs (0, 1), (2, 3), ... turned by position x 10000^(-2k / size)."""
    out = np.zeros_like(x)
    for k in range(len(x) // 2):
        angle = position * 10_000.0 ** (-2 * k / len(x))
        out[2 * k] = x[2 * k] * np.cos(angle) - x[2 * k + 1] * np.sin(angle)
        out[2 * k + 1] = x[2 * k] * np.sin(angle) + x[2 * k + 1] * np.cos(angle)
    return out


def placed(x, place):
    """One head of one token at its place: none, a number, or a row and a column."""
    if place is None:
        return x
    return np.concatenate([turned(part, at) for part, at in zip(np.split(x, len(place)), place, strict=True)])


def attention(p, name, x, heads, places):
    tokens, width = x.shape
    query, key, value = (
        linear(p, f"{name}/{part}_proj/_flax_linear", x).reshape(tokens, heads, width // heads) for part in "qkv"
    )
    query, key = rms_norm(p, f"{name}/q_norm", query), rms_norm(p, f"{name}/k_norm", key)
    mixed = np.zeros_like(value)
    for head in range(heads):
        q, k = ([placed(part[i, head], places[i]) for i in range(tokens)] for part in (query, key))
        for i in range(tokens):
            weights = np.exp([q[i] @ k[j] / np.sqrt(width // heads) for j in range(tokens)])
            mixed[i, head] = weights / weights.sum() @ value[:, head]
    return linear(p, f"{name}/out_proj/_flax_linear", mixed.reshape(tokens, width))


def block(p, name, x, *how):
    x = x + attention(p, f"{name}/attn", rms_norm(p, f"{name}/norm1", x), *how) * p[f"{name}/attn_scale"]
    y = rms_norm(p, f"{name}/norm2", x)
    w1, w2, w3 = (f"{name}/mlp/w{i}/_flax_linear" for i in (1, 2, 3))
    return x + linear(p, w2, silu(linear(p, w1, y)) * linear(p, w3, y)) * p[f"{name}/mlp_scale"]


def blocks(p, name, x, *how):
    count = sum(key.startswith(name) and key.endswith("/attn_scale") for key in p)
    for i in range(count):
        x = block(p, f"{name}_{i}", x, *how)
    return x


def convolved(p, name, patch):
    return np.einsum("ijc,ijcw->w", patch, p[f"{name}/kernel"]) + p[f"{name}/bias"]


def embedded(p, patch):
    """The token of a patch."""
    if "x_embedder/proj/kernel" in p:
        return convolved(p, "x_embedder/proj", patch)
    return convolved(p, "x_embedder/proj2", convolved(p, "x_embedder/proj1", patch)[None, None])


def in_context_dit(p, z, r, t, label, guidance=None, *, heads, patch):
    """(u, v), or u alone of a file without v-blocks. `guidance` (omega, t_min, t_max), None for a network without."""
    z = np.moveaxis(z, 0, -1)
    corners = [(i, j) for i in range(0, z.shape[0], patch) for j in range(0, z.shape[1], patch)]
    x = [embedded(p, z[i : i + patch, j : j + patch]) for i, j in corners]
    table = "y_embedder/embedding_table/" + ("embedding" if "pos_embed" in p else "_flax_embedding/embedding")
    prefix = [p["class_tokens"] + p[table][label]]
    if guidance is not None:
        omega, t_min, t_max = guidance
        prefix.append(p["omega_tokens"] + number(p, "omega_embedder", 1 - 1 / omega))
        prefix.append(p["t_min_tokens"] + number(p, "cfg_t_start_embedder", t_min))
        prefix.append(p["t_max_tokens"] + number(p, "cfg_t_end_embedder", t_max))
    prefix.append(p["time_tokens"] + number(p, "h_embedder", t - r))
    x = np.concatenate([*prefix, np.stack(x)])
    places = [(i,) for i in range(len(x))]
    if "pos_embed" in p:
        x = x + p["pos_embed"]
        places = [None] * (len(x) - len(corners)) + [(i // patch, j // patch) for i, j in corners]
    x = blocks(p, "shared_blocks", x, heads, places)
    outputs = []
    for head in "uv":
        tokens = blocks(p, f"{head}_heads", x, heads, places)[-len(corners) :]
        values = linear(p, f"{head}_final_layer/linear/_flax_linear", rms_norm(p, f"{head}_final_layer/norm", tokens))
        image = np.zeros(z.shape, values.dtype)
        for (i, j), value in zip(corners, values, strict=True):
            image[i : i + patch, j : j + patch] = value.reshape(patch, patch, -1)
        outputs.append(np.moveaxis(image, -1, 0))
    return outputs


def total_derivative(p, z, v, r, t, *condition, **how):
    """du/dt and dv/dt along (v, 0, 1)."""
    step = 1e-30
    return [output.imag / step for output in in_context_dit(p, z + 1j * step * v, r, t + 1j * step, *condition, **how)]
