"""More networks, in styles that the first zoo doesn't have: attention, scans, odd splits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from graph_zoo_base import Basic, ConvBN, Head, case, conv
from jax import lax


@case("convnext", statistic=True)
class ConvNeXt(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 8, (2, 2), strides=2, rngs=rngs)
        self.dw = conv(8, 8, 7, g=8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((8,), 0.1))
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        y = self.down(nnx.gelu(self.up(self.norm(self.dw(x)))))
        return self.head(x + self.gamma * y)


@case("unet")
class UNet(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b, self.c = (
            ConvBN(3, 8, rngs=rngs), ConvBN(8, 12, rngs=rngs), ConvBN(12, 16, rngs=rngs)
        )  # fmt: skip
        self.up1 = nnx.ConvTranspose(16, 12, (2, 2), strides=(2, 2), rngs=rngs)
        self.d1, self.d2 = ConvBN(24, 10, rngs=rngs), ConvBN(18, 6, rngs=rngs)
        self.out = conv(6, 2, 1, rngs=rngs)

    def __call__(self, x):
        pool = lambda x: nnx.max_pool(x, (2, 2), strides=(2, 2))  # noqa: E731
        a = self.a(x)
        b = self.b(pool(a))
        c = self.c(pool(b))
        y = self.d1(jnp.concatenate([self.up1(c), b], -1))
        y = y.repeat(2, axis=1).repeat(2, axis=2)
        return self.out(self.d2(jnp.concatenate([a, y], -1)))


@case("ghost")
class Ghost(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = ConvBN(3, 8, rngs=rngs)
        self.primary, self.cheap = ConvBN(8, 6, 1, rngs=rngs), ConvBN(6, 6, 3, 1, 6, rngs=rngs)
        self.last = ConvBN(12, 8, 1, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.primary(self.stem(x))
        return self.head(self.last(jnp.concatenate([x, self.cheap(x)], axis=-1)))


@case("res2net", tags="chunk")
class Res2Net(nnx.Module):
    def __init__(self, *, rngs):
        self.a = ConvBN(3, 16, rngs=rngs)
        self.cs = nnx.List([ConvBN(4, 4, rngs=rngs) for _ in range(3)])
        self.b = ConvBN(16, 16, 1, act=False, rngs=rngs)
        self.head = Head(16, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        parts = jnp.array_split(x, 4, axis=-1)
        y, out = parts[0], [parts[0]]
        for part, c in zip(parts[1:], self.cs):
            y = c(part if len(out) == 1 else part + y)
            out.append(y)
        return self.head(nnx.relu(self.b(jnp.concatenate(out, -1)) + x))


@case("selective_kernel")
class SelectiveKernel(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 8, rngs=rngs), ConvBN(3, 8, 5, rngs=rngs)
        self.z = nnx.Linear(8, 4, rngs=rngs)
        self.up = nnx.List([nnx.Linear(4, 8, rngs=rngs) for _ in range(2)])
        self.last = ConvBN(8, 6, rngs=rngs)
        self.head = Head(6, rngs=rngs)

    def __call__(self, x):
        u = jnp.stack([self.a(x), self.b(x)], axis=1)
        s = nnx.relu(self.z(u.sum(1).mean((1, 2))))
        w = jax.nn.softmax(jnp.stack([f(s) for f in self.up], axis=1), axis=1)
        return self.head(self.last((u * w[:, :, None, None, :]).sum(1)))


@case("eca")
class ECA(nnx.Module):
    def __init__(self, *, rngs):
        self.a = ConvBN(3, 8, rngs=rngs)
        self.gate = nnx.Conv(1, 1, (3,), use_bias=False, rngs=rngs)
        self.b = ConvBN(8, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        s = self.gate(x.mean((1, 2))[..., None])[..., 0]
        return self.head(self.b(x * jax.nn.sigmoid(s)[:, None, None, :]))


@case("mixer")
class Mixer(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Conv(3, 8, (2, 2), strides=2, rngs=rngs)
        self.t1, self.t2 = nnx.Linear(16, 12, rngs=rngs), nnx.Linear(12, 16, rngs=rngs)
        self.c1, self.c2 = nnx.Linear(8, 10, rngs=rngs), nnx.Linear(10, 8, rngs=rngs)
        self.fc = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.t2(nnx.gelu(self.t1(x.swapaxes(1, 2)))).swapaxes(1, 2)
        x = x + self.c2(nnx.gelu(self.c1(x)))
        return self.fc(x.mean(1))


@case("partial_conv", tags="chunk")
class Partial(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.p = ConvBN(3, 16, rngs=rngs), conv(4, 4, rngs=rngs)
        self.b = ConvBN(16, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        n = x.shape[-1] // 4
        x = (
            x.at[..., :n].set(self.p(x[..., :n]))
            if False
            else jnp.concatenate([self.p(x[..., :n]), x[..., n:]], -1)
        )
        return self.head(self.b(x))


@case("repvgg")
class RepVGG(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = ConvBN(3, 8, rngs=rngs)
        self.c3, self.c1 = ConvBN(8, 8, act=False, rngs=rngs), ConvBN(8, 8, 1, act=False, rngs=rngs)
        self.id = nnx.BatchNorm(8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        return self.head(nnx.relu(sum([self.c3(x), self.c1(x), self.id(x)])))


@case("film", (2, 8, 8, 3), (2, 6), tags="chunk")
class FiLM(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 8, rngs=rngs), ConvBN(8, 6, rngs=rngs)
        self.cond, self.head = nnx.Linear(6, 16, rngs=rngs), Head(6, rngs=rngs)

    def __call__(self, x, c):
        scale, shift = jnp.split(self.cond(c)[:, None, None], 2, axis=-1)
        return self.head(self.b(nnx.relu(self.a(x) * (1 + scale) + shift)))


@case("glu", tags="chunk")
class GLU(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = conv(3, 16, bias=True, rngs=rngs), conv(8, 12, bias=True, rngs=rngs)
        self.head = Head(6, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.glu(self.b(nnx.glu(self.a(x)))))


@case("raw_nchw", (2, 3, 8, 8))
class Raw(nnx.Module):
    """Weights of its own in OIHW, batch statistics folded by hand."""

    def __init__(self, *, rngs):
        self.w1, self.w2 = nnx.Param(jnp.ones((8, 3, 3, 3))), nnx.Param(jnp.ones((6, 8, 3, 3)))
        self.s1, self.b1 = nnx.Param(jnp.ones(8)), nnx.Param(jnp.ones(8))
        self.fc = nnx.Param(jnp.ones((5, 6)))

    def __call__(self, x):
        kw = {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}
        x = lax.conv_general_dilated(x, self.w1[...], (1, 1), "SAME", **kw)
        x = nnx.relu(x * self.s1[...][:, None, None] + self.b1[...].reshape(1, -1, 1, 1))
        x = lax.conv_general_dilated(x, self.w2[...], (2, 2), [(1, 1), (1, 1)], **kw)
        return jnp.einsum("nchw,oc->no", x, self.fc[...]) / 16


@case("multi_head", statistic=True)
class MultiHead(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Conv(3, 16, (2, 2), strides=2, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 16, rngs=rngs)
        self.fc = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.attend(x)
        return self.fc((x + self.down(nnx.relu(self.up(x)))).mean(1))


@case("remat")
class Remat(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = ConvBN(3, 8, rngs=rngs)
        self.blocks = nnx.List([Basic(8, 8, rngs=rngs), Basic(8, 12, 2, rngs=rngs)])
        self.head = Head(12, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for b in self.blocks:
            x = nnx.remat(lambda m, x: m(x))(b, x)
        return self.head(x)


@case("scanned")
class Scanned(nnx.Module):
    """Equal blocks with stacked weights under a scan."""

    def __init__(self, *, rngs):
        self.stem = ConvBN(3, 8, rngs=rngs)
        self.w1, self.w2 = nnx.Param(jnp.ones((3, 1, 1, 8, 12))), nnx.Param(jnp.ones((3, 12, 8)))
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        def step(x, w):
            y = lax.conv_general_dilated(
                x, w[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return x + nnx.relu(y) @ w[1], None

        x, _ = lax.scan(step, self.stem(x), (self.w1[...], self.w2[...]))
        return self.head(x)


@case("recurrent", (2, 3, 6, 6, 2))
class Recurrent(nnx.Module):
    """A convolutional recurrence over time, its state starting at zero."""

    def __init__(self, *, rngs):
        self.wx, self.wh = conv(2, 8, rngs=rngs), conv(8, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        h = jnp.zeros((*x.shape[0:1], *x.shape[2:4], self.wh.out_features))
        for t in range(x.shape[1]):
            h = jnp.tanh(self.wx(x[:, t]) + self.wh(h))
        return self.head(h)


@case("coord_conv")
class CoordConv(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 8, rngs=rngs), ConvBN(10, 6, rngs=rngs)
        self.head = Head(6, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        n, h, w, _ = x.shape
        ys, xs = jnp.meshgrid(jnp.linspace(-1, 1, h), jnp.linspace(-1, 1, w), indexing="ij")
        grid = jnp.broadcast_to(jnp.stack([ys, xs], -1), (n, h, w, 2))
        return self.head(self.b(jnp.concatenate([grid, x], -1)))


@case("bilinear_pooling")
class Bilinear(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 8, rngs=rngs), ConvBN(8, 6, rngs=rngs)
        self.fc = nnx.Linear(36, 5, rngs=rngs)

    def __call__(self, x):
        x = self.b(self.a(x))
        z = jnp.einsum("nhwc,nhwd->ncd", x, x) / 64
        return self.fc(z.reshape(z.shape[0], -1))


@case("weight_standardised", statistic=True)
class Standardised(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = conv(3, 8, rngs=rngs), conv(8, 8, rngs=rngs)
        self.head = Head(8, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        w = self.b.kernel[...]
        w = (w - w.mean((0, 1, 2))) / jnp.sqrt(w.var((0, 1, 2)) + 1e-5)
        x = lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return self.head(nnx.relu(x))


@case("two_pools")
class TwoPools(nnx.Module):
    def __init__(self, *, rngs):
        self.a, self.b = ConvBN(3, 8, rngs=rngs), nnx.Conv(8, 6, 3, rngs=rngs)
        self.fc, self.aux = nnx.Linear(12, 5, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        y = jax.nn.hard_swish(self.b(x))
        z = jnp.hstack([y.mean((1, 2)), y.max((1, 2))])
        return self.fc(self.drop(z)), self.aux(x.min((1, 2)))


@case("fusion", tags="weights")
class Fusion(nnx.Module):
    """Learnt positive weights of the inputs of a sum."""

    def __init__(self, *, rngs):
        self.a, self.b, self.c = (ConvBN(3, 8, k, rngs=rngs) for k in (1, 3, 5))
        self.w = nnx.Param(jnp.ones(3))
        self.last = ConvBN(8, 6, rngs=rngs)
        self.head = Head(6, rngs=rngs)

    def __call__(self, x):
        w = nnx.relu(self.w[...])
        w = w / (w.sum() + 1e-4)
        x = w[0] * self.a(x) + w[1] * self.b(x) + w[2] * self.c(x)
        return self.head(self.last(x))


@case("einsum_layers")
class EinsumLayers(nnx.Module):
    def __init__(self, *, rngs):
        self.a = nnx.Einsum("nhwc,cd->nhwd", (3, 8), (8,), rngs=rngs)
        self.b = nnx.LinearGeneral(8, (2, 6), rngs=rngs)
        self.c = nnx.LinearGeneral((2, 6), 7, axis=(-2, -1), rngs=rngs)
        self.head = Head(7, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))))
