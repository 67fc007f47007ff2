"""Does the input keep up? Images/s of the pipeline alone, of the train step alone, and of both.

  python benchmarks/input_pipeline.py --dataset digits --model lenet_5_caffe
  python benchmarks/input_pipeline.py --dataset cifar10_jpeg --model resnet20_cifar --data_dir D

The pipeline is measured in memory and record by record, with several numbers of workers, and on
JPEG files of photograph size (synthetic ones, made here) cropped to 224. ``both / step`` near 1
means that the input costs nothing. Figures of one run are to be compared with each other only.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cnnjax import data, files, models, training
from cnnjax.data import prepare

ROOT = pathlib.Path(__file__).resolve().parents[1]


def rate(make: Callable[[], Iterator[Any]], batch_size: int, steps: int, repeats: int) -> float:
    """Median images/s of taking ``steps`` batches, the first ones left out."""
    figures = []
    for _ in range(repeats):
        batches = make()
        for _ in range(5):
            next(batches)
        begin = time.perf_counter()
        for _ in range(steps):
            next(batches)
        figures.append(steps * batch_size / (time.perf_counter() - begin))
        batches.close()  # type: ignore[attr-defined]
    return statistics.median(figures)


def photographs(folder: pathlib.Path, n: int) -> None:
    """Smooth noise as JPEG files of 500 x 375 pixels, an image folder of two classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(n):
        place = folder / "train" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (38, 50, 3), np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{i}.jpg", quality=90)


def pipelines(args: argparse.Namespace, augment: data.Augment) -> dict[str, float]:
    """Images/s of the input alone."""

    def make(**options: Any) -> Callable[[], Iterator[Any]]:
        settings = {"batch_size": args.batch_size, "train": True, "augment": augment}
        settings |= {"data_dir": args.data_dir} | options
        return lambda: data.loader(args.dataset, "train", **settings)

    out = {}
    for workers in (0, 1, 2):
        out[f"memory, {workers} workers"] = rate(
            make(workers=workers), args.batch_size, args.batches, args.repeats
        )
    for workers in (0, 1, 2):
        out[f"records, {workers} workers"] = rate(
            make(workers=workers, in_memory=False), args.batch_size, args.batches // 6, args.repeats
        )
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        photographs(place / "raw", 64)
        prepare.prepare("photographs", place / "raw", place / "tfds", progress=False)
        crop = data.Augment(size=224, random_resized_crop=(0.08, 1.0), flip=True)
        for workers in (0, os.cpu_count() or 1):
            options = {"batch_size": 16, "train": True, "augment": crop, "workers": workers}
            out[f"JPEG 500x375 to 224, {workers} workers"] = rate(
                lambda options=options: data.loader(
                    "photographs", "train", data_dir=place / "tfds", **options
                ),
                16,
                12,
                args.repeats,
            )
    return out


def trained(args: argparse.Namespace, augment: data.Augment) -> dict[str, float]:
    """Images/s of the train step on one batch kept on the device, and fed by the loader."""
    batches = data.loader(
        args.dataset,
        "train",
        batch_size=args.batch_size,
        train=True,
        augment=augment,
        data_dir=args.data_dir,
    )
    fields = {"num_classes": batches.info.num_classes, "in_channels": batches.image_shape[-1]}
    if hasattr(models.config(args.model), "image_size"):
        fields["image_size"] = batches.image_shape[0]
    model = models.create(args.model, rngs=nnx.Rngs(0), **fields)
    schedule = training.build_schedule(
        training.ScheduleConfig("constant", base=0.01), total_steps=10**6, steps_per_epoch=100
    )
    optimizer = training.build_optimizer(training.OptimizerConfig("sgd", momentum=0.9), schedule)
    network, state = training.create_state(model, optimizer, seed=0)
    step = training.make_train_step(network, optimizer, learning_rate=schedule)

    held = jax.device_put(next(batches))

    def run(state: Any, source: Callable[[], Any]) -> tuple[Any, float]:
        for _ in range(3):
            state, metrics = step(state, source())
        jax.block_until_ready(metrics)
        begin = time.perf_counter()
        for _ in range(args.steps):
            state, metrics = step(state, source())
        jax.block_until_ready((state, metrics))
        return state, args.steps * args.batch_size / (time.perf_counter() - begin)

    alone, both = [], []
    for _ in range(args.repeats):  # in turns, so that a busy machine slows both alike
        state, figure = run(state, lambda: held)
        alone.append(figure)
        state, figure = run(state, lambda: next(batches))
        both.append(figure)
    batches.close()
    return {"step": statistics.median(alone), "both": statistics.median(both)}


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="lenet_300_100")
    parser.add_argument("--data_dir")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200, help="train steps per measurement")
    parser.add_argument("--batches", type=int, default=300, help="of the pipeline alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="default: benchmarks/results/input_pipeline_DATASET.json")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    described = data.info(args.dataset, args.data_dir)
    channels = described.image_shape[-1]
    augment = data.Augment(pad=2, flip=True, mean=(0.5,) * channels, std=(0.25,) * channels)
    alone, step = pipelines(args, augment), trained(args, augment)
    result = {
        "benchmark": "input_pipeline",
        "dataset": args.dataset,
        "model": args.model,
        "augment": "pad 2, crop, flip, normalise",
        "batch_size": args.batch_size,
        "steps": args.steps,
        "batches": args.batches,
        "repeats": args.repeats,
        "seed": 0,
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average_before": round(load, 1),  # above the cores: others were busy here
        "jax": jax.__version__,
        "pipeline_images_per_second": {k: round(v, 1) for k, v in alone.items()},
        "step_images_per_second": round(step["step"], 1),
        "both_images_per_second": round(step["both"], 1),
        "both_over_step": round(step["both"] / step["step"], 3),
        "pipeline_over_step": round(alone["memory, 1 workers"] / step["step"], 2),
        "memory_over_records": round(alone["memory, 1 workers"] / alone["records, 1 workers"], 2),
    }
    out = pathlib.Path(
        args.out or ROOT / "benchmarks" / "results" / f"input_pipeline_{args.dataset}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
