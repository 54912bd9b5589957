"""Synthetic images of the eight flat modalities: ultrasound to microscopy.

A recipe takes a random generator and a shape and returns (image, labels, descriptions): the image (H, W) or (H, W, 3)
RGB, grey levels as floats that `phantoms` rounds and clips to 0..255, the label map (H, W) uint16, object i as
i + 1, and one description an object. All geometry is in fractions of `shape`; colours are RGB 0..255.
The drawings are ours; they copy the look of a modality, no patient and no data set.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from phantoms.packaged import fill_outline, smooth_outline
from phantoms.volume import Drawing, ball, blur, field, mix, soft


def speckle(rng: np.random.Generator, shape: Sequence[int], sigma: Sequence[float]) -> np.ndarray:
    """Rayleigh speckle of mean about 1: the amplitude of a blurred complex Gaussian, as in ultrasound and OCT."""
    return np.hypot(field(rng, shape, sigma), field(rng, shape, sigma)) / 1.253


def blob(rng, shape, centre, radii, wobble: float = 0.0, angle: float = 0.0) -> np.ndarray:
    """Normalised radius of a wobbly ellipse: below 1 inside, 1 on the border.

    shape : (H, W); centre (y, x) and radii (y, x) : fractions of (H, W); angle : radians; wobble : relative amplitude.
    Returns (H, W) float64.
    """
    (h, w), (cy, cx), (ry, rx) = shape, centre, radii
    dy, dx = np.arange(h)[:, None] - cy * h, np.arange(w)[None] - cx * w
    u, v = (np.cos(angle) * dx + np.sin(angle) * dy) / (rx * w), (np.cos(angle) * dy - np.sin(angle) * dx) / (ry * h)
    theta, border = np.arctan2(v, u), np.ones(shape)
    for k in range(2, 9):  # harmonics: the finer, the weaker
        border += wobble * rng.uniform(0.5, 1.2) / np.sqrt(k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    return np.hypot(u, v) / border


def region(rng, shape, points, jitter: float = 0.0) -> np.ndarray:
    """Inside of a smooth closed curve -> (H, W) bool; points (x, y) and jitter in fractions of (W, H)."""
    p = np.asarray(points) + rng.uniform(-jitter, jitter, (len(points), 2))
    return fill_outline(smooth_outline(p * np.array(shape[::-1])), shape)


def stroke(canvas: np.ndarray, points: np.ndarray, thickness: float) -> None:
    """Draw a polyline of value 1 into canvas (H, W) float32, in place; points (n, 2) x, y px."""
    fixed = np.round(np.asarray(points) * 16).astype(np.int32)
    cv2.polylines(canvas, [fixed], False, 1.0, max(1, round(thickness)), cv2.LINE_AA, shift=4)


def vessels(rng, canvas, start, heading: float, width: float, length: float, bend: float = 0.0, depth: int = 2) -> None:
    """Draw a branching tree into canvas (H, W) float32, in place.

    start : (x, y) px; heading : radians, 0 to the right, positive turns down; bend : radians a step of 8 px;
    width, length : px of the trunk; depth : how often a branch may branch again.
    """
    path, angle = [np.asarray(start, float)], heading
    for _ in range(max(2, int(length / 8))):  # steps of 8 px
        angle += bend + rng.normal(0, 0.06)
        path.append(path[-1] + 8 * np.array([np.cos(angle), np.sin(angle)]))
        if depth and rng.random() < 0.1:
            side = rng.choice((-1, 1)) * rng.uniform(0.4, 0.9)
            vessels(rng, canvas, path[-1], angle + side, width * 0.6, length * 0.55, -bend / 2, depth - 1)
    n = len(path)
    for i in range(3):  # thinner towards the end
        stroke(canvas, np.array(path[i * n // 3 : (i + 1) * n // 3 + 1]), width * 0.85**i)


def vignette(shape, strength: float) -> np.ndarray:
    """(H, W) factor, 1 in the middle, 1 - strength in the corners."""
    return 1 - strength * ball(shape, (0.5, 0.5), (np.sqrt(0.5), np.sqrt(0.5))) ** 2.5


def draw_us(rng, shape=(480, 560)) -> Drawing:
    """Sector scan of soft tissue: a solid mass that casts a shadow, a cyst with bright tissue behind it."""
    h, w = shape
    y, x = np.mgrid[:h, :w].astype(np.float32)
    r, theta = np.hypot(y + 0.18 * h, x - w / 2), np.arctan2(x - w / 2, y + 0.18 * h)
    depth = (r / h - 0.26) / 0.86  # 0 at the transducer, 1 at the deepest arc
    ripple = depth + 0.010 * field(rng, shape, (30, 60))
    echo = 0.26 * np.exp(0.25 * field(rng, shape, (9, 26)) + 0.15 * field(rng, shape, (3, 12)))
    for at, gain in ((0.02, 0.9), (0.11, 0.45), (0.16, 0.3), (0.27, 0.4), (0.30, 0.3), (0.93, 0.5)):
        echo += gain * np.exp(-(((ripple - at) / 0.008) ** 2)) * (0.7 + 0.3 * field(rng, shape, 20))  # fascia
    labels = np.zeros(shape, np.uint16)
    plan = (((0.45, 0.36), (0.095, 0.105), 0.10, 0.055, 0.45), ((0.55, 0.64), (0.07, 0.075), 0.03, 0.008, 2.4))
    for i, (centre, radii, wobble, level, behind) in enumerate(plan):
        centre = np.array(centre) + rng.uniform(-0.02, 0.02, 2)
        rho = blob(rng, shape, centre, radii, wobble, rng.uniform(-0.3, 0.3))
        r0, t0 = (a[int(centre[0] * h), int(centre[1] * w)] for a in (r, theta))
        beam = soft(np.abs(theta - t0) / (radii[1] * w / r0 * 0.9), 0.12) / (1 + np.exp((r0 + 0.06 * h - r) / 8))
        echo = echo * (1 + (behind - 1) * beam)
        echo = mix(echo, level * np.exp(0.3 * field(rng, shape, 6)), soft(rho, 0.05))
        echo = echo + 0.10 * np.exp(-(((rho - 1.06) / 0.06) ** 2))  # bright wall
        labels[rho < 1] = i + 1
    grain = cv2.remap(speckle(rng, (600, 260), (1.4, 1.2)), (theta + 0.7) * 185, depth * 600, cv2.INTER_LINEAR)
    sector = (np.abs(theta) < 0.62) & (depth > 0) & (depth < 1)
    level = 205 + 125 * np.log10(np.maximum(echo * grain, 1e-3)) - 35 * depth  # log compression, attenuation
    text = ("solid hypoechoic mass with an acoustic shadow", "cyst with enhancement behind it")
    return np.where(sector, np.clip(level, 8, 255), 0), labels, text


RIGHT_LUNG = [(0.42, 0.17), (0.36, 0.12), (0.28, 0.15), (0.21, 0.25), (0.165, 0.4), (0.14, 0.56), (0.125, 0.72)]
RIGHT_LUNG += [(0.135, 0.79), (0.2, 0.745), (0.3, 0.715), (0.37, 0.72), (0.42, 0.735), (0.43, 0.6), (0.415, 0.46)]
RIGHT_LUNG += [(0.43, 0.34), (0.44, 0.24)]
LEFT_LUNG = [(1 - x, y + (0.025 if y > 0.7 else 0)) for x, y in RIGHT_LUNG]  # the left dome lies lower
HEART = [(0.43, 0.47), (0.5, 0.42), (0.56, 0.43), (0.61, 0.51), (0.67, 0.62), (0.7, 0.71), (0.68, 0.77)]
HEART += [(0.58, 0.79), (0.48, 0.79), (0.41, 0.75), (0.39, 0.66), (0.405, 0.55)]
TORSO = [(0.41, -0.1), (0.4, 0.05), (0.3, 0.1), (0.12, 0.15), (0.03, 0.25), (0.05, 0.5), (0.06, 0.8), (0.04, 1.2)]
TORSO += [(1 - x, y) for x, y in reversed(TORSO)]


def draw_xray(rng, shape=(512, 512)) -> Drawing:
    """Chest, frontal view: the patient's right lung is on the left of the image."""
    h, w = shape
    right, left, heart = (region(rng, shape, p, 0.008) for p in (RIGHT_LUNG, LEFT_LUNG, HEART))
    right, left = right & ~heart, left & ~heart
    body = blur(region(rng, shape, TORSO), 3)
    air = blur(right, 3) + blur(left, 3)
    image = 12 + body * (112 + 55 * blur(body, 60) + 5 * field(rng, shape, 14))
    image = mix(image, 58 + 10 * field(rng, shape, 25) + 4 * field(rng, shape, 4), air * 0.93)
    image += 26 * blur(heart, 3) + 24 * soft(np.abs(np.arange(w) / w - 0.5)[None] / 0.055, 0.1) * body
    image += 18 * body * soft((0.86 - np.arange(h) / h)[:, None] / 0.1, 0.15)  # liver and bowel below the domes
    marks = np.zeros(shape, np.float32)
    for side in (-1, 1):
        for _ in range(11):  # lung vessels fan out from the hila
            heading = rng.uniform(-1.4, 1.4) + (side < 0) * np.pi
            vessels(rng, marks, (w * (0.5 + side * 0.09), h * 0.46), heading, 4, 150)
    image += 22 * blur(marks, 1.2) * air
    for side in (-1, 1):
        for i in range(9):
            reach, y0 = 0.25 + 0.13 * np.sin(min(i, 5) / 5 * np.pi / 2), 0.1 + 0.068 * i
            turn = np.linspace(0.15, 2.45, 40)[:, None]  # round the chest: spine, side (pi / 2), front
            path = np.hstack([0.5 + side * reach * np.sin(turn), y0 + 0.1 * (1 - np.cos(turn))])
            for part, gain in ((path[:27], 1.0), (path[24:], 0.55)):  # the front end is cartilage, fainter
                rib, rim = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
                stroke(rib, part * (w, h), 0.025 * w)
                stroke(rim, (part + (0, 0.012)) * (w, h), 2)
                image += gain * (15 * blur(rib, 1.5) + 10 * blur(rim, 1)) * body
        bone = np.zeros(shape, np.float32)  # clavicle
        ends = np.array([(0.5 + side * 0.05, 0.165), (0.5 + side * 0.2, 0.135), (0.5 + side * 0.37, 0.15)])
        stroke(bone, ends * (w, h), 15)
        image += 22 * blur(bone, 2) * body
    labels = right * np.uint16(1) + left * np.uint16(2) + heart * np.uint16(3)
    text = ("lung, on the left of the image", "lung, on the right of the image", "heart")
    return image + 4 * field(rng, shape, 0.7), labels, text


