"""Synthetic images and volumes of the challenge's modalities but ultrasound, and the tools that draw them.

A recipe takes a random generator and a shape, and returns (image, objects). The image is (H, W),
(H, W, 3) RGB or (D, H, W), grey levels 0..255 as floats. An object is a description and a mask.
Later objects are painted over earlier ones. All geometry is in fractions of the shape, (z, y, x).
The drawings are ours: they copy the look of a modality, no patient and no data set.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from formats.intensity import window_to_uint8

SPLINE_STEPS = 12  # points drawn between two clicked points: fine enough for a gap of 60 px


def blur(a: np.ndarray, sigma: float | Sequence[float]) -> np.ndarray:
    """Gaussian blur of (H, W) or (D, H, W) -> float32; sigma in px, one number or one an axis."""
    s = np.broadcast_to(np.asarray(sigma, float), a.ndim)
    if a.ndim == 2:
        return cv2.GaussianBlur(a.astype(np.float32), (0, 0), sigmaX=s[1], sigmaY=s[0])
    planes = np.stack([blur(plane, s[1:]) for plane in a])
    taps = 2 * int(np.ceil(3 * s[0])) + 1
    return cv2.GaussianBlur(planes.reshape(len(a), -1), (1, taps), sigmaX=s[0], sigmaY=s[0]).reshape(a.shape)


def field(rng: np.random.Generator, shape: Sequence[int], sigma: float | Sequence[float]) -> np.ndarray:
    """Smooth random field, mean 0, standard deviation 1; sigma (px) sets the size of its blobs."""
    f = blur(rng.standard_normal(tuple(shape), dtype=np.float32), sigma)
    return (f - f.mean()) / f.std()


def speckle(rng, shape, sigma) -> np.ndarray:
    """Rayleigh speckle of OCT, mean about 1: amplitude of a complex Gaussian."""
    return np.hypot(field(rng, shape, sigma), field(rng, shape, sigma)) / 1.253


def ball(shape, centre, radii) -> np.ndarray:
    """Normalised radius of an ellipse or ellipsoid: below 1 inside, 1 on the border."""
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    return np.sqrt(sum(((g / n - c) / r) ** 2 for g, n, c, r in zip(grid, shape, centre, radii, strict=True)))


def blob(rng, shape, centre, radii, wobble: float = 0.0, angle: float = 0.0) -> np.ndarray:
    """`ball` in 2D with a wavy border (relative amplitude `wobble`), turned by `angle` radians."""
    (h, w), (cy, cx), (ry, rx) = shape, centre, radii
    dy, dx = np.arange(h)[:, None] - cy * h, np.arange(w)[None] - cx * w
    u, v = (np.cos(angle) * dx + np.sin(angle) * dy) / (rx * w), (np.cos(angle) * dy - np.sin(angle) * dx) / (ry * h)
    theta, border = np.arctan2(v, u), np.ones(shape)
    for k in range(2, 9):  # harmonics: the finer, the weaker
        border += wobble * rng.uniform(0.5, 1.2) / np.sqrt(k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    return np.hypot(u, v) / border


def soft(rho: np.ndarray, width: float) -> np.ndarray:
    """Membership 1 inside (rho < 1) to 0 outside, over about 4 * width."""
    return 1 / (1 + np.exp(np.clip((rho - 1) / width, -50, 50)))


def mix(image: np.ndarray, value, weight: np.ndarray) -> np.ndarray:
    """Move the image towards `value` (number, colour or array) by weight 0..1."""
    return image + (np.asarray(value) - image) * (weight if weight.ndim == image.ndim else weight[..., None])


def fill_outline(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The inside of the closed Catmull-Rom curve through `points` (n, 2), x and y in px -> (H, W) bool"""
    p0, p1, p2, p3 = (np.roll(points, shift, axis=0)[:, None, :] for shift in (1, 0, -1, -2))  # each (n, 1, 2)
    t = (np.arange(SPLINE_STEPS) / SPLINE_STEPS)[None, :, None]  # (1, steps, 1)
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round(curve.reshape(-1, 2) * 16).astype(np.int32)], 1, shift=4)  # 1/16 px fixed point
    return mask.astype(bool)


