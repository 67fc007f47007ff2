"""Kinds of layers, layouts and signatures, one at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from graph_zoo_base import ConvBN, Head, case, conv


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
