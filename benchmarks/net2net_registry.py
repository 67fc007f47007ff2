"""Net2Net on every network of the registry: where it applies, where not, and why.

    XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" \\
        python benchmarks/net2net_registry.py [--names resnet18 vgg16 ...] [--write]

For each network, with random numbers as its weights: one group of channels is widened and one
identity layer is put in behind a ReLU (Chen et al., ICLR 2016, arXiv 1511.05641), and the outputs
on a random image are compared with the original's, relative to the largest. Groups and places are
tried in a fixed order until one is accepted; where all are refused the row says why. Images are as
small as the network takes. Finished rows are kept in ``benchmarks/results/net2net_registry.json``;
``--write`` only writes the page ``net2net_registry.md`` beside it anew. The flags save
compilation, which is most of the time.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from flax import nnx

from cnnjax import distillation, files, graph, models, report, surgery
from cnnjax.distillation import sameness

RESULT = pathlib.Path(__file__).parent / "results" / "net2net_registry.json"
PAGE = RESULT.with_suffix(".md")
SIZES = (48, 64, 96, 128)  # of images, for networks whose own are larger than 32 pixels
GROUPS = 6  # tried for widening
PLACES = 6  # tried for the identity layer, with each activation
TITLE = """# Net2Net on the networks of the registry

Written by `python benchmarks/net2net_registry.py`. Random weights; outputs of the widened and of
the deepened network against the original's on one random image, evaluation mode, largest
difference relative to the largest output. Widened: the first of {groups} groups of channels that is
accepted (middle, last and first ones); deepened: an identity layer with its activation in front of
a convolution or a dense layer that reads values which the activation leaves as they are.

