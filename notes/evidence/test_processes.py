"""Several processes (torchrun): two compute what one computes (R1)."""
import json
import runpy
import subprocess
import sys

import pytest
import torch

import ppo_rlhf as ppo
from helpers import ONE_THREAD
from test_ppo_rlhf import HERE, TINY, read_metrics, slow, small_config


def launch(*command):
    """Run a script in two processes, and return what it printed."""
    environment = ONE_THREAD | {"PYTHONPATH": str(HERE)}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0"]
    process = subprocess.Popen([sys.executable, *torchrun, *map(str, command)], text=True,
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        shown, errors = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:  # they wait for each other: torchrun ends both
        process.terminate()
        shown, errors = process.communicate()
    assert process.returncode == 0, errors[-9000:]
    return shown


# ---- The numbers ---------------------------------------------------------------------------------
WORKER = '''
import pathlib, sys
import torch, torch.distributed as dist
import ppo_rlhf as ppo

folder, result = pathlib.Path(sys.argv[1]), {}
if ppo.WORLD > 1:
    dist.init_process_group("gloo")
cfg, rollout = torch.load(folder / "rollout.pt", weights_only=False)

# New models: random weights
fresh = ppo.base_model({flag: [] for flag in ppo.OWN_DATA}, cfg)
result["fresh"] = [x.clone() for x in fresh.parameters()]

# One update in PPO, and three steps in stage 1, of different lengths
actor = ppo.load_model(ppo.ActorCritic, folder / "actor", cfg)
part = rollout[ppo.share(list(range(len(rollout))))]
still = torch.optim.SGD(actor.parameters(), lr=0.0)
result["metrics"] = ppo.update_policy(actor, still, part, cfg)
result["gradients"] = [p.grad.clone() for p in actor.parameters() if p.grad is not None]
result["white"] = ppo.whiten(part.advantages, part.mask)
result["moments"] = ppo.moments(part.returns, part.mask)
result["texts"] = ppo.gather([reply.text for reply in part.replies])
replies = [ppo.Reply("I feel sad.\\n", "Call a friend" + "!" * n, True) for n in range(9)]
ppo.train_supervised(actor, ppo.imitation_loss, replies, 16, 3, 1e-2, "test", cfg)
result["weights"] = list(actor.parameters())

# Stage 2 begins with a new head
data = ppo.load_data({flag: [] for flag in ppo.OWN_DATA}, cfg)
trained = ppo.train_reward_model(fresh, data, cfg)
result["reward_model"] = list(trained.parameters())

# The report of 3 prompts, 5 replies each: 15 replies cannot be shared equally. All replies are the
# same text, so what is measured of them depends on the prompt alone.
def call_a_friend(actor, prompt_ids, *_):
    reply = ppo.Reply("", "Call a friend.", True)
    return ppo.encode(actor, [reply] * len(prompt_ids))[2:]

ppo.generate = call_a_friend
prompts = ["I feel sad. What can I do?\\n", "I am so lonely today.\\n", "Hello\\n"]
make_report, arguments = ppo.make_report, []
ppo.make_report = lambda *args: arguments.extend(args) or make_report(*args)
models = {"pretrained": actor, "sft": ppo.frozen(actor), "ppo": fresh}
def score(prompts): return [float(len(prompt)) for prompt in prompts]
cfg.report_batches, cfg.batch_size = 1, 15  # 5 replies to each prompt
report, _ = ppo.compare_models(models, score, prompts, cfg)
result["report"] = report["ppo"]["reward"], report["optimum"]["objective"]
result["tables"], result["log_ratios"] = arguments[:2]
result["groups"] = ppo.sample_groups(actor, prompts, 3, cfg)
result["stream"] = ppo.reseed(cfg, "a").random(), torch.rand(1).item()
torch.save(result, folder / f"result-{ppo.WORLD}-{ppo.RANK}.pt")
if ppo.WORLD > 1:
    dist.barrier()
    dist.destroy_process_group()
'''


@pytest.fixture(scope="module")
def workers(world, rollout, tmp_path_factory):
    """What WORKER finds: alone, and in each of two processes."""
    folder = tmp_path_factory.mktemp("workers")
    cfg = small_config("--minibatches", "1", "--ppo_epochs", "1", "--max_grad_norm", "1e9")
    torch.save((cfg, rollout), folder / "rollout.pt")
    ppo.save_model(world[1], folder / "actor")
    (folder / "worker.py").write_text(WORKER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["worker.py", str(folder)])
        for name in ["generate", "make_report"]:  # which it replaces; to be put back afterwards
            patch.setattr(ppo, name, getattr(ppo, name))
        runpy.run_path(str(folder / "worker.py"))
    launch(folder / "worker.py", folder)
    return [torch.load(folder / f"result-{name}.pt", weights_only=False)
            for name in ("1-0", "2-0", "2-1")]


def test_all_processes_begin_with_the_same_weights(workers):
    _, first, second = workers
    assert all(torch.equal(a, b) for a, b in zip(first["fresh"], second["fresh"]))


def test_all_processes_have_the_same_reward_model(workers):
    """Its head is new, and random in each process at first."""
    one, first, second = workers
    assert all(torch.equal(a, b) for a, b in zip(first["reward_model"], second["reward_model"]))


def test_two_processes_compute_the_update_of_one(workers, rollout):
    """Gradient, metrics and whitening, although the replies of the two differ much in length."""
    one, *two = workers
    texts = [reply.text for reply in rollout.replies]
    assert one["texts"] == texts
    white = torch.zeros_like(one["white"])
    white[:4], white[4:] = two[0]["white"], two[1]["white"]
    assert torch.allclose(one["white"], white, atol=1e-5)
    for other in two:
        assert other["texts"] == texts
        for a, b in zip(one["gradients"], other["gradients"]):
            assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)
        assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)
        assert other["moments"] == pytest.approx(one["moments"], rel=1e-4)


