"""Small networks of many topologies, each in its own style: what a user might write.

``build(name)`` gives a module with random values and its inputs; ``CASES`` says what's expected.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

IMAGE = (2, 8, 8, 3)


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable[[nnx.Rngs], nnx.Module]
    inputs: tuple[tuple[int, ...], ...]
    statistic: bool
    tags: frozenset[str]


CASES: dict[str, Case] = {}


def case(name: str, *inputs: tuple[int, ...], statistic: bool = False, tags: str = "", **fields):
    """Registers a module class (with constructor fields) under a name."""

    def put(cls: Any) -> Any:
        make = lambda rngs: cls(rngs=rngs, **fields)  # noqa: E731
        CASES[name] = Case(make, inputs or (IMAGE,), statistic, frozenset(tags.split()))
        return cls

    return put


def fill(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """Random values for an abstract module, without compiling an initializer."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(model)

    def leaf(path: Any, a: Any) -> Any:
        text = jax.tree_util.keystr(path)
        if "count" in text or not jnp.issubdtype(a.dtype, jnp.floating):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                return jax.random.key(0)
            return jnp.zeros(a.shape, a.dtype)
        if "'var'" in text:
            return jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)
        scale = 0.3 if len(a.shape) < 2 else 1.5 / np.sqrt(max(1, np.prod(a.shape[:-1])))
        return jnp.asarray(scale * rng.standard_normal(a.shape) + 0.1, a.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(leaf, state))


@functools.cache
def abstract(name: str) -> nnx.Module:
    """The module with abstract leaves."""
    return nnx.eval_shape(lambda: CASES[name].make(nnx.Rngs(0)))


def build(name: str, seed: int = 0) -> tuple[nnx.Module, tuple[jax.Array, ...]]:
    """A module of the zoo with random values, and random inputs."""
    rng = np.random.default_rng(seed + 1)
    inputs = tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in CASES[name].inputs)
    return fill(abstract(name), seed), inputs


def conv(i: int, o: int, k: int = 3, s: int = 1, g: int = 1, bias: bool = False, **kw: Any) -> Any:
    """A convolution with SAME padding."""
    return nnx.Conv(i, o, (k, k), strides=(s, s), feature_group_count=g, use_bias=bias, **kw)


class ConvBN(nnx.Module):
    def __init__(self, i, o, k=3, s=1, g=1, act=True, *, rngs):
        self.conv = conv(i, o, k, s, g, rngs=rngs)
        self.bn = nnx.BatchNorm(o, rngs=rngs)
        self.act = act

    def __call__(self, x):
        x = self.bn(self.conv(x))
        return nnx.relu(x) if self.act else x


class Head(nnx.Module):
    def __init__(self, i, *, rngs):
        self.fc = nnx.Linear(i, 5, rngs=rngs)

    def __call__(self, x):
        return self.fc(x.mean(axis=(1, 2)))


@case("plain_flatten")
class Plain(nnx.Module):
    def __init__(self, *, rngs):
        self.c1 = conv(3, 8, bias=True, rngs=rngs)
        self.c2 = conv(8, 12, bias=True, rngs=rngs)
        self.fc1 = nnx.Linear(4 * 4 * 12, 20, rngs=rngs)
        self.fc2 = nnx.Linear(20, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.c1(x)), (2, 2), strides=(2, 2))
        x = jnp.tanh(self.c2(x))
        return self.fc2(jax.nn.sigmoid(self.fc1(x.reshape(x.shape[0], -1))))


@case("batch_norm")
class Normed(nnx.Module):
    def __init__(self, *, rngs):
        self.body = nnx.List([ConvBN(3, 8, rngs=rngs), ConvBN(8, 16, s=2, rngs=rngs)])
        self.head = Head(16, rngs=rngs)

    def __call__(self, x):
        for layer in self.body:
            x = layer(x)
        return self.head(x)


class Basic(nnx.Module):
    def __init__(self, i, o, s=1, *, rngs):
        self.a = ConvBN(i, o, s=s, rngs=rngs)
        self.b = ConvBN(o, o, act=False, rngs=rngs)
        self.down = ConvBN(i, o, 1, s, act=False, rngs=rngs) if s > 1 or i != o else None

    def __call__(self, x):
        return nnx.relu(self.b(self.a(x)) + (x if self.down is None else self.down(x)))


