"""torchvision's and timm's names, and whole networks against theirs with the same weights."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from cnnjax import models, tree
from cnnjax.models import keymaps


def _forward(model: Any, x: np.ndarray) -> np.ndarray:
    model.eval()
    graphdef, state = nnx.split(model)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x))


# their names of some modules, and how many arrays with a name of their own there are
NAMES: dict[str, tuple[set[str], dict[str, Any]]] = {
    "googlenet": (
        {
            "conv1.conv",
            "inception3a.branch1.conv",
            "inception3a.branch2.0.bn",
            "inception4e.branch3.1.conv",
            "inception5b.branch4.1.conv",
            "aux1.conv.conv",
            "aux2.fc1",
            "fc",
        },
        {"aux_heads": True},
    ),
    "inception_v3": (
        {
            "Conv2d_1a_3x3.conv",
            "Conv2d_3b_1x1.bn",
            "Mixed_5b.branch5x5_2.conv",
            "Mixed_5d.branch3x3dbl_3.conv",
            "Mixed_6a.branch3x3.conv",
            "Mixed_6e.branch7x7dbl_5.bn",
            "Mixed_7a.branch7x7x3_4.conv",
            "Mixed_7c.branch3x3dbl_3b.conv",
            "Mixed_7b.branch_pool.conv",
            "AuxLogits.conv0.conv",
            "AuxLogits.fc",
            "fc",
        },
        {"aux_heads": True},
    ),
    "inception_v4": (
        {
            "features.0.conv",
            "features.3.conv.conv",
            "features.4.branch1.3.bn",
            "features.5.conv.conv",
            "features.6.branch3.1.conv",
            "features.10.branch0.conv",
            "features.11.branch2.4.conv",
            "features.18.branch1.3.conv",
            "features.21.branch2_3b.conv",
            "last_linear",
        },
        {},
    ),
    "inception_resnet_v2": (
        {
            "conv2d_4a.conv",
            "mixed_5b.branch2.2.bn",
            "repeat.9.branch2.2.conv",
            "repeat.0.conv2d",
            "mixed_6a.branch1.2.conv",
            "repeat_1.19.branch0.conv",
            "mixed_7a.branch2.2.conv",
            "repeat_2.8.branch1.2.conv",
            "block8.conv2d",
            "conv2d_7b.bn",
            "classif",
        },
        {},
    ),
    "xception": (
        {
            "conv1",
            "bn2",
            "block1.rep.0.conv1",
            "block1.rep.4",
            "block1.skip",
            "block3.skipbn",
            "block4.rep.1.conv1",
            "block11.rep.7.pointwise",
            "block12.rep.5",
            "block12.skip",
            "conv3.conv1",
            "bn4",
            "fc",
        },
        {},
    ),
    "mobilenet_v1_025": (
        {
            "conv_stem",
            "bn1",
            "blocks.0.0.conv_dw",
            "blocks.3.5.bn2",
            "blocks.4.1.conv_pw",
            "classifier",
        },
        {},
    ),
    "mobilenet_v2": (
        {
            "features.0.0",
            "features.1.conv.0.0",
            "features.1.conv.1",
            "features.1.conv.2",
            "features.2.conv.0.1",
            "features.17.conv.1.0",
            "features.17.conv.3",
            "features.18.1",
            "classifier.1",
        },
        {},
    ),
}
HEAVY = {"inception_v4", "inception_resnet_v2", "xception"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in HEAVY else []) for n in NAMES]
)
def test_torch_names(name):
    expected, fields = NAMES[name]
    model = models.abstract(name, **fields)
    ours = {
        path.rpartition("/")[0].replace("/", ".")
        for path in tree.flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    }
    rules = keymaps.layouts_of(name)[0].rules
    theirs = {keymaps.apply(rules, module) for module in ours}
    assert len(theirs) == len(ours)
    assert expected <= theirs
    assert not [n for n in theirs if "steps" in n or "branches" in n]


def test_timms_names_of_mobilenet_v2_and_of_vggs_head():
    expected = {
        "mobilenet_v2": {
            "conv_stem",
            "blocks.0.0.conv_pw",
            "blocks.0.0.bn2",
            "blocks.1.0.conv_pwl",
            "blocks.5.2.conv_dw",
            "blocks.6.0.bn3",
            "conv_head",
            "bn2",
            "classifier",
        },
        "vgg16": {"features.0", "features.28", "pre_logits.fc1", "pre_logits.fc2", "head.fc"},
    }
    for name, theirs in expected.items():
        ours = {
            path.rpartition("/")[0].replace("/", ".")
            for path in tree.flatten(nnx.to_pure_dict(nnx.state(models.abstract(name), nnx.Param)))
        }
        rules = keymaps.layouts_of(name)[1].rules
        found = {keymaps.apply(rules, module) for module in ours}
        assert len(found) == len(ours)
        assert theirs <= found


TIMM: dict[str, Any] = {"padding": "torch", "bn_epsilon": 1e-5, "bn_momentum": 0.9}
TORCH: dict[str, tuple[str, str, dict[str, Any], int, dict[str, Any]]] = {
    # ours: (package, builder, options there, size, fields here)
    "googlenet": ("torchvision.models", "googlenet", {"aux_logits": False}, 64, {}),
    "inception_v3": (
        "torchvision.models",
        "inception_v3",
        {"aux_logits": False},
        96,
        {"count_include_pad": True},
    ),
    "mobilenet_v2": ("torchvision.models", "mobilenet_v2", {}, 64, {}),
    "inception_v4": ("timm.models", "inception_v4", {}, 96, {}),
    "inception_resnet_v2": ("timm.models", "inception_resnet_v2", {}, 96, {}),
    "xception": ("timm.models", "legacy_xception", {}, 96, TIMM),
    "mobilenet_v1": ("timm.models", "mobilenetv1_100", {}, 64, {**TIMM, "activation": "relu6"}),
    "mobilenet_v2_140": ("timm.models", "mobilenetv2_140", {}, 64, {}),
    "vgg16_bn": ("timm.models", "vgg16_bn", {}, 224, {}),
    "preact_resnet50": ("timm.models", "resnetv2_50", {}, 64, {"stem": "bare"}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TORCH)
def test_torch(name):
    package, build, options, size, fields = TORCH[name]
    torch = pytest.importorskip("torch")
    library = pytest.importorskip(package)
    torch.manual_seed(0)
    if package.startswith("torchvision"):
        options = {**options, "weights": None}
        if name != "mobilenet_v2":
            options["init_weights"] = True
    reference = getattr(library, build)(num_classes=7, **options).eval()
    weights = {}
    for key, value in reference.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
            value.uniform_(0.7, 1.3)
        elif value.ndim == 1:
            value.normal_(0, 0.1)
        else:  # small initial values would let the signal die, and all outputs be alike
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        weights[key] = value.numpy()
    model = models.create(name, num_classes=7, rngs=nnx.Rngs(0), **fields)
    models.load_weights(model, weights)
    x = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        want = reference(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    got = _forward(model, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert np.abs(want[0] - want[1]).max() > 1e-3 * np.abs(want).max()  # not degenerate