def test_two_processes_take_the_steps_of_one_before_ppo_and_stay_alike(workers, world):
    one, *two = workers
    for other in two:
        for (name, _), *pair in zip(world[1].named_parameters(), one["weights"], other["weights"]):
            if name.endswith("c_attn.bias"):
                # The bias of the keys changes nothing. Its gradient is only rounding, and Adam
                # blows that up. So only queries and values are compared.
                pair = [torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in pair]
            assert (pair[0] - pair[1]).abs().mean() < 1e-6, name
    assert all(torch.equal(a, b) for a, b in zip(two[0]["weights"], two[1]["weights"]))


def test_the_report_of_two_processes_has_all_replies_in_the_order_of_one(workers):
    one, *two = workers
    for other in two:
        assert other["report"] == pytest.approx(one["report"], rel=1e-4)
        assert other["log_ratios"] == pytest.approx(one["log_ratios"], abs=1e-3)
        assert other["groups"] == one["groups"] and len(one["groups"]) == 3
        for name, table in one["tables"].items():
            assert len(table) == 15
            for line, expected in zip(other["tables"][name], table, strict=True):
                assert line.pop("reply") == expected["reply"]
                expected = {key: x for key, x in expected.items() if key != "reply"}
                assert line == pytest.approx(expected, abs=1e-3, nan_ok=True)
    assert one["log_ratios"][0] == pytest.approx(one["log_ratios"][4], abs=1e-3)
    assert abs(one["log_ratios"][4] - one["log_ratios"][5]) > 0.01  # another prompt


def test_processes_share_their_choices_and_not_their_dice(workers):
    one, first, second = (worker["stream"] for worker in workers)
    assert one == first and second[0] == first[0] and second[1] != first[1]


