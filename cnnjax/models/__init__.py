"""Architectures: a registry of classic and efficient networks as Flax NNX modules.

``create(name, rngs=nnx.Rngs(0), num_classes=10)`` builds one, ``abstract(name)`` its structure
without memory, ``names()`` lists them, ``config(name)`` shows the fields, ``input_shape(name)`` the
standard input. Activations are NHWC, kernels HWIO.
"""

from __future__ import annotations

from cnnjax.models.convert import load_weights, read_weights, save_weights
from cnnjax.models.detector import Detector, make_detector
from cnnjax.models.fold import fold_batchnorm
from cnnjax.models.pretrained import load_pretrained
from cnnjax.models.registry import (
    ModelConfig,
    Provenance,
    abstract,
    config,
    create,
    input_shape,
    names,
    register,
)

# the family modules (one a line, sorted); each registers its variants when first imported
FAMILIES = (
    "alexnet",
    "cross_connected",
    "densenet",
    "fractalnet",
    "googlenet",
    "highway",
    "inception_resnet",
    "inception_v2",
    "inception_v3",
    "lenet",
    "lenet_1998",
    "maxout_nin",
    "mobilenet",
    "multi_resnet",
    "nin",
    "plain",
    "preact_resnet",
    "resnet",
    "resnet_cifar",
    "rir",
    "ror",
    "shufflenet",
    "vgg",
    "vgg_cifar",
    "wide_resnet",
    "xception",
    "zfnet",
)

__all__ = [
    "FAMILIES",
    "Detector",
    "ModelConfig",
    "Provenance",
    "abstract",
    "config",
    "create",
    "fold_batchnorm",
    "input_shape",
    "load_pretrained",
    "load_weights",
    "make_detector",
    "names",
    "read_weights",
    "register",
    "save_weights",
]
