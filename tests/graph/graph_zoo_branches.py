"""Networks that branch, join and attend: concatenation, gates, products of activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from graph_zoo_base import ConvBN, Head, case, conv


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
