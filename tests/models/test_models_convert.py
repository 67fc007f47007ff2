"""Conversion of PyTorch-layout weights: layouts, mismatches, and two trained networks."""

from __future__ import annotations

import io
import itertools
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import models_a_oracle as oracle
import models_b_oracle as direct
import numpy as np
import pytest
from flax import nnx

from cnnjax import models, tree
from cnnjax.models import keras_layers, keymaps
from scripts import convert_weights

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def cifar_test_images(
    real_data: pathlib.Path, count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decoded images (N, 32, 32, 3) and labels of the CIFAR-10 copy's test split."""
    image = pytest.importorskip("PIL.Image")
    with np.load(real_data / "cifar10_jpeg" / "test_jpeg.npz") as data:
        raw, offset, label = data["jpeg"].tobytes(), data["offset"], data["label"]
    offset, label = offset[: None if count is None else count + 1], label[:count]
    images = np.stack(
        [
            np.asarray(image.open(io.BytesIO(raw[a:b])).convert("RGB"))
            for a, b in itertools.pairwise(offset)
        ]
    )
    return images, label


def accuracy(model, images: np.ndarray, labels: np.ndarray, batch: int = 500) -> float:
    graphdef, state = nnx.split(model)

    @jax.jit
    def correct(state, x, y):
        x = (x.astype(jnp.float32) / 255.0 - MEAN) / STD
        return jnp.sum(jnp.argmax(nnx.merge(graphdef, state)(x), -1) == y)

    hits = [
        int(correct(state, images[i : i + batch], labels[i : i + batch]))
        for i in range(0, len(images), batch)
    ]
    return 100.0 * sum(hits) / len(images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"), [("resnet20_cifar", 81.03), ("resnet56_cifar", 83.20)]
)
@pytest.mark.method("resnet_cifar")
def test_trained_cifar_resnet_reproduces_its_accuracy(real_data, name, expected):
    file = real_data / "weights" / f"cifar10_{name.removesuffix('_cifar')}.npz"
    model = models.load_pretrained(name, file)
    images, labels = cifar_test_images(real_data)
    assert accuracy(model, images, labels) == pytest.approx(expected, abs=0.05)


@pytest.mark.method("resnet_cifar")
def test_trained_cifar_resnet_on_the_first_images(real_data):
    file = real_data / "weights" / "cifar10_resnet20.npz"
    model = models.load_pretrained("resnet20_cifar", file)
    # the names reveal a port that pads on both sides
    assert model.config.zero_channels == "both"
    images, labels = cifar_test_images(real_data, 500)
    # 81.03 % on all images; the standard error on 500 is 1.8 points
    assert abs(accuracy(model, images, labels) - 81.03) < 5.5


# --- layouts ---

SMALL = {"blocks_per_stage": 3, "widths": (4, 8), "num_classes": 5}


def small_resnet(seed=0, **fields):
    return oracle.fill(
        models.create("resnet20_cifar", rngs=nnx.Rngs(0), **{**SMALL, **fields}), seed
    )


def torch_layout(model, rules=()) -> dict[str, np.ndarray]:
    """PyTorch's names (by a port's rules) and layouts of a small ResNet, written out by hand."""
    out = {}
    for path, leaf in tree.flatten(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))).items():
        *module, last = path.split("/")
        name = {
            "kernel": "weight",
            "scale": "weight",
            "bias": "bias",
            "mean": "running_mean",
            "var": "running_var",
        }[last]
        array = np.asarray(leaf)
        if last == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        out[f"{keymaps.apply(rules, '.'.join(module))}.{name}"] = array
    return out


def evaluate(model, x):
    model.eval()
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda s: nnx.merge(graphdef, s)(x))(state))


def same_arrays(a, b):
    a, b = (tree.flatten(nnx.state(m, nnx.Any(nnx.Param, nnx.BatchStat))) for m in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])


