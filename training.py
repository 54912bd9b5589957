"""What 02_train.py calls: losses, start, validation, exact resuming, several processes. [P 3.2, Table 3]

Letters: B images a batch, K objects an image, N = B K prompts, H, W the 256 grid.
Logits and masks are (N, 1, H, W), predicted IoU is (N, 1).
"""

import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from data import SliceDataset
from figures import plot_losses
from formats import InputError, checkpoints, usable_cores
from formats.cache import fingerprint
from formats.case import why
from formats.checkpoints import OF_KINDS, load_weights, read_checkpoint, state_dict_of
from formats.writing import csv_text, progress_bar, save_figure, save_json, save_text, tell
from model import BoxSegmenter
from presets import Preset
from segment import build

OBJECT_CHUNK = 16  # objects of a validation image that are decoded together
SAVE_EVERY, MOST_STEPS = 50, 10**9
CURVE_EVERY, CURVE_UNTIL = 10, 200  # steps: a run that has just begun is looked at often
LOWER = "lower the rate (--set learning_rate=...) and start again, or from last.pt, which is good, with --init"
PROGRESS = ("step", "best", "log", "losses")  # fields of Run
LOG_COLUMNS = ("step", "train_loss", "validation_loss", "validation_dice", "learning_rate")


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice loss, the mean over all prompts of

        1 - (2 sum_i p_i t_i + e) / (sum_i p_i^2 + sum_i t_i + e)

    i    the pixels of one prompt's mask
    p_i  probability that pixel i belongs to the object: the sigmoid of its logit
    t_i  the truth, 1 or 0; so t_i^2 = t_i, and both sums of the denominator are of squares (#28)
    e    1e-5: if truth and prediction are empty the loss is 0, not 0 / 0"""
    p = logits.sigmoid().flatten(1)  # (N, H W)
    t = masks.flatten(1)
    overlap = 2 * (p * t).sum(dim=1)  # (N,)
    return (1 - (overlap + 1e-5) / (p.square().sum(dim=1) + t.sum(dim=1) + 1e-5)).mean()


def mask_iou(logits: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of the mask (logits above 0) and the truth. -> (N, 1), no gradient

    If both are empty it is 1 (#29)."""
    p, t = (logits > 0).flatten(1), (masks > 0.5).flatten(1)
    union = (p | t).sum(dim=1, keepdim=True)
    return torch.where(union > 0, (p & t).sum(dim=1, keepdim=True) / union.clamp(min=1), 1.0)


def segmentation_loss(logits: Tensor, iou: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """The losses of 02_train.py's step: bce, dice, mse, and their sum, `loss`. [P Table 3]"""
    terms = {
        "bce": F.binary_cross_entropy_with_logits(logits, masks),
        "dice": dice_loss(logits, masks),
        "mse": F.mse_loss(iou, mask_iou(logits, masks)),
    }
    return terms | {"loss": sum(terms.values())}


def starting_network(
    model: str, preset: Preset, init: Path | None, seed: int, device: torch.device | None = None,
    kinds: tuple[str, ...] = (),
) -> tuple[BoxSegmenter, str]:  # fmt: skip
    """A network with the weights that training starts from, and words that say which. [P 2.2; #24]

    init: a checkpoint of ours, of which all is used, or efficientvit_sam_l0.pt, of which the encoder
    is. With decoder=random a checkpoint of ours with another decoder gives its encoder alone, too.
    kinds: of boxes beside exact ones (recipe/); one that `init` has no decoder for starts from that of
    exact ones. Without any, as in Table 3, decoders of other kinds are left out."""
    torch.manual_seed(seed)
    network, told, whole = build(model, kinds), f"encoder from {init or 'random weights'}", False
    if init is not None:
        stored, prefix = read_checkpoint(init), "image_encoder."
        stored |= {"model": with_kinds(state_dict_of(stored), kinds)}
        try:
            whole = "preset" in stored and load_weights(init, network, stored) is not None
        except InputError:
            if preset.decoder != "random":
                raise
        if not whole:
            part = {k.removeprefix(prefix): v for k, v in state_dict_of(stored).items() if k.startswith(prefix)}
            load_weights(init, network.image_encoder, part)
    if not whole:
        donor = build(model if preset.decoder == "random" else "baseline")
        if preset.decoder == "lite_medsam":
            load_weights(checkpoints.lite_medsam_path(), donor)
        network.prompt_encoder, network.mask_decoder = donor.prompt_encoder, donor.mask_decoder
        own = {name: value for name, value in network.state_dict().items() if not name.startswith(OF_KINDS)}
        network.load_state_dict(with_kinds(own, kinds))
    if device is not None and device.type == "cuda":
        network.to(device, memory_format=torch.channels_last)  # in which its convolutions are fast
    return network, f"all weights from {init}" if whole else f"{told}, decoder from {preset.decoder} weights"


def with_kinds(state: dict, kinds: tuple[str, ...]) -> dict:
    """A state dict with a decoder for each of `kinds` and no other; a missing one is a copy of that of exact boxes."""
    kept = {name: value for name, value in state.items() if not name.startswith(OF_KINDS)}
    for name in list(kept):
        module, _, rest = name.partition(".")
        for kind in kinds if f"{module}s." in OF_KINDS else ():
            kept[f"{module}s.{kind}.{rest}"] = state.get(f"{module}s.{kind}.{rest}", kept[name])
    return kept


def decode_batch(decode: Callable, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """embedding (B, 256, 64, 64), boxes (B, K, 4) -> logits (N, 1, H, W), IoU (N, 1), float32.

    On a CPU one image at a time is decoded: its boxes share the decoder's first steps, a third less time."""
    if embedding.device.type == "cpu":
        answers = [decode(one.unsqueeze(0), asked) for one, asked in zip(embedding, boxes, strict=True)]
        logits, iou = (torch.cat(part) for part in zip(*answers, strict=True))
    else:
        image_of_box = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
        logits, iou = decode(embedding, boxes.flatten(0, 1), image_of_box)
    return logits.float(), iou.float()


@torch.no_grad()
def validate(
    network: BoxSegmenter, items: Iterable, channels: str = "image", extra: Callable | None = None, boxes_are: str = "exact"
) -> dict:  # fmt: skip
    """-> validation_loss, validation_dice: means over the modalities (D16); dice: of each modality

    items: pairs of a modality and a data.validation_item.   channels: "image" or "raw", what of an
    item the network sees.   extra(embedding, item): a loss that recipe/ adds.   boxes_are: their kind.
    Of several processes the first one validates, and the others wait for what it found."""
    found, losses, dices = {}, defaultdict(list), defaultdict(list)
    device = next(network.parameters()).device
    if first_process():
        network.eval()
        for modality, item in items:
            item = {key: torch.from_numpy(value).to(device) for key, value in item.items()}
            embedding = network.image_encoder(item[channels].unsqueeze(0))  # (1, 256, 64, 64)
            loss, dice = 0.0, []
            for first in range(0, len(item["boxes"]), OBJECT_CHUNK):  # an image may hold hundreds of objects
                boxes, masks = (item[key][first : first + OBJECT_CHUNK] for key in ("boxes", "masks"))
                logits, iou = network.decode(embedding, boxes, boxes_are=boxes_are)
                terms = segmentation_loss(logits.float(), iou.float(), masks.unsqueeze(1))
                loss += terms["loss"].item() * len(boxes)
                p, t = (logits[:, 0] > 0).flatten(1), (masks > 0.5).flatten(1)
                dice += (2 * (p & t).sum(dim=1) / (p.sum(dim=1) + t.sum(dim=1))).tolist()
            losses[modality].append(loss / len(dice) + (float(extra(embedding, item)) if extra else 0.0))
            dices[modality].append(mean_of(dice))
        for name, group in (("validation_loss", losses), ("validation_dice", dices)):
            found[name] = mean_of([mean_of(values) for values in group.values()])
        found["dice"] = {modality: mean_of(values) for modality, values in sorted(dices.items())}
    told = [found]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


def mean_of(values: list[float]) -> float:
    """Plain mean."""
    return sum(values) / len(values)


@dataclass
class Run:
    """All that a checkpoint holds, so that a run that was stopped goes on as if it had not been."""

    model: str  # a name of segment.MODELS
    preset: Preset
    network: BoxSegmenter
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.ReduceLROnPlateau | None  # recipe/ has none
    must_match: dict[str, object] = field(default_factory=dict)  # what else must be equal when the run is resumed
    stage: str = "finetune"  # the run's name in dice_by_modality.csv
    step: int = 0  # optimiser steps that were done
    best: float = math.inf  # smallest validation loss of a step
    log: list[dict] = field(default_factory=list)  # rows of log.csv, and in `dice` the Dice of each modality
    losses: list[dict] = field(default_factory=list)  # rows of losses.csv

    def start(self, told: str, data: SliceDataset, validating: int, steps: int, arguments: dict) -> Iterator[dict]:
        """Resume if asked to, say what begins, write arguments.json. -> the batch of each step that is left

        What a batch holds depends on (seed, step, place) alone: a resumed run draws the same."""
        self.must_match = {"batch": data.batch, "seed": data.seed, "data": fingerprint(data.folder)}
        if arguments["resume"]:
            self.resume(arguments["out"] / "last.pt")
        count, device = sum(p.numel() for p in self.network.parameters()), next(self.network.parameters()).device.type
        tell(f"02_train.py: {told}\n02_train.py: {count:,} parameters, {device}, "
             f"{len(data.entries)} images, {validating} for validation, steps {self.step} to {steps}")  # fmt: skip
        if first_process():
            save_json(arguments["out"] / "arguments.json", arguments | {"preset_fields": vars(self.preset)})
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.optimiser.register_step_pre_hook(lambda *_: process_mean(*(p.grad for p in self.network.parameters())))
        self.bar = progress_bar(None, "train", steps, unit="step", initial=self.step, disable=rank > 0)
        plan = ([(step, place) for place in range(rank, data.batch, processes)] for step in range(self.step, steps))
        workers = min(8, usable_cores()) if device == "cuda" else 0
        return iter(DataLoader(data, batch_sampler=plan, num_workers=workers))

    def count(self, loss: Tensor, folder: Path) -> None:
        """A step is done: its loss, the bar, and from time to time last.pt, log and curve."""
        self.note(loss)
        self.step += 1
        self.bar.set_postfix(loss=f"{self.losses[-1]['loss']:.4f}")
        self.bar.update()
        self.keep(folder, now=self.step == self.bar.total)

    def finish(self, best: Path, smoke: bool) -> dict:
        """Say what training changed, and what comes next. -> the last row of log.csv"""
        self.bar.close()
        first, last = self.log[0], self.log[-1]
        loss, dice = (f"{first[key]:.4f} -> {last[key]:.4f}" for key in ("validation_loss", "validation_dice"))
        end = f"wrote last.pt and {best}. Next: python 03_quantize.py --model {best}"
        end = "its files were removed again. Next: python 03_quantize.py --smoke" if smoke else end
        tell(f"02_train.py: steps {first['step']} -> {last['step']}, validation loss {loss}, Dice {dice}; {end}")
        return last

    def note(self, loss: Tensor) -> None:
        """Keep the loss of the step that is being done. InputError if it is not finite."""
        process_mean(mean := loss.detach().clone())
        row = {"step": self.step + 1, "loss": mean.item(), "learning_rate": self.optimiser.param_groups[0]["lr"]}
        if not math.isfinite(row["loss"]):
            raise InputError(f"step {row['step']}: the loss is {row['loss']}; {LOWER}")
        self.losses.append(row)

    def add_row(self, found: dict, folder: Path) -> dict:
        """Add what `validate` found to the log, and print its Dice. -> the row. InputError if its loss is not finite."""
        if not math.isfinite(found["validation_loss"]):
            raise InputError(f"step {self.step}: the validation loss is {found['validation_loss']}; {LOWER}")
        since = self.log[-1]["step"] if self.log else 0
        losses = [row["loss"] for row in self.losses if row["step"] > since]
        row = {"step": self.step, "train_loss": mean_of(losses) if losses else None, **found}
        self.log.append(row | {"learning_rate": self.optimiser.param_groups[0]["lr"]})
        tell(f"step {self.step}, Dice: " + ", ".join(f"{name} {dice:.3f}" for name, dice in row["dice"].items()))
        self.write_log(folder)
        return row

    def keep(self, folder: Path, now: bool = False) -> None:
        """Write last.pt and the log if it is time to, or `now`: before the step's validation, which a
        longer run might not make here."""
        if saved := now or self.step % SAVE_EVERY == 0:
            self.save(folder / "last.pt")
        if saved or (self.step % CURVE_EVERY == 0 and self.step <= CURVE_UNTIL):
            self.write_log(folder)

    def write_log(self, folder: Path) -> None:
        """losses.csv, log.csv, dice_by_modality.csv, and the losses as a picture, curve.png."""
        if not first_process():
            return
        if self.losses:
            save_text(folder / "losses.csv", csv_text(self.losses, tuple(self.losses[0]), number=""))  # all digits
            curve = plot_losses(self.log, [(row["step"], row["loss"]) for row in self.losses])
            save_figure(folder / "curve.png", curve.figure)
        if self.log:
            save_text(folder / "log.csv", csv_text(self.log, LOG_COLUMNS, number=""))
            dice = [{"stage": self.stage, "step": row["step"]} | row["dice"] for row in self.log]
            save_text(folder / "dice_by_modality.csv", csv_text(dice, tuple(dice[0])))

    def save(self, path: Path, **changed) -> None:
        """Write a checkpoint.   changed: what recipe/ adds or replaces."""
        state = {
            "model": self.network.state_dict(), "architecture": self.model, "preset": self.preset.name,
            "preset_fields": vars(self.preset), "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(), "rng": torch.get_rng_state(),
            "must_match": {key: str(value) for key, value in self.must_match.items()},
        }  # fmt: skip
        if first_process():
            checkpoints.save_checkpoint(path, state | {key: getattr(self, key) for key in PROGRESS} | changed)

    def resume(self, path: Path) -> dict:
        """Everything back from a checkpoint. -> its content

        InputError if it belongs to other settings or other data, or lacks something."""
        stored = read_checkpoint(path)
        if not {"architecture", "optimiser"} <= stored.keys():
            raise InputError(f"{path}: cannot be resumed, it holds weights alone or an earlier version wrote it; "
                             "start from it with --init")  # fmt: skip
        try:
            self.take(path, stored)
        except InputError:
            raise
        except Exception as error:  # of a file that somebody changed anything may be missing, or of another type
            what = f"cannot be resumed, it is not complete ({type(error).__name__}: {why(error)})"
            raise InputError(f"{path}: {what}; start from it with --init") from error
        return stored

    def take(self, path: Path, stored: dict) -> None:
        """`resume` of what was read. May raise anything."""
        before = {"model": stored["architecture"]} | stored["preset_fields"] | stored["must_match"]
        now = {"model": self.model} | vars(self.preset) | {key: str(value) for key, value in self.must_match.items()}
        for name, value in now.items():
            if before.get(name) != value and name != "epochs":  # a run may be made longer
                name, was = "preset" if name == "name" else name, before.get(name)
                raise InputError(f"{path}: was trained with {name} {was}, not {value}; use the same, or another --out")
        if not isinstance(stored["optimiser"], dict):
            raise TypeError("optimiser is no dict")
        learning = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        state = {  # of AdamW: a count, and two moments of each weight
            i: {"step": torch.tensor(0.0), "exp_avg": learning[i], "exp_avg_sq": learning[i]}
            for i in stored["optimiser"]["state"]
            if type(i) is int
        }
        wanted = {
            "optimiser": self.optimiser.state_dict() | {"state": state}, "step": 0, "best": 0.0,
            "schedule": self.schedule and self.schedule.state_dict(), "rng": torch.get_rng_state(),
            "log": [
                dict.fromkeys(LOG_COLUMNS, 0.0)
                | {"step": 0, "train_loss": row["train_loss"] and 0.0, "dice": dict.fromkeys(row["dice"], 0.0)}
                for row in stored["log"]
                if isinstance(row, dict)
            ],
            "losses": [{"step": 0, "loss": 0.0, "learning_rate": 0.0} for _ in stored["losses"]],
        }  # fmt: skip
        bad = [name for name, one in wanted.items() if form_of(stored[name]) != form_of(one)]
        if bad or not 0 <= stored["step"] <= MOST_STEPS:
            raise ValueError(f"{(bad or ['step'])[0]} is not of this run's form")
        load_weights(path, self.network, stored)
        self.optimiser.load_state_dict(stored["optimiser"])
        if self.schedule:
            self.schedule.load_state_dict(stored["schedule"])
        for key in PROGRESS:
            setattr(self, key, stored[key])
        torch.set_rng_state(stored["rng"])


def form_of(value):
    """What two checkpoints of a run have in common: names, types and shapes. NaN is a type of its own."""
    if isinstance(value, dict):
        return {key: form_of(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [form_of(one) for one in value]
    if isinstance(value, Tensor):
        return value.dtype, value.shape
    return type(value) if value == value else "NaN"


def out_of_range(arguments: dict) -> str:
    """What is wrong with the numbers that 02_train.py and the recipe are given; "" if nothing is."""
    limits = {"steps": (1, MOST_STEPS), "batch": (1, 4096), "validate_every": (1, MOST_STEPS), "seed": (0, 2**63 - 1)}
    for name, (low, high) in limits.items():
        if arguments[name] is not None and not low <= arguments[name] <= high:
            return f"--{name.replace('_', '-')} must lie in {low} to {high}"
    return ""


def join_processes(batch: int) -> torch.device:
    """The device of this process: a GPU if there is one. InputError if a batch cannot be cut into equal parts.

        torchrun --nproc-per-node 2 02_train.py --cache cache --init efficientvit_sam_l0.pt

    Each process takes its part of the batch, and gradients are averaged. Only batch norm differs: each
    process has the mean and variance of its part, and the first one's running means are kept. The first
    one alone prints and writes files."""
    processes, place = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", place) if torch.cuda.is_available() else torch.device("cpu")
    if batch % processes:
        raise InputError(f"--batch {batch} cannot be cut into {processes} equal parts; give a multiple of {processes}")
    if processes == 1:
        return device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # validation, for which the others wait, may take hours
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    if not first_process():
        sys.stdout = open(os.devnull, "w")
    return device


def first_process() -> bool:
    """Whether this process is the one that validates, prints and writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def process_mean(*values: Tensor | None) -> None:
    """Replace each by its mean over the processes: the batch's, as their parts of it have one size."""
    for value in values if dist.is_initialized() else ():
        if value is not None:
            dist.all_reduce(value)
            value /= dist.get_world_size()
