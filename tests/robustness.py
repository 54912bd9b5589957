"""Attack the five scripts and every reader, count the answers, and write results/robustness.md.

    python tests/robustness.py                                all, on two cores 25 min at most (make robustness)
    python tests/robustness.py --share 0.1 --kills 5 --every 10 --parts catalogue fuzz
    python tests/robustness.py --only "step 4: npz"           rows of the catalogue whose names hold this
    python tests/robustness.py --reader "MHA, zlib" --number 17 --keep FOLDER     one changed file again

Exit code 1 where anything was answered badly.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from bad_inputs import catalogue, differs_as_proper_command, faults_of  # noqa: E402
from fuzzing import READERS, again, fuzz  # noqa: E402
from kills import KILLS, kill_once, one_pair  # noqa: E402

ROOT = Path(__file__).parent.parent
FUZZED, KILLED, CHUNK = 20_000, 50, 500
PROPER = 80  # one in so many rows of the catalogue is run as a command proper, too
PARTS = ("catalogue", "fuzz", "kills", "pairs")


def job(what: tuple) -> tuple[str, str, int, list[str]]:
    """`attacked`; what goes wrong in the attack itself is a fault too."""
    try:
        return attacked(what)
    except Exception as error:
        return what[0], str(what[1]), 0, [f"{what}: of this program: {error!r}"]


def attacked(what: tuple) -> tuple[str, str, int, list[str]]:
    """In a worker: a part of the attack. -> (part, name, how many inputs, what is wrong)"""
    part, name, number = what
    if part == "catalogue":
        attack = ATTACKS[number]
        faults = faults_of(attack)
        if not faults and number % PROPER == 0 and (other := differs_as_proper_command(attack)):
            faults = [other]
        return part, attack.name, 1, [f"{attack.name}: {'; '.join(faults)}"] * bool(faults)
    if part == "fuzz":
        count, faults = fuzz(name, number)
        return part, name, count, [f"{name}, number {at}: {wrong}" for at, wrong in faults]
    wrong = kill_once(name, number) if part == "kills" else one_pair(number)
    return part, name, 1, [f"{name}, number {number}: {wrong}"] * bool(wrong)


def jobs(parts: list[str], share: float, killed: int, every: int, only: str) -> list[tuple]:
    """Slow ones first."""
    found, count = [], max(1, round(FUZZED * share))
    if "kills" in parts:
        found += [("kills", name, n) for n in range(killed) for name in KILLS]
    if "pairs" in parts:
        found += [("pairs", "pair", n) for n in range(killed)]
    if "catalogue" in parts:
        found += [("catalogue", "", n) for n, attack in enumerate(ATTACKS) if only in attack.name and n % every == 0]
    if "fuzz" in parts:
        chunks = [range(at, min(at + CHUNK, count)) for at in range(0, count, CHUNK)]
        found += [("fuzz", name, numbers) for numbers in chunks for name in READERS]
    return found


def commit() -> str:
    """This copy's, and whether it was changed since."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def report(
    counts: Counter, by_name: Counter, faults: dict[str, list[str]], minutes: float, args: argparse.Namespace
) -> str:
    """The page, in Markdown."""
    inputs, bad = counts["catalogue"], len(faults["catalogue"])
    every = [line for lines in faults.values() for line in lines]
    lost = sum("lost:" in line or "is lost" in line for line in every)
    silent = sum("without a word" in line or "other pixels" in line for line in every)
    rows = [
        ("bad inputs, as commands", inputs, f"{inputs - bad} answered well" if inputs else "not run"),
        ("changed files, for the readers", counts["fuzz"], f"{len(faults['fuzz'])} answered badly, {len(READERS)} readers"),
        ("kills, each followed by a run", counts["kills"], f"{len(faults['kills'])} ended in another result or left files"),
        ("pairs of runs on one cache", counts["pairs"], f"{len(faults['pairs'])} ended in half an index"),
        ("good cases lost", lost, ""), ("wrong without a word", silent, ""),
    ]  # fmt: skip
    table = "\n".join(f"| {what} | {number:,} | {told} |" for what, number, told in rows)
    detail = "\n".join(
        f"| {name} | {number:,} |" for (part, name), number in sorted(by_name.items()) if part in ("fuzz", "kills")
    )
    listed = "\n".join(f"- `{line[:300]}`" for line in every[:200]) or "None."
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    return (
        f"# Robustness\n\nWritten by `{args.command}` on {when}, commit {args.commit}, in {minutes:.1f} minutes on {args.jobs} cores.\n"
        "What a good answer is stands in `tests/bad_inputs.py`. The networks are stand-ins of no size.\n\n"
        f"| what | number | found |\n| --- | ---: | --- |\n{table}\n\n"
        f"| reader or script | changed files, or kills |\n| --- | ---: |\n{detail}\n\n## Answered badly\n\n{listed}\n"
    )


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--share", type=float, default=1.0, help="of 20,000 changed files a reader, above 0 (1)")
    p.add_argument("--kills", type=int, default=KILLED, help="of each script, and pairs of runs (50)")
    p.add_argument("--every", type=int, default=1, help="take one in so many rows of the catalogue (1)")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    p.add_argument("--only", default="", help="rows of the catalogue whose names hold this text")
    p.add_argument("--jobs", type=int, default=2, help="processes (2)")
    p.add_argument("--out", type=Path, default=ROOT / "results" / "robustness.md")
    p.add_argument("--list", action="store_true", help="print the names of the catalogue's rows")
    p.add_argument("--reader", choices=READERS, help="read one changed file again, here")
    p.add_argument("--number", type=int, default=0)
    p.add_argument("--keep", type=Path, default=Path("fuzzed"), help="folder for that file")
    args = p.parse_args(argv)
    if args.list:
        print("\n".join(ascii(attack.name)[1:-1] for attack in ATTACKS))
        return 0
    if args.reader:
        print(again(args.reader, args.number, args.keep))
        return 0
    args.command = " ".join(["python tests/robustness.py", *(sys.argv[1:] if argv is None else argv)])
    args.commit = commit()
    start, counts, by_name = time.monotonic(), Counter(), Counter()
    faults: dict[str, list[str]] = {part: [] for part in PARTS}
    todo = jobs(list(args.parts), args.share, args.kills, args.every, args.only)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("fork")) as pool:
        for done, (part, name, count, wrong) in enumerate(pool.map(job, todo), start=1):
            counts[part] += count
            by_name[part, name] += count
            faults[part] += wrong
            for line in wrong:
                print(line[:300].encode("ascii", "backslashreplace").decode(), flush=True)
            if done % 100 == 0:
                print(f"{done} of {len(todo)} parts, {(time.monotonic() - start) / 60:.1f} min", flush=True)
    text = report(counts, by_name, faults, (time.monotonic() - start) / 60, args)
    args.out.write_bytes(text.encode("utf-8", "backslashreplace"))
    print(text.partition("| reader or script")[0])
    return int(any(faults.values()))


ATTACKS = catalogue()
if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
