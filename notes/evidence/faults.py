"""What can go wrong while the script runs, done to real processes; a line per fault, PASS or FAIL.

    python notes/evidence/faults.py                        # all of them: 5 to 15 minutes on two cores
    python notes/evidence/faults.py kill --times 3         # one experiment: kill, disk, folder, reward, hang or processes
    python notes/evidence/faults.py --seed 1               # other random moments

PASS means: the fault ends as promised (one line on stderr and exit code 2, or what the line says), within seconds.
After it was mended, `--resume` ends like a run that was never disturbed: the same metrics.csv apart from the seconds,
and the same weights, byte for byte. A stage before PPO that was interrupted is repeated from its beginning; PPO goes on
where it was last saved. Needs Linux or macOS; the full disk needs the right to mount a tmpfs, else it is skipped.
"""
import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "ppo_rlhf.py"
TINY = ("--n_layer 1 --n_embd 32 --n_head 2 --pretrain_steps 30 --sft_steps 30 --rm_steps 30 --rankings 40 --cycles 12 "
        "--batch_size 8 --max_new_tokens 12 --eval_every 3 --report_batches 1 --save_every 2 --device cpu").split()
TORCHRUN = ("-m torch.distributed.run --nproc-per-node=2 --master-port=0 --rdzv-backend=c10d "
            "--rdzv-endpoint=localhost:0").split()
LIMIT = 120  # seconds after which a process counts as hanging
# The 20th call is in the 4th cycle of PPO: one call tries the function, 14 measure it against the human.
REWARD = """
import time
calls = 0
def score(completions):
    global calls
    calls += 1
    if calls == 20:
        {fault}
    return [len(text) / 10 for text in completions]
"""


