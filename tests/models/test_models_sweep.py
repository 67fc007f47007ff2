"""Every architecture: traced once, on 8 devices, in bfloat16, with remat, folded, shrunk, saved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import models_a_oracle as oracle
import numpy as np
import pytest
from flax import nnx
from models_small import LARGE, SMALL

import cnnjax
from cnnjax import graph, models, pruning, training, tree

QUICK = ("lenet_5_caffe", "resnet20_cifar", "densenet_40_12")
# variants with parts of their own
MORE = [
    ("highway_10", 12, {"stages": ((4, 1, 3), (4, 1, 2)), "stage_dropout": (0.3, 0.5),
                        "image_size": 12}),
    ("preact_resnet200", 32, {"stages": (1, 1), "widths": (8, 16), "stem_width": 8}),
    ("preact_resnet50", 33, {"stages": (1, 2), "widths": (8, 16), "stem_width": 8, "stem": "bare",
                             "keras": True}),
    ("rir_18_wide_projection", 8, {"stages": (1, 1), "width": 4}),
    ("nin_imagenet", 67, {}),
    ("fractalnet34", 32, {"widths": (8, 8), "columns": 2}),
]  # fmt: skip
ROWS = [
    pytest.param(*row, id=row[0], marks=() if row[0] in QUICK else pytest.mark.slow)
    for row in [*SMALL, *MORE]
]
EVERY = pytest.mark.parametrize(("name", "size", "fields"), ROWS)


def build(name, fields, **more):
    fields = {"num_classes": 5, **fields, **more}
    return oracle.fill(models.create(name, rngs=nnx.Rngs(0), **fields))


def images(name, size, count, seed=0):
    channels = models.config(name).in_channels
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, size, size, channels)).astype(np.float32)


def relative(a, b):
    """The distance of two trees of arrays over the norm of the first."""
    a, b = (np.concatenate([np.ravel(v) for v in jax.tree.leaves(t)]) for t in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


@EVERY
def test_training_is_traced_once_and_the_same_on_eight_devices(name, size, fields):
    model = build(name, fields)
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    traces = []

    @jax.jit
    def step(params, rest, x):
        traces.append(name)

        def loss(params):
            inner = nnx.merge(graphdef, params, rest, copy=True)
            return jnp.mean(jnp.square(inner(x) - 1.0)), nnx.state(inner, nnx.Not(nnx.Param))

        return jax.value_and_grad(loss, has_aux=True)(params)

    x = images(name, size, 8)
    (loss, new), grads = step(params, rest, x)
    assert np.isfinite(loss)
    for path, grad in tree.flatten(grads).items():
        assert np.all(np.isfinite(grad)), path
    # other values, the state of the step before: nothing is traced again
    step(params, new, images(name, size, 8, seed=1))
    # what the network itself makes of roundings: where batch norms see 8 numbers a channel (the
    # Inceptions' last maps have one pixel here) they grow
    noise = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    own = relative(grads, step(params, rest, x * (1 + 1e-6 * noise))[1])
    assert own < 0.05
    assert len(traces) == 1
    mesh = training.data_mesh()
    assert mesh.size == 8
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = jax.device_put((params, rest), everywhere)
    (loss8, new8), grads8 = step(*state, jax.device_put(x, split))
    np.testing.assert_allclose(loss8, loss, rtol=1e-4)
    assert relative(grads, grads8) < max(1e-3, 4 * own)
    stats, stats8 = (jax.tree.leaves(nnx.filter_state(s, nnx.BatchStat)) for s in (new, new8))
    if stats:
        assert relative(stats, stats8) < 1e-4


@EVERY
def test_bfloat16_stays_near_float32(name, size, fields):
    nets = [build(name, fields, dtype=d) for d in (None, "bfloat16")]
    for net in nets:
        net.eval()
        assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(nnx.state(net, nnx.Param)))
    graphdefs, state = [nnx.split(n)[0] for n in nets], nnx.split(nets[0])[1]
    run = jax.jit(lambda s, x: [nnx.merge(g, s)(x) for g in graphdefs])
    full, half = run(state, images(name, size, 2))
    assert half.dtype == jnp.float32
    # bfloat16 has 8 bits; deep networks add up their roundings
    assert np.abs(half - full).max() < 0.08 * np.abs(full).max() + 1e-3
    # evaluation draws nothing
    np.testing.assert_array_equal(run(state, images(name, size, 2))[0], full)


@EVERY
def test_folded_halved_and_saved(name, size, fields, tmp_path):
    """Folding is exact to 1e-5; half of the channels go, proved; a file keeps what is left."""
    model = build(name, fields)
    model.eval()
    x = images(name, size, 2)
    example = jax.ShapeDtypeStruct(x.shape, x.dtype)
    outputs = {"whole": model}
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
    if norms:
        outputs["folded"] = models.fold_batchnorm(model, example, tolerance=1e-5)
        left = [m for _, m in nnx.iter_modules(outputs["folded"]) if isinstance(m, nnx.BatchNorm)]
        # a plain dense layer norms a concatenation first: no convolution has a norm of its own
        assert (len(left) < len(norms)) == (name != "densenet_40_12")
    read = graph.trace(model, example)
    scores = pruning.importance.l1(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    keep = pruning.select_channels(read, scores, ratio=0.5)
    small = pruning.shrink(model, read, keep, check=True)
    before, after = (tree.count(nnx.state(m, nnx.Param)) for m in (model, small))
    assert after < before
    cnnjax.save(tmp_path / "small", small)
    outputs["small"], outputs["loaded"] = small, cnnjax.load(tmp_path / "small")
    outputs["loaded"].eval()
    parts = {k: nnx.split(m) for k, m in outputs.items()}
    run = jax.jit(lambda s, x: {k: nnx.merge(parts[k][0], s[k])(x) for k in s})
    got = run({k: s for k, (_, s) in parts.items()}, x)
    assert got["small"].shape == got["whole"].shape
    assert np.isfinite(got["small"]).all()
    np.testing.assert_array_equal(got["loaded"], got["small"])
    if norms:
        scale = np.abs(got["whole"]).max()
        np.testing.assert_allclose(got["folded"], got["whole"], rtol=0, atol=1e-5 * scale)


def recomputed(jaxpr):
    """How many parts of a program are marked to be computed again in the backward pass."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name in ("checkpoint", "remat", "remat2")
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                total += recomputed(inner) if hasattr(inner, "eqns") else 0
    return total


