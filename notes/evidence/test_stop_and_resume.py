"""A run that was stopped in any way goes on, and ends bit for bit like one that was not stopped.

Stages 0 to 2 are saved when they are done, and repeated if they were not. PPO is saved every
save_every cycles, and when Ctrl-C is pressed.
"""
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import ppo_rlhf as ppo
from helpers import ONE_THREAD, TEN, read_config, same_results, snapshot, write_jsonl
from test_ppo_rlhf import HERE, NAN, TINY, read_metrics, slow, small_config


class Killed(BaseException):
    """Nobody catches this by accident."""


def read_state(out):
    return torch.load(out / "state.pt", weights_only=True)


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def call_at(purpose, function, patch):
    """Call a function when the script seeds its dice for this purpose, such as "PPO 1"."""
    reseed = ppo.reseed

    def spy(cfg, now):
        if now == purpose:
            function()
        return reseed(cfg, now)

    patch.setattr(ppo, "reseed", spy)


@pytest.fixture(autouse=True)
def handler_is_restored():
    """After every test here, whatever happened in it, Ctrl-C does what it did before."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


# ---- Killed --------------------------------------------------------------------------------------
def kill_when_replacing(name, time_of_it, patch):
    """Die when the file or folder of this name is put in its place for the n-th time.

    What was to be put there is left half written.
    """
    replace, seen = os.replace, []

    def die(source, target):
        if Path(target).name == name:
            seen.append(target)
            if len(seen) == time_of_it:
                file = Path(source)
                if file.is_dir():
                    file = file / "model.safetensors"
                file.write_bytes(file.read_bytes()[:100])
                raise Killed
        replace(source, target)

    patch.setattr(os, "replace", die)


@pytest.mark.parametrize("name, time_of_it", [
    ("sft", 1), ("metrics.csv", 2), ("state.pt", 2), ("policy", 1),
    *(pytest.param(*case, marks=slow) for case in [
        ("pretrain", 1), ("reward_model", 1), ("metrics.csv", 1), ("state.pt", 1),
        ("metrics.csv", 3), ("state.pt", 3), ("report.json", 1)])])
def test_a_run_killed_while_saving_and_resumed_ends_as_if_not(run, name, time_of_it, tmp_path,
                                                              monkeypatch):
    """With --save_every 1, metrics.csv and state.pt are replaced in each of the 3 cycles."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_when_replacing(name, time_of_it, patch)
        with pytest.raises(Killed):
            ppo.main([*TINY, "--save_every", "1", "--out", str(out)])
    assert (out / f"{name}.tmp").exists()
    ppo.main(["--resume", str(out)])
    same_results(run, out)
    assert not list(out.glob("*.tmp"))


def test_a_run_killed_between_two_saves_repeats_the_cycles_since_then(run, tmp_path, monkeypatch):
    """--save_every 2: cycle 3 was done and is lost."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_when_replacing("state.pt", 2, patch)
        with pytest.raises(Killed):
            ppo.main([*TINY, "--init_from", str(run), "--save_every", "2", "--out", str(out)])
    assert read_state(out)["cycle"] == 2 and len(read_metrics(out)) == 3
    ppo.main(["--resume", str(out)])
    same_results(run, out)


def test_a_run_killed_before_its_settings_were_saved_can_be_called_again(tmp_path, monkeypatch):
    command = [*TINY, "--out", str(tmp_path / "run"), "--cycles", "1"]
    with monkeypatch.context() as patch:
        kill_when_replacing("config.json", 1, patch)
        with pytest.raises(Killed):
            ppo.main(command)
    with pytest.raises(ppo.UserError, match="not the folder of a run"):
        ppo.main(["--resume", str(tmp_path / "run")])
    call_at("pretraining 0", stop_here, monkeypatch)
    with pytest.raises(Killed):
        ppo.main(command)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def stop_here():
    raise Killed


# ---- Ctrl-C --------------------------------------------------------------------------------------
def test_ctrl_c_in_a_stage_before_ppo_stops_at_once_and_the_stage_is_repeated(
        run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    went_on = []
    with monkeypatch.context() as patch:
        call_at("reward model 4", lambda: went_on.append("no"), patch)
        call_at("reward model 3", press_ctrl_c, patch)
        with pytest.raises(KeyboardInterrupt):
            ppo.main([*TINY, "--out", str(out)])
    assert not went_on
    assert f"stopped; to go on: main(['--resume', '{out}'])\n" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "pretrain", "sft"]
    before = snapshot(out / "sft")
    ppo.main(["--resume", str(out)])
    same_results(run, out)
    assert snapshot(out / "sft") == before


def test_ctrl_c_in_ppo_waits_for_the_end_of_the_cycle_and_saves(run, tmp_path, monkeypatch,
                                                                capsys):
    """main can be called again in the same process: in a notebook, say."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        call_at("PPO 1", press_ctrl_c, patch)
        with pytest.raises(KeyboardInterrupt):
            ppo.main([*TINY, "--save_every", "9", "--out", str(out)])
    assert f"stopped; to go on: main(['--resume', '{out}'])\n" in capsys.readouterr().out
    assert read_state(out)["cycle"] == len(read_metrics(out)) == 2
    ppo.main(["--resume", str(out)])
    same_results(run, out)