"""


def filled(name: str, size: int) -> tuple[nnx.Module, tuple[int, int, int]]:
    """The network with random numbers as weights, and the shape of its images."""
    height, _, channels = models.input_shape(name)
    fields = {}
    if size != height and hasattr(models.config(name), "image_size"):
        fields["image_size"] = size
    graphdef, state = nnx.split(models.abstract(name, **fields))
    rng = np.random.default_rng(0)

    def leaf(path: Any, a: Any) -> Any:
        text = jax.tree_util.keystr(path)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not np.issubdtype(a.dtype, np.floating):
            return np.zeros(a.shape, a.dtype)
        stacked = any(
            word in text for word in ("'var'", "'mean'", "'scale'", "'bias'")
        )  # by a scan
        if len(a.shape) < 2 or stacked:
            center = 1.0 if "'var'" in text or "'scale'" in text else 0.0
            return (center + rng.uniform(-0.1, 0.1, a.shape)).astype(a.dtype)
        draws = rng.standard_normal(a.shape, np.float32)
        return draws * np.float32(np.sqrt(2.0 / np.prod(a.shape[:-1])))

    model = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(leaf, state))
    return model, (size, size, channels)


def smallest(name: str) -> tuple[nnx.Module, np.ndarray, graph.Graph]:
    """Network, image and graph at the smallest size that the network takes.

    Raises:
      ValueError: no size is taken, not even its own.
    """
    own = models.input_shape(name)[0]
    why = ""
    for size in (own,) if own <= 32 else (*SIZES, own):
        try:
            model, shape = filled(name, size)
            found = graph.trace(model, jax.ShapeDtypeStruct((1, *shape), np.float32))
        except (ValueError, TypeError) as error:
            why = str(error)
            continue
        if all(min(x.output_shape[1:3]) > 0 for x in found.layers if len(x.output_shape) == 4):
            image = np.random.default_rng(1).standard_normal((1, *shape), np.float32)
            return model, image, found
    raise ValueError(f"{name}: no size of images is taken: {why}")


def spread(items: Any, count: int) -> list[Any]:
    """Up to ``count`` of a sequence: the middle, the last, the first, then between."""
    items = list(items)
    shares = (0.5, 1.0, 0.0, 0.75, 0.25, 0.9, 0.1)[:count]
    at = dict.fromkeys(round(s * (len(items) - 1)) for s in shares) if items else {}
    return [items[i] for i in at]


def short(error: Exception) -> str:
    """The first line of a message, without the path of a source file."""
    return str(error).split("\n")[0].replace(str(pathlib.Path(__file__).parents[1]) + "/", "")


def wider(model: Any, image: np.ndarray, found: graph.Graph, before: Any) -> dict[str, Any]:
    """The row's part on Net2Wider."""
    reasons: dict[str, str] = {}
    for group in spread(found.groups, GROUPS):
        for width in (group.size + max(1, group.size // 8), 2 * group.size):
            try:
                grown, _ = distillation.widen(
                    jax.random.key(0), model, found, group.name, width, check=False
                )
            except ValueError as error:
                reasons[group.name] = short(error)
                continue
            outputs, _ = sameness.run(grown, surgery.leaves(grown), (image,))
            worst = sameness.difference(outputs, before)
            if worst <= sameness.TOLERANCE:
                what = f"{group.name}: {group.size} to {width}"
                return {"applies": True, "what": what, "difference": worst}
            reasons[group.name] = f"{group.name}: outputs differ by {worst:.1e}"
    why = next(iter(reasons.values()), "no group of channels can change")
    return {"applies": False, "why": why}


def deeper(model: Any, image: np.ndarray, found: graph.Graph, before: Any) -> dict[str, Any]:
    """The row's part on Net2Deeper."""
    reasons = []
    calls: dict[str, int] = {}
    for layer in found.layers:
        calls[layer.path] = calls.get(layer.path, 0) + 1
    paths = [p for p, n in calls.items() if n == 1 and _module(model, p)]
    acts = {"relu": jax.nn.relu, "relu6": jax.nn.relu6}
    graphdef, state = nnx.split(model)

    def reads(state: Any, image: Any) -> Any:
        inner = nnx.merge(graphdef, state, copy=True)
        return graph.capture(inner, dict.fromkeys(paths, "input"))(image)[1]

    seen, _ = sameness.evaluate(reads, state, image)
    for name, act in acts.items():
        fit = [p for p in paths if _is_output_of(act, seen.get(p))]
        for path in spread(fit, PLACES):
            try:
                grown = distillation.deepen(
                    model, path, image, side="input", activation=act, rngs=nnx.Rngs(0)
                )
            except ValueError as error:
                reasons.append(short(error))
                continue
            outputs, _ = sameness.run(grown, surgery.leaves(grown), (image,))
            worst = sameness.difference(outputs, before)
            return {"applies": True, "what": f"{name} before {path}", "difference": worst}
    why = (
        reasons[0] if reasons else "no layer reads values that a ReLU or a ReLU6 leaves as they are"
    )
    return {"applies": False, "why": why}


def _module(model: Any, path: str) -> bool:
    try:
        return isinstance(surgery.module_at(model, path), nnx.Conv | nnx.Linear)
    except KeyError:
        return False


def _is_output_of(activation: Any, value: Any) -> bool:
    if value is None:
        return False
    return bool(np.allclose(np.asarray(activation(value)), value, rtol=1e-6, atol=1e-7))


def examine(name: str) -> dict[str, Any]:
    """One row: ``{"name", "image", "layers", "wider", "deeper"}``."""
    model, image, found = smallest(name)
    model = graph.tracing.evaluation_mode(model)
    before, _ = sameness.run(model, surgery.leaves(model), (image,))
    if not all(np.isfinite(x).all() for x in before):
        part = {"applies": False, "why": "not examined: random weights overflow in this network"}
        shape, layers = list(image.shape[1:]), len(found.layers)
        return {"name": name, "image": shape, "layers": layers, "wider": part, "deeper": part}
    return {
        "name": name,
        "image": list(image.shape[1:]),
        "layers": len(found.layers),
        "wider": wider(model, image, found, before),
        "deeper": deeper(model, image, found, before),
    }


def page(rows: list[dict[str, Any]]) -> str:
    """The page of all rows."""

    def cell(part: dict[str, Any]) -> list[str]:
        if part["applies"]:
            return [part["what"], f"{part['difference']:.0e}"]
        return ["no: " + part["why"], ""]

    header = ["network", "image", "layers", "wider", "difference", "deeper", "difference"]
    cells = [
        [
            row["name"],
            "x".join(map(str, row["image"])),
            str(row["layers"]),
            *cell(row["wider"]),
            *cell(row["deeper"]),
        ]
        for row in rows
    ]
    good = {k: sum(row[k]["applies"] for row in rows) for k in ("wider", "deeper")}
    counts = (
        f"Examined so far: {len(rows)} of the registry's {len(models.names())} networks; "
        f"{good['wider']} can be widened, {good['deeper']} deepened.\n"
    )
    return TITLE.format(groups=GROUPS) + counts + "\n" + report.markdown_table(header, cells) + "\n"


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Both files, by way of temporary ones."""
    record = {
        "rows": [rows[name] for name in sorted(rows)],
        "environment": report.environment(),
    }
    for file, text in ((RESULT, json.dumps(record, indent=1) + "\n"), (PAGE, page(record["rows"]))):
        files.write_text(file, text)


def known() -> dict[str, dict[str, Any]]:
    """The finished rows by name."""
    if not RESULT.exists():
        return {}
    return {row["name"]: row for row in json.loads(RESULT.read_text())["rows"]}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--names", nargs="*", default=list(models.names()))
    parser.add_argument("--write", action="store_true", help="the page alone")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    flags = parser.parse_args()
    if flags.write:
        write(known())
        return
    for name in flags.names:
        if name in known() and not flags.again:
            continue
        row = examine(name)
        print(json.dumps(row), flush=True)
        write({**known(), name: row})  # read anew: several of these may run side by side


if __name__ == "__main__":
    main()
