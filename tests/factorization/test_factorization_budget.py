"""Ranks under one budget of the whole network, and by the clock, on small networks."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cnnjax
from cnnjax import factorization as f

pytestmark = pytest.mark.method("pca_energy_ranks")
EXAMPLE = jax.ShapeDtypeStruct((1, 10, 8, 3), jnp.float32)


class Net(nnx.Module):
    """Three convolutions of decaying spectra, a dense head."""

    def __init__(self, rngs):
        self.convs = nnx.List(
            [
                nnx.Conv(3, 12, (3, 3), rngs=rngs),
                nnx.Conv(12, 16, (3, 3), 2, rngs=rngs),
                nnx.Conv(16, 16, (3, 3), feature_group_count=2, rngs=rngs),
            ]
        )
        self.head = nnx.Linear(16, 12, rngs=rngs)
        rng = np.random.default_rng(0)
        for k, layer in enumerate([*self.convs, self.head]):
            shape = layer.kernel.shape
            n = min(np.prod(shape[:-1]), shape[-1])
            u, _ = np.linalg.qr(rng.normal(size=(np.prod(shape[:-1]), n)))
            v, _ = np.linalg.qr(rng.normal(size=(shape[-1], n)))
            decay = np.arange(1, n + 1) ** -(0.5 + 0.4 * k)
            layer.kernel[...] = jnp.asarray((u * decay @ v.T).reshape(shape), jnp.float32)

    def __call__(self, x):
        for layer in self.convs:
            x = nnx.relu(layer(x))
        return self.head(x.mean((1, 2)))


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


def test_kept_energies_are_what_the_factors_keep(net):
    rules = {"convs/0": f.Basis(), "convs/1": f.Spatial(), "convs/2": f.Basis(), "head": f.Basis()}
    found = f.menus(net, rules, EXAMPLE)
    assert [m.path for m in found.layers] == list(rules)
    for menu in found.layers:
        assert menu.options[0].ranks == ()
        assert menu.options[0].gain == 0
        option = menu.options[len(menu.options) // 2]
        single = f.LayerPlan(menu.path, menu.rule, option.ranks, (0, 0), None)
        small = f.factorize(net, f.Plan((single,)))
        layer = cnnjax.surgery.module_at(net, menu.path)
        parts = [
            np.asarray(p.kernel[...]) for p in cnnjax.surgery.module_at(small, menu.path).layers
        ]
        kernel = np.asarray(layer.kernel[...])
        if menu.path == "head":
            again = parts[0] @ parts[1]
        elif menu.path == "convs/1":
            again = np.asarray(f.compose_spatial(*parts))
        else:
            g = getattr(layer, "feature_group_count", 1)
            pairs = zip(np.split(parts[0], g, -1), np.split(parts[1], g, -1))
            again = np.concatenate([a @ b[0, 0] for a, b in pairs], -1)
        lost = np.sum((kernel - again) ** 2) / np.sum(kernel**2)
        np.testing.assert_allclose(np.exp(option.gain), 1 - lost, atol=1e-5)


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.6}, {"macs": 60_000}])
def test_a_budget_is_met_and_the_optimum_beats_greedy(net, budget):
    rules = {"head": f.Basis(), "convs/0": f.Basis(), "**": f.Tucker2(sweeps=2)}
    found = f.menus(net, rules, EXAMPLE)
    best, greedy = (f.allocate(found, how=how, **budget) for how in ("optimal", "greedy"))
    (what, value) = next(iter(budget.items()))
    old = getattr(cnnjax.profile(net, EXAMPLE), what)
    limit = value * old if isinstance(value, float) else value
    for decided in (best, greedy):
        counted = getattr(cnnjax.profile(f.factorize(net, decided), EXAMPLE), what)
        assert counted <= limit
        planned = sum(getattr(p, what)[1] - getattr(p, what)[0] for p in decided.layers)
        assert counted == old + planned
    assert f.total_gain(found, best) >= f.total_gain(found, greedy)
    assert f.plan(net, rules, EXAMPLE, **budget) == best
    assert f.plan(net, rules, EXAMPLE, allocation="greedy", **budget) == greedy


def test_the_optimum_of_a_tiny_problem_is_brute_force(net):
    found = f.menus(net, {"head": f.Basis(), "**": f.Basis()}, EXAMPLE, levels=5)
    for share in (0.3, 0.45, 0.6, 0.8):
        decided = f.allocate(found, macs=share)
        left = share * found.total["macs"] - found.rest("macs")
        combos = itertools.product(*(m.options for m in found.layers))
        best = max(sum(o.gain for o in c) for c in combos if sum(o.macs for o in c) <= left)
        np.testing.assert_allclose(f.total_gain(found, decided), best, rtol=1e-12)


def test_more_budget_never_keeps_less(net):
    found = f.menus(net, f_rules(), EXAMPLE)
    gains = [f.total_gain(found, f.allocate(found, macs=s)) for s in (0.3, 0.5, 0.7, 0.9, 1.0)]
    assert gains == sorted(gains)
    assert gains[-1] == 0


def f_rules():
    return {"head": f.Basis(), "**": f.Basis()}


@pytest.mark.method("cp_als")
def test_what_cp_keeps_is_measured(net):
    for rule in (f.CP(), f.Scheme1()):
        options = f.menus(net, {"convs/1": rule}, EXAMPLE, levels=2).layers[0].options
        gains = [o.gain for o in options]
        assert len(gains) == 3
        assert gains[0] == 0
        assert -15 < gains[2] < gains[1] < 0  # a higher rank keeps more


@pytest.mark.method("one_shot_whole_network")
def test_sensitivity_replaces_the_gains(net):
    found = f.menus(net, f_rules(), EXAMPLE)
    asked = []

    def evaluate(model):
        changed = [
            p
            for p in ("convs/0", "convs/1", "convs/2", "head")
            if isinstance(cnnjax.surgery.module_at(model, p), nnx.Sequential)
        ]
        asked.append(changed)
        return 1.0 - 0.1 * sum(p == "convs/1" for p in changed)  # only this layer matters

    measured = f.sensitivity(net, found, evaluate, points=2)
    assert [len(a) for a in asked] == [0] + 8 * [1]
    for menu in measured.layers:
        worst = min(o.gain for o in menu.options)
        assert worst == (pytest.approx(-0.1) if menu.path == "convs/1" else 0)
    decided = {p.path: p for p in f.allocate(measured, macs=0.75).layers}
    assert decided["convs/1"].kept


def test_bad_budgets(net):
    with pytest.raises(ValueError, match="out of reach: the cheapest options leave"):
        f.plan(net, f_rules(), EXAMPLE, macs=0.01)
    with pytest.raises(ValueError, match="macs budget is the share 2.5"):
        f.plan(net, f_rules(), EXAMPLE, macs=2.5)
    with pytest.raises(ValueError, match="one budget, macs or params"):
        f.plan(net, f_rules(), EXAMPLE, macs=0.5, params=0.5)
    with pytest.raises(ValueError, match="'optimal' or 'greedy'"):
        f.plan(net, f_rules(), EXAMPLE, macs=0.5, allocation="fast")
    with pytest.raises(ValueError, match="needs example="):
        f.plan(net, f_rules(), macs=0.5)


# --- by the clock ---------------------------------------------------------------------------------


def macs_clock(slow_per_layer, calls):
    """Seconds = MACs, plus a price for every layer of a chain, as small devices have it."""

    def timer(before, after, x):
        args = x if isinstance(x, tuple) else (x,)

        def seconds(module):
            shapes = [jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype) for a in args]
            kinds = [
                m
                for m in cnnjax.surgery.modules(module).values()
                if isinstance(m, nnx.Conv | nnx.Linear)
            ]
            return cnnjax.profile(module, *shapes).macs + slow_per_layer * len(kinds)

        calls.append((type(before).__name__, type(after).__name__))
        return float(seconds(before)), float(seconds(after))

    return timer


def test_layers_that_are_not_faster_stay(net):
    decided = f.plan(net, {"**": f.Basis(f.MacsRatio(0.6))}, EXAMPLE)
    free = f.keep_faster(net, decided, EXAMPLE, timer=macs_clock(0, []))
    assert [p.ranks for p in free.plan.layers] == [p.ranks for p in decided.layers]
    assert free.network[1] < free.network[0]
    # with a price per layer the cheap ones are not worth it, the dear ones are
    priced = f.keep_faster(net, decided, EXAMPLE, timer=macs_clock(6000, []))
    by_path = {p.path: p for p in priced.plan.layers}
    assert "not faster on this device" in (by_path["head"].kept or "")
    assert "->" in (by_path["head"].kept or "")
    assert not by_path["convs/0"].kept
    assert priced.network[1] <= priced.network[0]
    small = f.factorize(net, priced.plan)
    assert isinstance(small.head, nnx.Linear)
    assert isinstance(small.convs[0], nnx.Sequential)
    # at a prohibitive price nothing is left to replace
    none = f.keep_faster(net, decided, EXAMPLE, timer=macs_clock(10**9, []))
    assert all(p.kept for p in none.plan.layers)
    assert none.network[0] == none.network[1]


def test_the_choice_is_never_slower_than_the_network(net):
    decided = f.plan(net, {"**": f.Basis(f.MacsRatio(0.6))}, EXAMPLE)

    def liar(before, after, x):
        # layers alone look fast; together they are slow, but for the dearest of them
        if not isinstance(before, Net):
            return 2.0, 1.0 if before.kernel.shape[-1] == 12 and before.kernel.ndim == 4 else 1.9
        replaced = sum(
            isinstance(m, nnx.Sequential) for m in cnnjax.surgery.modules(after).values()
        )
        return 10.0, 9.0 + replaced - 0.5

    found = f.keep_faster(net, decided, EXAMPLE, timer=liar)
    assert found.network[1] <= found.network[0]
    assert [p.path for p in found.plan.layers if not p.kept] == ["convs/0"]
    assert set(found.reverted) == {"convs/1", "convs/2", "head"}
    rows = f.report(found.plan)
    assert all("seconds" in row for row in rows)
    with pytest.raises(ValueError, match="margin is 1.5"):
        f.keep_faster(net, decided, EXAMPLE, margin=1.5)


def test_the_real_clock_times_both(net):
    # the second module does a thousand times the work: no load of the machine hides that
    light, heavy = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), Repeated()
    before, after = f.time_pair(light, heavy, jnp.ones((512, 4)), rounds=3)
    assert 0 < before < after


class Repeated(nnx.Module):
    """A long chain of products."""

    def __init__(self):
        self.w = nnx.Param(jnp.eye(512))

    def __call__(self, x):
        y = jnp.ones((512, 512)) * x[0, 0]
        return jax.lax.fori_loop(0, 30, lambda _, y: y @ self.w[...], y)
