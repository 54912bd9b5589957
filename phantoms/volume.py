"""Synthetic volumes, CT, MR and PET, and the drawing helpers that work in any dimension.

A recipe takes a random generator and a shape and returns (image, labels, descriptions): the image (D, H, W), grey
levels as floats 0..255 that `phantoms` rounds (CT: uint8 already), the label map (D, H, W) uint16, object i (from 0)
as i + 1, and one description an object. All geometry is in fractions of `shape`, axis order (z, y, x).
The drawings are ours; they copy the look of a modality, no patient and no data set.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from files.intensity import window_to_uint8

Drawing = tuple[np.ndarray, np.ndarray, tuple[str, ...]]  # image, labels, one description an object


def blur(a: np.ndarray, sigma: float | Sequence[float]) -> np.ndarray:
    """Gaussian blur of a (H, W) or (D, H, W) array; sigma in pixels, one number or one an axis. Returns float32."""
    s = np.broadcast_to(np.asarray(sigma, float), a.ndim)
    if a.ndim == 2:
        return cv2.GaussianBlur(a.astype(np.float32), (0, 0), sigmaX=s[1], sigmaY=s[0])
    planes = np.stack([blur(plane, s[1:]) for plane in a])
    taps = 2 * int(np.ceil(3 * s[0])) + 1
    return cv2.GaussianBlur(planes.reshape(len(a), -1), (1, taps), sigmaX=s[0], sigmaY=s[0]).reshape(a.shape)


def field(rng: np.random.Generator, shape: Sequence[int], sigma: float | Sequence[float]) -> np.ndarray:
    """Smooth random field of `shape`, mean 0, standard deviation 1; sigma (px) sets the size of its blobs."""
    f = blur(rng.standard_normal(tuple(shape), dtype=np.float32), sigma)
    return (f - f.mean()) / f.std()


def ball(shape, centre, radii) -> np.ndarray:
    """Normalised radius of an ellipsoid, (D, H, W) float64; centre and radii (z, y, x) in fractions of shape."""
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    return np.sqrt(sum(((g / n - c) / r) ** 2 for g, n, c, r in zip(grid, shape, centre, radii, strict=True)))


def soft(rho: np.ndarray, width: float) -> np.ndarray:
    """Membership 1 inside (rho < 1) to 0 outside, over about 4 * width."""
    return 1 / (1 + np.exp(np.clip((rho - 1) / width, -50, 50)))


def mix(image: np.ndarray, value, weight: np.ndarray) -> np.ndarray:
    """Move the image towards `value` (number, colour or array) by weight 0..1; a colour image takes a (H, W) weight."""
    return image + (np.asarray(value) - image) * (weight if weight.ndim == image.ndim else weight[..., None])


def draw_ct(rng, shape=(12, 160, 160)) -> Drawing:
    """Upper abdomen after contrast: liver, spleen, kidneys, aorta, in HU, then the 400/40 window."""
    body = ball(shape, (0.5, 0.5, 0.5), (9, 0.37, 0.47))
    bump = 0.06 * field(rng, shape, (4, 9, 9))
    hu = np.full(shape, -1000.0)
    hu[body < 1] = -105
    hu[(body < 0.92) & (body > 0.83)] = 58  # muscle of the wall
    loops = field(rng, shape, (2, 6, 6))
    hu[(body < 0.83) & (loops > 0.1)] = 38  # bowel
    angle = np.arctan2(*np.ogrid[-0.5 : 0.5 : shape[1] * 1j, -0.5 : 0.5 : shape[2] * 1j])
    slant = angle[None] * 9 + np.arange(shape[0])[:, None, None] * 0.35
    hu[(np.abs(body - 0.86) < 0.022) & (np.cos(slant) > 0.75)] = 420  # ribs, oblique to the slices
    stomach = ball(shape, (0.3, 0.34, 0.66), (0.5, 0.13, 0.13)) + bump
    hu[stomach < 1], hu[stomach < 0.86] = 60, 12
    hu[(stomach < 0.86) & (np.arange(shape[1])[None, :, None] < 0.29 * shape[1])] = -850  # gas rises
    muscle = np.minimum(*(ball(shape, (0.5, 0.735, c), (9, 0.075, 0.09)) for c in (0.40, 0.60)))
    hu[muscle < 1] = 58
    spine = ball(shape, (0.5, 0.655, 0.5), (9, 0.075, 0.085))
    arch = np.minimum(ball(shape, (0.5, 0.785, 0.5), (9, 0.05, 0.02)), ball(shape, (0.5, 0.74, 0.5), (9, 0.02, 0.10)))
    hu[arch < 1], hu[spine < 1], hu[spine < 0.86] = 380, 420, 190
    hu[ball(shape, (0.5, 0.748, 0.5), (9, 0.028, 0.035)) < 1] = 35  # canal
    move = rng.uniform(-0.02, 0.02, (4, 3))  # organs lie a little elsewhere in every case
    lobes = ((0.45, 0.42, 0.29), (0.62, 0.24, 0.22)), ((0.4, 0.33, 0.45), (0.4, 0.12, 0.17))
    liver = np.minimum(*(ball(shape, np.array(centre) + move[0], radii) for centre, radii in lobes))
    spleen = ball(shape, np.array((0.4, 0.55, 0.79)) + move[1], (0.5, 0.15, 0.085))
    wall = 9 * (body > 0.81)  # organs stay inside the ribs
    plan = [("liver", liver + bump + wall, 112), ("spleen", spleen + bump + wall, 128)]
    for side, what, at in ((0.30, "left", move[2]), (0.69, "right", move[3])):
        kidney = ball(shape, np.array((0.58, 0.65, side)) + at, (0.42, 0.095, 0.065))
        plan.append((f"kidney, on the {what} of the image", kidney + bump / 2, 185))
    plan.append(("aorta", ball(shape, (0.5, 0.535, 0.53), (9, 0.036, 0.036)), 200))
    labels = np.zeros(shape, np.uint16)
    for i, (what, rho, value) in enumerate(plan):
        hu[rho < 1], labels[rho < 1] = value, i + 1
        if "kidney" in what:
            hu[rho < 0.62], hu[rho < 0.35] = 140, -60  # medulla, fat of the sinus
    hu[(labels == 1) & (field(rng, shape, (2, 2.2, 2.2)) > 1.9)] = 165  # vessels of the liver
    hu = blur(hu, (0.4, 0.75, 0.75)) + 13 * field(rng, shape, (0.3, 0.8, 0.8))
    return window_to_uint8(hu), labels, tuple(what for what, _, _ in plan)


def draw_mr(rng, shape=(10, 160, 144)) -> Drawing:
    """Axial T1-weighted head with contrast: lateral ventricles and a tumour with a bright rim; a bias field."""
    head = ball(shape, (0.5, 0.5, 0.5), (1.1, 0.46, 0.44)) + 0.01 * field(rng, shape, (4, 14, 14))
    fold, bump = field(rng, shape, (1.3, 2.9, 2.9)), 0.05 * field(rng, shape, (4, 9, 9))
    image = np.full(shape, 6.0)
    image[head < 1], image[head < 0.925] = 205, 22  # scalp fat, skull
    image[head < 0.86] = 38  # fluid
    depth = (0.85 - head) / 0.85  # 0 at the surface of the brain
    sulcus = (np.abs(fold) < 0.22) & (depth < 0.2)
    middle = np.abs(np.arange(shape[2]) / shape[2] - 0.5)[None, None]  # fissure between the hemispheres
    brain = (head < 0.845) & ~sulcus & ((middle > 0.008) | (ball(shape, (0.5, 0.5, 0.5), (9, 0.17, 0.2)) < 1))
    image[brain] = 112
    image[brain & (depth > 0.05) & ((np.abs(fold) > 0.75) | (depth > 0.24))] = 165  # white matter between the sulci
    for side in (-1, 1):
        nucleus = ball(shape, (0.45, 0.49, 0.5 + side * 0.115), (0.35, 0.085, 0.04))
        image[nucleus < 1] = 120
    labels, plan = np.zeros(shape, np.uint16), []
    for side, what in ((-1, "left of"), (1, "right of")):
        horns = (
            (0.40, 0.045, (0.34, 0.095, 0.035)),
            (0.55, 0.055, (0.42, 0.11, 0.03)),
            (0.64, 0.085, (0.34, 0.075, 0.034)),
        )
        parts = [ball(shape, (0.52, y, 0.5 + side * x), radii) for y, x, radii in horns]
        plan.append((f"lateral ventricle, on the {what} the image", np.minimum.reduce(parts) + bump))
    centre = np.array((0.5, 0.33, 0.70)) + rng.uniform(-0.03, 0.03, 3)
    tumour = ball(shape, centre, (0.26, 0.085, 0.085)) + 0.10 * field(rng, shape, (3, 5, 5))
    plan.append(("tumour with its rim", tumour))
    image = mix(image, 95, 0.7 * soft(ball(shape, centre, (0.38, 0.14, 0.13)) + bump, 0.08) * brain)  # swelling
    for i, (_, rho) in enumerate(plan):
        image[rho < 1], labels[rho < 1] = 40, i + 1
    image[(tumour < 1) & (tumour > 0.72)], image[tumour <= 0.72] = 215, 75
    image = blur(image, (0.4, 0.7, 0.7)) * (1 + 0.10 * field(rng, shape, (12, 50, 50)))  # bias field of the coil
    noise = [5 * rng.standard_normal(shape) for _ in range(2)]
    return np.hypot(image + noise[0], noise[1]), labels, tuple(what for what, _ in plan)  # magnitude: Rician noise


def draw_pet(rng, shape=(14, 64, 64)) -> Drawing:
    """Chest with three hot lesions, warm heart and liver; blurred by the scanner, counted with Poisson noise."""
    body = ball(shape, (0.5, 0.5, 0.5), (9, 0.34, 0.44))
    activity = np.where(body < 1, 1.0, 0.02)
    for side in (0.32, 0.68):
        activity[ball(shape, (0.6, 0.47, side), (0.7, 0.22, 0.13)) < 1] = 0.35  # lungs
    heart = ball(shape, (0.5, 0.45, 0.57), (0.25, 0.12, 0.11))
    activity[heart < 1], activity[heart < 0.6] = 4.0, 1.4  # muscle around blood
    activity[ball(shape, (0.05, 0.45, 0.32), (0.25, 0.24, 0.2)) < 1] = 2.2  # dome of the liver
    activity[ball(shape, (0.5, 0.74, 0.5), (9, 0.06, 0.06)) < 1] = 1.7  # marrow
    labels = np.zeros(shape, np.uint16)
    plan = (((0.62, 0.42, 0.30), 0.065, 11), ((0.5, 0.56, 0.72), 0.055, 9), ((0.74, 0.60, 0.47), 0.05, 8))
    for i, (centre, radius, uptake) in enumerate(plan):
        centre = np.array(centre) + rng.uniform(-0.02, 0.02, 3)
        lesion = ball(shape, centre, (radius * shape[1] / shape[0], radius, radius)) + 0.1 * field(rng, shape, 2)
        activity[lesion < 1], labels[lesion < 1] = uptake, i + 1
    counts = rng.poisson(25 * blur(activity, 1.1)) / 25  # point spread: 1.1 voxels, 10 mm full width at half maximum
    return 255 * blur(counts, 0.6) / 7, labels, ("hot lesion",) * 3
