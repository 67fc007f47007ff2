"""A restarted run of surgery or gates ends bit for bit like an uninterrupted one (slow)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cnnjax import pruning, training

pytestmark = pytest.mark.slow


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(6, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.layers[0](x)))


class Same:
    """One batch, again and again."""

    def __init__(self):
        x = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
        self.batch = {"image": x, "label": (x[:, 0] > 0).astype(np.int32)}
        self.number = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        return self.batch

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


@pytest.mark.method("dynamic_network_surgery")
@pytest.mark.method("hard_concrete_l0")
@pytest.mark.parametrize("kind", ["surgery", "gates"])
def test_resume_is_exact(kind, tmp_path):
    model = Net()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def fresh():
        if kind == "surgery":
            opt = pruning.dynamic_network_surgery(optax.adam(0.05), 0.3, gamma=0.5)
            extra = {"mask": pruning.full_mask(params)}
            return training.create_state(model, opt, extra=extra), opt, pruning.surgery_hooks()
        spec = {"layers/0/kernel": "filter"}
        own = pruning.gates.gated(params, spec, key=jax.random.key(0))
        hooks = training.Hooks(
            reparam=pruning.gates.reparam(spec), penalty=pruning.gates.penalty(spec, 0.01)
        )
        opt = optax.adam(0.05)
        return training.create_state(model, opt, params=own), opt, hooks

    ends = []
    for name, parts in (("whole", (8,)), ("cut", (4, 8))):
        for total in parts:
            (network, state), opt, hooks = fresh()
            step = training.make_train_step(network, opt, hooks=hooks)
            config = training.FitConfig(
                total_steps=total, log_every=1, eval_every=0, checkpoint_every=4, progress=False
            )
            result = training.fit(step, state, Same(), config, workdir=tmp_path / name)
        ends.append((result.state.params, result.state.opt_state, result.state.extra))
    for a, b in zip(*map(jax.tree.leaves, ends)):
        assert bool(jnp.all(a == b))
