"""Every training-time method in the trainer: 8 devices as one, resume, a smaller network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cnnjax import graph, pruning, training, tree
from cnnjax.pruning import gates, noise, penalties

METHODS = {
    "masked": "magnitude_prune_retrain",
    "gradual": "magnitude_prune_retrain",
    "surgery": "dynamic_network_surgery",
    "gates": "hard_concrete_l0",
    "hard_thresholding": "iterative_hard_thresholding",
    "bounded": "memory_bounded_l0",
    "proximal": "forward_backward_splitting",
    "group_lasso": "structured_sparsity_learning",
    "columns": "group_wise_brain_damage",
    "l1": "sparse_objective",
    "unit_bias": "weight_decay_biases",
    "rigl": "random_mask_pruning",
    "set": "random_mask_pruning",
    "plain": "dropout",
    "evolutional": "evolutional_dropout",
}
QUICK = ("surgery", "gates", "hard_thresholding", "proximal")
FIRST = "layers/0/kernel"


class Net(nnx.Module):
    def __init__(self, rate=0.0):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])
        self.drop = nnx.Dropout(rate, rngs=rngs) if rate else None

    def __call__(self, x):
        h = jax.nn.relu(self.layers[0](x))
        return self.layers[1](h if self.drop is None else self.drop(h))


class Batches:
    """Other images at every step; knows where it is."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        x = np.random.default_rng(self.number).normal(size=(32, 6)).astype(np.float32)
        return {"image": x, "label": (x[:, 0] > 0).astype(np.int32)}

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


def build(kind):
    """(network, state), optimizer, hooks of a method."""
    model = Net()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    adam, options, hooks = optax.adam(0.03), {}, {}
    if kind in noise.KINDS:
        model, opt = noise.with_dropout(Net(0.5), kind), adam
    elif kind == "masked":
        opt = pruning.masked(adam, pruning.magnitude_mask(params, sparsity=0.5))
    elif kind == "gradual":
        opt = pruning.gradual(adam, final=0.5, begin=0, end=6, every=2)
    elif kind == "surgery":
        opt = pruning.dynamic_network_surgery(adam, 0.3, gamma=0.5)
        options["extra"] = {"mask": pruning.full_mask(params)}
        found = pruning.surgery_hooks()
        hooks = {"reparam": found.reparam, "post_update": found.post_update}
    elif kind == "gates":
        spec, opt = {FIRST: "filter"}, adam
        options["params"] = gates.gated(params, spec, key=jax.random.key(0))
        hooks = {"reparam": gates.reparam(spec), "penalty": gates.penalty(spec, 0.01)}
    elif kind == "hard_thresholding":
        opt = pruning.iterative_hard_thresholding(
            adam, 0.5, dense_steps=2, sparse_steps=2, cycles=2
        )
    elif kind == "bounded":
        opt = pruning.memory_bounded_l0(adam, 0.5, every=3, last=6)
    elif kind == "proximal":
        opt = pruning.forward_backward_splitting(
            adam, {FIRST: pruning.Prox("group_l2", 0.3, group="filter")}, 0.3
        )
    elif kind in ("rigl", "set"):
        mask = pruning.random_mask(jax.random.key(3), params, {FIRST: 0.5})
        opt = pruning.regrowth(adam, mask, every=2, stop=7, method=kind)
    else:
        opt = adam
        hooks["penalty"] = {
            "group_lasso": lambda p, c: penalties.group_lasso(p, {"filter": 0.1}, include=FIRST),
            "columns": lambda p, c: penalties.group_lasso(p, {"column": 0.1}, include=FIRST),
            "l1": lambda p, c: penalties.sparsity(p, 0.01, 1),
            "unit_bias": lambda p, c: penalties.unit_bias(p, "hyperbolic", 0.1, include=FIRST),
        }[kind]
    return training.create_state(model, opt, **options), opt, training.Hooks(**hooks)


