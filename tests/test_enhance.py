"""enhance.py: equal to the released code, MedPy and OpenCV bit for bit or nearly, and right by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data

from enhance import diffuse, equalize, is_gray, network_input, three_channels
from presets import PRESETS

DEFAULTS = {f: getattr(PRESETS["fixed"], f) for f in ("iterations", "kappa", "gamma", "conductance", "border")}
GOLDEN = np.load(Path(__file__).parent / "golden" / "enhancement_golden.npz")
NAMES = ("cell", "camera", "retina_rgb", "noise", "flat")


@pytest.mark.parametrize("name", NAMES)
def test_equalization_is_bit_exact(name):
    assert np.array_equal(equalize(GOLDEN[f"{name}_gray"]), GOLDEN[f"{name}_equalized_gray"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option, conductance", [(1, "exponential"), (2, "quadratic")])
def test_diffusion_equals_medpy(name, option, conductance):
    want = GOLDEN[f"{name}_medpy_option{option}_niter10_kappa20_gamma0.1"]
    assert np.abs(diffuse(GOLDEN[f"{name}_gray"], 10, 20, 0.1, conductance, "reflect") - want).max() < 1e-3


@pytest.mark.parametrize("name", ["cell", "camera", "noise", "retina_rgb"])
def test_released_channels_are_bit_exact(name):
    image = skimage.data.retina()[600:856, 100:356] if name == "retina_rgb" else GOLDEN[f"{name}_gray"]
    assert np.array_equal(three_channels(image, PRESETS["released"]), GOLDEN[f"{name}_released_three_channel"])


def test_released_diffusion_is_bit_exact_and_nearly_a_plain_blur():
    gray = GOLDEN["camera_gray"]
    smooth = diffuse(gray.astype(np.float32) / 255, 1, 20, 0.1, "exponential", "wrap") * 255
    assert np.array_equal(smooth.astype(np.uint8), GOLDEN["camera_released_diffused"])
    linear = diffuse(gray, 1, 1e9, 0.1, "exponential", "wrap")  # conductance 1 everywhere
    assert np.abs(smooth - linear).max() < 1, "kappa = 20 on a 0..1 image must leave no edge (#1)"


def test_diffusion_by_hand():
    # one step between two pixels: each moves gamma * conductance * difference towards the other
    got = diffuse(np.array([[0.0, 10.0]]), 1, 10, 0.2, "exponential", "reflect")
    assert got[0] == pytest.approx([0.2 * np.exp(-1) * 10, 10 - 0.2 * np.exp(-1) * 10])
    got = diffuse(np.array([[0.0, 10.0]]), 1, 10, 0.2, "quadratic", "reflect")
    assert got[0] == pytest.approx([1, 9])


def slow_diffusion(image, iterations, kappa, gamma, conductance, border):
    """The docstring of `diffuse` pixel by pixel, in float64."""
    u = image.astype(float)
    (height, width), neighbours = u.shape, ((1, 0), (-1, 0), (0, -1), (0, 1))
    for _ in range(iterations):
        new = u.copy()
        for y, x in np.ndindex(u.shape):
            for dy, dx in neighbours:
                y2, x2 = y + dy, x + dx
                if border == "wrap":
                    y2, x2 = y2 % height, x2 % width
                else:
                    y2, x2 = min(max(y2, 0), height - 1), min(max(x2, 0), width - 1)
                d = u[y2, x2] - u[y, x]
                c = np.exp(-((d / kappa) ** 2)) if conductance == "exponential" else 1 / (1 + (d / kappa) ** 2)
                new[y, x] += gamma * c * d
        u = new
    return u


@pytest.mark.parametrize("border", ["reflect", "wrap"])
@pytest.mark.parametrize("conductance", ["exponential", "quadratic"])
def test_diffusion_is_its_equation_pixel_by_pixel(border, conductance):
    image = np.random.default_rng(0).integers(0, 256, (9, 13)).astype(np.uint8)
    got = diffuse(image, 5, 20.0, 0.2, conductance, border)
    assert got.dtype == np.float32
    assert got == pytest.approx(slow_diffusion(image, 5, 20.0, 0.2, conductance, border), abs=1e-3)


@pytest.mark.parametrize("field, value", [("iterations", 3), ("kappa", 5.0), ("gamma", 0.2), ("border", "wrap")])
def test_a_setting_of_the_diffusion_has_one_place_and_an_edit_there_has_effect(field, value):
    gray = GOLDEN["cell_gray"]
    edited = three_channels(gray, replace(PRESETS["fixed"], **{field: value}))[..., 1]
    assert np.array_equal(edited, np.rint(diffuse(gray, **DEFAULTS | {field: value})).astype(np.uint8))
    assert not np.array_equal(edited, three_channels(gray, PRESETS["fixed"])[..., 1])
    with pytest.raises(TypeError, match=field):  # no default beside the preset's
        diffuse(gray, **{name: setting for name, setting in DEFAULTS.items() if name != field})


def test_diffusion_with_zero_flux_keeps_the_mean_and_an_edge():
    rng = np.random.default_rng(0)
    step = np.repeat([[50.0] * 32 + [200.0] * 32], 64, axis=0)
    got = diffuse(step + 5 * rng.standard_normal(step.shape), **DEFAULTS)
    assert got.mean() == pytest.approx(step.mean(), abs=0.2)
    assert got[:, :30].std() < 2.5, "noise of 5 grey levels must fall within the regions"
    assert got[:, 33:].mean() - got[:, :31].mean() > 149, "the edge of 150 grey levels must stay"


def test_equalization_by_hand_and_flattening():
    assert equalize(np.array([[10, 10], [20, 30]], np.uint8)).tolist() == [[0, 0], [128, 255]]
    ramp = np.clip(np.random.default_rng(1).normal(100, 20, (200, 200)), 0, 255).astype(np.uint8)
    share = np.searchsorted(np.sort(equalize(ramp).ravel()), [64, 128, 192]) / ramp.size
    assert np.abs(share - [0.25, 0.5, 0.75]).max() < 0.03


def test_fixed_channels_are_raw_diffused_and_equalized_diffused():
    gray = GOLDEN["cell_gray"]
    raw, smooth, equal = np.moveaxis(three_channels(gray, PRESETS["fixed"]), -1, 0)
    assert np.array_equal(raw, gray)
    assert np.array_equal(smooth, np.rint(diffuse(gray, **DEFAULTS)).astype(np.uint8))
    assert np.array_equal(equal, equalize(smooth))


def test_colour_is_kept_or_turned_gray_as_the_preset_says():
    rgb = skimage.data.retina()[::8, ::8]
    assert three_channels(rgb, PRESETS["fixed"]) is rgb
    assert not is_gray(rgb) and not np.array_equal(three_channels(rgb, PRESETS["released"]), rgb)
    gray = np.repeat(rgb[..., :1], 3, axis=-1)  # three equal channels are gray
    assert np.array_equal(three_channels(gray, PRESETS["fixed"]), three_channels(gray[..., 0], PRESETS["fixed"]))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_a_constant_image_is_finite(preset):
    assert three_channels(np.full((9, 7), 42, np.uint8), preset).shape == (9, 7, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gamma": 0.3}, "gamma"),
        ({"gamma": 0}, "gamma"),
        ({"kappa": 0}, "kappa"),
        ({"conductance": "none"}, "conductance"),
        ({"border": "zero"}, "border"),
    ],
)
def test_bad_diffusion_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        diffuse(np.zeros((4, 4)), **DEFAULTS | change)


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match="one gray image"):
        diffuse(np.zeros((4, 4, 3)), **DEFAULTS)
    with pytest.raises(ValueError, match="uint8"):
        equalize(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="uint8 image"):
        three_channels(np.zeros((4, 4, 4), np.uint8), PRESETS["fixed"])


def test_network_input_is_normalized_padded_and_the_baselines_is_raw():
    image = skimage.data.camera()[:300]
    for preset in PRESETS.values():
        proposed = network_input(image, preset, enhanced=True)
        assert proposed.shape == (3, 256, 256) and proposed.dtype == np.float32
        # `paper` diffuses over the seam, which lies at row 154
        assert proposed.min() == 0 and proposed.max() == 1 and not proposed[:, 165:].any()
        raw = network_input(image, preset, enhanced=False)
        assert np.array_equal(raw[0], raw[1]) and np.array_equal(raw[0], raw[2])
        assert not np.array_equal(proposed[1], raw[1])
