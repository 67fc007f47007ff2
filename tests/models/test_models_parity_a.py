"""Whole networks against torchvision's with the same random weights, where it is installed.

Random weights travel through the same conversion as a downloaded file, so names, layouts, flatten
order, padding and normalisation are all under test.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from cnnjax import models
from cnnjax.models.fold import fold_batchnorm

# ours -> torchvision's builder, image size, its method in the catalogue
NETWORKS = {
    "alexnet": ("alexnet", 96, "alexnet"),
    "vgg16": ("vgg16", 64, "vgg16"),
    "vgg16_bn": ("vgg16_bn", 64, "vgg16"),
    "vgg19": ("vgg19", 64, "vgg19"),
    "vgg19_bn": ("vgg19_bn", 64, "vgg19"),
    "resnet18": ("resnet18", 65, "resnet18"),
    "resnet34": ("resnet34", 64, "resnet34"),
    "resnet50": ("resnet50", 64, "resnet50"),
    "resnet101": ("resnet101", 64, "resnet101"),
    "resnet152": ("resnet152", 64, "resnet152"),
    "resnext50_32x4d": ("resnext50_32x4d", 64, "resnext50_32x4d"),
    "resnext101_32x8d": ("resnext101_32x8d", 64, "resnext101_32x4d"),
    "resnext101_64x4d": ("resnext101_64x4d", 64, "resnext101_64x4d"),
    "wide_resnet50_2": ("wide_resnet50_2", 64, "wrn_28_10"),
    "densenet121": ("densenet121", 64, "densenet121"),
    "densenet169": ("densenet169", 64, "densenet169"),
    "densenet201": ("densenet201", 64, "densenet201"),
    "densenet161": ("densenet161", 64, "densenet161"),
}
ROWS = [
    pytest.param(name, *row[:2], id=name, marks=pytest.mark.method(row[2]))
    for name, row in NETWORKS.items()
]


def forward(model, x):
    graphdef, state = nnx.split(model)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "builder", "size"), ROWS)
def test_outputs_equal_torchvisions(name, builder, size, tmp_path):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    reference = getattr(torchvision.models, builder)(weights=None, num_classes=7).eval()
    for key, value in reference.state_dict().items():
        # batch norms that start as the identity would hide a swapped array
        if key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
            value.uniform_(0.7, 1.3)
        elif key.endswith("running_mean") or key.endswith("bias"):
            value.normal_(0.0, 0.1)
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    model = models.load_pretrained(name, tmp_path / "weights.pth", num_classes=7)
    x = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        want = reference(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    # not degenerate: the two images' outputs differ
    assert np.abs(want[0] - want[1]).max() > 1e-3 * np.abs(want).max()
    np.testing.assert_allclose(forward(model, x), want, rtol=0, atol=1e-4 * np.abs(want).max())
    if name == "resnet50":
        folded = fold_batchnorm(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
        got = forward(folded, x)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