def train(kind, total, *, mesh=None, folder=None):
    (network, state), opt, hooks = build(kind)
    step = training.make_train_step(network, opt, hooks=hooks, mesh=mesh)
    config = training.FitConfig(
        total, log_every=0, checkpoint_every=4 if folder else 0, progress=False
    )
    result = training.fit(step, state, Batches(), config, mesh=mesh, workdir=folder)
    return result.state


def cases(names):
    return [
        pytest.param(
            k,
            marks=[pytest.mark.method(METHODS[k])] + ([] if k in names else [pytest.mark.slow]),
        )
        for k in METHODS
    ]


@pytest.mark.parametrize("kind", cases(QUICK))
def test_eight_devices_as_one(kind):
    if jax.device_count() < 8:
        pytest.skip("needs 8 simulated devices")
    one, eight = train(kind, 5), train(kind, 5, mesh=training.data_mesh())
    # masks and zeros are the same, weights up to the order of a sum
    for a, b in zip(
        *(jax.tree.leaves((s.params, s.opt_state, s.extra)) for s in (one, eight)), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    assert len(jax.tree.leaves(eight.params)[0].sharding.device_set) == 8


@pytest.mark.parametrize("kind", cases(()))
def test_resume_is_exact(kind, tmp_path):
    whole = train(kind, 8, folder=tmp_path / "whole")
    train(kind, 4, folder=tmp_path / "cut")
    cut = train(kind, 8, folder=tmp_path / "cut")
    for a, b in zip(
        *(jax.tree.leaves((s.params, s.opt_state, s.extra)) for s in (whole, cut)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=pytest.mark.method(METHODS[k]))
        for k in ("gates", "proximal", "group_lasso")
    ],
)
def test_structured_methods_end_in_a_smaller_network(kind):
    """Trained on, dead groups removed: fewer units, the same logits as with the zeros."""
    model = Net()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if kind == "gates":
        spec = {FIRST: "filter"}
        trained = gates.gated(params, spec, key=jax.random.key(0))
        shut = trained["gates"][FIRST].at[..., jnp.asarray([1, 4, 5])].set(-4.0)
        trained["gates"][FIRST] = shut
        params = gates.fold(trained, spec)[0]
    elif kind == "proximal":
        spec = {FIRST: pruning.Prox("group_l2", 1.0, group="filter")}
        sizes = np.linalg.norm(np.asarray(params["layers"][0]["kernel"]), axis=0)
        params = pruning.prox_tree(params, float(np.sort(sizes)[2]) * 1.001, spec)
    else:
        # the sub-gradient and a threshold, as Wen et al. do
        opt = optax.sgd(0.05)
        state = opt.init(params)
        slope = jax.jit(
            jax.grad(lambda p: penalties.group_lasso(p, {"filter": 1.0}, include=FIRST))
        )
        third = np.sort(np.linalg.norm(params["layers"][0]["kernel"], axis=0))[2]
        for _ in range(int(third / 0.05) + 1):
            updates, state = opt.update(slope(params), state)
            params = optax.apply_updates(params, updates)
        norms = jnp.linalg.norm(params["layers"][0]["kernel"], axis=0)
        params["layers"][0]["kernel"] = jnp.where(norms < 0.06, 0, params["layers"][0]["kernel"])
    graphdef, state = nnx.split(model, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    masked = nnx.merge(graphdef, state)
    found = graph.trace(masked, jnp.zeros((1, 6)))
    alive = tree.map_with_path(lambda p, w: np.asarray(w) != 0, params)
    alive["layers"][0]["bias"] = np.asarray(params["layers"][0]["kernel"]).any(axis=0)
    small = pruning.shrink(masked, found, pruning.dead_channels(found, alive))
    assert small.layers[0].kernel.shape[1] <= 5
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
    np.testing.assert_allclose(small(x), masked(x), atol=1e-6)