# ---- Whole runs ----------------------------------------------------------------------------------
@slow
def test_a_run_with_two_processes_writes_one_folder_and_speaks_once(tmp_path):
    out = tmp_path / "run"
    shown = launch(HERE / "ppo_rlhf.py", *TINY, "--out", out)
    assert shown.count("RESULT on") == 1 and shown.count("X-RAY") == 2
    rows = read_metrics(out)
    assert [row["episodes"] for row in rows] == ["8", "16", "24"]
    assert all(float(row["first_log_ratio"]) < 1e-5 for row in rows)
    report = json.loads((out / "report.json").read_text())
    assert report["sft"]["win_rate"] == pytest.approx(0.5)


SWAPPED = '''
import signal, sys
import torch, torch.distributed as dist
import ppo_rlhf as ppo

flags = sys.argv[1:]
assign_rewards, reseed = ppo.assign_rewards, ppo.reseed
sums, groups = [], []

def with_price(rollout, cfg):
    """Every token costs 0.02."""
    return assign_rewards(rollout, cfg) - 0.02 * rollout.mask

def group_baseline(rollout, cfg):
    """GRPO: the reward of the reply less the mean of the replies to the same prompt."""
    rewards = rollout.rewards.sum(dim=1)
    advantages = torch.zeros_like(rewards)
    for number in rollout.group.unique():
        same = rollout.group == number
        advantages[same] = rewards[same] - rewards[same].mean()
        groups.append(int(same.sum()))
        prompts = {reply.prompt for reply, yes in zip(rollout.replies, same) if yes}
        assert len(prompts) == 1 and abs(advantages[same].sum()) < 1e-4
        sums.append(float(advantages[same].abs().sum()))
    advantages = advantages.unsqueeze(1) * rollout.mask
    return advantages, torch.zeros_like(advantages)

def press_ctrl_c_in_process_1(cfg, purpose):
    if purpose == "PPO 1" and ppo.RANK == 1:
        signal.raise_signal(signal.SIGINT)
    return reseed(cfg, purpose)

ppo.assign_rewards, ppo.estimate_advantages = with_price, group_baseline
if "--resume" in flags:
    ppo.main(flags)
    assert groups == [4] and sums[0] > 0  # the last cycle
    sys.exit()
ppo.reseed = press_ctrl_c_in_process_1
try:
    ppo.main(flags)
except KeyboardInterrupt:
    assert groups == [4, 4] and sum(sums) > 0
else:
    raise AssertionError("not stopped")
'''


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """A run with other rewards and advantages, stopped in cycle 2: folder, what was printed."""
    folder = tmp_path_factory.mktemp("swapped")
    (folder / "swapped.py").write_text(SWAPPED)
    out, flags = folder / "run", [*TINY, "--replies_per_prompt", "4", "--save_every", "9"]
    stopped = launch(folder / "swapped.py", *flags, "--out", out)
    state = torch.load(out / "state.pt", weights_only=True)
    resumed = launch(folder / "swapped.py", "--resume", out)
    return out, stopped, state, resumed


def test_a_swapped_baseline_and_a_price_run_in_two_processes_up_to_the_report(swapped):
    """The script asserts that each process sees whole groups: 4 replies to the same prompt."""
    out, *_, resumed = swapped
    assert resumed.count("RESULT on") == 1
    report = json.loads((out / "report.json").read_text())
    for name in ["pretrained", "sft", "ppo"]:  # the price is not in the report
        line = report[name]
        assert line["objective"] == pytest.approx(line["reward"] - 0.1 * line["kl"], abs=1e-4)


def test_ctrl_c_in_one_process_stops_both_after_the_cycle_and_both_go_on(swapped):
    out, stopped, state, _ = swapped
    assert stopped.count(f"main(['--resume', '{out}'])") == 1 and "RESULT on" not in stopped
    assert stopped.count("X-RAY") == 1  # one process speaks for both
    assert state["cycle"] == 2
    assert [row["cycle"] for row in read_metrics(out)] == ["1", "2", "3"]