def test_ctrl_c_pressed_twice_in_ppo_stops_at_once(run, tmp_path, monkeypatch):
    """What was saved before is still there: here the first cycle."""
    out = tmp_path / "run"
    flags = ["--init_from", str(run), "--save_every", "1", "--out", str(out)]
    with monkeypatch.context() as patch:
        call_at("PPO 1", press_ctrl_c, patch)
        call_at("validation", press_ctrl_c, patch)  # in the same cycle, the second of three
        with pytest.raises(KeyboardInterrupt):
            ppo.main([*TINY, *flags])
    assert read_state(out)["cycle"] == len(read_metrics(out)) == 1
    ppo.main(["--resume", str(out)])
    same_results(run, out)


def test_a_run_in_another_thread_ends_as_in_the_main_one(run, tmp_path):
    """Only the main thread gets signals, and only it may say what they do."""
    out = tmp_path / "run"
    failures = []

    def target():
        try:
            ppo.main([*TINY, "--init_from", str(run), "--out", str(out)])
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert not failures
    same_results(run, out)


def test_ctrl_c_means_what_it_meant_before_when_ppo_ends_in_any_way():
    """At the end, after an error in a cycle, and when the loop is left. In PPO it means another."""
    def someone_elses(number, frame):
        pass

    original = signal.signal(signal.SIGINT, someone_elses)
    try:
        for how in ["end", "error", "break"]:
            try:
                for cycle, rng in ppo.cycles_to_do({}, [], small_config("--cycles", "2")):
                    assert signal.getsignal(signal.SIGINT) is not someone_elses
                    if how == "error":
                        raise ppo.UserError
                    if how == "break":
                        break
            except ppo.UserError:
                pass
            assert signal.getsignal(signal.SIGINT) is someone_elses, how
    finally:
        signal.signal(signal.SIGINT, original)


