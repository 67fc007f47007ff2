"""Deep compression: share the survivors of pruning, tune the codebooks, code, and write the file.

Han, Mao, Dally, "Deep compression", ICLR 2016, arXiv 1510.00149. The input is a pruned network: its
zeros are the first stage's work and stay zeros. The paper's Huffman stage is one of the coders that
a file may use; the smallest wins per stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import optax
from flax import nnx

from cnnjax import tree as treelib
from cnnjax.coding import coded as codedlib
from cnnjax.coding import container, sharing
from cnnjax.coding.kmeans import Init
from cnnjax.coding.streams import Method
from cnnjax.training import (
    FitConfig,
    Hooks,
    StepConfig,
    create_state,
    fit,
    make_train_step,
)

PyTree = Any


@dataclasses.dataclass(frozen=True)
class DeepCompression:
    """How a pruned network is shared and coded.

    Attributes:
      bits: codebook bits, or ``((glob, bits), ...)`` with the first match deciding. The paper has 6
        (LeNet-300-100), or 8 for convolutions and 5 for dense layers.
      include: leaves to share.
      exclude: leaves not to share.
      init: start of k-means: "linear", "density" or "random".
      centroid_dtype: type that codebooks are rounded to, e.g. "float16"; None keeps float32.
      other_dtype: type that the remaining floating leaves (biases, normalization) are rounded to;
        None keeps them.
      method: entropy coder, see `cnnjax.coding.pack`.
      gap_bits: width of relative indices; None picks it per tensor.
    """

    bits: int | tuple[tuple[str, int], ...] = 5
    include: treelib.Patterns = "**/kernel"
    exclude: treelib.Patterns = ()
    init: Init = "linear"
    centroid_dtype: str | None = None
    other_dtype: str | None = None
    method: Method = "auto"
    gap_bits: int | None = None


def quantize(params: PyTree, config: DeepCompression, *, key: Any = None) -> PyTree:
    """The pruned parameters as a coded tree (stage 2 without tuning).

    Args:
      params: pruned parameters, any Flax tree.
      config: see `DeepCompression`.
      key: PRNG key for ``init="random"``.
    """
    return sharing.share(
        params,
        config.bits if isinstance(config.bits, int) else dict(config.bits),
        include=config.include,
        exclude=config.exclude,
        init=config.init,
        key=key,
    )


def round_tables(coded: PyTree, config: DeepCompression) -> PyTree:
    """Rounds codebooks and the remaining leaves to the types that the file stores them in.

    Raises:
      ValueError: if a value overflows its narrow type.
    """
    books = codedlib.codebooks(coded)
    shared = {
        path
        for path, node in container.coded_leaves(coded).items()
        if isinstance(node, codedlib.Shared)
    }

    def one(path: str, leaf: Any) -> Any:
        dtype = config.centroid_dtype if path in shared else config.other_dtype
        array = np.asarray(leaf)
        if dtype is None or array.dtype.kind != "f":
            return leaf
        return sharing.round_array(array, dtype, what=path)

    return codedlib.with_codebooks(coded, treelib.map_with_path(one, books))


def compress(
    params: PyTree,
    config: DeepCompression = DeepCompression(),
    *,
    finetune: Callable[[PyTree], PyTree] | None = None,
    metadata: Mapping[str, Any] | None = None,
    key: Any = None,
) -> bytes:
    """Share, tune, code: the bytes of the compressed file.

    Args:
      params: pruned parameters, any Flax tree.
      config: see `DeepCompression`.
      finetune: ``coded tree -> coded tree`` that trains the codebooks, e.g. a closure over
        `finetune_codebooks`; None skips the tuning.
      metadata: JSON-able facts to store.
      key: PRNG key for ``init="random"``.

    Returns:
      a file of `cnnjax.coding.container`; `decompress` gives exactly the quantized parameters.
    """
    coded = quantize(params, config, key=key)
    if finetune is not None:
        coded = finetune(coded)
    coded = round_tables(coded, config)
    return container.pack(coded, metadata=metadata, method=config.method, gap_bits=config.gap_bits)


def decompress(data: bytes, *, max_bytes: int = container.MAX_BYTES) -> PyTree:
    """The quantized parameters of a file, bit for bit: nested dicts of arrays.

    Raises:
      FormatError: if the file is not intact (see `cnnjax.coding.unpack`).
    """
    return codedlib.expand(container.unpack(data, max_bytes=max_bytes).coded)


def codebook_hooks(coded: PyTree, hooks: Hooks | None = None) -> Hooks:
    """Training hooks under which the trained parameters are `cnnjax.coding.codebooks` of ``coded``.

    The gradient of a centroid is then the sum over the weights that share it; codes and zeros do
    not move.
    """
    hooks = hooks or Hooks()
    if hooks.reparam is not None:
        raise ValueError("the hooks have a reparam already; codebooks cannot be put under it")

    def reparam(books: PyTree, context: Any) -> PyTree:
        del context
        return codedlib.expand(codedlib.with_codebooks(coded, books))

    return dataclasses.replace(hooks, reparam=reparam)


def finetune_codebooks(
    model: nnx.Module,
    coded: PyTree,
    data: Iterator[Any],
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    hooks: Hooks | None = None,
    config: StepConfig | None = None,
    seed: int = 0,
) -> PyTree:
    """Trains the centroids (and the leaves that are not shared) with fixed codes.

    Args:
      model: the network whose parameters were coded.
      coded: its coded tree, with the paths of the model's parameters.
      data: endless iterator of batches, see `cnnjax.training.fit`.
      optimizer: optax transformation.
      steps: number of steps.
      hooks: loss and the like; must have no ``reparam``.
      config: of the step.
      seed: of dropout's keys.

    Returns:
      the coded tree with trained codebooks; statistics (BatchNorm) are left as they are in the
      model, so recalibrate them if the network has any.
    """
    books = codedlib.codebooks(coded)
    network, state = create_state(model, optimizer, seed=seed, params=books)
    step = make_train_step(
        network, optimizer, config=config or StepConfig(), hooks=codebook_hooks(coded, hooks)
    )
    result = fit(step, state, data, FitConfig(steps, log_every=0, progress=False))
    return codedlib.with_codebooks(coded, result.state.params)
