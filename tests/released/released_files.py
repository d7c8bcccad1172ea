"""Weights in the layouts of the released networks, with numbers of our own; and files of flax, written by hand."""

import msgpack
import numpy as np
from random_tensors import random_tensor

CHANNELS, HEIGHT, WIDTH = 4, 8, 12
DEPTH, FEATURES, HEADS, PATCH, LABELS = 3, 16, 2, 2, 5
SIZE = {"depth": DEPTH, "width": FEATURES, "patch": PATCH, "channels": CHANNELS, "labels": LABELS}


def layers(depth, width, outputs, *, flax):
    """The linear layers of DiT by name, as (inputs, outputs); `outputs` of the last one."""
    number = "layers_{}" if flax else "{}"
    times = ("t_embedder", "h_embedder") if flax else ("t_embedder",)
    for embedder in times:
        yield f"{embedder}/mlp/{number.format(0)}", (256, width)
        yield f"{embedder}/mlp/{number.format(2)}", (width, width)
    for i in range(depth):
        block = f"blocks/{number.format(i)}"
        yield f"{block}/attn/qkv", (width, 3 * width)
        yield f"{block}/attn/proj", (width, width)
        yield f"{block}/mlp/fc1", (width, 4 * width)
        yield f"{block}/mlp/fc2", (4 * width, width)
        yield f"{block}/adaLN_modulation/{number.format(1)}", (width, 6 * width)
    yield f"final_layer/adaLN_modulation/{number.format(1)}", (width, 2 * width)
    yield "final_layer/linear", (width, outputs)


def flax_shapes(depth, width, patch, channels, labels):
    """Of the authors' JAX DiT, by names joined with slashes."""
    shapes = {
        "net/x_embedder/proj/kernel": (patch, patch, channels, width),
        "net/x_embedder/proj/bias": (width,),
        "net/y_embedder/embedding_table/_flax_embedding/embedding": (labels + 1, width),
    }
    for name, (inputs, outputs) in layers(depth, width, patch**2 * channels, flax=True):
        shapes[f"net/{name}/_flax_linear/kernel"] = (inputs, outputs)
        shapes[f"net/{name}/_flax_linear/bias"] = (outputs,)
    return shapes