def draw_mammography(rng, shape=(640, 448)) -> Drawing:
    """Oblique view of a breast with pectoral muscle, a spiculated mass and a smooth oval one."""
    h, w = shape
    y, x = np.mgrid[:h, :w].astype(np.float32)
    rho = blob(rng, shape, (0.53, 0.0), (0.45, 0.8), 0.012)
    inside = soft(rho, 0.006)
    # ducts and septa converge on the nipple: stretch a random field along the rays from it
    ray, dist = np.arctan2(y - 0.55 * h, 0.85 * w - x), np.hypot(y - 0.55 * h, x - 0.85 * w)
    strands = cv2.remap(field(rng, (400, 260), (3, 12)), dist / 2.5, (ray + np.pi) * 63, cv2.INTER_LINEAR)
    gland = soft(blob(rng, shape, (0.55, 0.42), (0.27, 0.36), 0.16), 0.12)
    tissue = 0.5 * strands + 0.5 * field(rng, shape, 18) + 0.4 * field(rng, shape, 6) + 0.3 * field(rng, shape, 2)
    image = 62 + 9 * tissue + gland * (42 + 22 * tissue)
    image = mix(image, 150 + 5 * field(rng, shape, (12, 4)), soft((x / w / 0.42 + y / h / 0.55), 0.025))  # pectoral
    labels = np.zeros(shape, np.uint16)
    plan = (((0.45, 0.40), (0.052, 0.070), 0.10, 0.06), ((0.68, 0.33), (0.030, 0.055), 0.02, 0.05))
    for i, (centre, radii, wobble, width) in enumerate(plan):
        centre = np.array(centre) + rng.uniform(-0.03, 0.03, 2)
        mass = blob(rng, shape, centre, radii, wobble, rng.uniform(-0.5, 0.5))
        image = mix(image, 188 - 25 * i + 5 * tissue, 0.85 * soft(mass, width))
        labels[mass < 1] = i + 1
        spikes = np.zeros(shape, np.float32)
        for a in rng.uniform(0, 2 * np.pi, 22 * (i == 0)):  # spicules leave the first mass only
            reach = np.linspace(0.8, rng.uniform(1.2, 1.9), 8)[:, None] * np.array(radii)[::-1] * (w, h)
            stroke(spikes, centre[::-1] * (w, h) + reach * (np.cos(a), np.sin(a)), 1)
        image += 38 * blur(spikes, 1.1)
    thick = np.clip((1 - rho) / 0.10, 0, 1) ** 0.6  # compressed breast thins at its rim
    image = inside * image * (0.45 + 0.55 * thick) + 26 * np.exp(-(((rho - 0.99) / 0.006) ** 2))
    return 8 + image + 3 * field(rng, shape, 0.7), labels, ("spiculated mass", "smooth oval mass")


