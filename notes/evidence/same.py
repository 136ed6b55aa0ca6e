"""Does the present script still do what an older version did, bit for bit?

    python notes/evidence/same.py COMMIT           # about five minutes; needs git

A record of records/ becomes old when the code that it depends on changes. But some changes only say
the same in another way. This program makes runs with the version of COMMIT and with the present
one, on one thread, and compares everything that they print and write, apart from seconds: models,
metrics, X-rays, reports. If all is equal, each record that held for COMMIT gets a line `same`, and
check_numbers.py accepts it for the present code. Other records and other files are left alone.

The runs are the default run, and shorter ones in which other parts of the script work; and, for
staircase.py, two cycles of each rung. What none of them reaches is not compared.
"""
import argparse
import csv
import datetime
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import record  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ["ppo_rlhf.py", "notes/staircase.py"]
SHORT = ("--pretrain_steps 30 --sft_steps 40 --rankings 30 --rm_steps 30 --cycles 4 --eval_every 2 "
         "--report_batches 4 ")
DATA = "--prompts DATA/prompts.jsonl --demos DATA/demos.jsonl --preferences DATA/preferences.jsonl"
RUNS = {
    "default": "",
    "grouped": SHORT + "--replies_per_prompt 4 --whiten_advantages --lam 0.5 --gamma 0.9",
    "divided": SHORT + "--micro_batch_size 7 --minibatches 4 --ppo_epochs 2",
    "cut off": SHORT + "--max_new_tokens 6 --missing_eos_penalty 2 --temperature 1.2",
    "human": SHORT + "--reward human --kl_coef 0.02 --ent_coef 0",
    "own data": SHORT + DATA}


def without_seconds(path: Path) -> bytes:
    """What a run has written into a file, apart from the time that it took."""
    if path.name == "metrics.csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return json.dumps([{key: x for key, x in row.items() if key != "seconds"}
                           for row in rows]).encode()
    if path.name == "report.json":
        report = json.loads(path.read_text())
        return json.dumps({key: x for key, x in report.items() if key != "seconds"}).encode()
    return path.read_bytes()


def show_runs(tree: Path):
    """Make the runs with the version in `tree` and print a line for each result."""
    sys.path[:0] = [str(tree), str(tree / "notes")]
    ppo = importlib.import_module("ppo_rlhf")
    with tempfile.TemporaryDirectory() as place:
        for name, flags in RUNS.items():
            out = Path(place, name)
            words = flags.replace("DATA", str(tree / "notes/data_zh")).split()
            with redirect_stdout(io.StringIO()):
                ppo.main([*words, "--device", "cpu", "--out", str(out)])
            for path in sorted(out.rglob("*")):
                if path.is_file() and path.name not in ("config.json", "state.pt"):
                    code = hashlib.sha256(without_seconds(path)).hexdigest()[:16]
                    print(f"{name}: {path.relative_to(out).as_posix()} {code}", flush=True)
        staircase = importlib.import_module("staircase")
        for number in range(len(staircase.RUNGS)):
            found = staircase.train(str(Path(place, "default")), "stairs", number, 1, 2)
            found.pop("seconds", None)
            print(f"rung {number}: {json.dumps(found, sort_keys=True)}", flush=True)


def lines_of(tree: Path) -> list[str]:
    done = subprocess.run([sys.executable, __file__, "--show", tree], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"error: the runs in {tree} failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?")
    parser.add_argument("--show", type=Path, metavar="TREE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.show:
        show_runs(args.show)
        return
    if not args.commit:
        parser.error("which commit?")
    with tempfile.TemporaryDirectory() as place:
        content = subprocess.run(["git", "archive", args.commit], cwd=ROOT, check=True,
                                 capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(place)
        before = {name: record.code_hash(Path(place, name)) for name in COMPARED}
        old, new = lines_of(Path(place)), lines_of(ROOT)
    for line in new:
        print("equal" if line in old else "DIFFERENT", line[:100])
    if old != new:
        raise SystemExit("error: the two versions do not do the same; no record was changed")
    now = {name: record.code_hash(ROOT / name) for name in COMPARED}
    found = f"{datetime.date.today()} {args.commit}"
    for path in sorted((ROOT / record.FOLDER).glob("*.txt")):
        if record.mark_same(path, before, now, found):
            print(f"{path.name} holds for the present code")


if __name__ == "__main__":
    main()
