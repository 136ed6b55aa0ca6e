"""A call that cannot work is one line that says why, and it writes nothing and takes no time."""
import runpy
import subprocess
import sys
import time

import pytest
import torch

import ppo_rlhf as ppo
from helpers import ONE_THREAD, TEN, jsonl, read_config, snapshot
from test_ppo_rlhf import HERE, TINY, slow, small_config

LONG = "very " * 40  # longer than --max_new_tokens of TINY
WRONG_FILES = {
    # Data
    "ten.jsonl": jsonl(*TEN),
    "five.jsonl": jsonl(*TEN[:5]),
    "same.jsonl": jsonl(*[TEN[0]] * 20),
    "one_held_out.jsonl": jsonl(*[line for line in TEN if line["prompt"] == "Question 0?\n"]),
    "empty.jsonl": "",
    "blank.jsonl": "\n\n\n",
    "text.jsonl": "Hello.\n",
    "half.jsonl": jsonl(*TEN) + '{"prompt": "a',
    "list.jsonl": "[1]\n",
    "number.jsonl": "3\n",
    "string.jsonl": '"prompt ranked"\n',
    "null.jsonl": "null\n",
    "deep.jsonl": "[" * 100_000 + "\n",
    "latin.jsonl": b'{"prompt": "caf\xe9"}\n',
    "utf16.jsonl": jsonl(*TEN).encode("utf-16"),
    "array.jsonl": '[{"prompt": "a"},\n {"prompt": "b"}]\n',
    "table.csv": "prompt,completion\na,b\n",
    "zipped.jsonl.gz": b"\x1f\x8b\x08\x00\x00\x00",
    "python.jsonl": "{'prompt': 'a'}\n",
    "commas.jsonl": '{"prompt": "a"},\n{"prompt": "b"},\n',
    "one_line.jsonl": '{"prompt": "a"}{"prompt": "b"}\n',
    "indented.jsonl": '{\n  "prompt": "a"\n}\n',
    "no_field.jsonl": "{}\n",
    "sharegpt.jsonl": '{"conversations": [{"from": "human", "value": "a"}]}\n',
    "alpaca.jsonl": '{"instruction": "a", "output": "b"}\n',
    "messages.jsonl": '{"messages": [{"role": "user", "content": "a"}]}\n',
    "no_prompt.jsonl": '{"prompt": null, "completion": "Take a walk."}\n' * 9,
    "messages_text.jsonl": '{"messages": "Hello there friend"}\n' * 9,
    "nothing_but_eos.jsonl": jsonl(*[line | {"completion": "<eos>"} for line in TEN]),
    "empty_prompts.jsonl": jsonl(*[line | {"prompt": ""} for line in TEN]),
    "equal_but_for_eos.jsonl": jsonl(*[line | {"rejected": "Good.<eos>"} for line in TEN]),
    "chosen_null.jsonl": '{"prompt": "a", "chosen": null, "rejected": "b"}\n',
    "half_character.jsonl": '{"prompt": "\\ud83d", "completion": "b"}\n',
    "other_field.jsonl": '{"text": "a"}\n',
    "number_field.jsonl": '{"prompt": 3}\n',
    "no_completion.jsonl": '{"prompt": "a"}\n',
    "empty_completion.jsonl": '{"prompt": "a", "completion": ""}\n',
    "two.jsonl": '{"prompt": "a", "completion": ["b"]}\n',
    "one_reply.jsonl": '{"prompt": "a", "chosen": "b"}\n',
    "equal.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "b"}\n',
    "equal_in_three.jsonl": '{"prompt": "a", "ranked": ["b", "b", "c"]}\n',
    "ranked_one.jsonl": '{"prompt": "a", "ranked": ["b"]}\n',
    "ranked_word.jsonl": '{"prompt": "a", "ranked": "bc"}\n',
    "ranked_object.jsonl": '{"prompt": "a", "ranked": {"b": 1, "c": 2}}\n',
    "ranked_number.jsonl": '{"ranked": 3}\n',
    "ranked_numbers.jsonl": '{"prompt": "a", "ranked": [1, 2]}\n',
    "chosen_number.jsonl": '{"prompt": "a", "chosen": 1, "rejected": "b"}\n',
    "equal_when_cut.jsonl": jsonl(*[line | {"chosen": LONG + "good", "rejected": LONG + "bad"}
                                    for line in TEN]),
    # Rewards
    "syntax.py": "def score(:\n",
    "raises.py": "1 / 0\n",
    "rewards.py": """
number = 3
def other_names(questions, answers): return [0.0] * len(answers)
def only_positional(prompts, completions, /): return [0.0] * len(completions)
def fails(completions): return [1 / len(text) for text in completions]
def asserts(**kwargs): assert False
def two_lines(**kwargs): raise ValueError("one\\ntwo")
def nan(completions): return [float("nan")] * len(completions)
def infinite(completions): return [float("-inf")] * len(completions)
def none(completions): pass
def one_none(completions): return [None] * len(completions)
def short(completions): return []
def long(completions): return [0.0] * (len(completions) + 1)
def one_number(completions): return 0.0
def words(completions): return ["good"] * len(completions)
def lists(completions): return [[0.0, 1.0]] * len(completions)
def digits(completions): return "1" * len(completions)
def complex_numbers(completions): return [1j] * len(completions)
def large(completions): return [10 ** 400] * len(completions)
def of_a_newer_trl(completions, completion_ids): return [0.0] * len(completions)
class Judges:
    def judge(completions): return [0.0] * len(completions)
""",
    "relative.py": "from .neighbour import score\n",
    "needs.py": "import no_such_package\n",
    "ends.py": "import sys\nsys.exit()\n",
    "folder.py/a": "",
    "random.py": "def score(completions): return [0.0] * len(completions)\n",
    # Models and runs
    "half_model/config.json": '{"model_type": "gpt2"}',
    "no_json/config.json": "{",
    "no_run/a": "",
    "not_empty/a": "",
    "later/config.json": '{"of_a_later_version": 1}',
    "strange/config.json": "[]",
    "wrong/config.json": '{"lam": 3}',
    "types/config.json": '{"lr": "fast"}',
    "no_sft/config.json": "{}",
    "empty_sft/config.json": "{}",
    "empty_sft/sft/a": ""}

