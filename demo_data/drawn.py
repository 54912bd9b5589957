"""Synthetic images and volumes, and what draws them. The drawings are ours, of no patient and no data set.

A recipe takes a random generator and a shape, and returns (image, objects). The image is (H, W), (H, W, 3) RGB or
(D, H, W), grey levels 0..255 as floats. An object is a description and a mask. Later objects are painted over earlier
ones. All geometry is in fractions of the shape, (z, y, x). The demo shows the CT volume, as no package carries a real
one; fundus and microscopy are only trained on, by the demo and by notebooks.
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


def vessels(rng, canvas, start, heading: float, width: float, length: float, bend: float = 0.0, depth: int = 2) -> None:
    """Draw a branching tree into canvas (H, W) float32; start (x, y), width and length in px.

    heading : radians, 0 to the right, positive turns down.   bend : radians a step."""
    path, angle = [np.asarray(start, float)], heading
    for _ in range(max(2, int(length / 8))):  # steps of 8 px
        angle += bend + rng.normal(0, 0.06)
        path.append(path[-1] + 8 * np.array((np.cos(angle), np.sin(angle))))
        if depth and rng.random() < 0.1:
            side = rng.choice((-1, 1)) * rng.uniform(0.4, 0.9)
            vessels(rng, canvas, path[-1], angle + side, width * 0.6, length * 0.55, -bend / 2, depth - 1)
    points, n = np.round(np.array(path) * 16).astype(np.int32), len(path)  # 1/16 px fixed point
    for i in range(3):  # thinner towards the end
        third, thickness = points[i * n // 3 : (i + 1) * n // 3 + 1], max(1, round(width * 0.85**i))
        cv2.polylines(canvas, [third], False, 1.0, thickness, cv2.LINE_AA, shift=4)


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
