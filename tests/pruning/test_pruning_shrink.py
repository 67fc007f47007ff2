"""Shrinking: sliced arrays, proofs, companion trees, refusals."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cnnjax
from cnnjax import graph as G
from cnnjax import pruning, surgery
from cnnjax.pruning import importance, proof


class Net(nnx.Module):
    """conv, BatchNorm, residual branch, depthwise, flatten, dense; dropout for good measure."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.branch = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.fc = nnx.Linear(16 * 9, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.sigmoid(self.bn(self.stem(x)))  # act(0) is not 0
        x = self.depthwise(x + self.branch(x))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.fc(self.drop(x.reshape(x.shape[0], -1)))


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 3)), jnp.float32)


def filled(model, seed=0):
    rng = np.random.default_rng(seed)

    def draw(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jax.random.key(0) if "key" in path else jnp.zeros(x.shape, x.dtype)
        if "var" in path:
            return jnp.asarray(rng.uniform(0.5, 2, x.shape), x.dtype)
        sign = rng.choice([1, 1, -1], x.shape)
        return jnp.asarray(rng.uniform(0.2, 1.0, x.shape) * sign, x.dtype)

    return surgery.map_leaves(model, draw)


@pytest.fixture(scope="module")
def net():
    model = filled(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    graph = G.trace(model, X)
    keep = pruning.select_channels(graph, importance.l1(nnx.state(model, nnx.Param)), ratio=0.5)
    return model, graph, keep


def snapshot(model):
    return {p: np.asarray(jax.random.key_data(x) if "key" in p else x).tobytes()
            for p, x in surgery.leaves(model).items()}  # fmt: skip


@pytest.mark.method("structured_surgery")
def test_shrunk_arrays_are_the_survivors_and_outputs_equal_the_gated_network(net):
    model, graph, keep = net
    before = snapshot(model)
    small = pruning.shrink(model, graph, keep)
    assert snapshot(model) == before
    ks = graph.axis("stem/kernel").kept(keep.alive)
    kd = np.sort(np.concatenate([2 * ks, 2 * ks + 1]))
    rows = (np.arange(9)[:, None] * 16 + kd).ravel()
    old, new = surgery.leaves(model), surgery.leaves(small)
    want = {
        "stem/kernel": old["stem/kernel"][..., ks],
        "branch/kernel": old["branch/kernel"][:, :, ks][..., ks],
        "depthwise/kernel": old["depthwise/kernel"][..., kd],
        "fc/kernel": old["fc/kernel"][rows],
        **{f"bn/{n}": old[f"bn/{n}"][ks] for n in ("scale", "bias", "mean", "var")},
        "branch/bias": old["branch/bias"][ks],
        "depthwise/bias": old["depthwise/bias"][kd],
        "fc/bias": old["fc/bias"],
    }
    for path, x in want.items():
        np.testing.assert_array_equal(new[path], x)
    assert small.depthwise.feature_group_count == 4
    assert surgery.edits_of(small)[-1]["why"] == "shrink"
    # the gated network, by hand: removed channels of the flattened map and of x times zero
    model.eval()
    small.eval()
    gate = np.zeros(8, np.float32)
    gate[ks] = 1
    x = nnx.sigmoid(model.bn(model.stem(X))) * gate
    x = model.depthwise((x + model.branch(x)) * gate)
    x = nnx.max_pool(x, (2, 2), strides=(2, 2)) * np.repeat(gate, 2)
    np.testing.assert_allclose(small(X), model.fc(x.reshape(2, -1)), rtol=1e-5, atol=1e-5)
    model.train()


def test_a_network_that_differs_fails_the_numeric_check(net):
    model, graph, keep = net
    how = pruning.cut(model, graph, keep)
    small = pruning.shrink(model, graph, keep, check=False)

    def wrong(path, leaf):
        out = how(path, leaf)
        return out[..., ::-1] if path == "stem/kernel" else out

    programs = proof.program_of(model), proof.program_of(small)
    leaves = surgery.leaves(model)
    with pytest.raises(proof.ProofError, match=r"differs from the gated one by \d"):
        proof.prove_equal(*programs, leaves, graph, keep.alive, wrong)
    assert proof.prove_equal(*programs, leaves, graph, keep.alive, how) < 1e-5


def test_zero_scales_do_not_hide_a_difference(net):
    """With gamma = 0 every network is equal; the check perturbs the numbers."""
    model, graph, keep = net
    dead = surgery.map_leaves(model, lambda p, x: x * 0 if p == "fc/kernel" else x)
    how = pruning.cut(model, graph, keep)

    def wrong(path, leaf):
        out = how(path, leaf)
        return out[..., ::-1] if path == "stem/kernel" else out

    small = pruning.shrink(dead, graph, keep)
    with pytest.raises(proof.ProofError):
        proof.prove_equal(
            proof.program_of(dead), proof.program_of(small), surgery.leaves(dead), graph,
            keep.alive, wrong,
        )  # fmt: skip


def test_abstract_models_shrink_to_abstract_models(net):
    model, graph, keep = net
    small = pruning.shrink(surgery.abstract(model), graph, keep)
    shapes = {p: x.shape for p, x in surgery.leaves(small).items()}
    concrete = pruning.shrink(model, graph, keep)
    assert shapes == {p: x.shape for p, x in surgery.leaves(concrete).items()}
    with pytest.raises(ValueError, match="its leaves are abstract"):
        pruning.shrink(surgery.abstract(model), graph, keep, check=True)


def test_keeping_everything_changes_nothing(net):
    model, graph, _ = net
    same = pruning.shrink(model, graph, graph.alive())
    assert snapshot(same) == snapshot(model)
    assert surgery.edits_of(same) == []


def test_optimizer_state_masks_and_averages_are_cut_alike(net):
    model, graph, keep = net
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    small = nnx.to_pure_dict(nnx.state(pruning.shrink(model, graph, keep), nnx.Param))
    optimizer = optax.chain(
        optax.clip(1.0),
        optax.adam(optax.linear_schedule(0.1, 0.0, 10)),
        optax.ema(0.9),
    )
    # moments that say which weight they belong to: mu = nu = ema = w
    state = jax.tree_util.tree_map_with_path(lambda path, x: x, optimizer.init(params))
    leaves, treedef = jax.tree.flatten(state)
    by_shape = [x for x in leaves if x.ndim]
    assert len(by_shape) == 3 * len(jax.tree.leaves(params))
    numbers = [*jax.tree.leaves(params)] * 3
    it = iter(numbers)
    state = jax.tree.unflatten(treedef, [next(it) if x.ndim else x for x in leaves])
    cut = pruning.shrink_tree(state, graph, keep, model=model)
    assert jax.tree.structure(cut) == treedef
    got = [x for x in jax.tree.leaves(cut) if x.ndim]
    for a, b in zip(got, [*jax.tree.leaves(small)] * 3):
        np.testing.assert_array_equal(a, b)
    # the new optimizer takes the state up
    jax.eval_shape(optimizer.update, small, cut, small)
    mask = jax.tree.map(lambda x: x > 0.5, params)
    shared = pruning.cut(model, graph, keep)
    mask = pruning.shrink_tree(mask, graph, keep, cut=shared)
    for a, b in zip(jax.tree.leaves(mask), jax.tree.leaves(small)):
        np.testing.assert_array_equal(a, np.asarray(b) > 0.5)
    # an NNX optimizer's own state
    nnx_optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    state = pruning.shrink_tree(nnx.state(nnx_optimizer), graph, keep, cut=shared)
    shapes = {x.shape for x in jax.tree.leaves(state) if x.ndim}
    assert shapes == {x.shape for x in jax.tree.leaves(small)}


def test_training_goes_on_where_it_was(net):
    """A step of the shrunk network with the cut momentum is the step of the gated one."""
    model, graph, keep = net
    model = surgery.copy(model)
    model.eval()
    optimizer = optax.sgd(0.01, momentum=0.9)

    def step(model, momentum):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        return jax.jit(lambda p, r, m: update(graphdef, p, r, m))(params, rest, momentum)

    def update(graphdef, params, rest, momentum):
        loss = lambda p: jnp.mean(nnx.merge(graphdef, p, rest, copy=True)(X) ** 2)  # noqa: E731
        grads = jax.grad(loss)(params)
        updates, momentum = optimizer.update(grads, momentum, params)
        return optax.apply_updates(params, updates), momentum

    momentum = optimizer.init(nnx.state(model, nnx.Param))
    momentum = jax.tree.map(lambda x: x + 0.1, momentum)
    small = pruning.shrink(model, graph, keep)
    how = pruning.cut(model, graph, keep)
    got, _ = step(small, pruning.shrink_tree(momentum, graph, keep, cut=how))
    gated = surgery.map_leaves(model, lambda p, x: jnp.asarray(proof.gate(p, x, graph, keep.alive)))
    want, _ = step(gated, momentum)
    want = pruning.shrink_tree(want, graph, keep, cut=how)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_companion_trees_that_do_not_fit_are_refused(net):
    model, graph, keep = net
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match="original model= or a cut="):
        pruning.shrink_tree(params, graph, keep)
    with pytest.raises(ValueError, match="no leaf of the tree belongs to a variable"):
        pruning.shrink_tree({"a": jnp.zeros(3)}, graph, keep, model=model)
    with pytest.raises(ValueError, match=r"stem/kernel has shape \(3,\)"):
        pruning.shrink_tree({"v": {"stem": {"kernel": jnp.zeros(3)}}}, graph, keep, model=model)


def test_graph_of_another_model_is_refused(net):
    _, graph, keep = net
    other = nnx.eval_shape(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="traced from another model"):
        pruning.shrink(other, graph, keep)


def test_a_layer_type_unknown_to_surgery_is_named():
    class Gain(nnx.Module):
        def __init__(self, features):
            self.features = features
            self.weight = nnx.Param(jnp.ones(features))

        def __call__(self, x):
            return x * self.weight.reshape(1, 1, 1, self.features)

    class Own(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Conv(3, 6, (1, 1), rngs=rngs)
            self.gain = Gain(6)
            self.b = nnx.Conv(6, 2, (1, 1), rngs=rngs)

        def __call__(self, x):
            return self.b(self.gain(self.a(x)))

    model = filled(nnx.eval_shape(lambda: Own(nnx.Rngs(0))))
    graph = G.trace(model, X)
    keep = pruning.Keep.of_positions(graph, {"a/kernel": [0, 1, 4]})
    with pytest.raises(ValueError, match="does not know the layer type Gain at 'gain'"):
        pruning.shrink(model, graph, keep)
    surgery.register(Gain, attributes={"features": ("weight", 0)})
    small = pruning.shrink(model, graph, keep)
    assert small.gain.features == 3


def test_hard_coded_channel_positions_are_refused_with_the_line():
    class HardCoded(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Conv(3, 12, (1, 1), rngs=rngs)
            self.b = nnx.Conv(4, 2, (1, 1), rngs=rngs)

        def __call__(self, x):
            return self.b(self.a(x)[..., 4:8])

    model = filled(nnx.eval_shape(lambda: HardCoded(nnx.Rngs(0))))
    graph = G.trace(model, X)
    # one of each third goes, so that the cuts at 4 and 8 would have to move
    keep = pruning.Keep.of_positions(graph, {"a/kernel": [1, 2, 3, 4, 6, 7, 8, 9, 11]})
    with pytest.raises(G.LabelError, match=r"test_pruning_shrink.py:\d+"):
        pruning.shrink(model, graph, keep)


def test_statistics_skip_the_numeric_check_only_when_they_are_pruned():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.b = nnx.Linear(8, 6, rngs=rngs)
            self.c = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.c(nnx.relu(self.b(self.norm(self.a(x)))))

    model = filled(nnx.eval_shape(lambda: Normed(nnx.Rngs(0))))
    graph = G.trace(model, X)
    scores = {"a/kernel": np.arange(8.0), "b/kernel": np.arange(6.0)}
    keep = pruning.select_channels(graph, scores, ratio=0.5)
    pruning.shrink(model, graph, keep, check=True)
    keep = pruning.select_channels(graph, scores, ratio=0.5, statistics=True)
    small = pruning.shrink(model, graph, keep)
    assert small.norm.num_features == 4
    with pytest.raises(ValueError, match=r"'a' are under a statistic"):
        pruning.shrink(model, graph, keep, check=True)


def test_16_bit_models_are_compared_in_their_precision():
    class Half(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Conv(3, 8, (3, 3), dtype=jnp.bfloat16, rngs=rngs)
            self.b = nnx.Conv(8, 4, (3, 3), dtype=jnp.bfloat16, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.relu(self.a(x))).mean((1, 2))

    model = filled(nnx.eval_shape(lambda: Half(nnx.Rngs(0))))
    graph = G.trace(model, X)
    keep = pruning.Keep.of_positions(graph, {"a/kernel": [0, 1, 4]})
    assert pruning.shrink(model, graph, keep).a.out_features == 3


def test_latency_table_and_measured_latency(net):
    model, graph, keep = net
    table = pruning.latency_table(graph, points=(0.5, 1.0), calls=3)
    again = pruning.LatencyTable.from_json(table.to_json())
    cost = again.cost(graph)
    assert 0 < cost(keep.alive) <= cost(graph.alive())
    # additive: on a made-up table the prediction is the sum of the interpolated entries
    made = {k: [[1.0, 2.0], [3.0, 4.0]] for k in table.seconds}
    layers = [layer for layer in graph.layers if layer.macs]
    made_up = pruning.LatencyTable((0.5, 1.0), made, "none").cost(graph)
    assert made_up(graph.alive()) == pytest.approx(4.0 * len(layers))
    # stem: whole inputs, half outputs (3); branch: halves (1); depthwise (1); fc: half, whole (2)
    assert made_up(keep.alive) == pytest.approx(3 + 1 + 1 + 2)
    with pytest.raises(ValueError, match="lacks the layer"):
        pruning.LatencyTable((1.0,), {}, "none").cost(graph)
    with pytest.raises(ValueError, match="must rise"):
        pruning.latency_table(graph, points=(1.0, 0.5))
    measured = pruning.measured_latency(model, graph, calls=2)
    assert measured(keep.alive) > 0
    assert measured(keep.alive) == measured(keep.alive)  # remembered


def test_save_and_load_a_shrunk_registry_model(tmp_path):
    model = cnnjax.models.create("lenet_5", rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
    graph = G.trace(model, x)
    keep = pruning.select_channels(graph, importance.l2(nnx.state(model, nnx.Param)), ratio=0.5)
    small = pruning.shrink(model, graph, keep)
    cnnjax.save(tmp_path / "m", small)
    loaded = cnnjax.load(tmp_path / "m")
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 1)), jnp.float32)
    np.testing.assert_array_equal(loaded(batch), small(batch))
    # and it can be traced and shrunk again
    graph = G.trace(loaded, x)
    keep = pruning.select_channels(graph, importance.l2(nnx.state(loaded, nnx.Param)), ratio=0.2)
    cnnjax.save(tmp_path / "n", pruning.shrink(loaded, graph, keep, check=False))
    assert len(surgery.edits_of(cnnjax.load(tmp_path / "n"))) == 2


def test_no_warning_is_given_on_the_way(net):
    model, graph, keep = net
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruning.shrink(model, graph, keep)