# The message must name the last flag, or what stands after =>. F is the folder of the files above,
# R is a finished run.
WRONG_CALLS = """
--cycle 3 | --out | --lr | --lr fast | --lr 0 | --lr -1 | --lr nan | --lr inf | --lr 1e999
--sft_lr 0 | --rm_lr inf | --n_layer 2.5 | --n_layer 0 | --n_layer -1 | --n_embd 0 | --n_head 0
--n_head 7 | --seed -1 | --seed one | --seed 1e3 | --pretrain_steps -1 | --sft_steps -1
--rm_steps -1 | --rm_steps 1.5 | --cycles -1 | --cycles nan | --rankings 0 | --label_noise -1
--label_noise inf | --save_every 0 | --eval_every 0 | --report_batches 0 | --eval_batches 0
--report_batches -3
--micro_batch_size 0 | --batch_size 0 | --batch_size -8 | --replies_per_prompt 0
--replies_per_prompt 3 | --minibatches 0 | --minibatches 3 | --minibatches 16 | --ppo_epochs 0
--temperature 0 | --temperature -1 | --temperature nan | --temperature inf | --lam 1.5 | --lam -0.1
--lam nan | --gamma 1.01 | --gamma -1 | --clip_eps -0.2 | --clip_eps 0 | --clip_eps inf
--vf_coef -1 | --ent_coef -0.01 | --kl_coef -0.1 | --kl_coef inf | --missing_eos_penalty -1
--missing_eos_penalty inf | --max_grad_norm 0 | --bf16 maybe | --whiten_advantages 2
--max_new_tokens 0 | --max_new_tokens 225 | --max_new_tokens 1000 | --device abacus
--device cuda:99 | --device meta | --kl_target 1 | --value_clip 0.2 | --talk R
--optimum_samples 8 | --report_replies 8 | --gradient_checkpointing true | --whiten_rewards true

--out F/ten.jsonl | --out F/not_empty | --out R | --out F/ten.jsonl/below | --out /proc/nobody/may
--out F/NAME_TOO_LONG | --model F/nothing | --model F/no_run | --model F/half_model
--model F/no_json | --model F/ten.jsonl | --model no/such-model | --model= => --model
--reward= => --reward | --reward nobody | --reward F/no_run | --reward F/half_model
--reward F/nothing.py:f | --reward F/rewards.py | --reward F/rewards.py:missing
--reward F/rewards.py:number | --reward F/rewards.py:other_names
--reward F/rewards.py:only_positional | --reward F/rewards.py:fails | --reward F/rewards.py:asserts
--reward F/rewards.py:two_lines | --reward F/rewards.py:nan | --reward F/rewards.py:infinite
--reward F/rewards.py:none | --reward F/rewards.py:one_none | --reward F/rewards.py:short
--reward F/rewards.py:long | --reward F/rewards.py:one_number | --reward F/rewards.py:words
--reward F/rewards.py:lists | --reward F/syntax.py:score | --reward F/raises.py:score
--reward F/rewards.py:digits | --reward F/rewards.py:complex_numbers | --reward F/rewards.py:large
--reward F/rewards.py:of_a_newer_trl | --reward F/rewards.py:Judges.judge
--reward F/relative.py:score | --reward F/needs.py:score | --reward F/ends.py:score
--reward F/folder.py:score | --reward F/random.py:score | --reward F/rewards.py:
--reward R | --reward R/sft | --reward R/policy | --model R

--resume F/nothing | --resume F/no_run | --resume F/ten.jsonl | --resume F/no_json
--resume F/later | --resume F/strange | --resume F/wrong => --lam | --resume F/types
--resume R --cycles 9 | --resume R --cycles 60 | --resume R --out F/new | --resume R --lam 0.5
--resume R --init_from R | --init_from F/nothing | --init_from F/no_run | --init_from F/ten.jsonl
--init_from F/no_sft | --init_from F/empty_sft | --init_from R --n_layer 3
--init_from R --n_layer 2 | --init_from R --n_embd 64 | --init_from R --n_head 1
--init_from R --sft_steps 7 | --init_from R --sft_lr 0.1 | --init_from R --pretrain_steps 7
--init_from R --demos F/ten.jsonl | --init_from R --preferences F/ten.jsonl
--init_from R --model F/half_model | --init_from R --rankings 13 | --init_from R --rm_steps 7

--prompts F/nothing.jsonl | --prompts F/no_run | --prompts F/empty.jsonl | --prompts F/blank.jsonl
--prompts F/text.jsonl | --prompts F/half.jsonl | --prompts F/list.jsonl | --prompts F/number.jsonl
--prompts F/string.jsonl | --prompts F/null.jsonl | --prompts F/deep.jsonl
--prompts F/latin.jsonl | --prompts F/utf16.jsonl | --prompts F/half_character.jsonl
--prompts F/other_field.jsonl | --prompts F/number_field.jsonl
--prompts F/five.jsonl => 6 or more | --prompts F/same.jsonl => 6 or more
--prompts F/ten.jsonl --reward human | --demos F/ten.jsonl | --demos F/ten.jsonl --reward human
--preferences F/ten.jsonl --reward human | --preferences F/ten.jsonl --demos F/nothing.jsonl
--preferences F/ten.jsonl --demos F/no_completion.jsonl
--preferences F/ten.jsonl --demos F/empty_completion.jsonl
--preferences F/ten.jsonl --demos F/two.jsonl | --preferences F/ten.jsonl --demos F/number.jsonl
--preferences F/five.jsonl => 6 or more | --preferences F/one_reply.jsonl
--preferences F/equal.jsonl | --preferences F/ranked_one.jsonl
--preferences F/equal_in_three.jsonl | --preferences F/ranked_word.jsonl
--preferences F/ranked_object.jsonl | --preferences F/ranked_number.jsonl
--preferences F/ranked_numbers.jsonl | --preferences F/chosen_number.jsonl
--preferences F/number.jsonl | --preferences F/string.jsonl | --preferences F/null.jsonl
--preferences F/equal_when_cut.jsonl | --prompts F/ten.jsonl --preferences F/one_held_out.jsonl

--prompts F/array.jsonl => is an array | --prompts F/table.csv => not JSON
--prompts F/zipped.jsonl.gz => UTF-8 | --prompts F/python.jsonl => not JSON
--prompts F/commas.jsonl => line 1 | --prompts F/one_line.jsonl => line 1
--prompts F/indented.jsonl => line 1 | --prompts F/no_field.jsonl
--prompts F/utf16.jsonl => UTF-8 | --prompts F/list.jsonl => array
--prompts F/sharegpt.jsonl => conversations | --prompts F/messages.jsonl => messages
--prompts F/other_field.jsonl => text | --prompts F/no_prompt.jsonl => line 1
--reward R/reward_model --demos F/alpaca.jsonl => instruction, output
--reward R/reward_model --demos F/messages.jsonl => no chat template
--reward R/reward_model --demos F/messages_text.jsonl => line 1
--reward R/reward_model --demos F/no_prompt.jsonl => line 1
--reward R/reward_model --demos F/nothing_but_eos.jsonl
--preferences F/equal_but_for_eos.jsonl | --preferences F/chosen_null.jsonl
--preferences F/empty_prompts.jsonl => no line has a prompt
"""
WRONG_CALLS = [call.strip() for call in WRONG_CALLS.replace("\n", "|").split("|") if call.strip()]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """The folder of WRONG_FILES."""
    folder = tmp_path_factory.mktemp("wrong")
    for name, content in WRONG_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def flags_of_call(call, wrong, run, tmp_path):
    """The flags of a wrong call after those of a good one."""
    known = {"F": str(wrong), "R": str(run), "NAME_TOO_LONG": "x" * 300}
    flags = []
    for word in call.split(" => ")[0].split():
        flags.append("/".join(known.get(part, part) for part in word.split("/")))
    if "--resume" in flags:
        return flags
    if "--out" in flags:
        return [*TINY, *flags]
    return [*TINY, "--out", str(tmp_path / "out"), *flags]


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_wrong_call_says_so_in_one_line_and_writes_nothing(call, wrong, run, tmp_path, capsys):
    before, start = snapshot(wrong, run), time.process_time()
    with pytest.raises(ppo.UserError) as error:
        ppo.main(flags_of_call(call, wrong, run, tmp_path))
    message = str(error.value)
    flag = [word for word in call.split() if word.startswith("--")][-1]
    named = call.split(" => ")[1] if " => " in call else flag
    assert named in message and "\n" not in message, message
    assert len(named) + 10 < len(message) < 1000, message
    assert not list(tmp_path.iterdir()) and snapshot(wrong, run) == before
    assert "pretraining:" not in capsys.readouterr().out
    assert time.process_time() - start < 10


