"""Networks that move channels about: shuffles, chunks, maxout, pixels, permutations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from graph_zoo_base import Basic, ConvBN, Head, case, conv


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


@case("channel_roll", shift=1)
@case("channel_roll_back", shift=-3)
class Roll(nnx.Module):
    def __init__(self, *, rngs, shift):
        self.a, self.b = ConvBN(3, 8, rngs=rngs), ConvBN(8, 8, rngs=rngs)
        self.head, self.shift = Head(8, rngs=rngs), shift

    def __call__(self, x):
        return self.head(self.b(jnp.roll(self.a(x), self.shift, axis=-1)))


def swap(x):
    return jnp.concatenate([x[..., 3:], x[..., :3]], axis=-1)


@case("halves_swapped", swap=jax.jit(swap))
@case("halves_swapped_inline", swap=swap)
class Swapped(nnx.Module):
    """Cut anywhere, and put together in another order."""

    def __init__(self, *, rngs, swap):
        self.a, self.b = ConvBN(3, 10, rngs=rngs), ConvBN(14, 8, rngs=rngs)
        self.c = ConvBN(3, 4, 1, rngs=rngs)
        self.head, self.swap = Head(8, rngs=rngs), swap

    def __call__(self, x):
        return self.head(self.b(jnp.concatenate([self.swap(self.a(x)), self.c(x)], axis=-1)))


@case("index_shuffle")
class IndexShuffle(nnx.Module):
    """A channel shuffle, a flip and a repetition by index arrays made from the width."""

    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 12, rngs=rngs), ConvBN(12, 12, 1, 1, 3, rngs=rngs)
        self.c, self.d = ConvBN(12, 8, rngs=rngs), ConvBN(16, 6, rngs=rngs)
        self.head = Head(6, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        x = x[..., np.arange(x.shape[-1]).reshape(3, -1).T.ravel()]
        x = self.b(x)
        x = self.c(jnp.take(x, jnp.arange(x.shape[-1])[::-1], axis=-1))
        return self.head(self.d(x[..., np.arange(x.shape[-1]).repeat(2)]))


@case("fixed_index")
class FixedIndex(nnx.Module):
    """An index array that knows nothing of the width."""

    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 8, rngs=rngs), ConvBN(8, 6, rngs=rngs)
        self.head = Head(6, rngs=rngs)

    def __call__(self, x):
        return self.head(self.b(self.a(x)[..., np.array([3, 1, 2, 5, 4, 0, 7, 6])]))


@case("hard_coded", tags="refused")
class HardCoded(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 16, rngs=rngs), ConvBN(4, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        return self.head(self.b(x[..., 4:8]))
