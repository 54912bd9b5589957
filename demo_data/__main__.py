"""Write the demo cases: python -m demo_data --out demo

Writes demo/imgs and demo/gts, the input of steps 4 and 5; with --train also the input of step 1.
"""

import argparse
from pathlib import Path

from demo_data import RECIPES, demo_cases, synthetic_case, tiny_case
from formats.npz import write_case, write_training_case


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m demo_data", description="Write the demo cases.")
    p.add_argument("--out", type=Path, default=Path("demo"), help="folder for imgs/ and gts/ (demo)")
    p.add_argument("--train", type=int, default=0, metavar="N", help="also write N other synthetic cases of each "
                   "modality to train/, and the demo cases to val/, in training format")  # fmt: skip
    p.add_argument("--smoke", action="store_true", help="two tiny synthetic cases instead, one 2D and one 3D, 1 s")
    args = p.parse_args(argv)
    cases = [tiny_case(dims=2), tiny_case(dims=3)] if args.smoke else demo_cases()
    for case in cases:
        write_case(args.out, case)
        print(f"{case.name}: {' x '.join(map(str, case.image.shape))}, {case.labels.max()} objects")
        if args.train:
            write_training_case(args.out / "val", case)
    for seed in range(1, 1 + args.train):
        for case in [tiny_case(seed, d) for d in (2, 3)] if args.smoke else [synthetic_case(m, seed) for m in RECIPES]:
            write_training_case(args.out / "train", case)
    command = f"python 04_infer.py -i {args.out / 'imgs'} -o {args.out / 'segs'} --model baseline"
    print(f"demo_data: wrote {len(cases)} cases to {args.out}. Next: {command}")


if __name__ == "__main__":
    main()
