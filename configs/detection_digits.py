"""A thin detector learns from a wider one on scenes of digits: alone, distilled, term by term.

Chen et al., "Learning efficient object detection models with knowledge distillation", NIPS 2017:
weighted soft cross-entropy, teacher-bounded regression, hints through a 1x1 adapter. The scenes are
generated (`cnnjax.data.scenes`): 48x48 pixels, 1 to 4 handwritten digits of ten classes, clutter
and noise; training, validation and test scenes hold different digits. The teacher has 1,000
labelled scenes, the students 200 others. Every student has the same network, steps, optimizer and
seeds, the last step counts (VOC mAP at IoU 0.5, all points).

``alone`` learns from its 200 labelled scenes; ``soft``, ``bound`` and ``hint`` add one of the three
terms, ``terms`` all of them, on the same scenes. ``taught`` moreover has 1,800 scenes without
labels, which the teacher labels (a teacher, unlabelled inputs, few labelled ones: the survey's
scheme of knowledge transfer), with the soft term; ``labelled`` is the same without it. The weights
of the terms are chosen on validation scenes by a seed of its own (``--tune`` runs the trials again
and puts them into the result). With another student the paper's own (nu = 0.5, 1.5 for the
background) stood below the same student alone; on this one they were not tried.

    python configs/detection_digits.py --workdir runs/detection_digits

Every finished part stays in the work folder, and the command goes on where it was interrupted;
``--kinds`` and ``--seeds`` do a part, which joins the result file's others of the same teacher.
Expected: distilled above alone, and the teacher far above both.

What `scripts/update_results.py` found in ``configs/results/detection_digits.json``:
"""

# [measured]
# full run, seeds 0, 1, 2; 1 CPU cores, 1 x cpu, jax 0.10.2
# teacher: mAP@0.5 % 90.54, 11 points 86.15, COCO-like 65.49, params 113.3k, MACs 32.46M, runs 1
# alone: mAP@0.5 % 48.68 (46.23-50.90), 11 points 49.09 (47.11-51.20), COCO-like 26.32
#   (24.47-28.06), params 29.02k, MACs 8.27M, runs 3
# taught: mAP@0.5 % 73.81 (67.53-77.65), to alone (seeds above) +25.14 (3 of 3), 11 points 71.06
#   (65.46-74.49), COCO-like 50.88 (46.26-53.66), params 29.02k, MACs 8.27M, runs 3
# soft: mAP@0.5 % 52.57 (48.51-56.01), to alone (seeds above) +3.90 (3 of 3), 11 points 52.39
#   (48.57-55.26), COCO-like 28.73 (26.22-31.14), params 29.02k, MACs 8.27M, runs 3
# [/measured]

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from flax import nnx

import cnnjax
from cnnjax import detection, distillation, models, report, training
from cnnjax.data.memory import MemoryLoader, in_order
from cnnjax.data.scenes import SceneConfig, digit_scenes
from cnnjax.distillation import DetectionDistillConfig

RESULTS = pathlib.Path(__file__).parent / "results" / "detection_digits.json"
SCENES = SceneConfig()
# steps, so that more scenes don't mean longer training
SEEN = {
    "teacher": {"count": 1000, "steps": 930, "seed": 0},
    "student": {"count": 200, "steps": 600, "seed": 3},
    "unlabelled": {"count": 1800, "steps": 600, "seed": 4},
}
TESTS = {"validation": {"count": 500, "seed": 1}, "test": {"count": 1000, "seed": 2}}
BATCH = 32
MATCH = detection.MatchConfig()
HINTS = (("conv:input", "conv:input"),)  # what the heads look at
ALONE = DetectionDistillConfig(mu=1.0, nu=0.0, match=MATCH)
# each term's settings that ``--tune`` tries alone on the validation scenes; the first is in use
TERMS: dict[str, tuple[dict[str, Any], ...]] = {
    "soft": (
        {"mu": 0.5, "background_weight": 1.0},
        {"mu": 0.5, "background_weight": 1.5},
    ),
    "bound": ({"nu": 0.02}, {"nu": 0.1}),
    "hint": ({"hint_weight": 1.0, "hints": HINTS}, {"hint_weight": 0.1, "hints": HINTS}),
}
CHOSEN = {term: options[0] for term, options in TERMS.items()}
KINDS = {
    "alone": ALONE,
    "soft": dataclasses.replace(ALONE, **CHOSEN["soft"]),
    "bound": dataclasses.replace(ALONE, **CHOSEN["bound"]),
    "hint": dataclasses.replace(ALONE, **CHOSEN["hint"]),
    "terms": dataclasses.replace(ALONE, **CHOSEN["soft"], **CHOSEN["bound"], **CHOSEN["hint"]),
    "taught": dataclasses.replace(ALONE, **CHOSEN["soft"]),
    "labelled": ALONE,
}
UNLABELLED = ("taught", "labelled")  # kinds that see scenes which the teacher labels
CHOOSING_SEED = 10


