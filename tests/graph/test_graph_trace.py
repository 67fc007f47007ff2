"""Groups, labels, layers and adjacency against what's written down by hand; refusals."""

from __future__ import annotations

import graph_zoo as zoo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from cnnjax import graph as g

F32 = jnp.float32


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, F32)


def traced(name, **kw):
    return g.trace(zoo.abstract(name), *(spec(*s) for s in zoo.CASES[name].inputs), **kw)


def members(group):
    return {f"{p}:{a}" for p, a in group.members}


def test_groups_of_a_residual_network():
    graph = traced("residual_basic")
    names = [x.name for x in graph.groups]
    assert names == [
        "stem/conv",
        "blocks/0/a/conv",
        "blocks/1/a/conv",
        "blocks/1/b/conv",
        "blocks/2/a/conv",
    ]
    stream = graph.group_of("stem/conv/kernel")
    assert members(stream) == {
        "stem/conv/kernel:3", "stem/bn/scale:0", "stem/bn/bias:0", "stem/bn/mean:0",
        "stem/bn/var:0", "blocks/0/a/conv/kernel:2", "blocks/0/b/conv/kernel:3",
        *(f"blocks/0/b/bn/{v}:0" for v in ("scale", "bias", "mean", "var")),
        "blocks/1/a/conv/kernel:2", "blocks/1/down/conv/kernel:2",
    }  # fmt: skip
    assert stream is graph.group_of("blocks/0/b/conv/kernel")
    np.testing.assert_array_equal(
        graph.axis("stem/conv/kernel").labels, graph.axis("blocks/0/b/bn/var", 0).labels
    )


def test_concatenation_does_not_fuse_groups():
    graph = traced("dense_blocks")
    assert len(graph.groups) == 6
    assert len(graph.groups_of("trans/kernel", 2)) == 4
    with pytest.raises(ValueError, match="carries 4 groups"):
        graph.group_of("norm/scale", 0)
    want = np.concatenate(
        [graph.axis("stem/kernel").labels]
        + [graph.axis(f"layers/{i}/1/kernel").labels for i in range(3)]
    )
    np.testing.assert_array_equal(graph.axis("trans/kernel", 2).labels, want)


def test_flatten_repeats_labels_by_position():
    graph = traced("plain_flatten")
    channels = graph.axis("c2/kernel").labels
    np.testing.assert_array_equal(graph.axis("fc1/kernel", 0).labels, np.tile(channels, 16))


def test_padded_shortcut_fixes_what_meets_the_padding():
    graph = traced("option_a")
    labels = graph.axis("a/conv/kernel").labels
    assert (labels >= 0).all()
    out = graph.axis("b/conv/kernel")
    np.testing.assert_array_equal(out.labels[4:12], graph.axis("stem/conv/kernel").labels)
    assert (out.labels[:4] == -1).all()
    assert (out.labels[12:] == -1).all()
    assert "padding" in out.reason
    assert out.source is not None
    assert out.source.file.endswith("graph_zoo_residual.py")


def test_shuffle_and_flip_move_labels():
    graph = traced("shuffle1_g3")
    labels = graph.axis("a/conv/kernel").labels
    shuffled = labels.reshape(3, 8).T.ravel()
    np.testing.assert_array_equal(graph.axis("b/conv/kernel").labels, shuffled)
    np.testing.assert_array_equal(graph.axis("c/conv/kernel", 2).table, shuffled.reshape(3, 8))
    flip = traced("channel_flip")
    a = flip.axis("a/conv/kernel").labels
    np.testing.assert_array_equal(a, flip.axis("b/conv/kernel").labels)
    np.testing.assert_array_equal(a[::-1], flip.axis("b/conv/kernel", 2).labels)


def test_modes_of_a_grouped_convolution():
    flexible, tied, whole = (traced("resnext", mode=m) for m in ("flexible", "tied", "whole"))
    size = lambda graph, path: graph.group_of(path).size  # noqa: E731
    assert (size(flexible, "a/conv/kernel"), size(flexible, "b/conv/kernel")) == (16, 16)
    assert (size(tied, "a/conv/kernel"), size(tied, "b/conv/kernel")) == (4, 4)
    assert size(whole, "a/conv/kernel") == 4
    assert whole.group_of("a/conv/kernel") is whole.group_of("b/conv/kernel")
    (c,) = [c for c in flexible.constraints if c.kind == "grouped"]
    assert c.path == "b/conv"
    alive = flexible.alive()
    alive[c.parts[0][0]] = False
    assert not c.holds(alive)
    alive[[p[1] for p in c.parts[1:]]] = False
    assert c.holds(alive)
    with pytest.raises(ValueError, match="unknown mode"):
        traced("resnext", mode="hole")


