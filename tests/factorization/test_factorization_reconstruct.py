"""Reconstruction inside networks: exactness, a float64 oracle, orderings on held-out data."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cnnjax
from cnnjax import factorization as f
from cnnjax import surgery
from cnnjax.factorization.compose import compose_chain

EXAMPLE = jax.ShapeDtypeStruct((1, 10, 10, 3), jnp.float32)


class Net(nnx.Module):
    """conv-BN-ReLU, a grouped convolution with bias, a residual unit, a dense head."""

    def __init__(self, rngs, width=12):
        def conv(i, **options):
            return nnx.Conv(i, width, (3, 3), rngs=rngs, **options)

        self.a_head = nnx.Linear(width, 6, rngs=rngs)
        self.stem = conv(3, use_bias=False)
        self.bn1 = nnx.BatchNorm(width, rngs=rngs)
        self.grouped = conv(width, feature_group_count=2, strides=2)
        self.inner = conv(width, use_bias=False)
        self.bn2 = nnx.BatchNorm(width, rngs=rngs)
        self.pre = nnx.relu
        g = np.random.default_rng(3)
        for bn in (self.bn1, self.bn2):
            for name in ("mean", "bias"):
                getattr(bn, name)[...] = jnp.asarray(0.3 * g.normal(size=width), jnp.float32)
            for name in ("var", "scale"):
                getattr(bn, name)[...] = jnp.asarray(g.uniform(0.5, 1.5, width), jnp.float32)
        self.grouped.bias[...] = jnp.asarray(0.2 * g.normal(size=width), jnp.float32)

    def __call__(self, x):
        x = jax.nn.relu(self.bn1(self.stem(x)))
        x = jnp.maximum(self.grouped(x), 0)
        x = jax.nn.relu(x + self.bn2(self.inner(x)))
        return self.a_head(x.mean((1, 2)))


class Deep(nnx.Module):
    """Plain 3x3 convolutions with ReLUs."""

    def __init__(self, rngs, depth=4, width=16):
        widths = (3, *[width] * depth)
        self.convs = nnx.List(
            [nnx.Conv(i, o, (3, 3), rngs=rngs) for i, o in zip(widths, widths[1:])]
        )

    def __call__(self, x):
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        return x


def make_net():
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="module")
def net():
    return make_net()


def smooth(seed, n=32, size=10):
    """Images whose pixels go together, as natural ones do."""
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, size, size, 3))
    for _ in range(2):
        x = x + np.roll(x, 1, 1) + np.roll(x, 1, 2)
    return (x / x.std()).astype(np.float32)


def run(model, x):
    model = nnx.view(model, use_running_average=True, raise_if_not_found=False)
    return np.asarray(
        jax.jit(lambda g, s, x: nnx.merge(g, s)(x), static_argnums=0)(*nnx.split(model), x)
    )


@pytest.mark.method("asymmetric_3d")
def test_sites_are_read_off_the_program(net):
    sites = f.find_sites(net, ["a_head", "inner", "grouped", "stem"], EXAMPLE)
    assert [(s.path, s.norm, s.relu) for s in sites] == [
        ("stem", "bn1", True),
        ("grouped", None, True),
        ("inner", "bn2", False),  # an addition stands between it and the ReLU
        ("a_head", None, False),
    ]
    assert [s.size for s in sites] == [(10, 10), (10, 10), (5, 5), (1, 1)]


@pytest.mark.method("asymmetric_3d")
def test_full_ranks_are_exact(net):
    rules = {
        "stem": f.Basis(1.0, always=True),
        "grouped": f.Asymmetric3D(1.0, always=True),
        "inner": f.Asymmetric3D(1.0, always=True),
        "a_head": f.Basis(1.0, always=True),
    }
    held = smooth(9, 4)
    for options in (f.Reconstruction(), f.Reconstruction(asymmetric=False, nonlinear=False)):
        same, fits = f.reconstruct(
            net, rules, [smooth(0), smooth(1)], example=EXAMPLE, options=options
        )
        assert len(same.grouped.layers) == len(same.inner.layers) == 3
        assert max(fit.after for fit in fits) < 1e-6
        np.testing.assert_allclose(run(same, held), run(net, held), atol=2e-3)


@pytest.mark.method("asymmetric_3d")
def test_costs_are_as_planned(net):
    rules = {"inner": f.Asymmetric3D(), "stem": f.Basis()}
    decided = f.pca_plan(net, rules, [smooth(0)], 0.6, example=EXAMPLE)
    small, _ = f.reconstruct(net, decided, [smooth(0)], example=EXAMPLE)
    old, new = (cnnjax.profile(m, EXAMPLE).macs for m in (net, small))
    before, after = (sum(p.macs[k] for p in decided.layers) for k in (0, 1))
    assert old - new == before - after
    assert after <= 0.6 * before


@pytest.mark.method("asymmetric_3d")
def test_the_split_keeps_most_on_the_training_images(net):
    rules = {"grouped": f.Asymmetric3D(), "inner": f.Asymmetric3D()}
    found = {}
    splits = (0.35, 0.65, 0.8)
    for split in (*splits, None):
        decided = f.pca_plan(net, rules, [smooth(0)], 0.6, example=EXAMPLE, split=split)
        kept = 0.0
        for entry in decided.layers:
            if not entry.ranks:
                continue
            layer = surgery.module_at(net, entry.path)
            (site,) = f.find_sites(net, [entry.path], EXAMPLE)
            yy = np.asarray(f.response_moments(net, [site], [smooth(0)])[entry.path].yy)
            groups = layer.feature_group_count
            n = len(yy) // groups
            blocks = [yy[g * n : (g + 1) * n, g * n : (g + 1) * n] for g in range(groups)]
            values = np.mean([np.linalg.eigvalsh(b)[::-1] for b in blocks], axis=0)
            kept += np.log(values[: entry.ranks[1]].sum() / values.sum())
            squares = []
            for block in np.split(np.asarray(layer.kernel[...]), groups, axis=-1):
                kh, kw, i, o = block.shape
                matrix = block.transpose(2, 0, 3, 1).reshape(i * kh, o * kw)
                squares.append(np.linalg.svd(matrix, compute_uv=False) ** 2)
            kept += np.log(np.sum(np.array(squares)[:, : entry.ranks[0]]) / np.sum(squares))
        found[split] = ([p.ranks for p in decided.layers], kept)
    # every layer has its own split: no common one keeps more
    assert all(found[None][1] >= found[split][1] - 1e-6 for split in splits)
    assert len({str(found[s][0]) for s in splits}) > 1


@pytest.mark.method("response_low_rank")
def test_network_fit_equals_reduced_rank_regression_in_float64(net):
    """The first layer against a numpy transcription on all positions of all images."""
    x = smooth(4, 24)
    decided = f.plan(net, {"stem": f.Basis(4, always=True)}, EXAMPLE)
    options = f.Reconstruction(positions=2000, nonlinear=False)
    small, _ = f.reconstruct(net, decided, [x], example=EXAMPLE, options=options)
    tapped = cnnjax.graph.capture(nnx.view(net, use_running_average=True), {"bn1": "output"})
    y = np.asarray(tapped(jnp.asarray(x))[1]["bn1"], np.float64).reshape(-1, 12)
    centred = y - y.mean(0)
    vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :4]
    expected = centred @ vectors @ vectors.T + y.mean(0)
    tapped = cnnjax.graph.capture(nnx.view(small, use_running_average=True), {"bn1": "output"})
    got = np.asarray(tapped(jnp.asarray(x))[1]["bn1"], np.float64).reshape(-1, 12)
    # positions are drawn with replacement: the sampled covariance is near the exact one
    error = np.linalg.norm(got - expected) / np.linalg.norm(y)
    assert error < 0.02
    optimum = np.linalg.norm(y - expected) / np.linalg.norm(y)
    assert np.linalg.norm(y - got) / np.linalg.norm(y) < 1.005 * optimum


@pytest.mark.method("asymmetric_reconstruction")
def test_one_pass_equals_running_the_network_anew(monkeypatch):
    net = Deep(nnx.Rngs(1))
    rules = {
        "convs/0": f.Basis(8, always=True),
        "convs/1": f.Tucker2((8, 8), always=True),
        "convs/2": f.Asymmetric3D((12, 8), always=True),
    }
    x = smooth(2, 48)
    one, fits = f.reconstruct(net, rules, [x[:24], x[24:]], example=EXAMPLE)
    room = importlib.import_module("cnnjax.factorization.reconstruct")
    monkeypatch.setattr(room, "_one_pass", lambda *args: None)
    other, fits2 = f.reconstruct(net, rules, [x[:24], x[24:]], example=EXAMPLE)
    monkeypatch.undo()
    for a, b in zip(fits, fits2, strict=True):
        assert (a.path, a.samples) == (b.path, b.samples)
        np.testing.assert_allclose(a.after, b.after, rtol=1e-3)
    np.testing.assert_allclose(run(one, x[:4]), run(other, x[:4]), atol=2e-3)


@pytest.mark.method("asymmetric_reconstruction")
def test_asymmetric_beats_symmetric_and_relu_aware_beats_linear_with_depth():
    net = Deep(nnx.Rngs(0))
    batches, held = [smooth(0, 64), smooth(1, 64)], smooth(2, 32)
    want = run(net, held)
    wins = {"asymmetric": 0, "aware": 0, "weights": 0}

    def error(model):
        return float(np.sum((run(model, held) - want) ** 2))

    def fitted(decided, **options):
        small, _ = f.reconstruct(
            net, decided, batches, example=EXAMPLE, options=f.Reconstruction(**options)
        )
        return error(small)

    for rank in (3, 5, 7, 9):
        decided = f.plan(net, {"**": f.Basis(rank, always=True)}, EXAMPLE)
        both = fitted(decided)
        wins["asymmetric"] += both <= fitted(decided, asymmetric=False)
        wins["aware"] += both <= fitted(decided, nonlinear=False)
        wins["weights"] += both <= error(f.factorize(net, decided))
    assert wins["asymmetric"] >= 3
    assert wins["aware"] >= 3
    assert wins["weights"] == 4


@pytest.mark.method("jaderberg_scheme2")
@pytest.mark.parametrize(
    "rule",
    [
        f.Spatial(6, always=True),
        f.Tucker2((3, 5), always=True),
        f.Basis(4, always=True),
    ],
    ids=["spatial", "tucker2", "basis"],
)
def test_held_out_responses_are_nearer_than_with_weights_alone(net, rule):
    batches, held = [smooth(0, 64)], smooth(5, 32)
    rules = {"stem": rule, "inner": rule}
    fitted, _ = f.reconstruct(
        net, rules, batches, example=EXAMPLE, options=f.Reconstruction(positions=40)
    )
    plain = f.factorize(net, rules, EXAMPLE)

    def answers(model):
        view = nnx.view(model, use_running_average=True)
        return cnnjax.graph.capture(view, {"bn1": "output"})(jnp.asarray(held))[1]["bn1"]

    want = np.maximum(answers(net), 0)
    ours, theirs = (np.linalg.norm(np.maximum(answers(m), 0) - want) for m in (fitted, plain))
    assert ours < theirs
    assert np.linalg.norm(run(fitted, held) - run(net, held)) < np.linalg.norm(
        run(plain, held) - run(net, held)
    )


@pytest.mark.method("asymmetric_3d")
def test_the_result_trains_saves_and_loads(net, tmp_path):
    small, _ = f.reconstruct(
        net, {"inner": f.Asymmetric3D((8, 6), always=True)}, [smooth(0)], example=EXAMPLE
    )
    assert [tuple(m.kernel.shape) for m in small.inner.layers] == [
        (3, 1, 12, 8),
        (1, 3, 8, 6),
        (1, 1, 6, 12),
    ]
    # BatchNorm holds the statistics of the new responses: training mode answers nearly the same
    x = smooth(0)
    train = nnx.view(small, use_running_average=False)
    np.testing.assert_allclose(np.asarray(train(jnp.asarray(x))), run(small, x), atol=0.5)
    graphdef, params, rest = nnx.split(train, nnx.Param, ...)
    gradient = jax.jit(
        jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, rest, copy=True)(jnp.asarray(x)) ** 2))
    )(params)
    flat = cnnjax.tree.flatten(gradient)
    assert all(np.abs(np.asarray(flat[f"inner/layers/{k}/kernel"])).max() > 0 for k in range(3))
    cnnjax.save(tmp_path / "small", small, factory=f"{__name__}:make_net")
    again = cnnjax.load(tmp_path / "small", factory=make_net)
    np.testing.assert_array_equal(run(again, x), run(small, x))


@pytest.mark.method("asymmetric_3d")
def test_bad_input(net):
    with pytest.raises(ValueError, match="stem: 2 samples for 12 outputs: at least 12"):
        f.reconstruct(
            net,
            {"stem": f.Basis(3)},
            [smooth(0, 2)],
            example=EXAMPLE,
            options=f.Reconstruction(positions=1),
        )
    with pytest.raises(ValueError, match="a_head: 2 samples for 6 outputs: at least 6"):
        f.pca_plan(net, {"a_head": f.Basis()}, [smooth(0, 2)], 0.5, example=EXAMPLE)
    with pytest.raises(ValueError, match="responses of stem of shape .* non-finite"):
        f.reconstruct(net, {"stem": f.Basis(3)}, [np.nan * smooth(0, 4)], example=EXAMPLE)
    with pytest.raises(ValueError, match="no batches"):
        f.reconstruct(net, {"stem": f.Basis(3)}, [], example=EXAMPLE)
    with pytest.raises(ValueError, match="positions is 0"):
        f.Reconstruction(positions=0)
    with pytest.raises(ValueError, match="not Tucker2"):
        f.pca_plan(net, {"stem": f.Tucker2()}, [smooth(0)], 0.5, example=EXAMPLE)
    with pytest.raises(ValueError, match="macs is 1.5"):
        f.pca_plan(net, {"stem": f.Basis()}, [smooth(0)], 1.5, example=EXAMPLE)
    with pytest.raises(ValueError, match="'step' matches no"):
        f.reconstruct(net, {"step": f.Basis(3)}, [smooth(0)], example=EXAMPLE)

    class Twice(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(3, 3, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.conv(self.conv(x))

    with pytest.raises(ValueError, match="conv is applied 2 times"):
        f.reconstruct(Twice(), {"conv": f.Basis(2)}, [smooth(0)], example=EXAMPLE)


@pytest.mark.method("chain_apply")
@pytest.mark.parametrize("groups", [1, 2])
def test_composed_chains_are_the_kernels(groups):
    g = np.random.default_rng(0)
    kernel = jnp.asarray(g.normal(size=(3, 5, 8 // groups, 12)), jnp.float32)
    spec = f.ConvSpec((2, 1), ((1, 2), (0, 3)), (1, 2), groups)
    for rule in (f.Spatial(1.0), f.Tucker2(1.0), f.Asymmetric3D(1.0)):
        full = rule.full((3, 5, 8 // groups, 12 // groups))
        chain = rule.chain(jax.random.key(0), kernel, full, spec, None)
        np.testing.assert_allclose(compose_chain(chain, (3, 5), groups), kernel, atol=1e-5)
    # below full rank: the composed kernel answers like the chain
    chain = f.Spatial(3).chain(jax.random.key(0), kernel, (3,), spec, None)
    x = g.normal(size=(2, 9, 11, 8)).astype(np.float32)
    composed = compose_chain(chain, (3, 5), groups)
    np.testing.assert_allclose(f.convolve(x, composed, spec), f.chain_apply(chain, x), atol=1e-4)
