"""darknet's [yolo] layer in training, one cell, anchor and object at a time.

Source: darknet yolo_layer.c (process_batch, delta_yolo_class, delta_yolo_box, averages_yolo_deltas and the end of
forward_yolo_layer) and box.c, in their order. A delta is minus a gradient. Boxes are (x, y, w, h): centre and sides,
as a share of the image. Python floats, so float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cfg.yolo import YoloSpec

Box = tuple[float, float, float, float]
Truth = tuple[float, float, float, float, int]  # a Box and its class
CLASS_SURE = 0.25
INF = math.inf


def logistic(t: float) -> float:
    return 1 / (1 + math.exp(-t)) if t > -700 else 0.0


# --- overlaps of two boxes ---------------------------------------------------------------------------------------


def edges(box: Box) -> Box:
    """left, top, right, bottom"""
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def intersection(a: Box, b: Box) -> float:
    al, at, ar, ab = edges(a)
    bl, bt, br, bb = edges(b)
    w, h = min(ar, br) - max(al, bl), min(ab, bb) - max(at, bt)
    return w * h if w > 0 and h > 0 else 0.0


def union(a: Box, b: Box) -> float:
    return a[2] * a[3] + b[2] * b[3] - intersection(a, b)


def iou(a: Box, b: Box) -> float:
    return intersection(a, b) / union(a, b) if intersection(a, b) else 0.0


def enclosing(a: Box, b: Box) -> tuple[float, float]:
    """Sides of the smallest box around both."""
    al, at, ar, ab = edges(a)
    bl, bt, br, bb = edges(b)
    return max(ar, br) - min(al, bl), max(ab, bb) - min(at, bt)


def giou(a: Box, b: Box) -> float:
    w, h = enclosing(a, b)
    return iou(a, b) - (w * h - union(a, b)) / (w * h)


def aspect(a: Box, b: Box) -> float:
    """v of CIoU"""
    return 4 / math.pi**2 * (math.atan(b[2] / b[3]) - math.atan(a[2] / a[3])) ** 2


def ciou_of_shapes(a: Box, b: Box) -> float:
    """CIoU of two boxes with one centre, so without the distance of their centres."""
    v = aspect(a, b)
    return iou(a, b) - v * v / (1 - iou(a, b) + v + 1e-6)


SHAPE_OVERLAPS = {"iou": iou, "giou": giou, "diou": iou, "ciou": ciou_of_shapes}  # diou: of equal centres


# --- the delta of a box ------------------------------------------------------------------------------------------


def box_ascent(pred: Box, truth: Box, kind: str) -> list[float]:
    """darknet's stand-in for the derivative of IoU (GIoU, DIoU, CIoU) to x, y, w, h of `pred`."""
    pred = (pred[0], pred[1], pred[2] or 1.0, pred[3] or 1.0)
    px, py, pw, ph = pred
    tx, ty, tw, th = truth
    pl, pt, pr, pb = edges(pred)
    tl, tt, tr, tb = edges(truth)
    iw, ih = min(pr, tr) - max(pl, tl), min(pb, tb) - max(pt, tt)  # negative where they do not meet
    i = iw * ih
    u = pw * ph + tw * th - i
    apart = iw <= 0 or ih <= 0

    d_area = {"l": -ph, "r": ph, "t": -pw, "b": pw}
    d_i = {
        "l": -ih if pl > tl else 0.0,
        "r": ih if pr < tr else 0.0,
        "t": -iw if pt > tt else 0.0,
        "b": iw if pb < tb else 0.0,
    }
    d_u = {side: d_area[side] - d_i[side] for side in "lrtb"}
    rise = {side: (u * d_i[side] - i * d_u[side]) / u**2 if u > 0 else 0.0 for side in "lrtb"}

    cw, ch = max(pr, tr) - min(pl, tl), max(pb, tb) - min(pt, tt)
    if kind == "giou":
        c = cw * ch
        d_c = {
            "l": -ch if pl < tl else 0.0,
            "r": ch if pr > tr else 0.0,
            "t": -cw if pt < tt else 0.0,
            "b": cw if pb > tb else 0.0,
        }
        for side in "lrtb":
            penalty = (c * d_u[side] - u * d_c[side]) / c**2
            rise[side] = penalty if apart else rise[side] + penalty

    # The sides w and h move two edges half a step each: darknet forgets the half.
    gx, gy = rise["l"] + rise["r"], rise["t"] + rise["b"]
    gw, gh = rise["r"] - rise["l"], rise["b"] - rise["t"]
    if kind not in ("diou", "ciou"):
        return [gx, gy, gw, gh]

    c = cw**2 + ch**2
    distance = (px - tx) ** 2 + (py - ty) ** 2
    dcw_dx = (pr > tr) - (pl < tl)
    dch_dy = (pb > tb) - (pt < tt)
    dcw_dw = ((pr > tr) + (pl < tl)) / 2
    dch_dh = ((pb > tb) + (pt < tt)) / 2
    penalty_x = (2 * (tx - px) * c - 2 * cw * dcw_dx * distance) / c**2
    penalty_y = (2 * (ty - py) * c - 2 * ch * dch_dy * distance) / c**2
    penalty_w = 2 * cw * dcw_dw * distance / c**2
    penalty_h = 2 * ch * dch_dh * distance / c**2
    if kind == "ciou":
        v = aspect(pred, truth)
        alpha = v / (1 - i / u + v + 1e-6)
        turn = 8 / math.pi**2 * (math.atan(tw / th) - math.atan(pw / ph))
        penalty_w += alpha * turn * ph
        penalty_h -= alpha * turn * pw
    if apart:
        return [penalty_x, penalty_y, penalty_w, penalty_h]
    return [gx + penalty_x, gy + penalty_y, gw + penalty_w, gh + penalty_h]


