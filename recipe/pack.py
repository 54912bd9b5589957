"""All that training needs, in files of a chosen size, for a machine that has a GPU and no network.

    python -m recipe --pack FOLDER --cache cache --init checkpoints/grays_anatomy_sam_l0.pt     here
    cat recipe.tar.* | tar x                                                                    there, in an empty folder

One tar archive, cut into pieces: the cache (pictures on the 256 grid, run lengths, LiteMedSAM's own masks), the weights
in float16 as start.pt, and the code. `distill` is not among the runs there: it needs LiteMedSAM's weights, and a
checkpoint of ours has it behind it.
"""

import tarfile
import tempfile
from pathlib import Path

from formats import InputError
from formats.checkpoints import export_checkpoint

ROOT = Path(__file__).parent.parent
PIECE = 60_000_000  # bytes, of each file but the last
CODE = ("*.py", "formats/*.py", "recipe/*.py", "demo_data/*.py")


def write_pack(folder: Path, cache: Path, init: Path | None) -> list[str]:
    """Write the pieces. -> their names.   init: the checkpoint that training there starts from"""
    if init is None:
        raise InputError("--pack: name the checkpoint that training starts from: --init CHECKPOINT")
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    with tempfile.TemporaryFile(dir=folder) as whole, tempfile.TemporaryDirectory() as made:
        export_checkpoint(init, Path(made) / "start.pt")
        with tarfile.open(fileobj=whole, mode="w") as archive:
            archive.add(Path(made) / "start.pt", "start.pt")
            archive.add(cache, "cache")
            for path in (path for pattern in CODE for path in sorted(ROOT.glob(pattern))):
                archive.add(path, path.relative_to(ROOT).as_posix())
        whole.seek(0)
        while piece := whole.read(PIECE):
            names.append(f"recipe.tar.{len(names):02}")
            (folder / names[-1]).write_bytes(piece)
    return names