def marked(name, size, fields, remat):
    model = models.abstract(name, num_classes=5, remat=remat, **fields)
    model.eval()
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((2, size, size, models.config(name).in_channels), jnp.float32)
    return recomputed(jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, x).jaxpr)


@pytest.mark.parametrize(
    ("name", "size", "fields"),
    [pytest.param(*r, id=r[0], marks=pytest.mark.slow if r[0] in LARGE else ()) for r in SMALL],
)
def test_remat_is_no_empty_promise(name, size, fields):
    assert marked(name, size, fields, True) >= 1
    if name in QUICK:
        assert marked(name, size, fields, False) == 0


REMAT = (
    "lenet_5_caffe",
    "plain_cnn",
    "alexnet",
    "zfnet",
    "vgg16_cifar",
    "googlenet",
    "rir_18_wide",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "lenet_5_caffe" else pytest.mark.slow) for n in REMAT]
)
def test_remat_gives_equal_gradients(name):
    size, fields = next(row[1:] for row in SMALL if row[0] == name)
    x = images(name, size, 4)
    out = []
    for remat in (False, True):
        model = build(name, fields, remat=remat)
        model.eval()  # drop-out's keys are drawn in another order
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, x, graphdef=graphdef, rest=rest):
            return jnp.mean(jnp.square(nnx.merge(graphdef, params, rest, copy=True)(x)))

        out.append(jax.jit(jax.grad(loss))(params, x))
    assert relative(*out) < 1e-4


def test_a_scanned_stage_names_every_block():
    """The maps of a scanned network are those of the unrolled one, block by block."""
    fields = {"num_classes": 5, "blocks_per_stage": 4, "widths": (4, 8)}
    plain = oracle.fill(models.create("resnet20_cifar", rngs=nnx.Rngs(0), **fields))
    scanned = models.create("resnet20_cifar", rngs=nnx.Rngs(0), scan=True, **fields)
    values = tree.flatten(nnx.state(plain, nnx.Any(nnx.Param, nnx.BatchStat)))

    def take(path, leaf):
        if "/repeated/" not in path:
            return values[path]
        head, tail = path.split("/1/repeated/")
        return jnp.asarray(np.stack([values[f"{head}/{i}/{tail}"] for i in (1, 2, 3)]))

    both = nnx.Any(nnx.Param, nnx.BatchStat)
    nnx.update(scanned, tree.map_with_path(take, nnx.state(scanned, both)))
    x = images("resnet20_cifar", 8, 2)
    found = []
    for model in (plain, scanned):
        model.eval()
        graphdef, state = nnx.split(model)
        run = jax.jit(
            lambda s, x, g=graphdef: (
                nnx.merge(g, s)(x, return_features=True),
                nnx.merge(g, s)(x, return_features=("layer1/2", "layer2/3"))[1],
            )
        )
        found.append(run(state, x))
    ((_, maps), some), ((_, want), _) = found[1], found[0]
    assert set(maps) == set(want) >= {f"layer{i}/{j}" for i in (1, 2) for j in range(4)}
    assert set(some) == {"layer1/2", "layer2/3"}
    for key in want:
        np.testing.assert_allclose(maps[key], want[key], rtol=1e-4, atol=1e-5, err_msg=key)
    for key in some:
        np.testing.assert_allclose(some[key], want[key], rtol=1e-4, atol=1e-5, err_msg=key)
    with pytest.raises(ValueError, match="no feature 'layer1/4' here"):
        scanned(x, return_features="layer1/4")