def draw_dermoscopy(rng, shape=(480, 640)) -> Drawing:
    """Pigmented lesion with an irregular border, a pigment network, globules and hairs."""
    h, w = shape
    image = np.full((h, w, 3), (222.0, 176.0, 156.0)) + 5 * field(rng, shape, 60)[..., None] * (0.6, 1, 1)
    image += 3 * field(rng, shape, 2)[..., None] - 6 * np.clip(field(rng, shape, 4), 1, 3)[..., None] * (0.2, 1, 0.8)
    rho = blob(rng, shape, (0.5, 0.5), (0.27, 0.24), 0.09, rng.uniform(0, 3)) + 0.05 * field(rng, shape, 9)
    inside = soft(rho, 0.045)
    tone = np.clip(0.5 + 0.28 * field(rng, shape, 38) + 0.5 * (0.75 - rho), 0, 1)  # light to dark brown
    pigment = np.array((168.0, 112, 82)) + tone[..., None] * (np.array((72.0, 42, 34)) - (168, 112, 82))
    net = np.exp(-((field(rng, shape, 2.8) / 0.4) ** 2))  # zero lines of a random field make a network
    pigment -= 20 * (net * np.clip(rho, 0, 1))[..., None]
    pigment -= 42 * (np.clip(field(rng, shape, 5) - 1.5, 0, 1) * (rho < 0.9))[..., None]  # globules
    image = mix(image, pigment, inside * 0.95)
    hairs = np.zeros(shape, np.float32)
    for _ in range(6):
        t, a, c = np.linspace(-0.6, 0.6, 40), rng.uniform(-0.9, 0.9), rng.uniform(-0.5, 0.5)
        p = np.stack([t * np.cos(a) - c * t**2 * np.sin(a), t * np.sin(a) + c * t**2 * np.cos(a)], 1)
        stroke(hairs, (p * rng.uniform(0.5, 0.9) + rng.uniform(0.15, 0.85, 2)) * (w, h), rng.choice((1, 2, 2)))
    image = mix(image, (52, 36, 30), 0.8 * blur(hairs, 0.7)) * vignette(shape, 0.35)[..., None]
    return image + 2.5 * rng.standard_normal(image.shape), (rho < 1).astype(np.uint16), ("pigmented lesion",)