def stroke(canvas: np.ndarray, points: np.ndarray, thickness: float) -> np.ndarray:
    """Draw a polyline of value 1 into canvas (H, W) float32, and return it; points (n, 2), px."""
    fixed = np.round(np.asarray(points) * 16).astype(np.int32)
    return cv2.polylines(canvas, [fixed], False, 1.0, max(1, round(thickness)), cv2.LINE_AA, shift=4)


def vessels(rng, canvas, start, heading: float, width: float, length: float, bend: float = 0.0, depth: int = 2) -> None:
    """Draw a branching tree into canvas (H, W) float32; start (x, y), width and length in px.

    heading : radians, 0 to the right, positive turns down.   bend : radians a step.
    """
    path, angle = [np.asarray(start, float)], heading
    for _ in range(max(2, int(length / 8))):  # steps of 8 px
        angle += bend + rng.normal(0, 0.06)
        path.append(path[-1] + 8 * np.array((np.cos(angle), np.sin(angle))))
        if depth and rng.random() < 0.1:
            side = rng.choice((-1, 1)) * rng.uniform(0.4, 0.9)
            vessels(rng, canvas, path[-1], angle + side, width * 0.6, length * 0.55, -bend / 2, depth - 1)
    n = len(path)
    for i in range(3):  # thinner towards the end
        stroke(canvas, np.array(path[i * n // 3 : (i + 1) * n // 3 + 1]), width * 0.85**i)


def draw_ct(rng, shape=(12, 160, 160)):
    """Upper abdomen after contrast: liver, spleen, kidneys, aorta, in HU; the 400/40 window."""
    body = ball(shape, (0.5, 0.5, 0.5), (9, 0.37, 0.47))
    bump = 0.06 * field(rng, shape, (4, 9, 9))
    hu = np.where(body < 1, -105.0, -1000.0)
    hu[(body < 0.92) & (body > 0.83)] = 58  # muscle of the wall
    hu[(body < 0.83) & (field(rng, shape, (2, 6, 6)) > 0.1)] = 38  # bowel
    angle = np.arctan2(*np.ogrid[-0.5 : 0.5 : shape[1] * 1j, -0.5 : 0.5 : shape[2] * 1j])
    slant = angle * 9 + np.arange(shape[0])[:, None, None] * 0.35
    hu[(np.abs(body - 0.86) < 0.022) & (np.cos(slant) > 0.75)] = 420  # ribs, oblique to the slices
    stomach = ball(shape, (0.3, 0.34, 0.66), (0.5, 0.13, 0.13)) + bump
    hu[stomach < 1], hu[stomach < 0.86] = 60, 12
    hu[(stomach < 0.86) & (np.arange(shape[1])[None, :, None] < 0.29 * shape[1])] = -850  # gas rises
    muscle = np.minimum(*(ball(shape, (0.5, 0.735, c), (9, 0.075, 0.09)) for c in (0.40, 0.60)))
    spine = ball(shape, (0.5, 0.655, 0.5), (9, 0.075, 0.085))
    arch = np.minimum(ball(shape, (0.5, 0.785, 0.5), (9, 0.05, 0.02)), ball(shape, (0.5, 0.74, 0.5), (9, 0.02, 0.10)))
    hu[muscle < 1], hu[arch < 1], hu[spine < 1], hu[spine < 0.86] = 58, 380, 420, 190
    hu[ball(shape, (0.5, 0.748, 0.5), (9, 0.028, 0.035)) < 1] = 35  # canal
    move = rng.uniform(-0.02, 0.02, (4, 3))  # organs lie a little elsewhere in every case
    lobes = ((0.45, 0.42, 0.29), (0.62, 0.24, 0.22)), ((0.4, 0.33, 0.45), (0.4, 0.12, 0.17))
    edge, kidney = bump + 9 * (body > 0.81), (0.42, 0.095, 0.065)  # organs stay inside the ribs
    plan = (
        ("liver", np.minimum(*(ball(shape, at + move[0], radii) for at, radii in lobes)) + edge, 112),
        ("spleen", ball(shape, (0.4, 0.55, 0.79) + move[1], (0.5, 0.15, 0.085)) + edge, 128),
        ("kidney, on the left of the image", ball(shape, (0.58, 0.65, 0.30) + move[2], kidney) + bump / 2, 185),
        ("kidney, on the right of the image", ball(shape, (0.58, 0.65, 0.69) + move[3], kidney) + bump / 2, 185),
        ("aorta", ball(shape, (0.5, 0.535, 0.53), (9, 0.036, 0.036)), 200),
    )
    for what, rho, value in plan:
        hu[rho < 1] = value
        if "kidney" in what:
            hu[rho < 0.62], hu[rho < 0.35] = 140, -60  # medulla, fat of the sinus
    objects = [(what, rho < 1) for what, rho, _ in plan]
    only_liver = objects[0][1] & ~np.any([mask for _, mask in objects[1:]], axis=0)
    hu[only_liver & (field(rng, shape, (2, 2.2, 2.2)) > 1.9)] = 165  # vessels of the liver
    hu = blur(hu, (0.4, 0.75, 0.75)) + 13 * field(rng, shape, (0.3, 0.8, 0.8))
    return window_to_uint8(hu), objects


def draw_mr(rng, shape=(10, 160, 144)):
    """Axial T1-weighted head with contrast: ventricles, a tumour with a rim, a bias field."""
    head = ball(shape, (0.5, 0.5, 0.5), (1.1, 0.46, 0.44)) + 0.01 * field(rng, shape, (4, 14, 14))
    fold, bump = field(rng, shape, (1.3, 2.9, 2.9)), 0.05 * field(rng, shape, (4, 9, 9))
    image = np.where(head < 1, 205.0, 6.0)  # scalp fat
    image[head < 0.925], image[head < 0.86] = 22, 38  # skull, fluid
    depth = (0.85 - head) / 0.85  # 0 at the surface of the brain
    sulcus = (np.abs(fold) < 0.22) & (depth < 0.2)
    middle = np.abs(np.arange(shape[2]) / shape[2] - 0.5)[None, None]  # fissure between the hemispheres
    brain = (head < 0.845) & ~sulcus & ((middle > 0.008) | (ball(shape, (0.5, 0.5, 0.5), (9, 0.17, 0.2)) < 1))
    image[brain] = 112
    image[brain & (depth > 0.05) & ((np.abs(fold) > 0.75) | (depth > 0.24))] = 165  # white matter between the sulci
    plan = []
    horns = (0.40, 0.045, 0.34, 0.095, 0.035), (0.55, 0.055, 0.42, 0.11, 0.03), (0.64, 0.085, 0.34, 0.075, 0.034)
    for side, what in ((-1, "left of"), (1, "right of")):
        image[ball(shape, (0.45, 0.49, 0.5 + side * 0.115), (0.35, 0.085, 0.04)) < 1] = 120  # nucleus
        parts = [ball(shape, (0.52, y, 0.5 + side * x), radii) for y, x, *radii in horns]
        plan.append((f"lateral ventricle, on the {what} the image", np.minimum.reduce(parts) + bump))
    centre = (0.5, 0.33, 0.70) + rng.uniform(-0.03, 0.03, 3)
    tumour = ball(shape, centre, (0.26, 0.085, 0.085)) + 0.10 * field(rng, shape, (3, 5, 5))
    plan.append(("tumour with its rim", tumour))
    image = mix(image, 95, 0.7 * soft(ball(shape, centre, (0.38, 0.14, 0.13)) + bump, 0.08) * brain)  # swelling
    for _, rho in plan:
        image[rho < 1] = 40
    image[(tumour < 1) & (tumour > 0.72)], image[tumour <= 0.72] = 215, 75
    image = blur(image, (0.4, 0.7, 0.7)) * (1 + 0.10 * field(rng, shape, (12, 50, 50)))  # bias field of the coil
    image = np.hypot(image + 5 * rng.standard_normal(shape), 5 * rng.standard_normal(shape))  # magnitude: Rician noise
    return image, [(what, rho < 1) for what, rho in plan]


def draw_pet(rng, shape=(14, 64, 64)):
    """Chest with three hot lesions, warm heart and liver; blurred, with Poisson noise."""
    body = ball(shape, (0.5, 0.5, 0.5), (9, 0.34, 0.44))
    activity = np.where(body < 1, 1.0, 0.02)
    lungs = np.minimum(*(ball(shape, (0.6, 0.47, side), (0.7, 0.22, 0.13)) for side in (0.32, 0.68)))
    activity[lungs < 1] = 0.35
    heart = ball(shape, (0.5, 0.45, 0.57), (0.25, 0.12, 0.11))
    activity[heart < 1], activity[heart < 0.6] = 4.0, 1.4  # muscle around blood
    activity[ball(shape, (0.05, 0.45, 0.32), (0.25, 0.24, 0.2)) < 1] = 2.2  # dome of the liver
    activity[ball(shape, (0.5, 0.74, 0.5), (9, 0.06, 0.06)) < 1] = 1.7  # marrow
    objects = []
    plan = (((0.62, 0.42, 0.30), 0.065, 11), ((0.5, 0.56, 0.72), 0.055, 9), ((0.74, 0.60, 0.47), 0.05, 8))
    for centre, radius, uptake in plan:
        centre, radii = centre + rng.uniform(-0.02, 0.02, 3), (radius * shape[1] / shape[0], radius, radius)
        lesion = ball(shape, centre, radii) + 0.1 * field(rng, shape, 2)
        activity[lesion < 1] = uptake
        objects.append(("hot lesion", lesion < 1))
    counts = rng.poisson(25 * blur(activity, 1.1)) / 25  # point spread: 1.1 voxels, 10 mm full width at half maximum
    return 255 * blur(counts, 0.6) / 7, objects


RIGHT_LUNG = [(0.42, 0.17), (0.36, 0.12), (0.28, 0.15), (0.21, 0.25), (0.165, 0.4), (0.14, 0.56), (0.125, 0.72)]
RIGHT_LUNG += [(0.135, 0.79), (0.2, 0.745), (0.3, 0.715), (0.37, 0.72), (0.42, 0.735), (0.43, 0.6), (0.415, 0.46)]
RIGHT_LUNG += [(0.43, 0.34), (0.44, 0.24)]
LEFT_LUNG = [(1 - x, y + (0.025 if y > 0.7 else 0)) for x, y in RIGHT_LUNG]  # the left dome lies lower
HEART = [(0.43, 0.47), (0.5, 0.42), (0.56, 0.43), (0.61, 0.51), (0.67, 0.62), (0.7, 0.71), (0.68, 0.77)]
HEART += [(0.58, 0.79), (0.48, 0.79), (0.41, 0.75), (0.39, 0.66), (0.405, 0.55)]
TORSO = [(0.41, -0.1), (0.4, 0.05), (0.3, 0.1), (0.12, 0.15), (0.03, 0.25), (0.05, 0.5), (0.06, 0.8), (0.04, 1.2)]
TORSO += [(1 - x, y) for x, y in reversed(TORSO)]


def draw_xray(rng, shape=(512, 512)):
    """Chest, frontal view: the patient's right lung is on the left of the image."""
    h, w = shape
    # each with how far its points may lie elsewhere in another case
    curves = ((RIGHT_LUNG, 0.008), (LEFT_LUNG, 0.008), (HEART, 0.008), (TORSO, 0.0))
    curves = [np.array(points) + rng.uniform(-by, by, (len(points), 2)) for points, by in curves]
    right, left, heart, torso = (fill_outline(points * (w, h), shape) for points in curves)
    right, left, body = right & ~heart, left & ~heart, blur(torso, 3)
    air = blur(right, 3) + blur(left, 3)
    image = 12 + body * (112 + 55 * blur(body, 60) + 5 * field(rng, shape, 14))
    image = mix(image, 58 + 10 * field(rng, shape, 25) + 4 * field(rng, shape, 4), air * 0.93)
    image += 26 * blur(heart, 3) + 24 * soft(np.abs(np.arange(w) / w - 0.5)[None] / 0.055, 0.1) * body
    image += 18 * body * soft((0.86 - np.arange(h) / h)[:, None] / 0.1, 0.15)  # liver and bowel below the domes
    marks = np.zeros(shape, np.float32)
    for x, turn in [(0.41, np.pi)] * 11 + [(0.59, 0)] * 11:  # lung vessels fan out from the hila
        vessels(rng, marks, (w * x, h * 0.46), rng.uniform(-1.4, 1.4) + turn, 4, 150)
    image += 22 * blur(marks, 1.2) * air
    for side in (-1, 1):
        for i in range(9):
            reach, y0 = 0.25 + 0.13 * np.sin(min(i, 5) / 5 * np.pi / 2), 0.1 + 0.068 * i
            turn = np.linspace(0.15, 2.45, 40)[:, None]  # round the chest: spine, side (pi / 2), front
            path = np.hstack([0.5 + side * reach * np.sin(turn), y0 + 0.1 * (1 - np.cos(turn))])
            for part, gain in ((path[:27], 1.0), (path[24:], 0.55)):  # the front end is cartilage, fainter
                rib = stroke(np.zeros(shape, np.float32), part * (w, h), 0.025 * w)
                rim = stroke(np.zeros(shape, np.float32), (part + (0, 0.012)) * (w, h), 2)
                image += gain * (15 * blur(rib, 1.5) + 10 * blur(rim, 1)) * body
        ends = np.array([(0.5 + side * 0.05, 0.165), (0.5 + side * 0.2, 0.135), (0.5 + side * 0.37, 0.15)])
        image += 22 * blur(stroke(np.zeros(shape, np.float32), ends * (w, h), 15), 2) * body  # clavicle
    objects = [("lung, on the left of the image", right), ("lung, on the right of the image", left), ("heart", heart)]
    return image + 4 * field(rng, shape, 0.7), objects


def draw_mammography(rng, shape=(640, 448)):
    """Oblique view of a breast with pectoral muscle, a spiculated mass and a smooth oval one."""
    h, w = shape
    y, x = np.mgrid[:h, :w].astype(np.float32)
    rho = blob(rng, shape, (0.53, 0.0), (0.45, 0.8), 0.012)
    # ducts and septa converge on the nipple: stretch a random field along the rays from it
    ray, dist = np.arctan2(y - 0.55 * h, 0.85 * w - x), np.hypot(y - 0.55 * h, x - 0.85 * w)
    strands = cv2.remap(field(rng, (400, 260), (3, 12)), dist / 2.5, (ray + np.pi) * 63, cv2.INTER_LINEAR)
    gland = soft(blob(rng, shape, (0.55, 0.42), (0.27, 0.36), 0.16), 0.12)
    tissue = 0.5 * strands + 0.5 * field(rng, shape, 18) + 0.4 * field(rng, shape, 6) + 0.3 * field(rng, shape, 2)
    image = 62 + 9 * tissue + gland * (42 + 22 * tissue)
    image = mix(image, 150 + 5 * field(rng, shape, (12, 4)), soft((x / w / 0.42 + y / h / 0.55), 0.025))  # pectoral
    objects = []
    for what, centre, radii, wobble, width, level, spicules in (
        ("spiculated mass", (0.45, 0.40), (0.052, 0.070), 0.10, 0.06, 188, 22),
        ("smooth oval mass", (0.68, 0.33), (0.030, 0.055), 0.02, 0.05, 163, 0),
    ):
        centre = centre + rng.uniform(-0.03, 0.03, 2)
        mass = blob(rng, shape, centre, radii, wobble, rng.uniform(-0.5, 0.5))
        image = mix(image, level + 5 * tissue, 0.85 * soft(mass, width))
        objects.append((what, mass < 1))
        spikes = np.zeros(shape, np.float32)
        for a in rng.uniform(0, 2 * np.pi, spicules):
            reach = np.linspace(0.8, rng.uniform(1.2, 1.9), 8)[:, None] * np.array(radii)[::-1] * (w, h)
            stroke(spikes, centre[::-1] * (w, h) + reach * (np.cos(a), np.sin(a)), 1)
        image += 38 * blur(spikes, 1.1)
    thick = np.clip((1 - rho) / 0.10, 0, 1) ** 0.6  # compressed breast thins at its rim
    image = soft(rho, 0.006) * image * (0.45 + 0.55 * thick) + 26 * np.exp(-(((rho - 0.99) / 0.006) ** 2))
    return 8 + image + 3 * field(rng, shape, 0.7), objects


def draw_dermoscopy(rng, shape=(480, 640)):
    """Pigmented lesion with an irregular border, a pigment network, globules and hairs."""
    h, w = shape
    image = np.full((h, w, 3), (222.0, 176.0, 156.0)) + 5 * field(rng, shape, 60)[..., None] * (0.6, 1, 1)
    image += 3 * field(rng, shape, 2)[..., None] - 6 * np.clip(field(rng, shape, 4), 1, 3)[..., None] * (0.2, 1, 0.8)
    rho = blob(rng, shape, (0.5, 0.5), (0.27, 0.24), 0.09, rng.uniform(0, 3)) + 0.05 * field(rng, shape, 9)
    tone = np.clip(0.5 + 0.28 * field(rng, shape, 38) + 0.5 * (0.75 - rho), 0, 1)  # light to dark brown
    pigment = np.array((168.0, 112, 82)) + tone[..., None] * (np.array((72.0, 42, 34)) - (168, 112, 82))
    net = np.exp(-((field(rng, shape, 2.8) / 0.4) ** 2))  # zero lines of a random field make a network
    pigment -= 20 * (net * np.clip(rho, 0, 1))[..., None]
    pigment -= 42 * (np.clip(field(rng, shape, 5) - 1.5, 0, 1) * (rho < 0.9))[..., None]  # globules
    image = mix(image, pigment, soft(rho, 0.045) * 0.95)
    hairs = np.zeros(shape, np.float32)
    for _ in range(6):
        t, a, c = np.linspace(-0.6, 0.6, 40), rng.uniform(-0.9, 0.9), rng.uniform(-0.5, 0.5)
        p = np.stack([t * np.cos(a) - c * t**2 * np.sin(a), t * np.sin(a) + c * t**2 * np.cos(a)], 1)
        stroke(hairs, (p * rng.uniform(0.5, 0.9) + rng.uniform(0.15, 0.85, 2)) * (w, h), rng.choice((1, 2, 2)))
    dimmed = 1 - 0.35 * ball(shape, (0.5, 0.5), np.sqrt((0.5, 0.5)))[..., None] ** 2.5  # towards the corners
    image = mix(image, (52, 36, 30), 0.8 * blur(hairs, 0.7)) * dimmed
    return image + 2.5 * rng.standard_normal(image.shape), [("pigmented lesion", rho < 1)]


def draw_endoscopy(rng, shape=(480, 560)):
    """Colon with folds, a dark lumen and two polyps, lit from the camera, with wet highlights."""
    h, w = shape
    y, x = np.mgrid[:h, :w].astype(np.float32)
    lumen = ball(shape, (0.40, 0.60), (0.42, 0.42)) + 0.04 * field(rng, shape, 45)  # about 1 where the wall is near
    rings = 8.5 * np.log(np.maximum(lumen, 0.08)) + 0.5 * field(rng, shape, 40)
    height = 13 * np.abs(np.cos(rings)) ** 0.7 * np.clip(lumen, 0.1, 1.3) + 4 * field(rng, shape, 26)
    height += 0.3 * field(rng, shape, 3)
    tint, objects = np.zeros(shape), []
    plan = (("large polyp", (0.62, 0.33), (0.15, 0.14)), ("small polyp", (0.30, 0.34), (0.085, 0.075)))
    for what, centre, radii in plan:
        rho = blob(rng, shape, centre + rng.uniform(-0.02, 0.02, 2), radii, 0.045)
        dome = np.clip(1 - rho**2, 0, None) ** 0.75 * radii[0] * h * 0.75
        height = mix(height, 6 + dome + field(rng, shape, 6), soft(rho, 0.03))
        tint = np.maximum(tint, soft(rho, 0.04))
        objects.append((what, rho < 1))
    gy, gx = np.gradient(blur(height, 1.2))
    to_light = np.stack([(0.35 * w - x) / w, (0.2 * h - y) / h, np.full(shape, 0.9)], -1)  # lamp beside the lens
    normal = np.stack([-gx, -gy, np.ones(shape)], -1)
    cosine = (normal * to_light).sum(-1) / np.linalg.norm(normal, axis=-1) / np.linalg.norm(to_light, axis=-1)
    cast = np.roll(blur(tint, 6), (9, 9), (0, 1)) * (1 - tint)  # the polyp shades the wall behind it
    light = (0.35 + 0.75 * np.clip(cosine, 0, 1)) * (0.2 + 0.8 * np.clip(lumen, 0, 1) ** 1.2) * (1 - 0.4 * cast)
    tree = np.zeros(shape, np.float32)
    for _ in range(14):
        vessels(rng, tree, rng.uniform(0, 1, 2) * (w, h), rng.uniform(0, 6.3), 2, 130)
    colour = mix(np.full((h, w, 3), (226.0, 142.0, 122.0)), (196, 84, 82), 0.45 * blur(tree, 1) * (1 - tint))
    colour = mix(colour, (222, 112, 100), 0.75 * tint) + 6 * field(rng, shape, 12)[..., None]
    wet = np.clip((cosine + 0.01 * field(rng, shape, 3) - 0.988) / 0.008, 0, 1) * (field(rng, shape, 12) > 0.9)
    dimmed = 1 - 0.55 * ball(shape, (0.5, 0.5), np.sqrt((0.5, 0.5)))[..., None] ** 2.5  # towards the corners
    image = mix(colour * light[..., None], (255, 250, 245), blur(wet, 0.8) * 0.9) * dimmed
    scope = np.abs(x / w - 0.5) + np.abs(y / h - 0.5) * 0.85 < 0.76  # its corners are black
    return (image + 3 * rng.standard_normal(image.shape)) * scope[..., None], objects


def draw_fundus(rng, shape=(512, 512)):
    """Colour photograph of a left eye: optic disc with its cup, two vessel arcades, macula."""
    h, w = shape
    eye = ball(shape, (0.5, 0.5), (0.475, 0.475))
    image = np.full((h, w, 3), (206.0, 98.0, 52.0)) + 7 * field(rng, shape, 45)[..., None] * (0.6, 1, 0.7)
    image += 3 * field(rng, shape, 3)[..., None] * (0.5, 1, 0.5)
    image = mix(image, (118, 40, 22), 0.75 * np.exp(-((ball(shape, (0.53, 0.60), (0.10, 0.11)) / 0.9) ** 2)))
    centre = (0.50, 0.27) + rng.uniform(-0.015, 0.015, 2)
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
    return image * soft(eye, 0.003)[..., None], [("optic disc, its cup left out", disc < 1), ("optic cup", cup < 1)]


def draw_oct(rng, shape=(384, 512)):
    """Retinal layers through the fovea with three cysts inside the retina and fluid below it."""
    h, w = shape
    y, x = np.mgrid[:h, :w] / np.array((h, w)).reshape(2, 1, 1)  # fractions
    pigment = 0.66 + 0.05 * (x - 0.5) ** 2 + 0.004 * field(rng, shape, (400, 40))[:1]  # epithelium below the retina
    lens = 0.075 * np.clip(1 - ((x - rng.uniform(0.53, 0.6)) / 0.15) ** 2, 0, None)  # height of the fluid
    top = 0.38 + 0.05 * (x - 0.5) ** 2 + 0.075 * np.exp(-(((x - 0.5) / 0.075) ** 2)) - 0.6 * lens
    t = (y - top) / (pigment - lens - top)  # 0 at the inner, 1 at the outer border of the retina
    knots = (-0.02, 0.0, 0.13, 0.15, 0.31, 0.33, 0.43, 0.45, 0.53, 0.56, 0.80, 0.82, 0.88, 0.97, 1.0)
    echo = np.interp(t, knots, (3, 150, 150, 95, 105, 52, 50, 98, 95, 44, 48, 80, 70, 165, 120))
    echo[t > 1] = 10
    below = (y - pigment) * h  # px under the epithelium
    echo = np.where(below > -2, 215 * np.exp(-(((below - 3) / 4) ** 2)) + 88 * np.exp(-below / 45) * (below > 3), echo)
    echo *= np.where(below > 8, 1 + 0.28 * field(rng, shape, (5, 9)), 1)  # choroid: vessels
    objects = []
    for centre in ((0.52, 0.26), (0.505, 0.39), (0.53, 0.78)):
        radii = rng.uniform((0.028, 0.032), (0.042, 0.058))
        cyst = (t < 0.1) + blob(rng, shape, centre + rng.uniform(-0.012, 0.012, 2), radii, 0.05)
        echo = mix(echo, 14, soft(cyst, 0.08))
        objects.append(("cyst in the retina", cyst < 1))
    objects.append(("fluid below the retina", (t > 1) & (below < -2)))
    for at in rng.uniform(0, 1, 4):  # retinal vessels shade what lies below
        echo *= 1 - 0.35 * np.exp(-(((x - at) / 0.008) ** 2)) * (t > 0.1)
    grain = 0.25 + 0.75 * speckle(rng, shape, (0.8, 1.3))
    return blur(echo, 0.8) * grain + 9 * speckle(rng, shape, (0.7, 1.0)), objects


def draw_microscope(rng, shape=(512, 640)):
    """Section stained pink and purple; 118 nuclei, some of them touching."""
    h, w = shape
    image = np.full((h, w, 3), (228.0, 172.0, 202.0)) + 7 * field(rng, shape, 30)[..., None]
    fibres = 0.7 * field(rng, shape, (3, 9)) + field(rng, shape, 6)
    image += fibres[..., None] * (5, 10, 6) + 4 * field(rng, shape, 1.2)[..., None]
    gap = soft(2.9 - field(rng, shape, 22), 0.08)
    image = mix(image, (246, 240, 245), 0.85 * gap)
    objects, placed, free = [], [], np.ones(shape, bool)
    while len(placed) < 118:
        y, x = rng.uniform(16, h - 16), rng.uniform(16, w - 16)
        long, short = rng.uniform(10, 15), rng.uniform(8, 11)
        near = any((y - v) ** 2 + (x - u) ** 2 < ((long + r) * 0.9) ** 2 for v, u, r in placed)
        if near or gap[int(y), int(x)] > 0.05:
            continue
        placed.append((y, x, long))
        y0, x0 = int(y) - 24, int(x) - 24  # draw in a window: 48 px hold the largest nucleus
        window = slice(max(0, y0), y0 + 48), slice(max(0, x0), x0 + 48)
        ph, pw, _ = image[window].shape
        at = ((y - window[0].start) / ph, (x - window[1].start) / pw)
        rho = blob(rng, (ph, pw), at, (short / ph, long / pw), 0.05, rng.uniform(0, np.pi))
        colour = np.array((96.0, 62, 140)) + rng.uniform(0.0, 1.0) * np.array((46.0, 44, 30))
        chromatin = 15 * field(rng, (ph, pw), 1.6) - 26 * np.exp(-(((rho - 0.93) / 0.1) ** 2))
        part = mix(image[window], (206, 138, 184), 0.5 * soft(rho / 1.45, 0.08))  # cytoplasm
        image[window] = mix(part, colour + chromatin[..., None], 0.92 * soft(rho, 0.06))
        nucleus = np.zeros(shape, bool)
        nucleus[window] = (rho < 1) & free[window]
        free &= ~nucleus
        objects.append(("nucleus", nucleus))
    return image + 3 * rng.standard_normal(image.shape), objects