def network(widths: tuple[int, ...]) -> dict[str, Any]:
    """Arguments of `models.make_detector`."""
    return {
        "backbone": "resnet20_cifar",
        "feature": "layer3",
        "image_size": (SCENES.size, SCENES.size),
        "num_classes": SCENES.classes,
        "sizes": (11.0, 16.0),
        "ratios": (1.4,),
        "fields": {"in_channels": 1, "widths": widths, "blocks_per_stage": 1},
    }


TEACHER, STUDENT = network((16, 32, 64)), network((8, 16, 32))
EXAMPLE = jax.ShapeDtypeStruct((1, SCENES.size, SCENES.size, 1), np.float32)


def train(
    model: Any, loss: Any, stream: Any, folder: pathlib.Path, *, steps: int, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Trains a detector, resuming from the folder; returns it with its last epoch's figures."""
    rate = training.build_schedule(
        training.ScheduleConfig("cosine", base=3e-3, warmup=steps / 30, unit="steps"),
        total_steps=steps,
    )
    optimizer = training.build_optimizer(training.OptimizerConfig("adamw", weight_decay=1e-4), rate)
    net, state = training.create_state(model, optimizer, seed=seed)
    hooks = training.Hooks(loss=loss)
    step = training.make_train_step(net, optimizer, hooks=hooks, learning_rate=rate)
    every = max(1, steps // 10)
    config = training.FitConfig(steps, log_every=every, checkpoint_every=2 * every, progress=False)
    result = training.fit(step, state, stream, config, workdir=folder)
    trained = training.state_to_model(net, result.state)
    if isinstance(trained, distillation.WithAdapters):
        trained = trained.student
    last = {k: v for k, v in result.last("train").items() if isinstance(v, float)}
    return trained, {"steps": steps, "last_epoch": last}


def measure(model: Any, tests: Any) -> dict[str, float]:
    """mAP of a trained detector on each of the test sets, and its COCO-like figure."""
    net, params, stats = training.split_network(model)
    state = training.TrainState(0, params, stats, None, None)
    find = detection.make_detect_step(net)
    out = {}
    for name, arrays in tests.items():
        found = [find(state, b["image"]) for b in in_order(arrays, 250)]
        found = jax.tree.map(lambda *a: np.concatenate(a), *jax.device_get(found))
        truth = {"boxes": arrays["boxes"], "labels": arrays["label"], "classes": SCENES.classes}
        out[f"{name}_map"] = detection.mean_average_precision(found, **truth).mean
        out[f"{name}_map11"] = detection.mean_average_precision(
            found, **truth, interpolation="11"
        ).mean
        out[f"{name}_coco"] = detection.coco_average_precision(found, **truth)
    return out


def scenes(who: str) -> dict[str, np.ndarray]:
    """Training scenes of the teacher or of the students."""
    return digit_scenes("train", SEEN[who]["count"], seed=SEEN[who]["seed"], config=SCENES)


def labelled_by(teacher: Any) -> dict[str, np.ndarray]:
    """The scenes without labels, with what the teacher finds in them as their labels."""
    net, params, stats = training.split_network(teacher)
    state = training.TrainState(0, params, stats, None, None)
    return detection.label_scenes(
        detection.make_detect_step(net), state, scenes("unlabelled")["image"]
    )


def the_teacher(args: Any) -> Any:
    """Trained, or taken from the work folder."""
    folder = args.workdir / "teacher"
    if not folder.exists():
        model = models.make_detector(**TEACHER, rngs=nnx.Rngs(100))
        stream = MemoryLoader(scenes("teacher"), batch_size=BATCH, seed=100)
        loss, steps = detection.detection_loss(MATCH), SEEN["teacher"]["steps"]
        place = args.workdir / "train" / "teacher"
        model, figures = train(model, loss, stream, place, steps=steps, seed=100)
        cnnjax.save(folder, model, factory=models.make_detector, kwargs=TEACHER, metadata=figures)
    return cnnjax.load(folder, factory=models.make_detector)


def student(
    args: Any, name: str, seed: int, config: DetectionDistillConfig, teacher: Any, tests: Any
) -> dict[str, Any]:
    """A student's figures: from the work folder, or by training it.

    The teacher's targets are computed once, ahead: the scenes are not augmented.
    """
    file = args.workdir / f"{name}-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    arrays = scenes("student")
    if name in UNLABELLED:
        more = labelled_by(teacher)
        arrays = {k: np.concatenate([a, more[k]]) for k, a in arrays.items()}
    model = models.make_detector(**STUDENT, rngs=nnx.Rngs(seed))
    plan = distillation.plan_detection(config, model, teacher, EXAMPLE)
    adapters = plan.adapters(nnx.Rngs(seed))
    whole = distillation.WithAdapters(model, adapters) if adapters else model
    if config.taught:
        guide = distillation.Teacher(teacher, taps=plan.teacher_taps)
        cache = distillation.cache_examples(guide, arrays["image"], batch_size=200)
        arrays = {**arrays, **distillation.lookup(cache, arrays["image"], np.arange(len(cache)))}
    stream = MemoryLoader(arrays, batch_size=BATCH, seed=seed)
    loss, steps = distillation.detection_distillation_loss(plan), SEEN["student"]["steps"]
    place = args.workdir / "train" / f"{name}-{seed}"
    model, figures = train(whole, loss, stream, place, steps=steps, seed=seed)
    figures |= {"name": name, "seed": seed, "config": str(config), **measure(model, tests)}
    report.write_result(figures, file)
    print(json.dumps(figures), flush=True)
    return figures


def tune(args: Any, teacher: Any, tests: Any) -> list[dict[str, Any]]:
    """Every trial of a term's settings, with its mAP on the validation scenes."""
    trials = []
    for term, options in TERMS.items():
        for i, fields in enumerate(options):
            config = dataclasses.replace(ALONE, **fields)
            got = student(args, f"try-{term}{i}", CHOOSING_SEED, config, teacher, tests)
            shown = {k: v for k, v in fields.items() if k != "hints"}
            trials.append({"term": term, **shown, "validation_map": got["validation_map"]})
    return trials


def main() -> None:
    """Trains what is missing; the result file grows with every finished student."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="also the trials of the weights")
    parser.add_argument("--reduced", type=int, default=1, help="divide sets and steps by this")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="the table of stored runs, anew")
    args = parser.parse_args()
    if args.table:
        old = json.loads(args.out.read_text())
        options = {"reduced": old["reduced"], "environment": old["environment"]}
        report.write_result(record(old["runs"], old["trials"], **options), args.out)
        return
    args.workdir.mkdir(parents=True, exist_ok=True)
    for part in (*SEEN.values(), *TESTS.values()):
        part["count"] //= args.reduced
    for part in SEEN.values():
        part["steps"] = max(1, part["steps"] // args.reduced)
    tests = {s: digit_scenes(s, **TESTS[s], config=SCENES) for s in TESTS}
    teacher = the_teacher(args)
    trials = tune(args, teacher, {"validation": tests["validation"]}) if args.tune else []
    last = {"test": tests["test"]}
    runs = [{"name": "teacher", "seed": 100, **measure(teacher, last)}]
    if args.out.exists():  # what else is known of students of this very teacher
        old = json.loads(args.out.read_text())
        asked = {(kind, seed) for kind in args.kinds for seed in args.seeds}
        if old["runs"][0] == runs[0] and old["reduced"] == (args.reduced > 1):
            runs += [r for r in old["runs"][1:] if (r["name"], r["seed"]) not in asked]
    for seed in args.seeds:
        for kind in args.kinds:
            runs.append(student(args, kind, seed, KINDS[kind], teacher, last))
            report.write_result(record(runs, trials, reduced=args.reduced > 1), args.out)


def against(kept: dict[str, list[dict[str, Any]]], name: str) -> str:
    """Mean difference in mAP to the student alone over common seeds, and how many are above."""
    theirs = {run["seed"]: run["test_map"] for run in kept.get("alone", ())}
    gains = [r["test_map"] - theirs[r["seed"]] for r in kept[name] if r["seed"] in theirs]
    if name in ("teacher", "alone") or not gains:
        return ""
    return f"{100 * np.mean(gains):+.2f} ({sum(g > 0 for g in gains)} of {len(gains)})"


def record(
    runs: list[dict[str, Any]], trials: Any, *, reduced: bool, environment: Any = None
) -> dict[str, Any]:
    """The result file: a table of the last epoch's figures, and every run."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    kept = {name: [run for run in runs if run["name"] == name] for name in names}
    costs = {
        who: report.measure(models.make_detector(**kwargs, rngs=nnx.Rngs(0)), EXAMPLE)
        for who, kwargs in (("teacher", TEACHER), ("student", STUDENT))
    }
    rows = []
    for name in names:
        cost = costs["teacher" if name == "teacher" else "student"]
        cells = [
            report.spread(
                {"mean": float(np.mean(v)), "min": float(min(v)), "max": float(max(v))}, scale=100
            )
            for v in (
                [run[k] for run in kept[name]] for k in ("test_map", "test_map11", "test_coco")
            )
        ]
        size = [report.human(cost["params"]), report.human(cost["macs"]), len(kept[name])]
        rows.append([name, cells[0], against(kept, name), *cells[1:], *size])
    return {
        "format": report.TABLE,
        "name": "detection_digits",
        "note": "last step; mean (min-max) over the seeds of the students; digits scenes 48x48, "
        f"{TESTS['test']['count']} for test; the teacher was trained on "
        f"{SEEN['teacher']['count']} scenes, the students on {SEEN['student']['count']} others, "
        f"'taught' and 'labelled' also on {SEEN['unlabelled']['count']} that the teacher labels",
        "seeds": sorted({r["seed"] for r in runs if r["name"] != "teacher"}),
        "reduced": reduced,
        "header": [
            "detector", "mAP@0.5 %", "to alone (seeds above)", "11 points", "COCO-like", "params",
            "MACs", "runs",
        ],
        "rows": rows,
        "trials": trials,
        "runs": runs,
        "environment": environment or report.environment(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