def draw_endoscopy(rng, shape=(480, 560)) -> Drawing:
    """Colon with folds, a dark lumen and two polyps, lit from the camera, with wet highlights."""
    h, w = shape
    y, x = np.mgrid[:h, :w].astype(np.float32)
    lumen = ball(shape, (0.40, 0.60), (0.42, 0.42)) + 0.04 * field(rng, shape, 45)  # about 1 where the wall is near
    rings = 8.5 * np.log(np.maximum(lumen, 0.08)) + 0.5 * field(rng, shape, 40)
    height = 13 * np.abs(np.cos(rings)) ** 0.7 * np.clip(lumen, 0.1, 1.3) + 4 * field(rng, shape, 26)
    height += 0.3 * field(rng, shape, 3)
    labels = np.zeros(shape, np.uint16)
    tint = np.zeros(shape)
    for i, (centre, radii) in enumerate((((0.62, 0.33), (0.15, 0.14)), ((0.30, 0.34), (0.085, 0.075)))):
        centre = np.array(centre) + rng.uniform(-0.02, 0.02, 2)
        rho = blob(rng, shape, centre, radii, 0.045)
        dome = np.clip(1 - rho**2, 0, None) ** 0.75 * radii[0] * h * 0.75
        height = mix(height, 6 + dome + field(rng, shape, 6), soft(rho, 0.03))
        tint = np.maximum(tint, soft(rho, 0.04))
        labels[rho < 1] = i + 1
    gy, gx = np.gradient(blur(height, 1.2))
    to_light = np.stack([(0.35 * w - x) / w, (0.2 * h - y) / h, np.full(shape, 0.9)], -1)  # lamp beside the lens
    normal = np.stack([-gx, -gy, np.ones(shape)], -1)
    cosine = (normal * to_light).sum(-1) / np.linalg.norm(normal, axis=-1) / np.linalg.norm(to_light, axis=-1)
    cast = np.roll(blur(tint, 6), (9, 9), (0, 1)) * (1 - tint)  # the polyp shades the wall behind it
    light = (0.35 + 0.75 * np.clip(cosine, 0, 1)) * (0.2 + 0.8 * np.clip(lumen, 0, 1) ** 1.2) * (1 - 0.4 * cast)
    tree = np.zeros(shape, np.float32)
    for _ in range(14):
        vessels(rng, tree, rng.uniform(0, 1, 2) * (w, h), rng.uniform(0, 6.3), 2, 130)
    colour = np.full((h, w, 3), (226.0, 142.0, 122.0))
    colour = mix(colour, (196, 84, 82), 0.45 * blur(tree, 1) * (1 - tint))
    colour = mix(colour, (222, 112, 100), 0.75 * tint) + 6 * field(rng, shape, 12)[..., None]
    wet = np.clip((cosine + 0.01 * field(rng, shape, 3) - 0.988) / 0.008, 0, 1) * (field(rng, shape, 12) > 0.9)
    image = mix(colour * light[..., None], (255, 250, 245), blur(wet, 0.8) * 0.9) * vignette(shape, 0.55)[..., None]
    corner = np.abs(x / w - 0.5) + np.abs(y / h - 0.5) * 0.85 < 0.76  # the scope's black corners
    image = (image + 3 * rng.standard_normal(image.shape)) * corner[..., None]
    return image, labels, ("large polyp", "small polyp")


