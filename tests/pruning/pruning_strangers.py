"""Networks as their authors would write them, each in its own style; nothing here knows cnnjax."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class PyramidUNet(nnx.Module):
    """Encoder and decoder in loops, skips by concatenation, bilinear resizing."""

    def __init__(self, widths=(6, 8, 10), *, rngs):
        ins = (3, *widths[:-1])
        self.down = nnx.List([nnx.Conv(i, o, (3, 3), rngs=rngs) for i, o in zip(ins, widths)])
        self.norms = nnx.List([nnx.BatchNorm(o, rngs=rngs) for o in widths])
        up = list(zip(widths[::-1], widths[-2::-1]))
        self.up = nnx.List([nnx.Conv(i + o, o, (3, 3), rngs=rngs) for i, o in up])
        self.mask = nnx.Conv(widths[0], 1, (1, 1), rngs=rngs)

    def __call__(self, x):
        skips = []
        for conv, norm in zip(self.down, self.norms):
            x = nnx.leaky_relu(norm(conv(x)), 0.1)
            skips.append(x)
            x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        x = skips.pop()
        for conv in self.up:
            skip = skips.pop()
            x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "bilinear")
            x = nnx.leaky_relu(conv(jnp.concatenate([skip, x], axis=-1)), 0.1)
        return jax.nn.sigmoid(self.mask(x))


class NeXtBlock(nnx.Module):
    """Depthwise, LayerNorm, two dense layers on pixels, a squeeze gate, a layer scale."""

    def __init__(self, dim, *, rngs):
        self.dw = nnx.Conv(dim, dim, (5, 5), feature_group_count=dim, rngs=rngs)
        self.ln = nnx.LayerNorm(dim, rngs=rngs)
        self.pw1, self.pw2 = (
            nnx.Linear(dim, 3 * dim, rngs=rngs),
            nnx.Linear(3 * dim, dim, rngs=rngs),
        )
        self.fc1, self.fc2 = nnx.Linear(3 * dim, 4, rngs=rngs), nnx.Linear(4, 3 * dim, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((dim,), 0.5))

    def __call__(self, x):
        y = jax.nn.gelu(self.pw1(self.ln(self.dw(x))), approximate=False)
        gate = self.fc2(jax.nn.silu(self.fc1(y.mean((-3, -2)))))
        y = y * jax.nn.hard_sigmoid(gate)[..., None, None, :]
        return x + self.gamma * self.pw2(y)


class NeXt(nnx.Module):
    def __init__(self, *, rngs):
        self.patch = nnx.Conv(3, 8, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.blocks = nnx.Sequential(NeXtBlock(8, rngs=rngs), NeXtBlock(8, rngs=rngs))
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.max(self.blocks(self.patch(x)), axis=(1, 2)))


class Siamese(nnx.Module):
    """Two images through one tower; embeddings compared by difference, product and cosine."""

    def __init__(self, *, rngs):
        self.tower = nnx.Sequential(
            nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.relu,
            nnx.Conv(8, 12, (3, 3), strides=2, rngs=rngs), nnx.relu,
            lambda x: x.mean(axis=(1, 2)),
            nnx.Linear(12, 10, rngs=rngs),
        )  # fmt: skip
        self.verdict = nnx.Linear(20, 2, rngs=rngs)

    def __call__(self, left, right):
        a, b = self.tower(left), self.tower(right)
        both = self.verdict(jnp.concatenate([jnp.abs(a - b), a * b], axis=-1))
        return both, jnp.einsum("nd,nd->n", a, b)


class Detector(nnx.Module):
    """A backbone, a top-down pyramid and heads shared by the levels; outputs are reshaped."""

    def __init__(self, anchors=2, classes=3, *, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.c1, self.c2 = conv(3, 8, strides=2), conv(8, 12, strides=2)
        self.l1, self.l2 = (nnx.Conv(i, 6, (1, 1), rngs=rngs) for i in (8, 12))
        self.tower = conv(6, 6)
        self.cls, self.box = conv(6, anchors * classes), conv(6, anchors * 4)
        self.classes = classes

    def __call__(self, x):
        c1 = nnx.relu(self.c1(x))
        c2 = nnx.relu(self.c2(c1))
        p2 = self.l2(c2)
        p1 = self.l1(c1) + jnp.repeat(jnp.repeat(p2, 2, axis=1), 2, axis=2)
        cls, box = [], []
        for p in (p1, p2):
            t = nnx.relu(self.tower(p))
            cls.append(self.cls(t).reshape(p.shape[0], -1, self.classes))
            box.append(self.box(t).reshape(p.shape[0], -1, 4))
        return {"cls": jnp.concatenate(cls, 1), "box": jnp.concatenate(box, 1)}


class AttentionPool(nnx.Module):
    """Learnt queries attend to pixels; the values are mixed by an einsum over experts."""

    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.key, self.value = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (4, 6)))
        self.experts = nnx.Param(jax.random.normal(rngs.params(), (4, 10, 5)))

    def __call__(self, x):
        x = jnp.tanh(self.stem(x))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        weights = jax.nn.softmax(jnp.einsum("npk,qk->nqp", self.key(x), self.queries[...]), axis=-1)
        pooled = jnp.einsum("nqp,npv->nqv", weights, jax.nn.elu(self.value(x)))
        return jnp.einsum("nqv,qvo->no", pooled, self.experts[...])


class LambdaDense(nnx.Module):
    """A DenseNet of closures: bottlenecks are functions in a list, features a growing list."""

    def __init__(self, growth=4, layers=3, *, rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        widths = [6 + growth * i for i in range(layers)]
        self.norms = nnx.List([nnx.BatchNorm(w, rngs=rngs) for w in widths])
        self.mids = nnx.List([nnx.Conv(w, 8, (1, 1), rngs=rngs) for w in widths])
        self.outs = nnx.List([nnx.Conv(8, growth, (3, 3), rngs=rngs) for _ in widths])
        self.fc = nnx.Linear(6 + growth * layers, 3, rngs=rngs)

    def __call__(self, x):
        features = [self.stem(x)]
        bottleneck = lambda n, m, o: lambda y: o(nnx.relu(m(nnx.relu(n(y)))))  # noqa: E731
        for step in map(bottleneck, self.norms, self.mids, self.outs):
            features.append(step(jnp.concatenate(features, axis=-1)))
        return self.fc(jnp.concatenate([f.mean((1, 2)) for f in features], axis=1))


class GatedGhost(nnx.Module):
    """Ghost features, a gate by split halves, and coordinate attention by pooled rows, columns."""

    def __init__(self, *, rngs):
        self.primary = nnx.Conv(3, 8, (1, 1), rngs=rngs)
        self.cheap = nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs)
        self.mix = nnx.Conv(24, 20, (1, 1), rngs=rngs)
        self.squeeze = nnx.Conv(10, 6, (1, 1), rngs=rngs)
        self.rows, self.cols = (nnx.Conv(6, 10, (1, 1), rngs=rngs) for _ in range(2))
        self.fc = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        p = nnx.relu(self.primary(x))
        x = self.mix(jnp.concatenate([p, nnx.relu(self.cheap(p))], axis=-1))
        value, gate = jnp.split(x, 2, axis=-1)
        x = value * jax.nn.sigmoid(gate)
        h, w = x.shape[1:3]
        rows, cols = x.mean(axis=2, keepdims=True), x.mean(axis=1, keepdims=True)
        y = jnp.concatenate([rows, cols.transpose(0, 2, 1, 3)], axis=1)
        y = jax.nn.hard_swish(self.squeeze(y))
        rows, cols = y[:, :h], y[:, h : h + w].transpose(0, 2, 1, 3)
        x = x * jax.nn.sigmoid(self.rows(rows)) * jax.nn.sigmoid(self.cols(cols))
        return self.fc(x.mean((1, 2)))


class Cell(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.a, self.b = nnx.Conv(dim, 12, (3, 3), rngs=rngs), nnx.Conv(12, dim, (3, 3), rngs=rngs)

    def __call__(self, x):
        return x + self.b(nnx.relu(self.a(x)))


class Looped(nnx.Module):
    """Blocks made by ``nnx.vmap``, applied by ``nnx.scan``; one is rematerialized; a cond."""

    def __init__(self, depth=3, *, rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def make(rngs):
            return Cell(8, rngs=rngs)

        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.cells, self.last = make(rngs), Cell(8, rngs=rngs)
        self.fc = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, image):
        x = self.stem(image)
        x = nnx.scan(lambda x, cell: cell(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.cells
        )
        x = nnx.remat(lambda cell, x: cell(x))(self.last, x)
        x = lax.cond(image.mean() > 0, lambda x: nnx.relu(x), lambda x: jnp.tanh(x), x)
        return self.fc(x.mean((1, 2)))


class TorchStyle(nnx.Module):
    """NCHW throughout, weights in OIHW, views with literal sizes, in-place style updates."""

    def __init__(self, *, rngs):
        key = rngs.params
        self.w1 = nnx.Param(0.3 * jax.random.normal(key(), (12, 3, 3, 3)))
        self.w2 = nnx.Param(0.3 * jax.random.normal(key(), (8, 12, 3, 3)))
        self.bias = nnx.Param(jax.random.normal(key(), (12,)))
        self.fc = nnx.Linear(8 * 2 * 2, 5, rngs=rngs)

    def __call__(self, x):
        x = x.transpose(0, 3, 1, 2)
        x = lax.conv(x, self.w1[...], (2, 2), "SAME") + self.bias[...][None, :, None, None]
        x = lax.conv(jnp.maximum(x, 0), self.w2[...], (2, 2), "SAME")
        x = x.at[:, :, 0, 0].multiply(2.0)
        return self.fc(jnp.reshape(x, (x.shape[0], -1)))


class Routed(nnx.Module):
    """A mixture of experts by the best of a softmax: which weights are used is computed."""

    def __init__(self, *, rngs):
        self.stem, self.tail = (nnx.Conv(i, 8, (3, 3), rngs=rngs) for i in (3, 8))
        self.router = nnx.Linear(8, 3, rngs=rngs)
        self.experts = nnx.Param(jax.random.normal(rngs.params(), (3, 8, 6)))
        self.fc = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.tail(nnx.relu(self.stem(x)))).mean((1, 2))
        best = jnp.argmax(self.router(x), axis=-1)
        return self.fc(nnx.relu(jnp.einsum("nc,nco->no", x, self.experts[...][best])))


class Sorted(nnx.Module):
    """Activations sorted over channels before the last layer: an order statistic."""

    def __init__(self, *, rngs):
        self.a, self.b = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.Conv(8, 6, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.fc(jnp.sort(nnx.relu(self.b(nnx.relu(self.a(x)))).mean((1, 2)), axis=-1))


class QueryPool(nnx.Module):
    """A learnt query attends to pixels by Flax's own attention: its width is in a constant."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.mid = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.query = nnx.Param(0.3 * jax.random.normal(rngs.params(), (1, 1, 8)))
        self.attend = nnx.MultiHeadAttention(2, 8, qkv_features=8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.mid(nnx.relu(self.stem(x))))
        pixels = x.reshape(len(x), -1, x.shape[-1])
        query = jnp.broadcast_to(self.query[...], (len(x), 1, self.query.shape[-1]))
        return self.head(self.attend(query, pixels, pixels)[:, 0])


class Hourglass(nnx.Module):
    """Down by pooling, up by transposed convolutions, skips joined by concatenation."""

    def __init__(self, rngs):
        self.d1 = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.d2 = nnx.Conv(6, 8, (3, 3), rngs=rngs)
        self.u2 = nnx.ConvTranspose(8, 6, (2, 2), strides=(2, 2), rngs=rngs)
        self.u1 = nnx.Conv(12, 4, (3, 3), rngs=rngs)
        self.out = nnx.Conv(4, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        a = nnx.relu(self.d1(x))
        b = nnx.relu(self.d2(nnx.max_pool(a, (2, 2), (2, 2))))
        return self.out(nnx.relu(self.u1(jnp.concatenate((self.u2(b), a), -1))))
