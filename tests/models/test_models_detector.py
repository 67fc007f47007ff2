"""The detector: shapes and anchors, the trainer, the graph's reader, archives, refusals."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cnnjax
from cnnjax import detection, graph, models, training
from cnnjax.data.memory import MemoryLoader, in_order
from cnnjax.data.scenes import SceneConfig, digit_scenes

pytestmark = pytest.mark.method("detection_distillation")
KWARGS = {
    "backbone": "resnet20_cifar",
    "feature": "layer2",
    "image_size": [24, 24],
    "num_classes": 3,
    "sizes": [6.0, 10.0],
    "ratios": [1.4],
    "fields": {"in_channels": 1, "widths": [8, 16], "blocks_per_stage": 1},
}
SCENES = SceneConfig(size=24, objects=(1, 2), scale=(8.0, 12.0), classes=3, clutter=1, noise=0.02)


@functools.cache
def detector():
    model = models.make_detector(**KWARGS, rngs=nnx.Rngs(0))
    model.eval()
    return model


def run(model, x):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x)


def test_output_rows_belong_to_anchors():
    model = detector()
    x = np.random.default_rng(0).normal(size=(2, 24, 24, 1)).astype(np.float32)
    out = run(model, x)
    assert out.shape == (2, 12 * 12 * 2, 1 + 3 + 4)
    anchors = model.anchors((24, 24))
    assert anchors.shape == (288, 4)
    np.testing.assert_allclose((anchors[:, 2:] + anchors[:, :2])[2] / 2, [1, 3])  # second column
    # the rows are (row, column, anchor): the head written out at one cell
    _, maps = model.backbone(jnp.asarray(x), return_features="layer2")
    y = jax.nn.relu(model.conv(maps["layer2"]))[1, 5, 7]
    logits = (y @ model.classes.kernel[...][0, 0] + model.classes.bias[...]).reshape(2, 4)
    boxes = (y @ model.boxes.kernel[...][0, 0] + model.boxes.bias[...]).reshape(2, 4)
    row = (5 * 12 + 7) * 2
    np.testing.assert_allclose(out[1, row : row + 2, :4], logits, atol=1e-5)
    np.testing.assert_allclose(out[1, row : row + 2, 4:], boxes, atol=1e-5)
    assert run(model, np.zeros((1, 16, 32, 1), np.float32)).shape[1] == 8 * 16 * 2
    bad = models.make_detector(**KWARGS, rngs=nnx.Rngs(0))
    bad.eval()
    bad.stride = 4
    with pytest.raises(ValueError, match="multiples"):
        jax.eval_shape(bad, jax.ShapeDtypeStruct((1, 24, 24, 1), jnp.float32))


def test_bad_descriptions():
    with pytest.raises(ValueError, match="no feature 'layer9'"):
        models.make_detector(**{**KWARGS, "feature": "layer9"}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="needs a map"):
        models.make_detector(**{**KWARGS, "feature": "pool"}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="needs a map"):
        models.make_detector(**{**KWARGS, "image_size": [25, 25]}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unknown model"):
        models.make_detector(**{**KWARGS, "backbone": "resnet20cifar"}, rngs=nnx.Rngs(0))


def test_channels_of_a_detector_can_go(tmp_path):
    """It is read off its jaxpr like any network; cut, saved and loaded it computes the same."""
    from cnnjax import pruning

    model = detector()
    x = np.random.default_rng(1).normal(size=(2, 24, 24, 1)).astype(np.float32)
    read = graph.trace(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    keep = pruning.select_channels(read, pruning.importance.l1(params), ratio=0.5, round_to=1)
    small = pruning.shrink(model, read, keep)
    before, after = (
        graph.profile(m, jax.ShapeDtypeStruct(x.shape, x.dtype)) for m in (model, small)
    )
    assert after.macs < 0.6 * before.macs
    out = run(small, x)
    assert out.shape == (2, 288, 8)
    np.testing.assert_array_equal(small.anchors((24, 24)), model.anchors((24, 24)))
    cnnjax.save(tmp_path / "net", small, factory=models.make_detector, kwargs=KWARGS)
    again = cnnjax.load(tmp_path / "net", factory=models.make_detector)
    np.testing.assert_allclose(run(again, x), out, atol=1e-6)


@pytest.mark.slow
def test_a_detector_learns_and_resumes(tmp_path):
    """Easy scenes, a minute: found at IoU 0.5; interrupted and resumed, exactly the same."""
    train = digit_scenes("train", 256, config=SCENES)
    test = in_order(digit_scenes("test", 100, config=SCENES), 50)

    def fit(steps, folder):
        optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 400))
        network, state = training.create_state(detector(), optimizer)
        hooks = training.Hooks(loss=detection.detection_loss())
        step = training.make_train_step(network, optimizer, hooks=hooks)
        find = detection.make_detect_step(network)
        config = training.FitConfig(steps, checkpoint_every=5, progress=False)
        return training.fit(
            step,
            state,
            MemoryLoader(train, batch_size=32),
            config,
            workdir=folder,
            evaluate=lambda s: detection.evaluate(find, s, test, classes=3),
        )

    whole, _, resumed = fit(10, tmp_path / "a"), fit(5, tmp_path / "b"), fit(10, tmp_path / "b")
    assert resumed.resumed_from == 5
    jax.tree.map(np.testing.assert_array_equal, whole.state.params, resumed.state.params)
    before, after = whole.last()["map"], fit(400, tmp_path / "a").last()
    assert after["map"] > max(0.6, before + 0.3)
    assert after["count"] == 100
