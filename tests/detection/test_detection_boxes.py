"""Boxes, anchors, matching, sampling and suppression against pixels and plain Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import detection as D

pytestmark = pytest.mark.method("detection_distillation")


def boxes_on(grid, n, rng):
    """Integer boxes on a grid of pixels, some of them empty."""
    corner = rng.integers(0, grid, (n, 2))
    return np.concatenate([corner, np.minimum(corner + rng.integers(0, 14, (n, 2)), grid)], 1)


def pixel_iou(a, b, grid=20):
    masks = np.zeros((2, grid, grid), bool)
    for mask, (y0, x0, y1, x1) in zip(masks, (a, b)):
        mask[y0:y1, x0:x1] = True
    union = (masks[0] | masks[1]).sum()
    return (masks[0] & masks[1]).sum() / union if union else 0.0


def test_iou_counts_pixels():
    rng = np.random.default_rng(0)
    a, b = boxes_on(20, 12, rng), boxes_on(20, 15, rng)
    expected = [[pixel_iou(p, q) for q in b] for p in a]
    got = D.box_iou(a.astype(np.float32), b.astype(np.float32))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.count_nonzero(expected) > 10
    areas = [(q[2] - q[0]) * (q[3] - q[1]) for q in b]
    np.testing.assert_allclose(D.box_area(b.astype(np.float32)), areas)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_coding_round_trip(seed):
    rng = np.random.default_rng(seed)
    corner, anchor = rng.uniform(-20, 40, (2, 6, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 30, (6, 2))], 1).astype(np.float32)
    anchors = np.concatenate([anchor, anchor + rng.uniform(4, 25, (6, 2))], 1).astype(np.float32)
    deltas = D.encode_boxes(boxes, anchors)
    np.testing.assert_allclose(D.decode_boxes(deltas, anchors), boxes, atol=2e-4)
    # the formula, written out in doubles
    b, a = boxes.astype(np.float64), anchors.astype(np.float64)
    for i in range(6):
        h, w = a[i, 2] - a[i, 0], a[i, 3] - a[i, 1]
        expected = [
            ((b[i, 0] + b[i, 2]) / 2 - (a[i, 0] + a[i, 2]) / 2) / h / 0.1,
            ((b[i, 1] + b[i, 3]) / 2 - (a[i, 1] + a[i, 3]) / 2) / w / 0.1,
            np.log((b[i, 2] - b[i, 0]) / h) / 0.2,
            np.log((b[i, 3] - b[i, 1]) / w) / 0.2,
        ]
        np.testing.assert_allclose(deltas[i], expected, rtol=1e-4, atol=1e-4)


def test_coding_is_finite_for_padding_and_wild_outputs():
    anchor = np.array([[0, 0, 8, 8]], np.float32)
    assert np.isfinite(D.encode_boxes(np.zeros((1, 4), np.float32), anchor)).all()
    wild = D.decode_boxes(np.full((1, 4), 1e4, np.float32), anchor)
    assert np.isfinite(wild).all()
    clipped = np.asarray(D.clip_boxes(wild, 30, 40))
    assert (clipped >= 0).all()
    assert (clipped <= [30, 40, 30, 40]).all()


def test_anchor_grid_order_and_shapes():
    grid = D.anchor_grid((12, 8), (3, 2), (4.0, 6.0), (1.0, 4.0))
    rows = []
    for y in range(3):
        for x in range(2):
            for s in (4.0, 6.0):
                for r in (1.0, 4.0):
                    h, w = s * r**0.5, s / r**0.5
                    cy, cx = 4 * y + 2, 4 * x + 2
                    rows.append((cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2))
    np.testing.assert_allclose(grid, rows, rtol=1e-6)
    with pytest.raises(ValueError, match="sizes must be positive"):
        D.anchor_grid((8, 8), (2, 2), ())
    with pytest.raises(ValueError, match="background, classes and 4 deltas"):
        D.split_output(jnp.zeros((1, 3, 5)))


def plain_match(anchors, boxes, labels, positive, negative):
    """The rule in plain loops."""
    real = [j for j in range(len(labels)) if labels[j] > 0]
    overlap = {
        (i, j): float(D.box_iou(anchors[i : i + 1], boxes[j : j + 1])[0, 0])
        for i in range(len(anchors))
        for j in real
    }
    out_index, out_label = [0] * len(anchors), [0] * len(anchors)
    for i in range(len(anchors)):
        best, value = 0, -1.0
        for j in real:
            if overlap[i, j] > value:
                best, value = j, overlap[i, j]
        out_index[i] = best
        if value >= positive:
            out_label[i] = labels[best]
        elif value >= negative:
            out_label[i] = -1
    claims = {}
    for j in real:
        i = max(range(len(anchors)), key=lambda i: (overlap[i, j], -i))
        if overlap[i, j] > 0 and (i not in claims or overlap[i, j] > overlap[i, claims[i]]):
            claims[i] = j
    for i, j in claims.items():
        out_index[i], out_label[i] = j, labels[j]
    return out_index, out_label


def test_matching_against_plain_loops():
    anchors = D.anchor_grid((20, 20), (5, 5), (6.0,))
    match = jax.jit(D.match_one)
    rng = np.random.default_rng(1)
    kinds = set()
    for _ in range(12):
        boxes = boxes_on(20, 4, rng).astype(np.float32)
        labels = rng.integers(0, 4, 4).astype(np.int32)
        labels[boxes[:, 2] - boxes[:, 0] < 1] = 0
        index, label = match(anchors, boxes, labels, 0.5, 0.3)
        expected = plain_match(anchors, boxes, labels.tolist(), 0.5, 0.3)
        np.testing.assert_array_equal(label, expected[1])
        chosen = np.asarray(label) > 0
        np.testing.assert_array_equal(np.asarray(index)[chosen], np.array(expected[0])[chosen])
        kinds |= set(np.sign(np.asarray(label)).tolist())
    assert kinds == {-1, 0, 1}


def test_targets_code_the_matched_object():
    anchors = D.anchor_grid((20, 20), (5, 5), (6.0,))
    boxes = np.array([[[1, 1, 8, 7], [10, 9, 17, 15]], [[0, 0, 0, 0]] * 2], np.float32)
    labels = np.array([[3, 2], [0, 0]], np.int32)
    targets = D.assign_targets(anchors, boxes, labels)
    assert (targets.labels[1] == 0).all()  # an image without objects is all background
    assert np.isfinite(targets.deltas).all()
    found = D.decode_boxes(targets.deltas, jnp.broadcast_to(anchors, targets.deltas.shape))
    for j in (0, 1):
        mine = np.asarray(targets.labels[0]) == labels[0, j]
        assert mine.any()
        want = np.broadcast_to(boxes[0, j], (mine.sum(), 4))
        np.testing.assert_allclose(np.asarray(found)[0][mine], want, atol=1e-3)


def test_negatives_are_the_greatest_and_three_to_one():
    rng = np.random.default_rng(0)
    labels = np.zeros((3, 20), np.int32)
    labels[0, [2, 9]], labels[0, 4], labels[2, :] = 1, -1, 2
    score = rng.random((3, 20)).astype(np.float32)
    got = np.asarray(D.sample_negatives(score, labels, 3))
    for row, (lab, sc) in enumerate(zip(labels, score)):
        background = [i for i in range(20) if lab[i] == 0]
        wanted = sorted(background, key=lambda i: -sc[i])[: 3 * max(int((lab > 0).sum()), 1)]
        assert set(np.flatnonzero(got[row])) == {*wanted, *np.flatnonzero(lab > 0).tolist()}
    assert got[1].sum() == 3
    assert not got[0, 4]  # in between: takes no part
    hard = D.background_score(jnp.array([[[5.0, 0.0], [0.0, 5.0]]]), None, True)
    assert hard[0, 1] > hard[0, 0]
    assert D.background_score(jnp.zeros((1, 4, 2)), jax.random.key(0), False).shape == (1, 4)
    with pytest.raises(ValueError, match="need a key"):
        D.background_score(jnp.zeros((1, 4, 2)), None, False)


def greedy(boxes, labels, valid, threshold):
    """Suppression as it is told: take the best, strike what it covers, and so on."""
    alive, kept = [i for i in range(len(boxes)) if valid[i]], []
    while alive:
        first = alive.pop(0)
        kept.append(first)
        alive = [
            i
            for i in alive
            if labels[i] != labels[first] or pixel_iou(boxes[first], boxes[i]) <= threshold
        ]
    return kept


def test_suppression_is_greedy():
    suppress = jax.jit(D.suppress)
    rng = np.random.default_rng(3)
    dropped = 0
    for _ in range(20):
        corner = rng.integers(0, 8, (30, 2))
        boxes = np.concatenate([corner, corner + rng.integers(4, 9, (30, 2))], 1)
        labels, valid = rng.integers(1, 3, 30), rng.random(30) < 0.9
        keep = suppress(boxes.astype(np.float32), labels, valid, 0.3)
        expected = greedy(boxes, labels, valid, 0.3)
        np.testing.assert_array_equal(np.flatnonzero(keep), expected)
        dropped += int(valid.sum()) - len(expected)
    assert dropped > 100
    # a chain, in which every box depends on the one before
    chain = np.array([[0, 2 * i, 8, 2 * i + 8] for i in range(9)])
    keep = suppress(chain.astype(np.float32), np.ones(9, int), np.ones(9, bool), 0.3)
    np.testing.assert_array_equal(np.flatnonzero(keep), greedy(chain, np.ones(9), np.ones(9), 0.3))


def test_detections_against_a_plain_pipeline():
    rng = np.random.default_rng(0)
    anchors = D.anchor_grid((20, 20), (5, 5), (6.0,))
    raw = rng.normal(0, 1.5, (2, 25, 1 + 3 + 4)).astype(np.float32)
    config = D.NmsConfig(score=0.2, iou=0.3, candidates=40, detections=12)
    find = jax.jit(lambda r: D.detections_of(r, anchors, (20, 20), config))
    found = jax.device_get(find(raw))
    assert found.boxes.shape == (2, 12, 4)
    for n in range(2):
        p = np.exp(raw[n, :, :4]) / np.exp(raw[n, :, :4]).sum(-1, keepdims=True)
        boxes = np.clip(D.decode_boxes(raw[n, :, 4:], anchors), 0, 20)
        ranked = sorted(((p[i, c], i, c) for i in range(25) for c in (1, 2, 3)), reverse=True)[:40]
        kept = []
        for score, i, c in ranked:
            clash = [
                1
                for _, j, other in kept
                if other == c and float(D.box_iou(boxes[i : i + 1], boxes[j : j + 1])[0, 0]) > 0.3
            ]
            if score > 0.2 and not clash:
                kept.append((score, i, c))
        kept = kept[:12]
        size = len(kept)
        np.testing.assert_allclose(found.scores[n, :size], [k[0] for k in kept], rtol=1e-5)
        np.testing.assert_array_equal(found.labels[n, :size], [k[2] for k in kept])
        np.testing.assert_allclose(found.boxes[n, :size], [boxes[k[1]] for k in kept], atol=1e-4)
        assert (found.labels[n, size:] == 0).all()
        assert (found.scores[n, size:] == 0).all()


def test_more_rows_than_candidates_are_padding():
    anchors = D.anchor_grid((8, 8), (1, 1), (6.0,))
    found = D.detections_of(np.zeros((1, 1, 6), np.float32), anchors, (8, 8))
    assert found.boxes.shape == (1, 20, 4)
    assert int((found.labels > 0).sum()) == 1


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="negative <= positive"):
        D.MatchConfig(positive=0.3, negative=0.4)
    with pytest.raises(ValueError, match="negatives must be at least 1"):
        D.MatchConfig(negatives=0)
    with pytest.raises(ValueError, match="detections <= candidates"):
        D.NmsConfig(candidates=5, detections=10)
    with pytest.raises(ValueError, match="lie in 0..1"):
        D.NmsConfig(score=1.5)


def test_scenes_labelled_by_a_detector():
    """Only sure detections, the best ones, at any batch size; the rest is padding."""
    rng = np.random.default_rng(4)
    images = rng.random((5, 4, 4, 1)).astype(np.float32)
    scores = -np.sort(-rng.random((5, 3)).astype(np.float32), axis=1)
    boxes = rng.random((5, 3, 4)).astype(np.float32)
    labels = rng.integers(1, 4, (5, 3)).astype(np.int32)

    def detect(state, part):
        at = [int(np.flatnonzero((images == x).all((1, 2, 3)))[0]) for x in part]
        return D.Detections(boxes[at], scores[at], labels[at])

    for most, size in ((2, 2), (4, 5)):
        got = D.label_scenes(detect, None, images, threshold=0.4, most=most, batch_size=size)
        assert got["boxes"].shape == (5, most, 4)
        for i in range(5):
            want = [(b, c) for b, s, c in zip(boxes[i], scores[i], labels[i]) if s >= 0.4][:most]
            np.testing.assert_array_equal(got["label"][i, : len(want)], [c for _, c in want])
            for j, (box, _) in enumerate(want):
                np.testing.assert_array_equal(got["boxes"][i, j], box)
            assert not got["label"][i, len(want) :].any()
            assert not got["boxes"][i, len(want) :].any()
    with pytest.raises(ValueError, match=r"threshold is 1.5"):
        D.label_scenes(detect, None, images, threshold=1.5)
    with pytest.raises(ValueError, match="no images"):
        D.label_scenes(detect, None, images[:0])
