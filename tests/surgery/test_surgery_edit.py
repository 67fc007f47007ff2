"""Replacement, removal, records and their replay."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import ops, surgery


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.conv = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.conv(x)))


class Net(nnx.Module):
    def __init__(self, width=4, *, rngs):
        self.stem = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(3)])
        self.heads = nnx.Dict({"a": nnx.Linear(width, 2, rngs=rngs)})

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.heads["a"](x.mean((1, 2)))


@pytest.fixture(scope="module")
def net():
    model = Net(rngs=nnx.Rngs(0))
    model.eval()
    return model


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 3)), jnp.float32)


def bytes_of(model):
    return {p: np.asarray(x).tobytes() for p, x in surgery.leaves(model).items()}


def test_removed_block_is_skipped_and_the_input_is_untouched(net):
    before, want = bytes_of(net), net.blocks
    out = surgery.remove(net, "blocks/1")
    assert bytes_of(net) == before
    assert net.blocks is want
    assert isinstance(net.blocks[1], Block)
    assert isinstance(out.blocks[1], surgery.Identity)
    x = net.stem(X)
    x = net.blocks[2](net.blocks[0](x))
    np.testing.assert_allclose(out(X), net.heads["a"](x.mean((1, 2))), rtol=1e-6)
    assert surgery.edits_of(out) == [
        {"kind": "replace", "path": "blocks/1", "module": {"layer": "Identity", "args": {}}}
    ]


@pytest.mark.parametrize("path", ["stem", "blocks/0/conv", "heads/a"])
def test_replace_in_attributes_lists_and_dicts(net, path):
    old = surgery.module_at(net, path)
    if path == "heads/a":
        new = nnx.Linear(4, 5, rngs=nnx.Rngs(1))
    else:
        ins = old.in_features
        new = nnx.Sequential(
            nnx.Conv(ins, 2, (1, 1), rngs=nnx.Rngs(1)),
            nnx.relu,
            nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(2)),
        )
    out = surgery.replace(net, path, new)
    assert surgery.module_at(net, path) is old
    got = surgery.module_at(out, path)
    assert got is not new
    assert bytes_of(got) == bytes_of(new)
    assert out(X).shape == ((2, 5) if path == "heads/a" else (2, 2))
    replayed = surgery.replay(net, surgery.edits_of(out))
    problems, settings = surgery.differences(out, replayed)
    assert problems == []
    assert settings == {}


def test_wrong_paths_list_near_matches(net):
    with pytest.raises(KeyError, match="Did you mean 'blocks/1"):
        surgery.remove(net, "block/1")
    with pytest.raises(KeyError, match="the root cannot be replaced"):
        surgery.remove(net, "")


def test_record_survives_split_merge_clone_and_jit_and_is_json(net):
    out = surgery.remove(surgery.remove(net, "blocks/1"), "blocks/2")
    graphdef, state = nnx.split(out)
    hash(graphdef)
    for copy in (nnx.merge(graphdef, state), nnx.clone(out), surgery.copy(out)):
        assert [e["path"] for e in surgery.edits_of(copy)] == ["blocks/1", "blocks/2"]
    nnx.jit(lambda m, x: m(x))(out, X)
    for text in surgery.record_of(out).edits:
        json.loads(text)
    assert surgery.edits_of(net) == []
    assert "edits=2" in repr(surgery.record_of(out))


def test_rebuild_edits_replay_to_the_same_structure(net):
    params = surgery.leaves(net)
    axes = {
        "stem/kernel": {3: [0, 2]}, "stem/bias": {0: [0, 2]}, "heads/a/kernel": {0: [0, 2]},
        **{f"blocks/{i}/conv/kernel": {2: [0, 2], 3: [0, 2]} for i in range(3)},
        **{f"blocks/{i}/{n}": {0: [0, 2]} for i in range(3)
           for n in ("conv/bias", "norm/scale", "norm/bias", "norm/mean", "norm/var")},
    }  # fmt: skip
    small = surgery.rebuild(
        net, {p: surgery.take(params[p], ax) for p, ax in axes.items()}, why="shrink"
    )
    assert small(X).shape == (2, 2)
    (edit,) = surgery.edits_of(small)
    assert edit["kind"] == "rebuild"
    assert edit["why"] == "shrink"
    replayed = surgery.replay(surgery.abstract(net), [edit])
    assert surgery.differences(small, replayed) == ([], {})
    # and a replacement after it
    again = surgery.remove(small, "blocks/0")
    assert surgery.differences(again, surgery.replay(net, surgery.edits_of(again))) == ([], {})


def test_differences_finds_foreign_changes(net):
    other = surgery.copy(net)
    other.train()
    problems, settings = surgery.differences(net, other)
    assert problems == []
    assert settings["blocks/0/norm"] == {"use_running_average": True}
    other = surgery.copy(net)
    other.blocks[1] = surgery.Identity()
    problems, _ = surgery.differences(net, other)
    assert any("'blocks/1' is a Block, not a Identity" in p for p in problems)
    assert any("no variable 'blocks/1/conv/kernel'" in p for p in problems)


def test_opaque_replacement_works_and_says_why_it_cannot_be_replayed(net):
    class Mine(nnx.Module):
        def __call__(self, x):
            return 2 * x

    out = surgery.replace(net, "blocks/2", Mine())
    assert out(X).shape == (2, 2)
    with pytest.raises(ValueError, match=r"'blocks/2' cannot be made.*Mine is not registered"):
        surgery.replay(net, surgery.edits_of(out))


def test_own_edit_kind(net):
    @surgery.edit("test.double_head")
    def _replay(model, *, path, features):
        return surgery.replace(
            model, path, nnx.eval_shape(lambda: nnx.Linear(4, features, rngs=nnx.Rngs(0)))
        )

    out = surgery.replace(
        net, "heads/a", nnx.Linear(4, 6, rngs=nnx.Rngs(0)),
        record={"kind": "test.double_head", "path": "heads/a", "features": 6},
    )  # fmt: skip
    assert surgery.edits_of(out)[-1]["kind"] == "test.double_head"
    replayed = surgery.replay(net, surgery.edits_of(out))
    assert surgery.differences(out, replayed)[0] == []
    assert surgery.edits_of(replayed) == surgery.edits_of(out)
    assert "test.double_head" in surgery.kinds()
    with pytest.raises(ValueError, match="needs a 'kind'"):
        surgery.replace(net, "heads/a", nnx.Linear(4, 6, rngs=nnx.Rngs(0)), record={})


def test_replay_refuses_unknown_kinds_and_edits_that_do_not_fit(net):
    with pytest.raises(ValueError, match=r"unknown edit kind 'rebild'\. Did you mean 'rebuild'"):
        surgery.replay(net, [{"kind": "rebild"}])
    with pytest.raises(ValueError, match="edit 'replace' does not fit"):
        surgery.replay(net, [{"kind": "replace", "where": "x"}])
    with pytest.raises(ValueError, match="which the model does not have"):
        surgery.replay(net, [{"kind": "rebuild", "shapes": {"x": [1]}, "static": {}}])


DESCRIBED = {
    "conv": lambda r: nnx.Conv(4, 6, (3, 3), strides=2, padding=((1, 1), (0, 0)),
                               feature_group_count=2, use_bias=False, rngs=r),
    "bf16": lambda r: nnx.Conv(4, 6, (3, 3), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=r),
    "transpose": lambda r: nnx.ConvTranspose(4, 6, (3, 3), strides=2, rngs=r),
    "linear": lambda r: nnx.Linear(4, 6, precision=jax.lax.Precision.HIGHEST, rngs=r),
    "general": lambda r: nnx.LinearGeneral((2, 3), (4, 5), axis=(1, -1), rngs=r),
    "einsum": lambda r: nnx.Einsum("ab,bc->ac", (3, 4), rngs=r),
    "bn": lambda r: nnx.BatchNorm(5, momentum=0.9, use_running_average=True, rngs=r),
    "gn": lambda r: nnx.GroupNorm(8, num_groups=4, use_bias=False, rngs=r),
    "ln": lambda r: nnx.LayerNorm(8, epsilon=1e-3, rngs=r),
    "mha": lambda r: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r),
    "prelu": lambda r: nnx.PReLU(),
    "own_conv": lambda r: ops.Conv(4, 4, (3, 3), feature_group_count=4, rngs=r),
    "embed": lambda r: nnx.Embed(5, 4, rngs=r),
    "dropout": lambda r: nnx.Dropout(0.3),
    "dropout_rngs": lambda r: nnx.Dropout(0.3, rngs=r),
    "sequential": lambda r: nnx.Sequential(nnx.Linear(2, 3, rngs=r), nnx.gelu, nnx.PReLU()),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DESCRIBED))
def test_stock_layers_describe_themselves(name):
    layer = DESCRIBED[name](nnx.Rngs(0))
    text = json.dumps(surgery.describe(layer))
    assert surgery.differences(layer, surgery.build(json.loads(text))) == ([], {})


def test_base_is_stamped_once(net):
    model = surgery.copy(net)
    surgery.set_base(model, "tiny", {"width": 4})
    assert surgery.base_of(model) == {"factory": "tiny", "kwargs": {"width": 4}}
    out = surgery.remove(model, "blocks/0")
    assert surgery.base_of(out) == {"factory": "tiny", "kwargs": {"width": 4}}
    with pytest.raises(ValueError, match="edited already"):
        surgery.set_base(out, "tiny", {})
    with pytest.raises(TypeError, match="JSON"):
        surgery.set_base(model, "tiny", {"act": jax.nn.relu})


def test_modules_are_found_as_nnx_finds_them(net):
    class Odd(nnx.Module):
        def __init__(self):
            self.b = nnx.data([nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {"x": net}])
            self.a = self.b[0]  # twice the same

    for model in (net, Odd()):
        want = {"/".join(map(str, p)): id(m) for p, m in nnx.iter_modules(model)}
        assert {p: id(m) for p, m in surgery.modules(model).items()} == want
    out = surgery.replace(Odd(), "b/1/x/heads/a", nnx.Linear(4, 7, rngs=nnx.Rngs(0)))
    assert surgery.module_at(out, "b/1/x/heads/a").out_features == 7


def test_layers_of_our_rooms_are_imported_when_an_archive_names_them(monkeypatch):
    class Late(nnx.Module):
        pass

    imported = []

    def load(name):
        imported.append(name)
        if name == "cnnjax.factorization":
            surgery.register(Late, attributes={}, name="test.Late")

    monkeypatch.setattr("importlib.import_module", load)
    assert isinstance(surgery.build({"layer": "test.Late", "args": {}}), Late)
    with pytest.raises(ValueError, match="'test.Latte' is not registered here"):
        surgery.build({"layer": "test.Latte", "args": {}})
    assert all(name.startswith("cnnjax.") for name in imported)