# --- one image -------------------------------------------------------------------------------------------------


class Image:
    """Deltas of one image: call `background`, then `assign`, then `average`, as darknet does.

    output[a][k][row][column]: the layer's activated output; raw w and h unless new_coords.
    """

    def __init__(self, x: np.ndarray, truths: Sequence[Truth], spec: YoloSpec, input_hw: tuple[int, int], eps: float):
        self.spec, self.truths, self.eps = spec, truths, eps
        self.input_h, self.input_w = input_hw
        self.anchors, _, self.h, self.w = x.shape
        self.output = x.astype(np.float64)
        if not spec.new_coords:
            for k in [0, 1, *range(4, 5 + spec.classes)]:
                self.output[:, k] = np.vectorize(logistic)(self.output[:, k])
        self.output[:, :2] = spec.scale_x_y * self.output[:, :2] - (spec.scale_x_y - 1) / 2
        self.delta = np.zeros_like(self.output)
        self.ious: list[float] = []  # of the assignments
        self.gious: list[float] = []

    def box(self, a: int, row: int, column: int) -> Box:
        x, y, w, h = self.output[a, :4, row, column].tolist()
        anchor_w, anchor_h = self.spec.head_anchors[a]
        if self.spec.new_coords:
            w, h = 4 * w * w, 4 * h * h
        else:
            w, h = math.exp(w), math.exp(h)
        return (column + x) / self.w, (row + y) / self.h, w * anchor_w / self.input_w, h * anchor_h / self.input_h

    def class_mult(self, label: int) -> float:
        counts = [max(count, 1) for count in self.spec.counters_per_class]
        return min(max(counts) / counts[label], self.spec.max_delta) if counts else 1.0

    def background(self) -> None:
        """process_batch: every cell and anchor, positive or not."""
        spec = self.spec
        for row in range(self.h):
            for column in range(self.w):
                for a in range(self.anchors):
                    output, delta = self.output[a, :, row, column], self.delta[a, :, row, column]
                    pred = self.box(a, row, column)
                    best, best_truth = 0.0, None
                    for truth in self.truths:
                        overlap = iou(pred, truth[:4])
                        if overlap > best:
                            best, best_truth = overlap, truth
                    class_sure = any(p > CLASS_SURE for p in output[5:])
                    match = best if class_sure else 0.0
                    p = output[4]
                    delta[4] = spec.obj_normalizer * (0 - p)
                    if match > spec.ignore_thresh:
                        delta[4] = max(delta[4], spec.obj_normalizer * (match - p)) if spec.objectness_smooth else 0.0
                    if spec.truth_thresh < 1 and best > spec.truth_thresh:
                        assert best_truth is not None
                        label = best_truth[4]
                        target = best**2 if spec.objectness_smooth else 1.0
                        delta[4] = spec.obj_normalizer * (target - p)
                        self.class_delta(a, row, column, label)
                        if spec.objectness_smooth:  # and not for an assigned one
                            delta[5 + label] = self.class_mult(label) * (target - output[5 + label])
                        self.box_delta(a, row, column, best_truth)

    def assign(self) -> None:
        """process_batch: the objects one after the other."""
        spec = self.spec
        for truth in self.truths:
            x, y, w, h, label = truth
            column = min(int(np.float32(x) * np.float32(self.w)), self.w - 1)
            row = min(int(np.float32(y) * np.float32(self.h)), self.h - 1)
            shape = (0.0, 0.0, w, h)
            shapes = [(0.0, 0.0, aw / self.input_w, ah / self.input_h) for aw, ah in spec.anchors]
            best = 0
            for n, anchor in enumerate(shapes):
                if iou(anchor, shape) > iou(shapes[best], shape):
                    best = n
            chosen = [best] if best in spec.mask else []
            if spec.iou_thresh < 1:
                overlap = SHAPE_OVERLAPS[spec.iou_thresh_kind]
                for n, anchor in enumerate(shapes):
                    if n in spec.mask and n != best and overlap(anchor, shape) > spec.iou_thresh:
                        chosen.append(n)
            for n in chosen:
                a = spec.mask.index(n)
                pred = self.box(a, row, column)
                self.ious.append(iou(pred, truth[:4]))
                self.gious.append(giou(pred, truth[:4]))
                self.box_delta(a, row, column, truth)
                delta, p = self.delta[a, :, row, column], self.output[a, 4, row, column]
                if not spec.objectness_smooth or delta[4] == 0:
                    delta[4] = self.class_mult(label) * spec.obj_normalizer * (1 - p)
                self.class_delta(a, row, column, label)

    def class_delta(self, a: int, row: int, column: int, label: int) -> None:
        """delta_yolo_class"""
        spec = self.spec
        p, delta = self.output[a, 5:, row, column], self.delta[a, 5:, row, column]
        yes, no = 1 - self.eps / 2, self.eps / 2
        if delta[label] != 0:
            delta[label] = (yes - p[label]) * self.class_mult(label)
            return
        if spec.focal_loss:
            pt = p[label] + 1e-15
            g = -(1 - pt) * (2 * pt * math.log(pt) + pt - 1)
            for j in range(spec.classes):
                delta[j] = 0.5 * g * ((j == label) - p[j])
            return
        for j in range(spec.classes):
            delta[j] = (yes if j == label else no) - p[j]
        if spec.counters_per_class:
            delta[label] *= self.class_mult(label) * spec.cls_normalizer

    def box_delta(self, a: int, row: int, column: int, truth: Truth) -> None:
        """delta_yolo_box"""
        spec = self.spec
        tx, ty, tw, th, label = truth
        output, delta = self.output[a, :4, row, column], self.delta[a, :4, row, column]
        norm = spec.iou_normalizer * self.class_mult(label)
        if spec.iou_loss == "mse":
            anchor_w, anchor_h = spec.head_anchors[a]
            ratio_w, ratio_h = tw * self.input_w / anchor_w, th * self.input_h / anchor_h
            sides = [math.sqrt(r / 4) if spec.new_coords else math.log(r) for r in (ratio_w, ratio_h)]
            target = [tx * self.w - column, ty * self.h - row, *sides]
            for k in range(4):
                delta[k] += (2 - tw * th) * norm * (target[k] - output[k])
            return
        ascent = box_ascent(self.box(a, row, column), truth[:4], spec.iou_loss)
        for k in range(4):
            step = norm * ascent[k]
            if k >= 2 and not spec.new_coords:
                step *= math.exp(output[k])
            if not math.isfinite(step):
                step = 0.0
            delta[k] += min(max(step, -spec.max_delta), spec.max_delta)

    def average(self) -> None:
        """averages_yolo_deltas"""
        if self.spec.iou_thresh >= 1:
            return
        for row in range(self.h):
            for column in range(self.w):
                for a in range(self.anchors):
                    delta = self.delta[a, :, row, column]
                    classes = sum(d > 0 for d in delta[5:])
                    if delta[4] != 0 and classes > 0:
                        delta[:4] /= classes