@pytest.mark.parametrize("when", ["PPO", pytest.param("pretraining", marks=slow)])
def test_ctrl_c_on_the_command_line_exits_with_130_and_the_command_to_go_on(run, when, tmp_path):
    out, flags = tmp_path / "run", [*TINY, "--out", tmp_path / "run"]
    if when == "PPO":
        flags += ["--init_from", run, "--cycles", "1000"]
        wait_for = out / "metrics.csv"
    else:
        flags += ["--pretrain_steps", "100000"]
        wait_for = out / "config.json"
    process = subprocess.Popen([sys.executable, HERE / "ppo_rlhf.py", *flags], text=True,
                               env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not wait_for.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == ""
    assert shown.endswith(f"stopped; to go on: python {HERE / 'ppo_rlhf.py'} --resume {out}\n")
    if when == "PPO":
        assert len(read_metrics(out)) == read_state(out)["cycle"] > 0


# ---- In a notebook -------------------------------------------------------------------------------
def state_of_the_process():
    """What main must leave as it was, apart from the seeds of the global random numbers."""
    return {
        "what Ctrl-C does": signal.getsignal(signal.SIGINT),
        "environment": dict(os.environ),
        "where it is": os.getcwd(),
        "where it imports from": sys.path[:],
        "modules from elsewhere": {name for name in sys.modules if name.startswith("mine_")},
        "library messages": logging.get_verbosity(),
        "hub messages": logging.get_logger("huggingface_hub").level,
        "library bars": logging.is_progress_bar_enabled(),
        "gradients": torch.is_grad_enabled(),
        "number type": torch.get_default_dtype(),
        "objects that garbage collection leaves alone": gc.get_freeze_count() > 1000,
        "output": (sys.stdout, sys.stderr),
        "threads": threading.active_count()}


@pytest.mark.parametrize("end", ["finished", "wrong call", "error", "interrupt"])
def test_main_leaves_the_process_as_it_found_it_however_it_ends(end, run, tmp_path, monkeypatch):
    (tmp_path / "mine_neighbour.py").write_text("VALUE = 1.0\n")
    (tmp_path / "mine_reward.py").write_text(
        "from mine_neighbour import VALUE\n\ndef score(completions):\n"
        "    return [VALUE * len(text) for text in completions]\n")
    flags = [*TINY, "--init_from", str(run), "--out", str(tmp_path / "run"), "--cycles", "1",
             "--reward", f"{tmp_path}/mine_reward.py:score"]
    if end == "error":
        call_at("PPO 0", stop_here, monkeypatch)
    elif end == "interrupt":
        call_at("PPO 0", press_ctrl_c, monkeypatch)
    elif end == "wrong call":
        flags += ["--prompts", str(tmp_path / "nothing.jsonl")]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    gc.unfreeze()
    try:
        before = state_of_the_process()
        try:
            ppo.main(flags)
        except (Killed, KeyboardInterrupt, ppo.UserError) as error:
            assert end == {Killed: "error", KeyboardInterrupt: "interrupt",
                           ppo.UserError: "wrong call"}[type(error)]
        else:
            assert end == "finished"
        assert state_of_the_process() == before
    finally:
        logging.set_verbosity(verbosity)


def test_after_an_interrupt_the_next_cell_runs_to_its_end_and_so_does_the_printed_command(
        run, tmp_path, monkeypatch, capsys):
    """Cell 1 is stopped, cell 2 is another run, cell 3 is what cell 1 told to call."""
    flags = [*TINY, "--init_from", str(run)]
    with monkeypatch.context() as patch:
        call_at("PPO 1", press_ctrl_c, patch)
        with pytest.raises(KeyboardInterrupt):
            ppo.main([*flags, "--out", str(tmp_path / "one")])
    [command] = [line.removeprefix("stopped; to go on: ")
                 for line in capsys.readouterr().out.splitlines() if line.startswith("stopped")]
    ppo.main([*flags, "--out", str(tmp_path / "two")])
    same_results(run, tmp_path / "two")
    assert len(read_metrics(tmp_path / "one")) == 2
    eval(command, {"main": ppo.main})
    same_results(run, tmp_path / "one")


def test_the_command_for_another_run_of_ppo_works_where_it_is_printed(run, tmp_path, monkeypatch,
                                                                      capsys):
    """In a notebook it is a call of main, on the command line a command."""
    def last_command():
        last = capsys.readouterr().out.splitlines()[-1]
        return last.split("with another flag: ")[1]

    flags = [*TINY, "--init_from", str(run), "--cycles", "0", "--out"]
    ppo.main([*flags, str(tmp_path / "one")])
    called = []
    eval(last_command(), {"main": called.append})
    cfg = ppo.parse_config(called[0])
    assert cfg.init_from == str(tmp_path / "one") and cfg.kl_coef == 0.05 and cfg.batch_size == 8

    monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py", *flags, str(tmp_path / "two")])
    ppo.main()
    python, script, *rest = last_command().split()
    assert (python, script) == ("python", "ppo_rlhf.py")
    assert ppo.parse_config(rest).init_from == str(tmp_path / "two")


def test_flags_in_a_list_may_be_numbers_and_paths(run, tmp_path):
    """On a command line all are texts; in a notebook one writes what it is."""
    ppo.main([*TINY, "--init_from", run, "--out", tmp_path / "run", "--cycles", 0, "--lam", 0.5])
    config = read_config(tmp_path / "run")
    assert (config["cycles"], config["lam"]) == (0, 0.5)
    assert config["init_from"] == str(run)


def test_main_works_where_gradients_are_turned_off(run, tmp_path):
    """As in the first cell of many notebooks that only use models."""
    with torch.no_grad():
        ppo.main([*TINY, "--init_from", str(run), "--out", str(tmp_path / "run")])
        assert not torch.is_grad_enabled()
    same_results(run, tmp_path / "run")


# ---- What the output can show --------------------------------------------------------------------
@pytest.mark.parametrize("encoding, shown", [
    ("utf-8", "é 天 ☺"), ("cp1252", "é ? ?"), ("ascii", "? ? ?"), ("gbk", "é 天 ?")])
def test_what_the_terminal_cannot_show_becomes_a_question_mark(encoding, shown, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    ppo.say("é 天 ☺")
    assert written.getvalue().decode(encoding).splitlines() == [shown]


def test_half_a_character_can_be_shown_too(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    ppo.say("\ud83d")


@pytest.mark.parametrize("kind", ["without an encoding", "nothing"])
def test_output_may_go_to_any_object_that_can_be_written_to(kind, monkeypatch):
    """A notebook's own copy of the output, say, or none, as under pythonw."""
    written = []

    class Copy:
        def write(self, text):
            written.append(text)

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", None if kind == "nothing" else Copy())
    ppo.say("天")
    assert kind == "nothing" or "".join(written) == "天\n"


def test_a_run_with_chinese_prompts_ends_on_a_terminal_that_knows_no_chinese(run, tmp_path,
                                                                             monkeypatch):
    """The files hold what the terminal could not show."""
    lines = [line | {"prompt": f"今天{i}"} for i, line in enumerate(TEN)]
    path = write_jsonl(tmp_path / "prompts.jsonl", lines)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    ppo.main([*TINY, "--init_from", str(run), "--cycles", "1", "--prompts", path, "--out",
              str(tmp_path / "run")])
    assert b'X-RAY of one reply to "??' in written.getvalue()
    rows = (tmp_path / "run/xray.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["prompt"].startswith("今天")


# ---- What is remembered --------------------------------------------------------------------------
def test_a_resumed_run_remembers_the_best_policy_from_before_the_stop(run, tmp_path, monkeypatch):
    """The policy of cycle 2 validated better than that of cycle 3, which comes after the stop."""
    out = tmp_path / "run"

    def good_and_stop(*args):
        press_ctrl_c()
        return [2.0, 2.0]

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "validate", good_and_stop)
        with pytest.raises(KeyboardInterrupt):
            ppo.main([*TINY, "--init_from", str(run), "--out", str(out)])
    best = read_state(out)["actor"]
    monkeypatch.setattr(ppo, "validate", lambda *args: [1.0, 1.0])
    ppo.main(["--resume", str(out)])
    assert [row["validation"] for row in read_metrics(out)] == ["", "2.0", "1.0"]
    kept = ppo.load_model(ppo.ActorCritic, out / "policy", small_config()).state_dict()
    assert all(torch.equal(best[name], weight) for name, weight in kept.items())
    last = read_state(out)["actor"]
    assert not all(torch.equal(last[name], weight) for name, weight in kept.items())


# ---- Damaged -------------------------------------------------------------------------------------
def damage(run, kind):
    """Damage one file of a run."""
    if kind == "half a state":
        content = (run / "state.pt").read_bytes()
        (run / "state.pt").write_bytes(content[:1000])
    elif kind == "something else as state":
        torch.save({"stage": "PPO", "weights": [1]}, run / "state.pt")
    elif kind == "the state of other settings":
        state = read_state(run)
        state["settings"]["lr"] = 1.0
        torch.save(state, run / "state.pt")
    elif kind == "the state of a larger model":
        state = read_state(run)
        state["actor"]["lm.transformer.wte.weight"] = torch.zeros(3, 3)
        torch.save(state, run / "state.pt")
    elif kind == "no weights":
        (run / "sft/model.safetensors").write_bytes(b"junk")
    elif kind == "no heads":
        (run / "reward_model/heads.safetensors").unlink()
    elif kind == "no settings":
        (run / "config.json").unlink()


@pytest.mark.parametrize("kind", [
    "half a state", "something else as state", "the state of other settings",
    "the state of a larger model", "no weights", "no heads", "no settings"])
def test_a_damaged_run_is_one_line_and_nothing_is_overwritten(run, kind, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    config = (out / "config.json").read_text().replace(str(run), str(out))
    (out / "config.json").write_text(config)
    damage(out, kind)
    before = snapshot(tmp_path)
    with pytest.raises(ppo.UserError, match="damaged|not the folder of a run") as error:
        ppo.main(["--resume", str(out)])
    assert "\n" not in str(error.value) and str(out) in str(error.value)
    assert snapshot(tmp_path) == before


def test_a_run_whose_folder_was_moved_can_go_on_there(run, tmp_path):
    out = tmp_path / "moved"
    shutil.copytree(run, out)
    (out / "report.json").unlink()
    ppo.main(["--resume", str(out)])
    same_results(run, out)


# ---- Errors in the middle ------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_cycle(
        run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    gae, cycles = ppo.estimate_advantages, []

    def explode_in_cycle_2(rollout, cfg):
        cycles.append(1)
        advantages, returns = gae(rollout, cfg)
        return (advantages * NAN if len(cycles) == 2 else advantages), returns

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "estimate_advantages", explode_in_cycle_2)
        with pytest.raises(ppo.UserError, match="infinite or NaN in PPO, cycle 2; try a lower"):
            ppo.main([*TINY, "--init_from", str(run), "--save_every", "1", "--out", str(out)])
    state = read_state(out)
    assert state["cycle"] == 1 and all(x.isfinite().all() for x in state["actor"].values())
    ppo.main(["--resume", str(out)])
    same_results(run, out)


@pytest.mark.parametrize("stage, flags", [
    ("pretraining", ["--sft_lr", "1e30"]),
    ("SFT", ["--sft_lr", "1e30", "--pretrain_steps", "1"]),
    ("reward model", ["--rm_lr", "1e30"])])
def test_a_loss_that_is_not_finite_names_the_stage_and_the_stage_is_not_saved(stage, flags,
                                                                              tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ppo.UserError, match=rf"infinite or NaN in {stage}, step \d;"):
        ppo.main([*TINY, *flags, "--out", str(out)])
    saved = {"pretraining": [], "SFT": ["pretrain"], "reward model": ["pretrain", "sft"]}
    assert sorted(path.name for path in out.iterdir()) == ["config.json", *saved[stage]]


def test_a_full_disk_is_one_line_and_the_last_save_stays(run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    save = torch.save

    def full_in_cycle_2(state, path):
        if state["cycle"] == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_in_cycle_2)
        with pytest.raises(ppo.UserError, match="cannot write .*/state.pt.*No space left") as error:
            ppo.main([*TINY, "--init_from", str(run), "--save_every", "1", "--out", str(out)])
    assert "\n" not in str(error.value) and read_state(out)["cycle"] == 1
    ppo.main(["--resume", str(out)])
    same_results(run, out)


def test_a_disk_that_is_full_when_a_stage_is_saved_leaves_no_half_model(run, tmp_path,
                                                                        monkeypatch):
    out = tmp_path / "run"

    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        call_at("SFT 0", lambda: patch.setattr(ppo, "save_file", full), patch)
        with pytest.raises(ppo.UserError, match="cannot write .*/sft.*No space left"):
            ppo.main([*TINY, "--out", str(out)])
    assert not (out / "sft").exists() and (out / "pretrain").exists()
    ppo.main(["--resume", str(out)])
    same_results(run, out)


@pytest.mark.parametrize("changed", ["prompts.jsonl", "mine.py"])
def test_a_run_is_not_resumed_with_other_data_or_another_reward(changed, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "mine.py").write_text("def f(completions):\n    return [1.0] * len(completions)\n")
    (tmp_path / "run").mkdir()
    cfg = ppo.Config(prompts=str(tmp_path / "prompts.jsonl"), reward=f"{tmp_path / 'mine.py'}:f",
                     cycles=1, out=str(tmp_path / "run"))
    assert [cycle for cycle, _ in ppo.cycles_to_do({}, [], cfg)] == [0]
    cfg.resume, cfg.cycles = cfg.out, 1
    assert [*ppo.cycles_to_do({}, [], cfg)] == []  # nothing is left to do
    with open(tmp_path / changed, "a") as file:
        file.write("\n")
    with pytest.raises(ppo.UserError, match="the data or the reward have changed"):
        [*ppo.cycles_to_do({}, [], cfg)]


def test_a_run_is_resumed_by_any_spelling_of_its_folder(run):
    for spelling in [f"{run}/", f"{run.parent}/./{run.name}"]:
        cfg = ppo.parse_config(["--resume", spelling])
        assert (cfg.resume, cfg.out) == (spelling, spelling)


def test_the_command_to_go_on_is_quoted(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ppo_rlhf.py"])
    assert ppo.command(None, "--resume", "runs/my run") == \
        "python ppo_rlhf.py --resume 'runs/my run'"


def test_preferences_that_sft_imitated_cannot_be_exchanged(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "reward_model")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(dict(config, preferences="p.jsonl")))
    with pytest.raises(ppo.UserError, match="--preferences is p.jsonl"):
        ppo.parse_config(["--init_from", str(copied), "--preferences", "q.jsonl"])


def test_a_run_can_go_on_with_smaller_micro_batches_and_no_other_setting(run, tmp_path):
    """If the memory was full, this is what helps."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "report.json").unlink()
    ppo.main(["--resume", str(out), "--micro_batch_size", "3", "--save_every", "1"])
    before, after = [json.loads((folder / "report.json").read_text()) for folder in (run, out)]
    assert after["ppo"]["length"] == pytest.approx(before["ppo"]["length"], abs=2)
    with pytest.raises(ppo.UserError, match="--gamma is"):
        ppo.main(["--resume", str(out), "--gamma", "0.5"])
