"""Responses of a trained network: what data is worth there, layer by layer, on held-out images."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cnnjax
from cnnjax import factorization as f
from cnnjax import models, surgery
from cnnjax.factorization.survey import spec_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES, POSITIONS = 128, 20


@pytest.fixture(scope="module")
def resnet(real_data):
    """ResNet-20 in evaluation mode, and 128 images to fit on beside 128 others."""
    image = pytest.importorskip("PIL.Image")
    with np.load(real_data / "cifar10_jpeg" / "train_jpeg.npz") as file:
        offset = file["offset"][: 2 * IMAGES + 1]
        raw = file["jpeg"][: offset[-1]].tobytes()
    pictures = [
        np.asarray(image.open(io.BytesIO(raw[a:b])).convert("RGB"))
        for a, b in zip(offset, offset[1:])
    ]
    x = ((np.stack(pictures) / 255.0 - MEAN) / STD).astype(np.float32)
    network = models.load_pretrained("resnet20_cifar", real_data / "weights/cifar10_resnet20.npz")
    return nnx.view(network, use_running_average=True), x[:IMAGES], x[IMAGES:]


def captured(model, taps, x):
    """``{path: value}`` over all images."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda s, x: cnnjax.graph.capture(nnx.merge(graphdef, s), taps)(x)[1])
    return {path: np.asarray(value) for path, value in run(state, jnp.asarray(x)).items()}


def folded(model, conv, norm):
    """Kernel with the BatchNorm's gain, and the shift, in double precision."""
    conv, norm = (surgery.module_at(model, path) for path in (conv, norm))
    part = {k: np.asarray(getattr(norm, k)[...], float) for k in ("mean", "var", "scale", "bias")}
    gain = part["scale"] / np.sqrt(part["var"] + norm.epsilon)
    return np.asarray(conv.kernel[...], float) * gain, part["bias"] - gain * part["mean"]


def positions(maps, seed):
    """Some rows of every image's map: (images * positions, channels)."""
    flat = maps.reshape(len(maps), -1, maps.shape[-1])
    drawn = np.random.default_rng(seed).integers(0, flat.shape[1], (len(flat), POSITIONS))
    return np.take_along_axis(flat, drawn[..., None], 1).reshape(-1, maps.shape[-1])


@pytest.mark.slow
@pytest.mark.method("nonlinear_response_low_rank")
@pytest.mark.method("response_low_rank")
def test_data_beats_weights_and_the_relu_is_worth_knowing(resnet):
    """The catalogue's three layers at a quarter of their outputs, ordering and ratios."""
    model, fit, held = resnet
    layers = ["layer2/0", "layer3/0", "layer3/1"]
    taps = {f"{p}/bn1": "output" for p in layers} | {f"{p}/conv1": "input" for p in layers}
    seen, other = captured(model, taps, fit), captured(model, taps, held)
    for layer in layers:
        y = positions(seen[f"{layer}/bn1"], 0)
        other_y = positions(other[f"{layer}/bn1"], 1)
        kernel, shift = folded(model, f"{layer}/conv1", f"{layer}/bn1")
        rank = kernel.shape[-1] // 4
        u, s, vt = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), full_matrices=False)
        low = ((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(kernel.shape).astype(np.float32)
        strides = np.broadcast_to(surgery.module_at(model, f"{layer}/conv1").strides, 2)
        plain = jax.lax.conv_general_dilated(
            other[f"{layer}/conv1"], low, strides, ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

        target = np.maximum(other_y, 0)

        def lost(answer, target=target):
            return np.sum((target - np.maximum(answer, 0)) ** 2) / np.sum(target**2)

        weights = lost(positions(np.asarray(plain), 1) + shift)
        linear = lost(np.asarray(f.response_low_rank(y, rank)(other_y)))
        aware = lost(np.asarray(f.nonlinear_response_low_rank(y, rank)(other_y)))
        assert linear < 0.75 * weights, (layer, linear, weights)
        assert aware < 0.98 * linear, (layer, aware, linear)


@pytest.mark.slow
@pytest.mark.method("jaderberg_scheme2")
def test_filters_fitted_to_data_answer_nearer_in_every_layer(resnet):
    model, fit, held = resnet
    blocks = [f"layer{stage}/{unit}" for stage in (1, 2, 3) for unit in (0, 1, 2)]
    pairs = [(f"{block}/conv{k}", f"{block}/bn{k}") for block in blocks for k in (1, 2)]
    taps = {c: "input" for c, _ in pairs} | {n: "output" for _, n in pairs}
    seen, other = captured(model, taps, fit[:32]), captured(model, taps, held[:32])
    for conv, norm in pairs:
        kernel, shift = (jnp.asarray(a, jnp.float32) for a in folded(model, conv, norm))
        _, _, i, o = kernel.shape
        rank = (3 * i * o) // (2 * (i + o))
        layer = surgery.module_at(model, conv)
        spec = spec_of(layer, conv)
        chain = f.Spatial().chain(jax.random.key(0), kernel, (rank,), spec, shift)
        fitted, _, _ = f.data_reconstruct(
            jax.random.key(1), chain, seen[conv], seen[norm], steps=40, rate=2e-3, batch=8
        )

        def lost(chain, conv=conv, norm=norm):
            return np.sum((np.asarray(f.chain_apply(chain, other[conv])) - other[norm]) ** 2)

        assert lost(fitted) < lost(chain), conv