def yolo_layer(
    x: np.ndarray,
    truths: Sequence[Sequence[Truth]],
    spec: YoloSpec,
    input_hw: tuple[int, int],
    *,
    label_smooth_eps: float | None = None,
) -> tuple[np.ndarray, dict[str, float]]:
    """x (N, A, 5 + C, H, W), the output of the convolution before the layer (after its logistic with new_coords), and
    the objects of each image -> deltas of x's shape, and darknet's printed cost in its parts."""
    eps = spec.label_smooth_eps if label_smooth_eps is None else label_smooth_eps
    images = [Image(one, of, spec, input_hw, eps) for one, of in zip(x, truths, strict=True)]
    for image in images:
        image.background()
        image.assign()
        image.average()
    delta = np.stack([image.delta for image in images])
    parts = {
        "box": 0.0,
        "objectness": float((delta[:, :, 4] ** 2).sum()),
        "classes": float((delta[:, :, 5:] ** 2).sum()),
    }
    if spec.iou_loss == "mse":
        parts["box"] = float((delta[:, :, :4] ** 2).sum())
        return delta, parts
    measured = [v for image in images for v in (image.gious if spec.iou_loss == "giou" else image.ious)]
    if measured:
        parts["box"] = spec.iou_normalizer * sum(1 - v for v in measured) / len(measured)
    parts["objectness"] *= spec.obj_normalizer
    parts["classes"] *= spec.obj_normalizer
    return delta, parts
