"""The paper's three channels of an image: raw, diffused, equalized. [P 2.1, Fig. 2]

Read top to bottom: diffuse -> equalize -> three_channels -> network_input. No PyTorch.
Every setting has its value in presets.py; no function here has a default of its own.
Letters: H, W image height and width; intensities are grey levels, 0..255.
Source [P]: Lee, Ku, Choi, "Gray's Anatomy for Segment Anything Model", CVPR 2024 challenge on
laptops. Diffusion: Perona and Malik 1990, doi:10.1109/34.56205.
"""

import numpy as np

from grid import GRID, pad_to_square, resize_to_grid
from presets import Preset

# Explicit time stepping with four neighbours stays stable as long as 1 - 4 gamma >= 0: then every
# new value lies within the old values of the pixel and its neighbours.
MAX_GAMMA = 0.25

# c(d), the conductance where two neighbours differ by d: 1 on flat ground, near 0 where |d| is much
# larger than kappa
CONDUCTANCES = {
    "exponential": lambda d, kappa: np.exp(-((d / kappa) ** 2)),  # favours high-contrast edges
    "quadratic": lambda d, kappa: 1 / (1 + (d / kappa) ** 2),  # favours wide regions
}

# Weights of red, green, blue in the released code. They sum to 0.9999, which shows in the last bit.
RELEASED_GRAY_WEIGHTS = np.array([0.2989, 0.5870, 0.1140], dtype=np.float32)


def diffuse(
    image: np.ndarray, iterations: int, kappa: float, gamma: float, conductance: str, border: str
) -> np.ndarray:
    """Perona-Malik anisotropic diffusion: smooths within regions, keeps edges. [P 2.1, channel 2]

        u  <-  u + gamma (c(S) S + c(N) N + c(W) W + c(E) E)

    repeated `iterations` times, all pixels at once.

    u           the image, (H, W) float32 all the time: never rounded, never clipped
    S, N, W, E  the neighbour below, above, left, right of a pixel, minus the pixel
    c(d)        `conductance`: "exponential" exp(-(d/kappa)^2), "quadratic" 1 / (1 + (d/kappa)^2)
    kappa       the difference at which smoothing fades, in the image's own units; float32, above 0
    gamma       the time step; float32, above 0 and at most 0.25
    border      the neighbour of a pixel at the edge. "reflect" repeats the pixel: its difference is
                0, nothing flows in or out. "wrap" takes the pixel at the opposite edge.

    The four products are added from left to right, then multiplied by gamma, then added to u.
    image : (H, W), any real dtype; first turned into float32.   Returns (H, W) float32.
    Raises ValueError for a wrong shape, name, time step or kappa.
    Source: Perona and Malik 1990, eq. 7 and 8. [P] gives no settings.
    >>> diffuse(np.array([[0, 0, 9, 9]]), 1, kappa=1e9, gamma=0.1, conductance="exponential", border="reflect").round(3)
    array([[0. , 0.9, 8.1, 9. ]], dtype=float32)
    """
    if image.ndim != 2:
        raise ValueError(f"diffusion takes one gray image (H, W), found shape {image.shape}")
    if not 0 < gamma <= MAX_GAMMA:
        raise ValueError(
            f"gamma is {gamma}, but must lie in (0, {MAX_GAMMA}]: larger time steps overshoot and oscillate"
        )
    if kappa <= 0 or iterations < 0:
        raise ValueError(f"kappa must be positive and iterations not negative, found {kappa} and {iterations}")
    if conductance not in CONDUCTANCES or border not in ("reflect", "wrap"):
        raise ValueError(f"unknown conductance {conductance!r} or border {border!r}")
    c = CONDUCTANCES[conductance]
    u, kappa, gamma = image.astype(np.float32), np.float32(kappa), np.float32(gamma)
    for _ in range(iterations):
        p = np.pad(u, 1, mode="edge" if border == "reflect" else "wrap")  # (H + 2, W + 2)
        # Each pair of neighbours has one difference, lower minus upper or right minus left: S or E
        # of its first pixel and, with the sign turned, N or W of its second.
        dy, dx = np.diff(p[:, 1:-1], axis=0), np.diff(p[1:-1], axis=1)  # (H + 1, W), (H, W + 1)
        # c(d) d, the flow between the two
        dy, dx = c(dy, kappa) * dy, c(dx, kappa) * dx
        u = u + gamma * (dy[1:] - dy[:-1] - dx[:, :-1] + dx[:, 1:])
    return u


