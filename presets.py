"""Three readings of the paper, in one frozen table: `fixed` (the default), `paper`, `released`. (D7)

The paper's text and its released code differ in some fifty places. PAPER_VS_CODE.md lists them by
number; each field below names the entries (#) that it settles. `paper` is what the text says,
`released` what the released code computes where that changes results, and `fixed` what we
recommend. Faults that only crash the released code are in no preset.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args, get_type_hints

from formats import InputError


@dataclass(frozen=True)
class Preset:
    """One column of the table. Defaults are `fixed`."""

    name: str = "fixed"
    # three channels [P 2.1]
    conductance: Literal["exponential", "quadratic"] = "exponential"  # of Perona and Malik; the text names none
    iterations: int = 10  # #1 diffusion steps (D2)
    gamma: float = 0.1  # #1 time step of one diffusion step
    kappa: float = 20.0  # #1 edge threshold, on an image that ranges over 0..diffusion_range
    diffusion_range: float = 255.0  # #1 the released code puts kappa = 20 on a 0..1 image: no edge is ever that steep
    border: Literal["reflect", "wrap"] = "reflect"  # #3 nothing flows out, or opposite borders touch
    rounding: Literal["nearest", "truncate"] = "nearest"  # #4 back to 8 bits
    equalize: Literal["diffused", "raw", "nothing"] = "diffused"  # #2 what channel 3 is made of: channel 2 or channel 1
    color: Literal["keep", "gray"] = "keep"  # #5 colour images keep their RGB, or turn gray
    # 256 grid [P 2.1]
    enhance_at: Literal["grid", "original"] = "grid"  # #7 enhance on the 256 grid, or at full size before resizing
    pad: Literal["after", "before"] = "after"  # zero padding to a square after or before resizing
    # box prompts [P 2.2]
    box_rounding: Literal["float", "int"] = "float"  # #43 boxes on the 256 grid; "int" truncates, as LiteMedSAM does
    reach: Literal["box", "image"] = "box"  # a 2D mask ends a quarter of its box and 8 grid pixels beyond it (D18)
    overlap: Literal["logit", "last"] = "logit"  # #46 a pixel of two masks: the higher logit wins, or the last object
    propagation: Literal["prompted", "mended", "released"] = "prompted"  # #40-42, #47 3D: ours, LiteMedSAM's, released
    # training [P 3.2, Table 3]
    epochs: int = 300  # #27 what an epoch is: `sampling`
    objects: int = 1  # objects an image, drawn anew at each step; they share one embedding
    sampling: Literal["equal", "without", "with"] = "equal"  # #20 an epoch: as many of each modality, or 1,000 a group
    jitter: Literal["both", "outward", "scaled"] = "both"  # #18 how a box's sides move, see grid.move_box
    flips: Literal["off", "on"] = "off"  # #17 mirror images at random; the text calls flips misleading
    decoder: Literal["lite_medsam", "random"] = "lite_medsam"  # #24 weights that prompt encoder and decoder start from
    learning_rate: float = 5e-5  # #25
    plateau: Literal["validation", "train"] = "validation"  # #26 the loss that lowers the learning rate
    # int8 [P 2.3]
    weight_int8: Literal["channel", "tensor"] = "channel"  # #39 a scale for each output channel, or one, as PyTorch's


PRESETS = {
    "fixed": Preset(),
    "paper": Preset(
        "paper", pad="before", box_rounding="int", reach="image", overlap="last", propagation="mended",
        sampling="without", weight_int8="tensor",
    ),
    "released": Preset(
        "released", iterations=1, diffusion_range=1.0, border="wrap", rounding="truncate", equalize="raw", color="gray",
        enhance_at="original", box_rounding="int", reach="image", overlap="last", propagation="released",
        sampling="with", jitter="outward", flips="on", decoder="random", learning_rate=2e-5, plateau="train",
        weight_int8="tensor",
    ),
}  # fmt: skip


# what a field of text may be, and between what a number must lie
CHOICES = {name: get_args(kind) for name, kind in get_type_hints(Preset).items() if get_args(kind)}
RANGES = {
    "epochs": (1, 1_000_000), "objects": (1, 1000), "learning_rate": (1e-9, 1.0), "iterations": (0, 1000),
    "gamma": (1e-6, 0.25), "kappa": (1e-6, 1e9), "diffusion_range": (1e-6, 1e6),
}  # fmt: skip


def override(preset: Preset, settings: list[str]) -> Preset:
    """The preset with fields replaced, settings as "field=value". InputError for an unknown field or value."""
    changes = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in asdict(preset) or name == "name":
            known = ", ".join(list(asdict(preset))[1:])
            raise InputError(f"{setting}: the preset has no such field; the fields are {known}")
        if name in CHOICES and text not in CHOICES[name]:
            raise InputError(f"{setting}: {name} is one of {', '.join(CHOICES[name])}")
        try:
            changes[name] = type(getattr(preset, name))(text)
        except ValueError as error:
            raise InputError(f"{setting}: {name} takes a number") from error
        if name in RANGES and not RANGES[name][0] <= changes[name] <= RANGES[name][1]:
            raise InputError(f"{setting}: {name} must lie in {RANGES[name][0]} to {RANGES[name][1]}")
    return replace(preset, **changes)


def preset_options(texts: list[str]) -> tuple[str | None, bool, list[str]]:
    """What `--preset NAME FIELD=VALUE ...` says -> (the name or None, whether it is forced, the fields).

    force=yes: use the preset although the weights were trained with another one. It has to be said: the
    network then sees images that were prepared in another way than in its training.
    InputError for an unknown name.
    >>> preset_options(["released", "kappa=3", "force=yes"]), preset_options(["kappa=3"])
    (('released', True, ['kappa=3']), (None, False, ['kappa=3']))
    """
    names = [text for text in texts if "=" not in text]
    if len(names) > 1 or not set(names) <= set(PRESETS):
        raise InputError(f"--preset {' '.join(texts)}: give one of {', '.join(PRESETS)}, FIELD=VALUE, or both")
    settings = [text for text in texts if "=" in text and text != "force=yes"]
    return (names[0] if names else None), "force=yes" in texts, settings


def table() -> str:
    """The presets side by side as a Markdown table, one row per field."""
    rows = ["| field | " + " | ".join(PRESETS) + " |", "| --- |" + " --- |" * len(PRESETS)]
    columns = [asdict(preset) for preset in PRESETS.values()]
    rows += [f"| `{f.name}` | " + " | ".join(str(c[f.name]) for c in columns) + " |" for f in fields(Preset)[1:]]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