def test_dense_rows_follow_the_channel_last_flatten():
    rng = np.random.default_rng(0)
    shapes = {
        "conv1": (20, 1, 5, 5),
        "conv2": (50, 20, 5, 5),
        "fc1": (500, 50),
        "fc2": (3, 500),
    }
    weights = {}
    # an image of 20x20 leaves 2x2 positions
    shapes["fc1"] = (500, 50 * 2 * 2)
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = rng.standard_normal(shape).astype(np.float32) * 0.1
        weights[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
    model = models.create("lenet_5_caffe", rngs=nnx.Rngs(0), image_size=20, num_classes=3)
    models.load_weights(model, weights)
    x = rng.standard_normal((2, 20, 20, 1)).astype(np.float32)
    # the same network in PyTorch's order: channels first, flattened as (c, h, w)
    h = x
    for name in ("conv1", "conv2"):
        kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
        h = direct.conv(h, kernel, 1, ((0, 0), (0, 0))) + weights[f"{name}.bias"]
        h = direct.pool(h, 2, 2, ((0, 0), (0, 0)), "max")
    flat = h.transpose(0, 3, 1, 2).reshape(2, -1)
    hidden = np.maximum(flat @ weights["fc1.weight"].T + weights["fc1.bias"], 0)
    want = hidden @ weights["fc2.weight"].T + weights["fc2.bias"]
    np.testing.assert_allclose(evaluate(model, x), want, rtol=1e-4, atol=1e-4)


def test_numbered_modules_load_into_scanned_blocks():
    plain = small_resnet()
    weights = torch_layout(plain)
    again = small_resnet(seed=1)
    models.load_weights(again, weights)
    same_arrays(again, plain)
    scanned = small_resnet(seed=1, scan=True)
    models.load_weights(scanned, weights)
    got = scanned.layer2[1].repeated.conv1.kernel[...]
    want = np.stack([plain.layer2[i].conv1.kernel[...] for i in (1, 2)])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("own_bias", [False, True])
def test_fused_batch_norms_load(own_bias):
    if own_bias:
        model = models.create(
            "resnet18", rngs=nnx.Rngs(0), stages=(1, 1), width=4, num_classes=5, use_bias=True
        )
        oracle.fill(model)
    else:
        model = small_resnet(shortcut="B")
    full = {
        re.sub(r"downsample\.conv", "downsample.0", k): v for k, v in torch_layout(model).items()
    }
    full = {re.sub(r"downsample\.bn", "downsample.1", k): v for k, v in full.items()}
    fused = {k: v for k, v in full.items() if k.startswith("fc")}
    for name in [k.removesuffix(".weight") for k in full if k.endswith(".weight")]:
        norm = re.sub(r"conv(\d)$", r"bn\1", re.sub(r"downsample\.0$", "downsample.1", name))
        if norm == name:
            continue
        scale = full[f"{norm}.weight"] / np.sqrt(full[f"{norm}.running_var"] + 1e-5)
        bias = full.get(f"{name}.bias", 0.0) - full[f"{norm}.running_mean"]
        fused[f"{name}.weight"] = full[f"{name}.weight"] * scale[:, None, None, None]
        fused[f"{name}.bias"] = bias * scale + full[f"{norm}.bias"]
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    want = evaluate(model, x)
    models.load_weights(model, fused)
    np.testing.assert_allclose(evaluate(model, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        (
            "resnet50",
            {
                "layer1.0.downsample.conv": "layer1.0.downsample.0",
                "layer4.2.bn3": "layer4.2.bn3",
                "fc": "fc",
            },
        ),
        (
            "vgg16_bn",
            {
                "stages.0.1.conv": "features.3",
                "stages.1.0.bn": "features.8",
                "stages.4.2.conv": "features.40",
                "fc2": "classifier.3",
            },
        ),
        ("vgg19", {"stages.4.3.conv": "features.34", "fc3": "classifier.6"}),
        ("alexnet", {"conv2": "features.3", "conv5": "features.10", "fc1": "classifier.1"}),
        (
            "densenet121",
            {
                "conv0": "features.conv0",
                "stages.3.15.bn2": "features.denseblock4.denselayer16.norm2",
                "transitions.2.conv": "features.transition3.conv",
                "bn": "features.norm5",
                "fc": "classifier",
            },
        ),
    ],
)
def test_torchvision_names(name, paths):
    layout = keymaps.layouts_of(name)[0]
    assert {ours: keymaps.apply(layout.rules, ours) for ours in paths} == paths


# --- files and errors ---


def test_every_mismatch_is_reported_at_once_and_nothing_changes():
    model = small_resnet()
    weights = torch_layout(model)
    del weights["layer1.0.conv1.weight"]
    weights["layer2.1.bn1.bias"] = np.zeros(3, np.float32)
    weights["surplus.weight"] = np.zeros((2, 2), np.float32)
    other = small_resnet(seed=1)
    with pytest.raises(ValueError, match="resnet20_cifar.*3 mismatches") as error:
        models.load_weights(other, weights)
    text = str(error.value)
    assert "missing in the file: layer1.0.conv1.weight (for layer1/0/conv1/kernel)" in text
    assert "layer2.1.bn1.bias: shape (3,) doesn't fit layer2/1/bn1/bias (8,)" in text
    assert "not in the model: surplus.weight (2, 2)" in text
    same_arrays(other, small_resnet(seed=1))


def test_weights_of_a_port_that_pads_otherwise_are_refused():
    weights = torch_layout(small_resnet())
    weights = {k.replace("fc.", "linear."): v for k, v in weights.items()}
    with pytest.raises(ValueError, match="need zero_channels='both', the model has 'end'"):
        models.load_weights(small_resnet(), weights)
    models.load_weights(small_resnet(zero_channels="both"), weights)


def test_another_models_file_bad_suffix_and_absent_file(tmp_path):
    np.savez(tmp_path / "w.npz", **torch_layout(small_resnet()))
    with pytest.raises(ValueError, match="don't fit model 'lenet_300_100'"):
        models.load_pretrained("lenet_300_100", tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError, match="no weight file"):
        models.load_pretrained("resnet20_cifar", tmp_path / "absent.npz")
    (tmp_path / "w.txt").write_text("no weights")
    with pytest.raises(ValueError, match="suffix must be .npz"):
        models.read_weights(tmp_path / "w.txt")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "w.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="not a readable .npz file"):
        models.read_weights(tmp_path / "cut.npz")


def test_load_pretrained_can_leave_the_head_fresh(tmp_path):
    model = small_resnet()
    weights = {f"module.{k}": v for k, v in torch_layout(model).items()}
    weights["module.bn1.num_batches_tracked"] = np.int64(7)
    np.savez(tmp_path / "w.npz", **weights)
    fields = {**SMALL, "num_classes": 9}
    tuned = models.load_pretrained("resnet20_cifar", tmp_path / "w.npz", skip="fc/*", **fields)
    assert tuned.fc.kernel.shape == (8, 9)
    assert np.any(np.asarray(tuned.fc.kernel[...]))
    np.testing.assert_array_equal(tuned.conv1.kernel[...], model.conv1.kernel[...])
    assert tuned.bn1.use_running_average
    with pytest.raises(ValueError, match="2 mismatches"):
        models.load_pretrained("resnet20_cifar", tmp_path / "w.npz", **fields)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    model = small_resnet()
    weights = {k: np.ascontiguousarray(v) for k, v in torch_layout(model).items()}
    safetensors.save_file(weights, tmp_path / "w.safetensors")
    same_arrays(
        models.load_pretrained("resnet20_cifar", tmp_path / "w.safetensors", **SMALL), model
    )
    # a folder as the hub's tools leave it
    (tmp_path / "w.safetensors").rename(tmp_path / "model.safetensors")
    same_arrays(models.load_pretrained("resnet20_cifar", tmp_path, **SMALL), model)


def test_repositories_on_the_hub_are_fetched(tmp_path, monkeypatch):
    np.savez(tmp_path / "w.npz", **torch_layout(small_resnet()))
    asked = []

    def fetch(repository, file):
        asked.append((repository, file))
        return str(tmp_path / "w.npz")

    fake = types.SimpleNamespace(hf_hub_download=fetch)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    for source in ("owner/net", "hf://owner/net/sub/file.npz"):
        same_arrays(models.load_pretrained("resnet20_cifar", source, **SMALL), small_resnet())
    assert asked == [("owner/net", "model.safetensors"), ("owner/net", "sub/file.npz")]

    def fail(repository, file):
        raise OSError("no route to host")

    monkeypatch.setattr(fake, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match="of 'timm/net' can't be fetched.*no route to host"):
        models.load_pretrained("resnet20_cifar", "hf-hub:timm/net", **SMALL)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        models.load_pretrained("resnet20_cifar", "owner/net", **SMALL)


def test_torch_files_are_read_without_pickles_of_objects(tmp_path):
    torch = pytest.importorskip("torch")
    model = small_resnet()
    weights = {k: torch.tensor(v) for k, v in torch_layout(model).items()}
    torch.save({"state_dict": weights}, tmp_path / "w.pth")
    same_arrays(models.load_pretrained("resnet20_cifar", tmp_path / "w.pth", **SMALL), model)
    torch.save(model.provenance, tmp_path / "object.pth")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        models.read_weights(tmp_path / "object.pth")


def test_the_script_converts_and_refuses(tmp_path, capsys):
    model = small_resnet()
    np.savez(tmp_path / "in.npz", **torch_layout(model))
    source, target = str(tmp_path / "in.npz"), str(tmp_path / "out.npz")
    fields = [f"--set={k}={v!r}" for k, v in SMALL.items()]
    assert convert_weights.main(["resnet20_cifar", source, target, *fields]) == 0
    with np.load(target) as file:
        np.testing.assert_array_equal(
            file["layer1/0/conv1/kernel"], model.layer1[0].conv1.kernel[...]
        )
        assert len(file.files) == len(torch_layout(model)) + 1
    # the fields came along: no need to repeat them
    same_arrays(models.load_pretrained("resnet20_cifar", target), model)
    assert convert_weights.main(["resnet20_cifar", source, str(tmp_path / "no.npz")]) == 1
    assert "mismatches" in capsys.readouterr().err
    assert convert_weights.main(["resnet2O_cifar", source, str(tmp_path / "no.npz")]) == 1
    assert "Did you mean" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npz", "out.npz"]


def test_a_converted_file_knows_in_what_its_network_differs(tmp_path):
    """Padding and epsilons that came with Keras' weights would be lost silently otherwise."""
    fields = keras_layers.keras_fields("mobilenet_v2")
    model = models.create("mobilenet_v2_035", num_classes=4, rngs=nnx.Rngs(0), **fields)
    models.save_weights(tmp_path / "net.npz", model)
    assert [p.name for p in tmp_path.iterdir()] == ["net.npz"]
    again = models.load_pretrained("mobilenet_v2_035", tmp_path / "net.npz")
    assert again.config == model.config
    assert again.config.padding == "SAME"
    same_arrays(again, model)
    # what is asked for goes first
    other = models.load_pretrained("mobilenet_v2_035", tmp_path / "net.npz", padding="torch")
    assert other.config.padding == "torch"
    with pytest.raises(ValueError, match="mismatches"):
        models.load_pretrained("mobilenet_v2_035", tmp_path / "net.npz", num_classes=5)
    assert "__fields__" not in models.read_weights(tmp_path / "net.npz")


def test_a_layout_whose_network_has_other_layers(tmp_path):
    """timm's pre-activation ResNets have no norm in the stem: their names reveal it."""
    fields = {"stages": (1, 2), "widths": (8, 16), "stem_width": 8, "num_classes": 3}
    model = models.create("preact_resnet50", rngs=nnx.Rngs(0), stem="bare", **fields)
    timm, *_ = keymaps.layouts_of("preact_resnet50")
    np.savez(tmp_path / "net.npz", **torch_layout(model, timm.rules))
    with np.load(tmp_path / "net.npz") as file:
        assert {"stages.1.blocks.0.downsample.conv.weight", "norm.running_var"} < set(file.files)
    again = models.load_pretrained("preact_resnet50", tmp_path / "net.npz", **fields)
    assert again.config.stem == "bare"
    same_arrays(again, model)