def equalize(image: np.ndarray) -> np.ndarray:
    """Histogram equalization: makes the cumulative distribution a straight line. [P 2.1, channel 3]

    image: (H, W) uint8. Returns (H, W) uint8 over the whole 0..255; a constant image comes back as
    it is. Source: the cumulative-distribution method; rounding as in OpenCV's equalizeHist.
    >>> equalize(np.array([[10, 10], [20, 30]], np.uint8))
    array([[  0,   0],
           [128, 255]], dtype=uint8)
    """
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(f"equalization takes one gray uint8 image (H, W), found {image.dtype} {image.shape}")
    histogram = np.bincount(image.ravel(), minlength=256)
    darkest = int(np.argmax(histogram > 0))
    brighter_pixels = image.size - histogram[darkest]
    if brighter_pixels == 0:
        return image.copy()
    cumulative = np.cumsum(histogram) - histogram[darkest]  # 0 at the darkest level that occurs
    scale = np.float32(255) / np.float32(brighter_pixels)
    levels = np.rint(cumulative.astype(np.float32) * scale).clip(0, 255).astype(np.uint8)
    return levels[image]


def is_gray(image: np.ndarray) -> bool:
    """True for (H, W), and for (H, W, 3) with three exactly equal channels."""
    return image.ndim == 2 or bool((image[..., :1] == image).all())


def three_channels(image: np.ndarray, preset: Preset) -> np.ndarray:
    """The network's three-channel image: raw, diffused, equalized. [P 2.1, Fig. 2]

    image: (H, W) or (H, W, 3) RGB, uint8. Returns (H, W, 3) uint8.
    The paper defines them for gray images, and found them "less effective for color images" (4.5).
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"need a uint8 image (H, W) or (H, W, 3), found {image.dtype} {image.shape}")
    # D3: colour images keep their colour
    if preset.color == "keep" and not is_gray(image):
        return image
    if preset.color == "gray":
        raw = _released_gray(image)
    else:
        raw = image if image.ndim == 2 else image[..., 0]
    # D2: kappa 20 of 255, ten iterations, rounded
    scaled = raw.astype(np.float32) * np.float32(preset.diffusion_range) / np.float32(255)
    smooth = diffuse(scaled, preset.iterations, preset.kappa, preset.gamma, preset.conductance, preset.border)
    smooth = smooth * np.float32(255 / preset.diffusion_range)
    if preset.rounding == "nearest":
        smooth = np.rint(smooth)
    smooth = smooth.clip(0, 255).astype(np.uint8)
    source = raw if preset.equalize == "raw" else smooth
    equalized = source if preset.equalize == "nothing" else equalize(source)
    return np.stack([raw, smooth, equalized], axis=-1)


def network_input(image: np.ndarray, preset: Preset, enhanced: bool) -> np.ndarray:
    """Prepare one image for the network -> (3, 256, 256) float32, 0..1, zero padding. [P 2.1]

    image: (H, W) or (H, W, 3) uint8, original frame.   enhanced: True for the proposed model, which
    gets three channels; False for the baseline, trained on raw images: then no preset is used.
    """
    if enhanced and preset.enhance_at == "original":
        return normalized(resize_to_grid(three_channels(image, preset)))
    if enhanced and preset.pad == "before":
        image = pad_to_square(image, max(image.shape[:2]))
    # D1: resize, enhance, normalize, then pad
    return grid_input(resize_to_grid(image), preset, enhanced)


def grid_input(image: np.ndarray, preset: Preset, enhanced: bool) -> np.ndarray:
    """`network_input` of an image that has been resized to the grid, as the cache holds it.

    image: (h, w) or (h, w, 3) uint8, without padding; where the preset pads "before", the square.
    Returns (3, 256, 256) float32.
    """
    return normalized(three_channels(image, preset) if enhanced else image)


def normalized(image: np.ndarray) -> np.ndarray:
    """(h, w) or (h, w, 3) uint8 -> (3, 256, 256) float32: min-max to 0..1, then zero padding."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    low, high = float(image.min()), float(image.max())
    unit = (image.astype(np.float32) - low) / max(high - low, 1e-8)  # a constant image becomes all zeros
    return np.ascontiguousarray(pad_to_square(unit.astype(np.float32), GRID).transpose(2, 0, 1))


def _released_gray(image: np.ndarray) -> np.ndarray:
    """Gray (H, W) uint8 as in the released code: min-max over all channels, then a weighted sum."""
    rgb = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
    low, high = int(rgb.min()), int(rgb.max())
    if low == high:  # the released code divides 0 by 0 here (#6); NaN cast to uint8 is usually 0
        return np.zeros(rgb.shape[:2], dtype=np.uint8)
    unit = (rgb.astype(np.float32) - low) / np.float32(high - low)
    return np.rint(unit @ RELEASED_GRAY_WEIGHTS * 255).clip(0, 255).astype(np.uint8)