def test_layers_and_counts():
    graph = traced("residual_bottleneck")
    b = graph.layer("b/conv")
    assert (b.kind, b.kernel_shape, b.stride, b.groups) == ("conv", (3, 3, 8, 8), (2, 2), 1)
    assert b.input_shape == (2, 8, 8, 8)
    assert b.output_shape == (2, 4, 4, 8)
    assert b.macs == 4 * 4 * 9 * 8 * 8
    assert b.params == 9 * 8 * 8
    np.testing.assert_array_equal(b.out_labels, graph.axis("b/conv/kernel").labels)
    fc = graph.layer("head/fc")
    assert (fc.kind, fc.macs, fc.params) == ("dense", 24 * 5, 24 * 5 + 5)
    assert graph.bn_of("b/conv").path == "b/bn"
    assert graph.bn_of("head/fc") is None
    assert [x.path for x in graph.next_layers("stem/bn")] == ["a/conv", "short/conv"]
    assert [x.path for x in graph.prev_layers("head/fc")] == ["c/bn", "short/bn"]
    assert [x.path for x in graph.next_layers("a/conv")] == ["a/bn"]
    depth = traced("inverted_residual").layer("depth/conv")
    assert (depth.groups, depth.macs) == (24, 64 * 9 * 24)
    assert "stem/conv: conv (2, 8, 8, 3)" in str(graph.layer("stem/conv"))
    up = traced("transposed").layer("up")
    assert (up.kind, up.input_dilation) == ("conv_transpose", (2, 2))
    assert up.macs == 4 * 4 * 16 * 8 * 6


def test_calls_of_a_shared_layer():
    graph = traced("weight_reuse")
    assert [x.call for x in graph.layers if x.path == "b/conv"] == [0, 1, 2]
    with pytest.raises(KeyError, match="not called 4 times"):
        graph.layer("b/conv", call=3)


def test_messages():
    graph = traced("batch_norm")
    with pytest.raises(KeyError, match="body/0/conv/kernel"):
        graph.group_of("body/0/con/kernel")
    with pytest.raises(KeyError, match="axis 7"):
        graph.group_of("body/0/conv/kernel", axis=7)
    with pytest.raises(ValueError, match="can't be pruned: the model's output"):
        graph.group_of("head/fc/kernel")
    with pytest.raises(ValueError, match="can't be pruned: meets the model's input"):
        graph.group_of("body/0/conv/kernel", axis=2)
    with pytest.raises(KeyError, match="head/fc"):
        graph.layer("head/f")
    with pytest.raises(g.GraphError, match=r"inputs of shape \(2, 8, 8, 4\)"):
        g.trace(zoo.abstract("batch_norm"), spec(2, 8, 8, 4))
    with pytest.raises(TypeError, match="NNX module or a function"):
        g.trace(3, spec(1))
    with pytest.raises(TypeError, match="params"):
        g.trace(lambda p, x: x, spec(1))
    with pytest.raises(TypeError, match="example"):
        g.trace(zoo.abstract("batch_norm"))


def test_the_model_stays_as_it_is():
    model, inputs = zoo.build("batch_norm")
    model.train()
    g.trace(model, *inputs)
    assert model.body[0].bn.use_running_average is False


# --- functions, control flow, refusals ------------------------------------------------------

PARAMS = {"a": spec(3, 8), "b": spec(8, 8), "c": spec(8, 4)}
X = spec(2, 3)


def simple(middle):
    def fn(p, x):
        return middle(p, jnp.tanh(x @ p["a"])) @ p["c"]

    return g.trace_fn(fn, PARAMS, X)


def free(graph, path="a", axis=1):
    return int((graph.axis(path, axis).labels >= 0).sum())


@jax.custom_vjp
def swish(x):
    return x * jax.nn.sigmoid(x)


swish.defvjp(lambda x: (swish(x), x), lambda x, ct: (ct,))


@jax.custom_jvp
def soft(x):
    return jnp.log1p(jnp.exp(x))


soft.defjvp(lambda p, t: (soft(*p), t[0] * jax.nn.sigmoid(p[0])))


@pytest.mark.parametrize(
    "middle",
    [
        lambda p, h: jax.jit(jnp.tanh)(h @ p["b"]),
        lambda p, h: jax.checkpoint(lambda h: jnp.tanh(h @ p["b"]))(h),
        lambda p, h: swish(h @ p["b"]),
        lambda p, h: soft(h @ p["b"]),
        lambda p, h: lax.cond(True, lambda h: h @ p["b"], lambda h: h @ p["b"], h),
        lambda p, h: lax.stop_gradient(h @ p["b"]),
    ],
)
def test_calls_are_entered(middle):
    graph = simple(middle)
    assert free(graph) == free(graph, "b") == 8
    assert len(graph.groups) == 2
    assert [x.path for x in graph.layers] == ["a", "b", "c"]


def test_branches_must_agree():
    graph = simple(lambda p, h: lax.cond(h.sum() > 0, lambda: h @ p["b"], lambda: h))
    assert len(graph.groups) == 1
    np.testing.assert_array_equal(graph.axis("a").labels, graph.axis("b").labels)
    # removed channels of tanh are 0, so that the sum is the same without them
    assert graph.groups[0].statistic is None
    graph = simple(lambda p, h: lax.cond(jnp.cos(h).sum() > 0, lambda: h @ p["b"], lambda: h))
    assert graph.groups[0].statistic is not None