def draw_fundus(rng, shape=(512, 512)) -> Drawing:
    """Colour photograph of a left eye: optic disc with its cup, two vessel arcades, macula."""
    h, w = shape
    eye = ball(shape, (0.5, 0.5), (0.475, 0.475))
    image = np.full((h, w, 3), (206.0, 98.0, 52.0)) + 7 * field(rng, shape, 45)[..., None] * (0.6, 1, 0.7)
    image += 3 * field(rng, shape, 3)[..., None] * (0.5, 1, 0.5)
    image = mix(image, (118, 40, 22), 0.75 * np.exp(-((ball(shape, (0.53, 0.60), (0.10, 0.11)) / 0.9) ** 2)))
    centre = np.array((0.50, 0.27)) + rng.uniform(-0.015, 0.015, 2)
    disc = blob(rng, shape, centre, (0.082, 0.073), 0.02)
    cup = blob(rng, shape, centre + (0.004, 0.010), (0.040, 0.037), 0.03)
    image = mix(mix(image, (248, 186, 118), soft(disc, 0.05)), (255, 236, 190), 0.9 * soft(cup, 0.09))
    for colour, width in (((120, 22, 16), 7), ((168, 36, 22), 5)):  # veins, then arteries
        tree = np.zeros(shape, np.float32)
        for up in (-1, 1):
            for heading, bend, length in ((1.25, -0.026, 430), (2.3, 0.02, 200), (1.75, 0.0, 150)):
                start = (centre[::-1] - (0.012, 0)) * (w, h) + rng.uniform(-5, 5, 2)
                vessels(rng, tree, start, up * (heading + rng.normal(0, 0.1)), width, length * w / 512, up * bend)
        image = mix(image, colour, 0.78 * blur(tree, 1.0) * (1 - 0.25 * soft(cup, 0.1)))
    image = image * (1.08 - 0.45 * np.clip(eye, 0, 1) ** 3)[..., None] + 2.5 * rng.standard_normal(image.shape)
    labels = (disc < 1).astype(np.uint16)
    labels[cup < 1] = 2
    return image * soft(eye, 0.003)[..., None], labels, ("optic disc, its cup left out", "optic cup")


