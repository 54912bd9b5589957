"""The five scripts as commands, hundreds of them in a minute: each in a fork of a process that has imported everything.

A fork has its own arguments, streams, exit code, memory and limits, as a command has; only starting Python and
importing PyTorch are done once. The networks are stand-ins that take no time. Some runs are repeated as commands
proper (`proper_command`), and must end alike.
"""

import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())  # PyTorch makes it where it is told
import cv2
import matplotlib.pyplot
import nibabel
import pycocotools.mask
import pydicom.pixels
import SimpleITK
import tifffile
import torch
from fake_model import TinyNetwork

import quantize
import segment
import training
from formats.checkpoints import save_checkpoint

ROOT = Path(__file__).parent.parent
STEPS = ("01_preprocess.py", "02_train.py", "03_quantize.py", "04_infer.py", "05_evaluate.py")
HANGS = 60  # seconds, of which a command takes less than one
GIB = 2**30
IMPORTED = (matplotlib.pyplot, nibabel, pycocotools.mask, pydicom.pixels, SimpleITK, tifffile)  # so that no fork has to
torch.optim.AdamW([torch.zeros(1)])  # imports what optimisers need, a second
torch.set_num_threads(1)  # a fork has no threads but the one that forks
cv2.setNumThreads(0)


class SmallNetwork(TinyNetwork):
    """TinyNetwork with what step 3 and 4 ask of a network."""

    def __init__(self):
        super().__init__()
        self.mask_decoders, self.prompt_encoders = torch.nn.ModuleDict(), torch.nn.ModuleDict()


def use_stand_ins() -> None:
    """In a fork: every network is small, and step 3 does not time it."""
    segment.build = training.build = lambda model, kinds=(): SmallNetwork()
    quantize.int8_reach = lambda network: {"weights": (1, 2)}
    quantize.pytorchs_int8 = lambda network: None
    names = ("float", "int8", "PyTorch's int8")
    quantize.compare_speed = lambda *_: {"encoder, 1 image": dict.fromkeys(names, 1.0)}


def small_checkpoint(path: Path, **changed) -> Path:
    """Weights of the stand-in, as step 2 writes them."""
    torch.manual_seed(0)
    save_checkpoint(
        path, {"model": SmallNetwork().state_dict(), "architecture": "baseline", "preset": "fixed"} | changed
    )
    return path


class Done(NamedTuple):
    """How a command ended."""

    code: int | None  # None: it was killed
    signal: str  # that killed it, or ""; "hang" if it was ended after HANGS seconds
    out: str
    err: str
    cpu: float  # seconds, with its workers
    mib: int  # the most that it, or a worker, held
    left: list[str]  # what it left in the folder for temporary files

    def sentences(self) -> list[str]:
        """The lines of stderr, without argparse's usage and the line that counts what was left out."""
        lines = re.sub(r"(?ms)^usage: .*?(?=^\S+: error: )", "", self.err).splitlines()
        return [line for line in lines if not re.search(r"(left out|problems?|none) as told above|told above", line)]


class Running:
    """A command that was started."""

    def __init__(self, script: str, *arguments: object, patch: Callable = use_stand_ins) -> None:
        self.folder = tempfile.TemporaryDirectory()
        for name in ("tmp", "here"):
            (Path(self.folder.name) / name).mkdir()
        if not (pid := os.fork()):
            self._child(script, [os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments], patch)
        self.pid = pid

    def _child(self, script: str, arguments: list[str], patch: Callable) -> None:
        code = 70
        try:
            os.setsid()
            folder = Path(self.folder.name)
            for number, name, how in ((0, os.devnull, os.O_RDONLY), (1, folder / "out", 577), (2, folder / "err", 577)):
                os.dup2(os.open(name, how), number)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
            tempfile.tempdir = str(folder / "tmp")
            limit_memory(8 * GIB)
            os.chdir(folder / "here")
            patch()
            sys.argv = [script, *arguments]
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, seconds: float = HANGS) -> Done:
        """Wait for the end, which comes by force after so many seconds."""
        end, hung = time.monotonic() + seconds, False
        while not (found := os.wait4(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > end and not hung:
                hung = True
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.004)
        _, status, used = found
        died = "hang" if hung else signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""
        folder = Path(self.folder.name)
        out, err = ((folder / name).read_bytes().decode("utf-8", "replace") for name in ("out", "err"))
        left = sorted(path.name for path in (*(folder / "tmp").rglob("*"), *folder.glob("here/CODE")))
        code = None if died else os.WEXITSTATUS(status)
        self.folder.cleanup()
        return Done(code, died, out, err, used.ru_utime + used.ru_stime, used.ru_maxrss // 1024, left)

    def kill(self) -> list[int]:
        """Kill it alone, not its workers. -> those of them that still run two seconds later, now killed too"""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        for _ in range(200):
            if not (workers := in_session(self.pid)):
                break
            time.sleep(0.01)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        self.folder.cleanup()
        return workers


def in_session(session: int) -> list[int]:
    """Processes that a command started and that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def limit_memory(more: int) -> None:
    """In a fork: so many bytes above what it has, beyond which nothing is granted; and no file of a dead process."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + more, has + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def command(script: str, *arguments: object, patch: Callable = use_stand_ins) -> Done:
    """Run a script to its end."""
    return Running(script, *arguments, patch=patch).finish()


def proper_command(script: str, *arguments: object) -> Done:
    """The same without fork and stand-ins, to compare with: steps 1 and 5 load no network."""
    with tempfile.TemporaryDirectory() as here:
        asked = [sys.executable, ROOT / script, *map(os.fspath, arguments)]
        done = subprocess.run(asked, cwd=here, capture_output=True, timeout=300)
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return Done(done.returncode, "", out, err, 0.0, 0, [])
