"""All that training needs, in archives of a chosen size, for a machine that has a GPU and no network.

    python -m recipe --pack FOLDER --cache cache --init checkpoints/grays_anatomy_sam_l0.pt     here
    for f in recipe-*.tar; do tar xf $f; done; python -m recipe --cache cache --init start --stage both exact drawn \\
        --minutes 12 --batch 64                                                                  there, in one folder

Holds the cache (pictures on the 256 grid, run lengths, LiteMedSAM's own masks), the weights in float16
and the code. A checkpoint may be larger than an archive: it becomes a folder `start` of several files
(formats/checkpoints.py reads such a folder). `distill` is not among the runs
there: it needs LiteMedSAM's weights, and a checkpoint of ours has it behind it.
"""

import io
import tarfile
from collections import defaultdict
from pathlib import Path

import torch

from formats import InputError
from formats.checkpoints import read_checkpoint, state_dict_of

ROOT = Path(__file__).parent.parent
MEGABYTES = 60  # at most, an archive
PART = 4_000_000  # weights, about, of each file of the checkpoint
CODE = ("*.py", "formats/*.py", "recipe/*.py", "demo_data/*.py")


def write_pack(folder: Path, cache: Path, init: Path | None) -> list[str]:
    """Write the archives. -> their names.   init: the checkpoint that training there starts from"""
    if init is None:
        raise InputError("--pack: name the checkpoint that training starts from: --init CHECKPOINT")
    stored, files, parts, count = read_checkpoint(init), {}, defaultdict(dict), 0
    for name, value in state_dict_of(stored).items():
        half = value.half() if value.is_floating_point() else value
        parts[count // PART][name] = half
        count += half.numel()
    for number, part in parts.items():
        content = io.BytesIO()
        torch.save({"model": part, "preset": stored.get("preset")}, content)
        files[f"start/{number:02}.pt"] = content.getvalue()
    wanted = [path for pattern in CODE for path in sorted(ROOT.glob(pattern))]
    files |= {path.relative_to(ROOT).as_posix(): path for path in wanted}
    files |= {f"cache/{p.relative_to(cache).as_posix()}": p for p in sorted(cache.rglob("*")) if p.is_file()}
    folder.mkdir(parents=True, exist_ok=True)
    names, archive, room = [], None, 0
    for name, content in files.items():
        content = content.read_bytes() if isinstance(content, Path) else content
        size = len(content) // 512 * 512 + 1536  # a tar's header, and whole blocks
        if archive is None or size > room:
            if archive is not None:
                archive.close()
            names.append(f"recipe-{len(names)}.tar")
            archive, room = tarfile.open(folder / names[-1], "w"), MEGABYTES * 10**6 - 10240
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
        room -= size
    archive.close()
    return names