# ---- Processes -------------------------------------------------------------------------------------------------------
def start(*flags, launcher=()):
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    return subprocess.Popen([sys.executable, *launcher, SCRIPT, *map(str, flags)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def end(process):
    """Wait -> (exit code, stdout, stderr); a process that hangs is killed, and its exit code is "hangs"."""
    try:
        out, errors = process.communicate(timeout=LIMIT)
        return process.returncode, out, errors
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "hangs", *process.communicate()


def wait_for(path, process):
    """Until the file is there, or the process has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


def run(*flags, launcher=()):
    """To the end; an undisturbed run must succeed."""
    code, out, errors = end(start(*flags, launcher=launcher))
    assert code == 0, f"exit code {code}: {errors[-500:]}"
    return out


def one_line(result):
    """"" if a process ended as it should after a mistake that the user can mend, else what was wrong."""
    code, _, errors = result
    fine = code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    return "" if fine else f"exit code {code}, stderr: {errors[-200:]!r}"


def results(folder):
    """All that two equal runs must have in common."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{name: x for name, x in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    weights = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
    return rows, weights


def differs(folder, reference):
    """"" if both runs ended alike, else what differs."""
    (rows, weights), (other_rows, other_weights) = results(folder), results(reference)
    wrong = ["metrics.csv"] * (rows != other_rows)
    files = weights.keys() | other_weights.keys()
    wrong += [str(path) for path in sorted(files) if weights.get(path) != other_weights.get(path)]
    return f"differs: {', '.join(wrong)}" if wrong else ""


def stage_of(folder):
    """What a run was doing when it was stopped, by what it had finished."""
    stages = {"pretrain": "pretraining", "sft": "SFT", "reward_model": "reward model", "policy": "PPO"}
    return next((stage for name, stage in stages.items() if not (folder / name).exists()), "report")


# ---- Experiments: each yields (what was done, what is wrong or "") ---------------------------------------------------
def kill(folder, options):
    """kill -9 at random moments, again and again, until the run is through; every other run has its own data."""
    data = [[], ["--preferences", SCRIPT.parent / "notes/data_zh/preferences.jsonl"]]
    for kind in 0, 1:
        run(*TINY, *data[kind], "--out", folder / f"reference{kind}")
    begin, rng = (folder / "reference0" / "config.json").stat().st_mtime, random.Random(options.seed)
    length = (folder / "reference0" / "report.json").stat().st_mtime - begin
    for i in range(options.times):
        out, kills, flags = folder / f"run{i}", [], [*TINY, *data[i % 2], "--out", folder / f"run{i}"]
        while True:
            process = start(*flags)
            if kills:
                time.sleep(options.startup)  # a resumed run gives no sign when its imports are done
            else:
                wait_for(out / "config.json", process)
            try:
                process.wait(rng.uniform(0, length))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills.append(stage_of(out))
                flags = ["--resume", out]
        code, _, errors = end(process)
        wrong = f"exit code {code}: {errors[-200:]!r}" if code else differs(out, folder / f"reference{i % 2}")
        yield f"kill -9, run {i + 1}: killed {len(kills)} times ({', '.join(kills)})", wrong
        shutil.rmtree(out)


def disk(folder, options):
    """A disk that is full at different moments."""
    run(*TINY, "--out", folder / "reference")
    disk, ballast = folder / "disk", folder / "disk" / "ballast"
    size = sum(path.stat().st_size for path in (folder / "reference").rglob("*") if path.is_file())
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * size}", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        yield "full disk: SKIPPED, a tmpfs cannot be mounted here", None
        return
    try:
        for share in 0, 0.1, 0.3, 0.5, 0.7, 0.9:
            with open(ballast, "wb") as file:
                while (free := shutil.disk_usage(disk).free) > share * size:
                    file.write(bytes(min(4096, free)))
                    file.flush()
            out = disk / "run"
            wrong = one_line(end(start(*TINY, "--out", out)))
            ballast.unlink()
            written = (out / "config.json").exists() and stage_of(out)
            if not wrong:
                run(*(["--resume", out] if written else [*TINY, "--out", out]))
            yield (f"disk full with room for {share:.0%} of the run ({written or 'at the start'})",
                   wrong or differs(out, folder / "reference"))
            shutil.rmtree(out)
    finally:
        subprocess.run(["umount", disk])


def folder(folder, options):
    """Folders that cannot be written to: at the start, and because somebody moves them away while the run goes on."""
    (folder / "file").write_text("")
    (folder / "read_only").mkdir(mode=0o555)
    places = [folder / "file", folder / "file" / "below", Path("/proc/nobody")]
    for place in places + [folder / "read_only" / "run"] * (os.geteuid() != 0):  # root may write anywhere
        wrong = one_line(end(start(*TINY, "--out", place)))
        yield f"--out {place.relative_to(folder) if folder in place.parents else place}", wrong
    run(*TINY, "--out", folder / "reference")
    process = start(*TINY, "--out", folder / "run")
    wait_for(folder / "run" / "metrics.csv", process)
    os.rename(folder / "run", folder / "moved")
    wrong = one_line(end(process))
    run("--resume", folder / "moved")
    yield "folder moved away in the middle of PPO", wrong or differs(folder / "moved", folder / "reference")


def reward(folder, options):
    """A reward function that fails, at once or after a while. When it is mended, the run goes on."""
    (folder / "my.py").write_text(REWARD.format(fault="pass"))
    reference, mended = folder / "reference", (folder / "my.py").read_text()
    flags = [*TINY, "--reward", f"{folder}/my.py:score"]
    run(*flags, "--out", reference)
    faults = {"raises an error": "completions[0][1000]", "returns NaN": "return [float('nan')] * len(completions)",
              "returns too few scores": "return [1.0]", "returns a word": "return ['good'] * len(completions)"}
    for name, fault in faults.items():
        for when in "at once", "in the middle":
            text = REWARD.format(fault=fault)
            out = folder / name / when
            (folder / "my.py").write_text(text.replace("calls == 20", "True") if when == "at once" else text)
            if fault == "return [1.0]" and when == "at once":  # one reply gets one score: right, until there are more
                (folder / "my.py").write_text(text.replace("calls == 20", "True").replace("[1.0]", "[]"))
            wrong = one_line(end(start(*flags, "--out", out)))
            (folder / "my.py").write_text(mended)
            if when == "at once":
                wrong = wrong or "a folder was left behind" * out.exists()
            else:
                run("--resume", out)
                wrong = wrong or differs(out, reference)
            yield f"reward function {name}, {when}", wrong


def stopped(result, out):
    """"" if a process ended as it should after Ctrl-C, else what was wrong."""
    code, shown, errors = result
    fine = code == 130 and f"--resume {out}" in shown and errors == ""
    return "" if fine else f"exit code {code}, stdout: {shown[-100:]!r}, stderr: {errors[-200:]!r}"


def hang(folder, options):
    """Ctrl-C: at once before PPO; in PPO it waits for a reward function that never returns, pressed twice it does not.
    """
    mended, marker, out = REWARD.format(fault="pass"), folder / "hangs", folder / "run"
    (folder / "my.py").write_text(mended)
    flags = [*TINY, "--reward", f"{folder}/my.py:score"]
    run(*flags, "--out", folder / "reference")
    process = start(*flags, "--sft_steps", 3000, "--out", folder / "early")
    wait_for(folder / "early" / "pretrain", process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    wrong = stopped(end(process), folder / "early")
    yield "Ctrl-C in SFT: ends with 130 and says how to go on", wrong or "SFT was finished" * (
        folder / "early" / "sft").exists()
    (folder / "my.py").write_text(REWARD.format(fault=f"open({str(marker)!r}, 'w'); time.sleep(1000)"))
    process = start(*flags, "--out", out)
    wait_for(marker, process)
    process.send_signal(signal.SIGINT)
    time.sleep(3)
    yield "hanging reward function, Ctrl-C once: waits", "" if process.poll() is None else "it ended"
    process.send_signal(signal.SIGINT)
    yield "Ctrl-C twice: ends with 130 and says how to go on", stopped(end(process), out)
    (folder / "my.py").write_text(mended)
    run("--resume", out)
    yield "when the function is mended, the run goes on", differs(out, folder / "reference")


def processes(folder, options):
    """One of two processes is killed: the other must end, too."""
    run(*TINY, "--out", folder / "reference", launcher=TORCHRUN)
    out = folder / "run"
    process = start(*TINY, "--out", out, launcher=TORCHRUN)
    wait_for(out / "metrics.csv", process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    code, _, errors = end(process)
    yield "torchrun, one of two processes killed", "" if code not in (0, "hangs") else f"exit code {code}"
    run("--resume", out, launcher=TORCHRUN)
    yield "and both go on with --resume", differs(out, folder / "reference")

    # without torchrun, which ends the others itself: does the one that is left notice?
    for victim in 0, 1:
        out, pair = folder / f"pair{victim}", []
        for rank in range(2):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                              MASTER_PORT=str(29500 + (os.getpid() + victim) % 1000))
            pair.append(start(*TINY, "--out", out))
        for name in "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT":
            del os.environ[name]
        wait_for(out / "metrics.csv", pair[0])
        pair[victim].kill()
        pair[victim].communicate()
        code, _, errors = end(pair[1 - victim])
        last = errors.strip().split("\n")[-1].split("] ")[-1][:60]
        yield f"by hand, process {victim} killed; the other ends: {last}", "" if code not in (0, "hangs") else f"{code}"


EXPERIMENTS = [kill, disk, folder, reward, hang, processes]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="*", help="all, if none is named")
    parser.add_argument("--times", type=int, default=20, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    known = {experiment.__name__: experiment for experiment in EXPERIMENTS}
    if unknown := set(options.experiment) - set(known):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    # A shell may start programs in the background with Ctrl-C ignored, and the runs would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin = time.perf_counter()  # how long does a call take that ends at once?
    subprocess.run([sys.executable, SCRIPT, "--lr", "0"], capture_output=True)
    options.startup = time.perf_counter() - begin
    failures = 0
    for name in options.experiment or known:
        with tempfile.TemporaryDirectory() as place:
            begin = time.perf_counter()
            for what, wrong in known[name](Path(place), options):
                now = time.perf_counter()
                verdict = "    " if wrong is None else "FAIL" if wrong else "PASS"
                print(f"{verdict} {now - begin:6.1f} s  {what}{': ' * bool(wrong)}{wrong or ''}", flush=True)
                begin, failures = now, failures + bool(wrong)
    print(f"{failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