def test_full_memory_of_the_gpu_is_one_line_that_says_what_to_lower(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", full)
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py", *TINY, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HERE / "ppo_rlhf.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "lower --micro_batch_size" in capsys.readouterr().err


def test_with_several_processes_no_gpu_can_be_named(monkeypatch):
    monkeypatch.setattr(ppo, "WORLD", 2)
    with pytest.raises(ppo.UserError, match="leave --device out"):
        ppo.parse_config(["--device", "cuda:0"])


def test_the_command_to_go_on_starts_as_many_processes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py"])
    assert ppo.command(None, "--resume", "a b") == "python ppo_rlhf.py --resume 'a b'"
    monkeypatch.setattr(ppo, "WORLD", 2)
    assert ppo.command(None, "--resume", "a") == (
        "torchrun --nproc-per-node 2 ppo_rlhf.py --resume a")


@slow
@pytest.mark.parametrize("call", ["--reward F/rewards.py:two_lines", "--gamma 2", "--cycle 3",
                                  "--prompts F/half.jsonl", "--resume F/no_run"])
def test_a_wrong_command_exits_with_2_and_one_line(call, wrong, run, tmp_path):
    flags = flags_of_call(call, wrong, run, tmp_path)
    done = subprocess.run([sys.executable, HERE / "ppo_rlhf.py", *flags], capture_output=True,
                          text=True, env=ONE_THREAD)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert call.split()[0] in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_names_the_cpu():
    with pytest.raises(ppo.UserError, match="--device cuda .*--device cpu"):
        ppo.parse_config(["--device", "cuda"])


@pytest.mark.parametrize("flag, wrong, fine", [
    ("--replies_per_prompt", "8", "4"), ("--minibatches", "8", "4")])
def test_each_of_two_processes_must_get_whole_groups_and_minibatches(flag, wrong, fine,
                                                                     monkeypatch):
    small_config(flag, wrong)  # alone, a batch of 8 is fine
    monkeypatch.setattr(ppo, "WORLD", 2)
    with pytest.raises(ppo.UserError, match=f"--batch_size 8 must be a multiple of 16 .{flag}"):
        small_config(flag, wrong)
    small_config(flag, fine)


# ---- The machine ---------------------------------------------------------------------------------
def test_another_version_of_transformers_is_one_line_at_once(monkeypatch):
    monkeypatch.setattr(ppo.transformers, "__version__", "4.57.1")
    with pytest.raises(ppo.UserError, match="needs transformers 5, not 4.57.1: pip install"):
        ppo.main(["--cycle", "3"])  # before anything else is looked at


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_the_variables_of_a_cluster_without_a_launcher_are_one_line_at_once(missing, monkeypatch):
    """Without it, the processes would wait for each other for ever."""
    for name in ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]:
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv(missing)
    monkeypatch.setattr(ppo, "WORLD", 2)
    with pytest.raises(ppo.UserError, match="WORLD_SIZE is set, but torchrun did not start"):
        ppo.main(["--cycle", "3"])