def sit_shapes(depth, width, patch, channels, labels, height=HEIGHT, columns=WIDTH):
    """Of SiT in torch."""
    shapes = {
        "pos_embed": (1, height * columns // patch**2, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (labels + 1, width),
    }
    for name, (inputs, outputs) in layers(depth, width, 2 * patch**2 * channels, flax=False):
        shapes[f"{name}.weight".replace("/", ".")] = (outputs, inputs)
        shapes[f"{name}.bias".replace("/", ".")] = (outputs,)
    return shapes


def from_shapes(seed, shapes):
    """Random tensors; their scale goes by torch's order of axes, which is the opposite."""
    return {name: random_tensor(f"{seed} {name}", shape[::-1]).transpose() for name, shape in shapes.items()}


def flax_tensors(seed="dit", **size):
    """By names joined with slashes."""
    return from_shapes(seed, flax_shapes(**(SIZE | size)))


TOKENS = {"class": 3, "omega": 2, "t_min": 1, "t_max": 1, "time": 2}
IN_CONTEXT = {"trunk": 2, "head": 2, "width": 16, "heads": 2, "patch": 2, "channels": CHANNELS, "labels": LABELS}
IN_CONTEXT |= {"mlp": 8 * 16 // 3, "tokens": TOKENS}
PIXELS = {"bottleneck": 6, "length": HEIGHT * WIDTH // PATCH**2 + sum(TOKENS.values())}
"""The options of pixel MeanFlow: outputs of the first convolution, and the number of all tokens."""


def block_shapes(name, width, heads, mlp):
    for part in "qkv":
        yield f"{name}/attn/{part}_proj/_flax_linear/kernel", (width, width)
    yield f"{name}/attn/out_proj/_flax_linear/kernel", (width, width)
    for norm, size in {
        "attn/q_norm": width // heads,
        "attn/k_norm": width // heads,
        "norm1": width,
        "norm2": width,
    }.items():
        yield f"{name}/{norm}/kernel", (size,)
    for layer, shape in {"w1": (width, mlp), "w2": (mlp, width), "w3": (width, mlp)}.items():
        yield f"{name}/mlp/{layer}/_flax_linear/kernel", shape
    yield f"{name}/attn_scale", (width,)
    yield f"{name}/mlp_scale", (width,)


def in_context_shapes(trunk, head, width, heads, patch, channels, labels, mlp, tokens, bottleneck=None, length=None):
    """Of the network of improved MeanFlow or, with the last two, of pixel MeanFlow, by names joined with slashes."""
    one, first = (
        ((), (patch, patch, channels, width)) if length is None else ((1,), (patch, patch, channels, bottleneck))
    )
    shapes = {f"{name}_tokens": (*one, count, width) for name, count in tokens.items()}
    if length is None:
        convolutions = {"proj": first}
        shapes["y_embedder/embedding_table/_flax_embedding/embedding"] = (labels + 1, width)
    else:
        convolutions = {"proj1": first, "proj2": (1, 1, bottleneck, width)}
        shapes["y_embedder/embedding_table/embedding"] = (1, labels + 1, width)
        shapes["pos_embed"] = (1, length, width)
    for name, shape in convolutions.items():
        shapes |= {f"x_embedder/{name}/kernel": shape, f"x_embedder/{name}/bias": shape[-1:]}
    linears = {
        "u_final_layer/linear": (width, patch**2 * channels),
        "v_final_layer/linear": (width, patch**2 * channels),
    }
    for embedder in ("h", "omega", "cfg_t_start", "cfg_t_end"):
        linears |= {
            f"{embedder}_embedder/mlp/layers_0": (256, width),
            f"{embedder}_embedder/mlp/layers_2": (width, width),
        }
    for name, shape in linears.items():
        shapes |= {f"{name}/_flax_linear/kernel": shape, f"{name}/_flax_linear/bias": shape[-1:]}
    shapes |= {"u_final_layer/norm/kernel": (width,), "v_final_layer/norm/kernel": (width,)}
    for stack, depth in {"shared_blocks": trunk, "u_heads": head, "v_heads": head}.items():
        for i in range(depth):
            shapes |= dict(block_shapes(f"{stack}_{i}", width, heads, mlp))
    return {f"net/{name}": shape for name, shape in shapes.items()}


def in_context_tensors(seed="imf", **options):
    """By names joined with slashes."""
    tensors = from_shapes(seed, in_context_shapes(**(IN_CONTEXT | options)))
    # All that would be small, so that every part can be seen in the result.
    larger = [name for name in tensors if name.endswith(("_scale", "norm/kernel", "norm1/kernel", "norm2/kernel"))]
    return tensors | {name: 10 * tensors[name] for name in larger}


def positions(rows, columns, width):
    """DiT's embedding of positions, number by number."""
    found = np.zeros((rows * columns, width))
    quarter = width // 4
    for token in range(rows * columns):
        for axis, place in enumerate((token % columns, token // columns)):
            for k in range(quarter):
                angle = place / 10_000 ** (k / quarter)
                found[token, 2 * quarter * axis + k] = np.sin(angle)
                found[token, 2 * quarter * axis + quarter + k] = np.cos(angle)
    return found


def sit_tensors(seed="sit", **size):
    """By their names in torch."""
    shapes = sit_shapes(**(SIZE | size))
    tensors = {name: random_tensor(f"{seed} {name}", shape) for name, shape in shapes.items()}
    tensors["pos_embed"] = positions(HEIGHT // PATCH, WIDTH // PATCH, FEATURES)[None].astype(np.float32)
    return tensors


def nested(tensors):
    """Dictionaries in dictionaries, from names with slashes."""
    tree = {}
    for name, tensor in tensors.items():
        *outer, last = name.split("/")
        node = tree
        for part in outer:
            node = node.setdefault(part, {})
        node[last] = tensor
    return tree


def extension(array, code=1):
    """An array as flax puts it into a file."""
    return msgpack.ExtType(code, msgpack.packb([list(array.shape), array.dtype.name, array.tobytes()]))


def write_flax(path, tree):
    """A file as `flax.serialization.to_bytes` writes it."""
    path.write_bytes(msgpack.packb(tree, default=lambda array: extension(np.asarray(array))))
    return path


def write_state(path, **parts):
    """A train state with these parts by names with slashes, in the middle of an optimizer's and a step."""
    moments = {"0": {"mu": np.zeros((2, 3), np.float32), "count": np.zeros((), np.int32)}}
    trees = {name: nested(tensors) for name, tensors in parts.items()}
    return write_flax(path, {"step": 7, "opt_state": moments, **trees, "rng": np.zeros(2, np.uint32)})