@case("residual_basic")
class ResNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = ConvBN(3, 8, rngs=rngs)
        self.blocks = nnx.List(
            [Basic(8, 8, rngs=rngs), Basic(8, 16, 2, rngs=rngs), Basic(16, 16, rngs=rngs)]
        )
        self.head = Head(16, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for b in self.blocks:
            x = b(x)
        return self.head(x)


@case("residual_bottleneck")
class Bottleneck(nnx.Module):
    def __init__(self, *, rngs, groups=1, width=8):
        self.stem = ConvBN(3, 16, rngs=rngs)
        self.a = ConvBN(16, width, 1, rngs=rngs)
        self.b = ConvBN(width, width, 3, 2, groups, rngs=rngs)
        self.c = ConvBN(width, 24, 1, act=False, rngs=rngs)
        self.short = ConvBN(16, 24, 1, 2, act=False, rngs=rngs)
        self.head = Head(24, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        return self.head(nnx.relu(self.c(self.b(self.a(x))) + self.short(x)))


case("resnext", groups=4, width=16, tags="grouped")(Bottleneck)


@case("option_a")
class OptionA(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = ConvBN(3, 8, rngs=rngs)
        self.a = ConvBN(8, 16, s=2, rngs=rngs)
        self.b = ConvBN(16, 16, act=False, rngs=rngs)
        self.c = ConvBN(16, 12, rngs=rngs)
        self.head = Head(12, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        y = self.b(self.a(x))
        short = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (4, 4)))
        return self.head(self.c(nnx.relu(y + short)))


@case("pre_activation")
class PreAct(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = conv(3, 8, rngs=rngs)
        self.n1, self.c1 = nnx.BatchNorm(8, rngs=rngs), conv(8, 12, rngs=rngs)
        self.n2, self.c2 = nnx.BatchNorm(12, rngs=rngs), conv(12, 8, rngs=rngs)
        self.n3 = nnx.BatchNorm(8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        y = self.c1(jax.nn.silu(self.n1(x)))
        x = x + self.c2(jax.nn.silu(self.n2(y)))
        return self.head(jax.nn.silu(self.n3(x)))


@case("dense_blocks")
class DenseNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = conv(3, 8, rngs=rngs)
        width, self.layers = 8, nnx.List([])
        for _ in range(3):
            self.layers.append(
                nnx.List([nnx.BatchNorm(width, rngs=rngs), conv(width, 4, rngs=rngs)])
            )
            width += 4
        self.norm, self.trans = nnx.BatchNorm(width, rngs=rngs), conv(width, 10, 1, rngs=rngs)
        self.last = ConvBN(10, 6, rngs=rngs)
        self.head = Head(16, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for norm, c in self.layers:
            x = jnp.concatenate([x, c(nnx.relu(norm(x)))], axis=-1)
        x = nnx.avg_pool(self.trans(nnx.relu(self.norm(x))), (2, 2), strides=(2, 2))
        return self.head(jnp.concatenate([x, self.last(x)], -1))


@case("inception")
class Inception(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = ConvBN(3, 8, rngs=rngs)
        self.b1 = ConvBN(8, 4, 1, rngs=rngs)
        self.b2 = nnx.Sequential(ConvBN(8, 6, 1, rngs=rngs), ConvBN(6, 8, rngs=rngs))
        self.b3 = nnx.Sequential(ConvBN(8, 2, 1, rngs=rngs), ConvBN(2, 4, 5, rngs=rngs))
        self.b4 = ConvBN(8, 4, 1, rngs=rngs)
        self.last = ConvBN(20, 8, 1, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        p = nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")
        y = jnp.concatenate([self.b1(x), self.b2(x), self.b3(x), self.b4(p)], axis=3)
        return self.head(self.last(y))


@case("inverted_residual")
class Inverted(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = ConvBN(3, 8, rngs=rngs)
        self.expand = ConvBN(8, 24, 1, rngs=rngs)
        self.depth = ConvBN(24, 24, 3, 1, 24, rngs=rngs)
        self.project = ConvBN(24, 8, 1, act=False, rngs=rngs)
        self.double = ConvBN(8, 16, 3, 2, 8, rngs=rngs)  # depthwise with multiplier 2
        self.head = Head(16, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        x = x + self.project(jax.nn.relu6(self.depth(jax.nn.relu6(self.expand(x)))))
        return self.head(self.double(x))


def shuffle(x, groups):
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, groups, c // groups)
    return jnp.swapaxes(x, 3, 4).reshape(n, h, w, c)


@case("shuffle1_g1", groups=1, tags="shuffle")
@case("shuffle1_g2", groups=2, tags="shuffle")
@case("shuffle1_g3", groups=3, tags="shuffle")
@case("shuffle1_g4", groups=4, tags="shuffle")
@case("shuffle1_g8", groups=8, tags="shuffle")
class Shuffle1(nnx.Module):
    def __init__(self, *, rngs, groups):
        g, width = groups, 48
        mid, self.groups = width // 2, g
        self.stem = ConvBN(3, width, rngs=rngs)
        self.a, self.b = (
            ConvBN(width, mid, 1, 1, g, rngs=rngs),
            ConvBN(mid, mid, 3, 1, mid, act=False, rngs=rngs),
        )
        self.c = ConvBN(mid, width, 1, 1, g, act=False, rngs=rngs)
        self.d, self.e = (
            ConvBN(width, mid, 1, 1, g, rngs=rngs),
            ConvBN(mid, mid, 3, 2, mid, act=False, rngs=rngs),
        )
        self.f = ConvBN(mid, width, 1, 1, g, act=False, rngs=rngs)
        self.head = Head(2 * width, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        x = nnx.relu(x + self.c(self.b(shuffle(self.a(x), self.groups))))
        y = self.f(self.e(shuffle(self.d(x), self.groups)))
        x = nnx.avg_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        return self.head(nnx.relu(jnp.concatenate([x, y], -1)))


@case("shuffle2", tags="shuffle")
class Shuffle2(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = ConvBN(3, 16, rngs=rngs)
        self.units = nnx.List(
            [
                nnx.List(
                    [
                        ConvBN(8, 8, 1, rngs=rngs),
                        ConvBN(8, 8, 3, 1, 8, act=False, rngs=rngs),
                        ConvBN(8, 8, 1, rngs=rngs),
                    ]
                )
                for _ in range(2)
            ]
        )
        self.head = Head(16, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for a, b, c in self.units:
            left, right = jnp.split(x, 2, axis=-1)
            x = shuffle(jnp.concatenate([left, c(b(a(right)))], -1), 2)
        return self.head(x)


@case("squeeze_excite")
class SqueezeExcite(nnx.Module):
    def __init__(self, *, rngs):
        self.a = ConvBN(3, 16, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(16, 4, rngs=rngs), nnx.Linear(4, 16, rngs=rngs)
        self.b = ConvBN(16, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        s = jnp.mean(x, axis=(1, 2), keepdims=True)
        s = jax.nn.sigmoid(self.fc2(nnx.relu(self.fc1(s))))
        return self.head(self.b(x * s))


@case("cbam", statistic=True)
class CBAM(nnx.Module):
    def __init__(self, *, rngs):
        self.a = ConvBN(3, 16, rngs=rngs)
        self.gate = conv(2, 1, 7, rngs=rngs)
        self.b = ConvBN(16, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        s = jnp.concatenate([x.mean(-1, keepdims=True), x.max(-1, keepdims=True)], -1)
        return self.head(self.b(x * jax.nn.sigmoid(self.gate(s))))


@case("non_local")
class NonLocal(nnx.Module):
    def __init__(self, *, rngs):
        self.a = ConvBN(3, 8, s=2, rngs=rngs)
        self.theta, self.phi, self.g = (conv(8, 6, 1, rngs=rngs) for _ in range(3))
        self.out = conv(6, 8, 1, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        n, h, w, _ = x.shape
        q, k, v = (f(x).reshape(n, h * w, -1) for f in (self.theta, self.phi, self.g))
        y = jax.nn.softmax(jnp.einsum("nic,njc->nij", q, k), -1) @ v
        return self.head(x + self.out(y.reshape(n, h, w, -1)))


@case("attention", scaled=False)
@case("attention_scaled", scaled=True, statistic=True)
class Attention(nnx.Module):
    def __init__(self, *, rngs, scaled):
        self.a = ConvBN(3, 8, s=2, rngs=rngs)
        self.q, self.k, self.v = (nnx.Linear(8, 16, rngs=rngs) for _ in range(3))
        self.out = nnx.Linear(16, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)
        self.scaled = scaled

    def __call__(self, x):
        x = self.a(x)
        n, h, w, c = x.shape
        t = x.reshape(n, h * w, c)
        q, k, v = (f(t).reshape(n, h * w, 4, -1) for f in (self.q, self.k, self.v))
        if self.scaled:
            q = q / q.shape[-1] ** 0.5
        a = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k))
        y = jnp.einsum("nhqk,nkhd->nqhd", a, v).reshape(n, h * w, -1)
        return self.head((t + self.out(y)).reshape(n, h, w, c))


@case("highway")
class Highway(nnx.Module):
    def __init__(self, *, rngs):
        self.a = ConvBN(3, 8, rngs=rngs)
        self.h, self.t = conv(8, 8, bias=True, rngs=rngs), conv(8, 8, bias=True, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        t = jax.nn.sigmoid(self.t(x))
        return self.head(nnx.relu(self.h(x)) * t + x * (1.0 - t))


@case("maxout_inner", inner=True)
@case("maxout_outer", inner=False)
class Maxout(nnx.Module):
    def __init__(self, *, rngs, inner):
        self.a = conv(3, 16, bias=True, rngs=rngs)
        self.b = conv(8, 12, bias=True, rngs=rngs)
        self.head, self.inner = Head(6, rngs=rngs), inner

    def maxout(self, x):
        if self.inner:
            return x.reshape(*x.shape[:-1], -1, 2).max(-1)
        return x.reshape(*x.shape[:-1], 2, -1).max(-2)

    def __call__(self, x):
        return self.head(self.maxout(self.b(self.maxout(self.a(x)))))


@case("fractal")
class Fractal(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = ConvBN(3, 8, rngs=rngs)
        self.a = ConvBN(8, 8, rngs=rngs)
        self.b, self.c = ConvBN(8, 6, rngs=rngs), ConvBN(6, 8, rngs=rngs)
        self.last = ConvBN(8, 6, rngs=rngs)
        self.head = Head(6, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        y = jnp.stack([self.a(x), self.c(self.b(x))]).mean(axis=0)
        return self.head(self.last(y))


@case("c2f", tags="chunk")
class C2f(nnx.Module):
    def __init__(self, *, rngs):
        self.a = ConvBN(3, 16, rngs=rngs)
        self.b1, self.b2 = Basic(8, 8, rngs=rngs), Basic(8, 8, rngs=rngs)
        self.out = ConvBN(32, 12, 1, rngs=rngs)
        self.head = Head(12, rngs=rngs)

    def __call__(self, x):
        y = list(jnp.split(self.a(x), 2, axis=-1))
        y.append(self.b1(y[-1]))
        y.append(self.b2(y[-1]))
        return self.head(self.out(jnp.concatenate(y, -1)))


@case("chunk_concat", tags="chunk")
class ChunkConcat(nnx.Module):
    def __init__(self, *, rngs):
        self.a = ConvBN(3, 12, rngs=rngs)
        self.b = ConvBN(12, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        c = x.shape[-1] // 3
        p, q, r = x[..., :c], x[..., c : 2 * c], x[..., 2 * c :]
        return self.head(self.b(jnp.concatenate([r, p * jax.nn.sigmoid(q), nnx.relu(q)], -1)))


@case("pixel_shuffle", torch=False)
@case("pixel_shuffle_torch", torch=True)
class PixelShuffle(nnx.Module):
    def __init__(self, *, rngs, torch):
        self.a, self.b = ConvBN(3, 8, rngs=rngs), ConvBN(8, 16, rngs=rngs)
        self.c = ConvBN(4, 6, rngs=rngs)
        self.head, self.torch = Head(6, rngs=rngs), torch

    def __call__(self, x):
        x = self.b(self.a(x))
        n, h, w, c = x.shape
        if self.torch:
            x = x.reshape(n, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        else:
            x = x.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
        return self.head(self.c(x.reshape(n, 2 * h, 2 * w, c // 4)))


@case("pixel_unshuffle")
class PixelUnshuffle(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 6, rngs=rngs), ConvBN(24, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        return self.head(self.b(x.reshape(n, h // 2, w // 2, 4 * c)))


@case("channel_flip")
class Flip(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 8, rngs=rngs), ConvBN(8, 8, rngs=rngs)
        self.c = ConvBN(8, 6, rngs=rngs)
        self.head = Head(6, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        return self.head(self.c(self.b(x[..., ::-1]) + x))


@case("channel_roll")
class Roll(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 8, rngs=rngs), ConvBN(8, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        return self.head(self.b(jnp.roll(self.a(x), 1, axis=-1)))


@case("weight_reuse")
class Reuse(nnx.Module):
    def __init__(self, *, rngs):
        self.a = ConvBN(3, 8, rngs=rngs)
        self.b = ConvBN(8, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        for _ in range(3):
            x = self.b(x)
        return self.head(x)


@case("bare_parameter")
class Bare(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = conv(3, 8, rngs=rngs), conv(8, 6, rngs=rngs)
        self.gain, self.shift = nnx.Param(jnp.ones(8)), nnx.Param(jnp.ones((1, 1, 1, 8)))
        self.w = nnx.Param(jnp.ones((6, 5)))

    def __call__(self, x):
        x = nnx.relu(self.a(x) * self.gain[...] + self.shift[...])
        return self.b(x).mean((1, 2)) @ self.w[...]


@case("prelu")
class PReLU(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = conv(3, 8, rngs=rngs), conv(8, 6, rngs=rngs)
        self.slope, self.one = nnx.Param(jnp.ones(8)), nnx.PReLU()
        self.head = Head(6, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        x = jnp.where(x > 0, x, self.slope[...] * x)
        return self.head(self.one(self.b(x)))


@case("transposed", transpose=False)
@case("transposed_kernel", transpose=True)
class Transposed(nnx.Module):
    def __init__(self, *, rngs, transpose):
        self.a = ConvBN(3, 8, s=2, rngs=rngs)
        self.up = nnx.ConvTranspose(
            8, 6, (4, 4), strides=(2, 2), transpose_kernel=transpose, rngs=rngs
        )
        self.b = conv(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.up(self.a(x))))


@case("resize")
class Resize(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 8, s=2, rngs=rngs), ConvBN(8, 6, rngs=rngs)
        self.lateral = ConvBN(3, 6, 1, rngs=rngs)
        self.head = Head(6, rngs=rngs)

    def __call__(self, x):
        y = self.a(x)
        n, h, w, c = y.shape
        y = jax.image.resize(y, (n, 2 * h, 2 * w, c), "bilinear")
        return self.head(self.b(y) + self.lateral(x))


@case("group_norm")
class GroupNormed(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.n = conv(3, 16, rngs=rngs), nnx.GroupNorm(16, num_groups=4, rngs=rngs)
        self.b = ConvBN(16, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        return self.head(self.b(nnx.relu(self.n(self.a(x)))))


@case("layer_norm", statistic=True)
class LayerNormed(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.n = conv(3, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        return self.head(x + self.down(jax.nn.gelu(self.up(self.n(x)))))


@case("linear_view", (2, 10))
class LinearView(nnx.Module):
    def __init__(self, *, rngs):
        self.fc = nnx.Linear(10, 4 * 4 * 6, rngs=rngs)
        self.a, self.b = ConvBN(6, 8, rngs=rngs), conv(8, 3, rngs=rngs)

    def __call__(self, z):
        return self.b(self.a(self.fc(z).reshape(-1, 4, 4, 6)))


@case("nchw", (2, 3, 8, 8))
class NCHW(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 8, rngs=rngs), ConvBN(8, 6, rngs=rngs)
        self.fc = nnx.Linear(6 * 4 * 4, 5, rngs=rngs)

    def layer(self, f, x):
        return f(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    def __call__(self, x):
        x = self.layer(self.a, x)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return self.fc(self.layer(self.b, x).reshape(x.shape[0], -1))


@case("several_inputs", (2, 8, 8, 3), (2, 6))
class TwoInputs(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.fc = ConvBN(3, 8, rngs=rngs), nnx.Linear(6, 8, rngs=rngs)
        self.b, self.c = ConvBN(8, 6, rngs=rngs), ConvBN(8, 4, rngs=rngs)
        self.cls, self.box = Head(6, rngs=rngs), conv(4, 4, 1, rngs=rngs)

    def __call__(self, image, context):
        x = self.a(image) + self.fc(context)[:, None, None, :]
        return {"cls": self.cls(self.b(x)), "box": self.box(self.c(x))}


@case("hard_coded", tags="refused")
class HardCoded(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 16, rngs=rngs), ConvBN(4, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        return self.head(self.b(x[..., 4:8]))