def test_scan_over_stacked_weights_ties_the_iterations():
    def fn(p, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["a"], p["stack"])
        return h @ p["c"]

    graph = g.trace_fn(fn, {**PARAMS, "stack": spec(5, 8, 8)}, X)
    labels = graph.axis("a").labels
    np.testing.assert_array_equal(labels, graph.axis("stack", 1).labels)
    np.testing.assert_array_equal(labels, graph.axis("stack", 2).labels)
    assert len(graph.groups) == 1
    assert "scan" in graph.axis("stack", 0).reason


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda p, h: jnp.sort(h, -1), "sort over channels"),
        (lambda p, h: jnp.cumsum(h, -1), "cumsum over channels"),
        (lambda p, h: h * np.arange(8.0, dtype=np.float32), "constant array"),
        (lambda p, h: h[:, [3, 1, 2, 5, 4, 0, 7, 6]], "indexed"),
        (lambda p, h: lax.while_loop(lambda h: h.sum() > 1, lambda h: h / 2, h), "'while'"),
        (lambda p, h: jnp.fft.fft(h).real, "'fft'"),
        (lambda p, h: jnp.roll(h, h.sum().astype(int), axis=1), "'dynamic_slice'"),
        (lambda p, h: h[:, 1:], "sliced 1:8"),
        (lambda p, h: lax.top_k(h, 8)[0], "'top_k'|sort"),
    ],
)
def test_what_is_not_exact_is_fixed_with_a_reason(middle, reason):
    def fn(p, x):
        return middle(p, jnp.tanh(x @ p["a"])) @ p["c"]

    params = dict(PARAMS)
    if reason.startswith("sliced"):
        params["c"] = spec(7, 4)
    graph = g.trace_fn(fn, params, X)
    axis = graph.axis("a")
    assert free(graph) == 0
    assert any(r in axis.reason for r in reason.split("|")), axis.reason
    assert axis.source is not None
    assert axis.source.file.endswith("test_graph_trace.py")


@pytest.mark.parametrize(
    ("middle", "kept"),
    [
        (lambda p, h: h + p["one"][0], 8),  # one bias for all channels
        (lambda p, h: (h[:, :, None] * h[:, None, :]).sum(1), 8),
        (lambda p, h: jnp.flip(h, 1), 8),
        (lambda p, h: h[:, None, :].repeat(3, 1).mean(1), 8),
        (lambda p, h: jnp.where(p["one"] > 0, h, 0.0), 8),
    ],
)
def test_what_is_exact_stays_free(middle, kept):
    def fn(p, x):
        return middle(p, jnp.tanh(x @ p["a"])) @ p["c"]

    graph = g.trace_fn(fn, {**PARAMS, "one": spec(1, 1)}, X)
    assert free(graph) == kept


def test_unknown_operations_are_never_elementwise():
    from jax.extend.core import Primitive

    odd = Primitive("odd")
    odd.def_abstract_eval(lambda a: a)
    graph = simple(lambda p, h: odd.bind(h))
    assert free(graph) == 0
    assert "'odd'" in graph.axis("a").reason


def test_window_over_channels_is_refused():
    def fn(p, x):
        h = lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = lax.reduce_window(h, 0.0, lax.add, (1, 1, 1, 3), (1, 1, 1, 1), "SAME")
        return h.mean((1, 2)) @ p["c"]

    graph = g.trace_fn(fn, {"k": spec(3, 3, 3, 8), "c": spec(8, 4)}, spec(1, 8, 8, 3))
    assert free(graph, "k", 3) == 0
    assert "reduce_window" in graph.axis("k").reason


def test_an_unused_variable_is_fixed():
    graph = g.trace_fn(lambda p, x: x @ p["a"] @ p["c"], PARAMS, X)
    assert free(graph, "b", 1) == 0
    assert "no other variable" in graph.axis("b").reason


def test_str_shows_groups_and_reasons():
    graph = traced("resnext")
    assert "grouped: 4 parts of 4, grouped convolution b/conv at " in str(graph)
    text = str(graph.axis("stem/conv/kernel"))
    assert text == "stem/conv/kernel axis 3: 16/16 positions of 16 atoms may go"
    assert "0/3 positions of 0 atoms may go; meets the model's input" in str(
        graph.axis("stem/conv/kernel", 2)
    )
    text = str(traced("cbam"))
    assert "a/conv: 16 atoms" in text
    assert "statistic: " in text
    assert "fixed: " in text


class Shared(nnx.Module):
    """Two calls of the same jitted function: JAX shares its inner jaxpr."""

    def __init__(self, *, rngs):
        self.a, self.b = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.c = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.c(jax.nn.gelu(self.b(jax.nn.gelu(self.a(x)))))


def test_shared_inner_programs_have_their_own_labels():
    graph = g.trace(nnx.eval_shape(lambda: Shared(rngs=nnx.Rngs(0))), X)
    assert [x.name for x in graph.groups] == ["a", "b"]
