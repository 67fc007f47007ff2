"""Pre-activation residual units: BN and ReLU before every convolution, nothing after the addition.

He, Zhang, Ren, Sun, "Identity mappings in deep residual networks", ECCV 2016, 1603.05027; with
several parallel branches: Abdi, Nahavandi, "Multi-residual networks", 1609.05672.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks, residual


class PreActBranch(nnx.Module):
    """[BN-ReLU]-conv-BN-ReLU-conv (basic) or [BN-ReLU]-1x1-BN-ReLU-3x3-BN-ReLU-1x1 (bottleneck).

    Args:
      in_features, features: channels before and after; a bottleneck's inner width is a quarter.
      stride: of one convolution.
      kind: ``"basic"`` or ``"bottleneck"``.
      leading: whether the first BN-ReLU belongs to the branch.
      stride_on: ``"1x1"`` or ``"3x3"``, bottleneck only.
      dropout: rate between a basic branch's convolutions (wide ResNet).
      fan: ``"out"`` or ``"in"`` of the He initialiser.
      use_bias: a bias in the last convolution.
      epsilon: of the batch norms.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        *,
        rngs: nnx.Rngs,
        kind: str,
        leading: bool,
        stride_on: str = "1x1",
        dropout: float = 0.0,
        fan: str = "out",
        use_bias: bool = False,
        epsilon: float = 1e-5,
        dtype: str | None = None,
    ):
        norms: Any = {"dtype": dtype, "epsilon": epsilon, "rngs": rngs}
        convs: Any = {"kernel_init": blocks.init.he_normal(fan), "dtype": dtype, "rngs": rngs}
        last: Any = {"use_bias": use_bias, **convs}
        self.leading = leading
        if leading:
            self.bn1 = blocks.batch_norm(in_features, **norms)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        if kind == "basic":
            self.conv1 = blocks.conv(in_features, features, 3, stride, **convs)
            self.bn2 = blocks.batch_norm(features, **norms)
            self.conv2 = blocks.conv(features, features, 3, **last)
        else:
            first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
            middle = features // 4
            self.conv1 = blocks.conv(in_features, middle, 1, first, **convs)
            self.bn2 = blocks.batch_norm(middle, **norms)
            self.conv2 = blocks.conv(middle, middle, 3, second, **convs)
            self.bn3 = blocks.batch_norm(middle, **norms)
            self.conv3 = blocks.conv(middle, features, 1, **last)
        self.deep = kind != "basic"

    def __call__(self, x: Any) -> Any:
        """F(x), (N, H, W, in) -> (N, H', W', out)."""
        if self.leading:
            x = jax.nn.relu(self.bn1(x))
        x = jax.nn.relu(self.bn2(self.conv1(x)))
        if self.dropout is not None:
            x = self.dropout(x)
        x = self.conv2(x)
        return self.conv3(jax.nn.relu(self.bn3(x))) if self.deep else x

    @property
    def kernel(self) -> Any:
        """The last convolution's kernel."""
        return residual.last_kernel(self.conv3 if self.deep else self.conv2)


class Branches(nnx.Module):
    """The sum of parallel branches, which random depth drops together."""

    def __init__(self, branches: list[PreActBranch]):
        self.branches = nnx.List(branches)

    @property
    def training(self) -> bool:
        """Whether batch statistics are being learned."""
        return not getattr(self.branches[0].bn2, "use_running_average", True)

    def branch(self, x: Any) -> Any:
        """sum_i F_i(x)."""
        total = self.branches[0](x)
        for other in list(self.branches)[1:]:
            total = total + other(x)
        return total


class PreActUnit(nnx.Module):
    """x + sum_i F_i(x), or, where the shape changes, projection(h) + sum_i F_i(h).

    h = BN-ReLU(x) is computed once then and shared by the branches and the 1x1 projection, which
    has no batch norm.

    Args:
      in_features, features: channels before and after.
      stride: of the branches and the shortcut.
      branches: how many parallel branches.
      shortcut: ``"B"`` (projection) or ``"A"`` (parameter-free, on x itself).
      leading: False for a unit that follows a BN-ReLU directly.
      use_bias: biases in the projection and the branches' last convolutions.
      epsilon: of the batch norms.
      options: of `PreActBranch`.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int = 1,
        *,
        rngs: nnx.Rngs,
        branches: int = 1,
        shortcut: str = "B",
        leading: bool = True,
        fan: str = "out",
        use_bias: bool = False,
        epsilon: float = 1e-5,
        dtype: str | None = None,
        **options: Any,
    ):
        changes = stride != 1 or in_features != features
        self.project = changes and shortcut == "B"
        self.shared = self.project and leading
        self.stride = stride
        if self.shared:
            self.bn = blocks.batch_norm(in_features, epsilon=epsilon, dtype=dtype, rngs=rngs)
        own = leading and not self.shared
        self.body = Branches(
            [
                PreActBranch(
                    in_features,
                    features,
                    stride,
                    leading=own,
                    fan=fan,
                    use_bias=use_bias,
                    epsilon=epsilon,
                    dtype=dtype,
                    rngs=rngs,
                    **options,
                )
                for _ in range(branches)
            ]
        )
        if self.project:
            self.projection = blocks.conv(
                in_features,
                features,
                1,
                stride,
                use_bias=use_bias,
                kernel_init=blocks.init.he_normal(fan),
                dtype=dtype,
                rngs=rngs,
            )

    def __call__(self, x: Any, gate: Any = None, extra: Any = None) -> Any:
        """(N, H, W, in) -> (N, H', W', out).

        ``gate`` drops or scales the branches; ``extra`` is added to the sum.
        """
        h = jax.nn.relu(self.bn(x)) if self.shared else x
        y = self.body.branch(h) if gate is None else residual.gated_branch(self.body, h, gate)
        if extra is not None:
            y = y + extra
        if self.project:
            return self.projection(h) + y
        features = self.body.branches[0].kernel.shape[-1]
        return residual.shortcut_a(x, features, self.stride) + y
