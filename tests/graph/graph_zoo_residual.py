"""Networks with shortcuts: basic, bottleneck, padded, pre-activation, inverted, highway."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from graph_zoo_base import Basic, ConvBN, Head, case, conv


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
