"""Average precision against a transcription of the VOC devkit's loop and of COCO's definition."""

from __future__ import annotations

import types

import numpy as np
import pytest

from cnnjax import detection as D

pytestmark = pytest.mark.method("detection_distillation")
CLASSES = 3


def overlap(a, b):
    height = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    width = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    common = height * width
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else 0.0


def ranked_hits(found, boxes, labels, c, threshold, rule):
    """One class: (score, hit) of all detections, the most confident first; number of objects."""
    rows = [
        (float(found.scores[n, k]), n, k)
        for n in range(len(boxes))
        for k in range(found.labels.shape[1])
        if found.labels[n, k] == c
    ]
    rows.sort(key=lambda r: -r[0])
    used, out = set(), []
    for _score, n, k in rows:
        best, value = None, -1.0
        for j in range(labels.shape[1]):
            if labels[n, j] != c or (rule == "coco" and (n, j) in used):
                continue
            o = overlap(found.boxes[n, k], boxes[n, j])
            if o > value:
                best, value = j, o
        hit = best is not None and value >= threshold and (n, best) not in used
        if hit:
            used.add((n, best))
        out.append(hit)
    return out, int((labels == c).sum())


def reference(found, boxes, labels, threshold, interpolation, rule):
    values = []
    for c in range(1, CLASSES + 1):
        hits, objects = ranked_hits(found, boxes, labels, c, threshold, rule)
        if not objects:
            continue
        curve, right = [], 0
        for k, hit in enumerate(hits, 1):
            right += hit
            curve.append((right / objects, right / k))
        if interpolation == "all":
            # area under the highest precision at this recall or beyond, by its levels
            levels = sorted({r for r, _ in curve})
            area, before = 0.0, 0.0
            for r in levels:
                area += (r - before) * max(p for s, p in curve if s >= r)
                before = r
            values.append(area)
        else:
            points = int(interpolation)
            total = 0.0
            for i in range(points):
                r = i / (points - 1)
                total += max((p for s, p in curve if s >= r - 1e-9), default=0.0)
            values.append(total / points)
    return float(np.mean(values))


def random_case(seed, images=12, rows=8, objects=4):
    """Detections near the objects, of wrong classes, twice, and out of the blue."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 20, (images, objects, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 15, (images, objects, 2))], -1)
    labels = rng.integers(0, CLASSES + 1, (images, objects))
    pick = rng.integers(0, objects, (images, rows))
    near = np.take_along_axis(boxes, pick[..., None], 1) + rng.normal(0, 1.2, (images, rows, 4))
    far = rng.uniform(0, 20, (images, rows, 4))
    far[..., 2:] = far[..., :2] + 10
    near = np.where(rng.random((images, rows, 1)) < 0.2, far, near)
    kinds = np.take_along_axis(labels, pick, 1)
    kinds = np.where(rng.random(kinds.shape) < 0.15, rng.integers(0, 4, kinds.shape), kinds)
    scores = rng.random((images, rows))
    found = types.SimpleNamespace(boxes=near, scores=scores, labels=kinds)
    return found, boxes, labels


@pytest.mark.parametrize("rule", ["voc", "coco"])
@pytest.mark.parametrize("interpolation", ["all", "11", "101"])
def test_map_against_the_transcription(rule, interpolation):
    seen = []
    for seed in range(6):
        found, boxes, labels = random_case(seed)
        for threshold in (0.5, 0.75):
            got = D.mean_average_precision(
                found,
                boxes,
                labels,
                classes=CLASSES,
                iou=threshold,
                interpolation=interpolation,
                rule=rule,
            )
            expected = reference(found, boxes, labels, threshold, interpolation, rule)
            np.testing.assert_allclose(got.mean, expected, atol=1e-12)
            seen.append(expected)
    assert 0.02 < min(seen) < max(seen) < 0.95


def test_the_rules_differ_where_the_best_object_is_taken():
    # two detections overlap object 0 most; the second also reaches object 1
    boxes = np.array([[[0, 0, 10, 10], [0, 4, 10, 14]]], float)
    labels = np.array([[1, 1]])
    found = types.SimpleNamespace(
        boxes=np.array([[[0, 0, 10, 10], [0, 1, 10, 11]]], float),
        scores=np.array([[0.9, 0.8]]),
        labels=np.array([[1, 1]]),
    )
    options = {"classes": 1, "iou": 0.5}
    assert D.mean_average_precision(found, boxes, labels, **options).mean == pytest.approx(0.5)
    coco = D.mean_average_precision(found, boxes, labels, rule="coco", **options)
    assert coco.mean == pytest.approx(1.0)


def test_coco_figure_is_the_mean_over_thresholds():
    found, boxes, labels = random_case(9)
    each = [reference(found, boxes, labels, t, "101", "coco") for t in np.linspace(0.5, 0.95, 10)]
    got = D.coco_average_precision(found, boxes, labels, classes=CLASSES)
    np.testing.assert_allclose(got, np.mean(each), atol=1e-12)


def test_known_values():
    hits = np.array([True, False, True])
    # recall 1/2 at precision 1, recall 1 at precision 2/3
    assert D.average_precision(hits, 2) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert D.average_precision(hits, 2, "11") == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert D.average_precision(np.array([], bool), 3) == 0
    assert np.isnan(D.average_precision(hits, 0))
    # recall 3/10 is reached at the grid's 0.3 exactly
    assert D.average_precision(np.ones(3, bool), 10, "11") == pytest.approx(4 / 11)


def test_perfect_detections_and_none():
    _, boxes, labels = random_case(0)
    perfect = types.SimpleNamespace(boxes=boxes, scores=np.full(labels.shape, 0.9), labels=labels)
    for interpolation in ("all", "11", "101"):
        got = D.mean_average_precision(
            perfect, boxes, labels, classes=CLASSES, interpolation=interpolation
        )
        assert got.mean == pytest.approx(1.0)
    nothing = types.SimpleNamespace(
        boxes=boxes, scores=np.zeros(labels.shape), labels=np.zeros_like(labels)
    )
    got = D.mean_average_precision(nothing, boxes, labels, classes=CLASSES)
    assert got.mean == 0
    assert got.objects == {c: int((labels == c).sum()) for c in (1, 2, 3)}
    empty = D.mean_average_precision(nothing, boxes, np.zeros_like(labels), classes=CLASSES)
    assert np.isnan(empty.mean)


def test_bad_input():
    found, boxes, labels = random_case(0)
    with pytest.raises(ValueError, match="interpolation is '12'"):
        D.average_precision(np.ones(2, bool), 2, "12")
    with pytest.raises(ValueError, match="rule is 'pascal'"):
        D.mean_average_precision(found, boxes, labels, classes=3, rule="pascal")
    with pytest.raises(ValueError, match="objects of 11"):
        D.mean_average_precision(found, boxes[:-1], labels[:-1], classes=3)
    with pytest.raises(ValueError, match="above the number of classes"):
        D.mean_average_precision(found, boxes, labels, classes=2)