def test_a_rank_alone_is_one_line_at_once(monkeypatch):
    """The program would take itself for the second of several: it says and writes nothing."""
    monkeypatch.setattr(ppo, "RANK", 1)
    with pytest.raises(ppo.UserError, match="RANK.*torchrun"):
        ppo.main(["--cycle", "3"])


@slow
@pytest.mark.parametrize("variables, fine", [
    ({"RANK": "1"}, False), ({"WORLD_SIZE": "2"}, False), ({"WORLD_SIZE": ""}, True),
    ({"RANK": "", "WORLD_SIZE": "1"}, True), ({"RANK": "0", "WORLD_SIZE": "1"}, True)], ids=str)
def test_odd_variables_of_a_cluster_end_in_one_line_or_do_not_count(variables, fine, run, tmp_path):
    out = tmp_path / "out"
    flags = ["--init_from", run, "--cycles", "0", "--out", out]
    done = subprocess.run([sys.executable, HERE / "ppo_rlhf.py", *flags], capture_output=True,
                          text=True, env=ONE_THREAD | variables)
    assert done.returncode == (0 if fine else 2) and (out / "report.json").exists() == fine
    assert fine or done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- What is not wrong ---------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [
    ["--lam", "0"], ["--gamma", "0"], ["--kl_coef", "0"], ["--ent_coef", "0"], ["--cycles", "0"],
    ["--seed", "0"], ["--label_noise", "0"], ["--clip_eps", "3"], ["--no_bf16"],
    ["--whiten_advantages"], ["--whiten_advantages", "true"], ["--n_head=1"]], ids=" ".join)
def test_such_values_are_not_wrong(flags):
    small_config(*flags)


def test_init_from_takes_the_settings_along_and_flags_change_them(run, tmp_path):
    out = tmp_path / "run"
    ppo.main(["--init_from", str(run), "--out", str(out), "--kl_coef", "0.05"])
    new = {"init_from": str(run), "out": str(out), "kl_coef": 0.05}
    assert read_config(out) == read_config(run) | new


def test_the_help_names_every_flag_and_what_it_does(capsys):
    with pytest.raises(SystemExit) as end:
        ppo.parse_config(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for name in vars(ppo.Config()):
        assert f"--{name} " in shown
    assert shown.count("(default: ") >= len(vars(ppo.Config())) - 10


@pytest.mark.parametrize("argv", [["--prompts", ""], ["--resume", ""], ["--out="]])
def test_an_empty_value_is_no_default(argv):
    """It comes from a variable that is not set. Then the built-in world would be trained on."""
    with pytest.raises(ppo.UserError, match="has an empty value"):
        ppo.parse_config(argv)