def draw_oct(rng, shape=(384, 512)) -> Drawing:
    """Retinal layers through the fovea with three cysts inside the retina and fluid below it."""
    h, w = shape
    y, x = np.mgrid[:h, :w] / np.array((h, w)).reshape(2, 1, 1)  # fractions
    pigment = 0.66 + 0.05 * (x - 0.5) ** 2 + 0.004 * field(rng, shape, (400, 40))[:1]  # epithelium below the retina
    lens = 0.075 * np.clip(1 - ((x - rng.uniform(0.53, 0.6)) / 0.15) ** 2, 0, None)  # height of the fluid
    outer = pigment - lens
    top = 0.38 + 0.05 * (x - 0.5) ** 2 + 0.075 * np.exp(-(((x - 0.5) / 0.075) ** 2)) - 0.6 * lens
    t = (y - top) / (outer - top)  # 0 at the inner, 1 at the outer border of the retina
    knots = (-0.02, 0.0, 0.13, 0.15, 0.31, 0.33, 0.43, 0.45, 0.53, 0.56, 0.80, 0.82, 0.88, 0.97, 1.0)
    echo = np.interp(t, knots, (3, 150, 150, 95, 105, 52, 50, 98, 95, 44, 48, 80, 70, 165, 120))
    below = (y - pigment) * h  # px under the epithelium
    echo = np.where(t > 1, 10, echo)
    echo = np.where(below > -2, 215 * np.exp(-(((below - 3) / 4) ** 2)) + 88 * np.exp(-below / 45) * (below > 3), echo)
    echo *= np.where(below > 8, 1 + 0.28 * field(rng, shape, (5, 9)), 1)  # choroid: vessels
    labels = np.zeros(shape, np.uint16)
    for i, (cy, cx) in enumerate(((0.52, 0.26), (0.505, 0.39), (0.53, 0.78))):
        radii = rng.uniform((0.028, 0.032), (0.042, 0.058))
        cyst = (t < 0.1) + blob(rng, shape, np.array((cy, cx)) + rng.uniform(-0.012, 0.012, 2), radii, 0.05)
        echo = mix(echo, 14, soft(cyst, 0.08))
        labels[cyst < 1] = i + 1
    labels[(t > 1) & (below < -2)] = 4
    for at in rng.uniform(0, 1, 4):  # retinal vessels shade what lies below
        echo *= 1 - 0.35 * np.exp(-(((x - at) / 0.008) ** 2)) * (t > 0.1)
    grain = 0.25 + 0.75 * speckle(rng, shape, (0.8, 1.3))
    image = blur(echo, 0.8) * grain + 9 * speckle(rng, shape, (0.7, 1.0))
    return image, labels, ("cyst in the retina",) * 3 + ("fluid below the retina",)


def draw_microscope(rng, shape=(512, 640), count: int = 118) -> Drawing:
    """Section stained pink and purple; `count` nuclei, some of them touching."""
    h, w = shape
    image = np.full((h, w, 3), (228.0, 172.0, 202.0)) + 7 * field(rng, shape, 30)[..., None]
    fibres = 0.7 * field(rng, shape, (3, 9)) + field(rng, shape, 6)
    image += fibres[..., None] * (5, 10, 6) + 4 * field(rng, shape, 1.2)[..., None]
    gap = soft(2.9 - field(rng, shape, 22), 0.08)
    image = mix(image, (246, 240, 245), 0.85 * gap)
    labels, placed = np.zeros(shape, np.uint16), []
    while len(placed) < count:
        y, x = rng.uniform(16, h - 16), rng.uniform(16, w - 16)
        long, short = rng.uniform(10, 15), rng.uniform(8, 11)
        near = any((y - v) ** 2 + (x - u) ** 2 < ((long + r) * 0.9) ** 2 for v, u, r in placed)
        if near or gap[int(y), int(x)] > 0.05:
            continue
        placed.append((y, x, long))
        y0, x0 = int(y) - 24, int(x) - 24  # draw in a window: 48 px hold the largest nucleus
        rows, cols = slice(max(0, y0), y0 + 48), slice(max(0, x0), x0 + 48)
        part = image[rows, cols]
        at = ((y - rows.start) / part.shape[0], (x - cols.start) / part.shape[1])
        radii = (short / part.shape[0], long / part.shape[1])
        rho = blob(rng, part.shape[:2], at, radii, 0.05, rng.uniform(0, np.pi))
        tone = rng.uniform(0.0, 1.0)
        colour = np.array((96.0, 62, 140)) + tone * np.array((46.0, 44, 30))
        chromatin = (
            15 * field(rng, part.shape[:2], 1.6)[..., None] - 26 * np.exp(-(((rho - 0.93) / 0.1) ** 2))[..., None]
        )
        part = mix(part, (206, 138, 184), 0.5 * soft(rho / 1.45, 0.08))  # cytoplasm
        image[rows, cols] = mix(part, colour + chromatin, 0.92 * soft(rho, 0.06))
        labels[rows, cols][(rho < 1) & (labels[rows, cols] == 0)] = len(placed)
    return image + 3 * rng.standard_normal(image.shape), labels, ("nucleus",) * count
