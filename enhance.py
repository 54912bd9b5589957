"""The paper's preprocessing of one image: raw, anisotropic diffusion, histogram equalization [P 2.1, Fig. 2].

Read top to bottom: diffuse -> equalize -> three_channels -> network_input. No PyTorch.
Letters: H, W image height and width; intensities are grey levels, 0..255.
Source [P]: Lee, Ku, Choi, "Gray's Anatomy for Segment Anything Model", CVPR 2024 challenge on laptops.
Diffusion: Perona and Malik 1990, doi:10.1109/34.56205.
"""

from __future__ import annotations

import numpy as np

from grid import GRID, pad_to_square, resize_to_grid
from presets import Preset

# Explicit time stepping with four neighbours stays stable as long as 1 - 4 gamma >= 0: then every new value lies within
# the old values of the pixel and its neighbours.
MAX_GAMMA = 0.25

CONDUCTANCES = {
    # conductance for a difference of d grey levels: 1 on flat ground, near 0 where |d| is much larger than kappa
    "exponential": lambda d, kappa: np.exp(-((d / kappa) ** 2)),  # favours high-contrast edges
    "quadratic": lambda d, kappa: 1 / (1 + (d / kappa) ** 2),  # favours wide regions
}

# Weights of red, green, blue in the released code. They sum to 0.9999, which shows in the last bit.
RELEASED_GRAY_WEIGHTS = np.array([0.2989, 0.5870, 0.1140], dtype=np.float32)


def diffuse(
    image: np.ndarray,
    iterations: int = 10,
    kappa: float = 20.0,
    gamma: float = 0.1,
    conductance: str = "exponential",
    border: str = "reflect",
) -> np.ndarray:
    """Perona-Malik anisotropic diffusion: smooths within regions, keeps the edges between them (D2). [P 2.1, channel 2]

    image: (H, W), any real dtype.   kappa: edge height, in the image's own units, at which smoothing fades.
    gamma: time step, at most 0.25.   border: "reflect" (zero flux) or "wrap" (opposite borders touch).
    Returns (H, W) float32. Raises ValueError for a wrong shape, name, time step or kappa.
    Source: Perona and Malik 1990, eq. 7 and 8, four neighbours.
    >>> diffuse(np.array([[0, 0, 9, 9]]), iterations=1, kappa=1e9, gamma=0.1).round(3)
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
    conduct = CONDUCTANCES[conductance]
    pad_mode = "edge" if border == "reflect" else "wrap"  # a repeated edge pixel has difference 0: no flux
    u = image.astype(np.float32)
    kappa, gamma = np.float32(kappa), np.float32(gamma)
    for _ in range(iterations):
        p = np.pad(u, 1, mode=pad_mode)  # (H + 2, W + 2)
        # one difference per pair of neighbours, (H + 1, W) and (H, W + 1): what leaves one pixel enters the other
        dy, dx = np.diff(p[:, 1:-1], axis=0), np.diff(p[1:-1], axis=1)
        dy, dx = conduct(dy, kappa) * dy, conduct(dx, kappa) * dx  # the flow between two neighbours
        u = u + gamma * (dy[1:] - dy[:-1] - dx[:, :-1] + dx[:, 1:])
    return u


def equalize(image: np.ndarray) -> np.ndarray:
    """Histogram equalization: maps grey levels so that their cumulative distribution becomes a straight line.

    image: (H, W) uint8. Returns (H, W) uint8 over the whole 0..255; a constant image is returned unchanged.
    Source: the cumulative-distribution method; rounding as in OpenCV's equalizeHist. [P 2.1, channel 3]
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
    A colour image comes back unchanged if the preset keeps colour (D3): the paper defines the channels for gray images,
    and found them "less effective for color images" (4.5).
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"need a uint8 image (H, W) or (H, W, 3), found {image.dtype} {image.shape}")
    if preset.color == "keep" and not is_gray(image):
        return image
    if preset.color == "gray":
        raw = _released_gray(image)
    else:
        raw = image if image.ndim == 2 else image[..., 0]
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
    """Prepare one image for the network. `fixed`: resize, enhance, normalize, pad (D1); other presets change the order. [P 2.1]

    image: (H, W) or (H, W, 3) uint8, original frame.   enhanced: True for the proposed model's three channels;
    False for the baseline, which was trained on raw images (gray repeated three times): then the preset is not used.
    Returns (3, 256, 256) float32: min-max normalized to 0..1, zero padding.
    """
    if enhanced and preset.enhance_at == "original":
        return normalized(resize_to_grid(three_channels(image, preset)))
    if enhanced and preset.pad == "before":
        image = pad_to_square(image, max(image.shape[:2]))
    return grid_input(resize_to_grid(image), preset, enhanced)


def grid_input(image: np.ndarray, preset: Preset, enhanced: bool) -> np.ndarray:
    """The same for an image that was resized already, as the cache holds it: (h, w) or (h, w, 3) uint8, without padding, but
    for presets that enhance the padded square. -> (3, 256, 256) float32"""
    return normalized(three_channels(image, preset) if enhanced else image)


def normalized(image: np.ndarray) -> np.ndarray:
    """(h, w) or (h, w, 3) uint8 on the grid -> (3, 256, 256) float32, min-max to 0..1, then zero padding."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    low, high = float(image.min()), float(image.max())
    unit = (image.astype(np.float32) - low) / max(high - low, 1e-8)  # a constant image becomes all zeros
    return np.ascontiguousarray(pad_to_square(unit.astype(np.float32), GRID).transpose(2, 0, 1))


def _released_gray(image: np.ndarray) -> np.ndarray:
    """Gray (H, W) uint8 as the released code makes it: min-max over all channels, then a weighted sum."""
    rgb = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
    low, high = int(rgb.min()), int(rgb.max())
    if low == high:  # the released code divides 0 by 0 here (#6); NaN cast to uint8 is usually 0
        return np.zeros(rgb.shape[:2], dtype=np.uint8)
    unit = (rgb.astype(np.float32) - low) / np.float32(high - low)
    return np.rint(unit @ RELEASED_GRAY_WEIGHTS * 255).clip(0, 255).astype(np.uint8)
