"""What a run tells while it trains and at its end: warnings, xray.jsonl, how much it samples."""
import json

import pytest
import torch

import ppo_rlhf as ppo
from helpers import TEN, same_results, write_jsonl
from test_ppo_rlhf import NAN, TINY, small_config, spy_on_updates


def warnings_in(text):
    return [line for line in text.splitlines() if line.startswith("warning: ")]


# ---- Warnings ------------------------------------------------------------------------------------
@pytest.mark.parametrize("accuracy, correlation, warning", [
    (0.5, NAN, "no better than a coin"), (0.2, 0.9, "no better than a coin"),
    (0.51, NAN, ""), (0.9, 0.71, ""), (0.9, 0.69, "correlation below 0.7"), (NAN, NAN, "")])
def test_a_reward_at_or_below_a_coin_and_one_far_from_the_human_are_named(accuracy, correlation,
                                                                        warning, capsys):
    ppo.warn_of_reward({"accuracy": accuracy, "correlation": correlation})
    shown = warnings_in(capsys.readouterr().out)
    assert len(shown) == bool(warning) and all(warning in line for line in shown)


def table_of(*outcomes):
    return [{"finished": finished, "reward": reward} for finished, reward in outcomes]


@pytest.mark.parametrize("table, constant", [
    (table_of(*[(True, 1.0)] * 8), True),
    (table_of(*[(True, 1.0)] * 4, *[(False, 0.0)] * 4), True),  # only the penalty differs
    (table_of(*[(False, -1.0)] * 8), True),
    (table_of(*[(True, 1.0)] * 7, (True, 1.5)), False),
    (table_of(*[(True, 1.0)] * 4, *[(False, 0.0)] * 3, (False, 0.5)), False),
    (table_of((True, 1.0)), False),  # one reply is no evidence, nor is one of each kind
    (table_of((True, 1.0), (False, 0.0)), False)])
def test_a_constant_reward_is_named_and_the_penalty_is_no_difference(table, constant, capsys):
    ppo.warn_if_constant(table)
    shown = warnings_in(capsys.readouterr().out)
    assert len(shown) == constant and all("is the same for all replies" in line for line in shown)


@pytest.mark.parametrize("ended, warns", [(0, True), (9, True), (10, False), (100, False)])
def test_replies_that_nearly_all_reach_the_limit_are_named(ended, warns, capsys):
    table = table_of(*[(i < ended, 0.0) for i in range(100)])
    ppo.warn_if_unfinished(table, small_config("--max_new_tokens", "12"))
    shown = warnings_in(capsys.readouterr().out)
    assert len(shown) == warns
    for line in shown:
        assert f"{100 - ended}% of the replies are cut off at --max_new_tokens 12" in line


REWARDS = {
    "constant": ("return [1.0] * len(completions)", "the reward is the same for all replies"),
    "reversed": ("return [-text.count('Good') for text in completions]", "no better than a coin"),
    "good": ("return [text.count('Good') for text in completions]", None)}


@pytest.mark.parametrize("kind", REWARDS)
def test_each_warning_is_shown_when_it_is_known_and_once_more_under_the_report(kind, tmp_path,
                                                                              capsys):
    """For own data as well: its held-out pairs measure the reward."""
    body, warning = REWARDS[kind]
    (tmp_path / "mine.py").write_text(f"def score(completions):\n    {body}\n")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", TEN)
    demos = write_jsonl(tmp_path / "demos.jsonl", [
        line | {"completion": ["Good.", "Bad."][i % 2]} for i, line in enumerate(TEN)])
    ppo.main([*TINY, "--preferences", pairs, "--demos", demos, "--sft_steps", "40", "--sft_lr",
              "0.01", "--reward", f"{tmp_path}/mine.py:score", "--out", str(tmp_path / "run")])
    during, after = capsys.readouterr().out.split("RESULT")
    for part in [during, after]:
        shown = warnings_in(part)
        assert [line for line in shown if "cut off" in line] == []
        if kind == "constant":  # which is no better than a coin either
            assert len(shown) == 2 and "coin" in shown[0] and warning in shown[1]
        else:
            assert len(shown) == bool(warning) and all(warning in line for line in shown)
    assert after.index("SECONDS") < after.index("warning") if warning else True


def test_replies_that_do_not_end_are_named_in_the_first_cycle_and_under_the_report(
        run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ppo, "warn_of_reward", lambda quality: None)
    ppo.main([*TINY, "--init_from", str(run), "--max_new_tokens", "2", "--out",
              str(tmp_path / "run")])
    during, after = capsys.readouterr().out.split("RESULT")
    for part in [during, after]:
        [shown] = warnings_in(part)
        assert "are cut off at --max_new_tokens 2." in shown
    rows = during.split("warning")[1].splitlines()
    assert rows[1].split()[0] == "2"  # it stands between cycle 1 and cycle 2


# ---- Warm-up -------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 2, 9, 10, 20, 450])
def test_no_step_is_wasted_on_a_learning_rate_of_zero(steps):
    """It rises for a tenth of the steps, reaches 1 in the next step, and falls to nearly 0."""
    shares = [ppo.rise_and_fall(step, steps) for step in range(steps)]
    rise = steps // 10
    assert shares[:rise] == pytest.approx([(i + 1) / (rise + 1) for i in range(rise)])
    assert shares[rise] == 1 and shares[rise:] == sorted(shares[rise:], reverse=True)
    assert all(share > 0 for share in shares)
    assert steps < 9 or shares[-1] < 0.1


def test_the_first_step_of_a_stage_learns(world, monkeypatch):
    seen = spy_on_updates(monkeypatch)
    tokenizer, actor, _, prompts = world
    replies = [ppo.Reply(prompts[0], "Call a friend.", True)]
    ppo.finetune(actor, replies, small_config("--sft_steps", "20", "--sft_lr", "0.3"))
    assert seen[0][0] == [pytest.approx(0.1)]
    learned = ppo.finetune(actor, replies, small_config("--sft_steps", "1"))
    assert any(not torch.equal(a, b) for a, b in zip(actor.parameters(), learned.parameters()))


# ---- How much is sampled for validation and report -----------------------------------------------
@pytest.mark.parametrize("batches, prompts, batch_size, each", [
    (3, 20, 64, 9), (3, 20, 32, 4), (3, 20, 512, 76), (28, 20, 64, 89), (3, 2, 8, 12),
    (1, 20, 8, 2)])  # a spread needs two replies
def test_replies_to_each_prompt_follow_the_batch(batches, prompts, batch_size, each):
    cfg = small_config("--batch_size", str(batch_size))
    assert ppo.replies_each(batches, ["?"] * prompts, cfg) == each


def count_replies(monkeypatch):
    """What is sampled, by purpose: training, validation, xray, report ..."""
    counts, purpose = {}, [""]
    reseed, sample = ppo.reseed, ppo.sample_replies

    def remember(cfg, now):
        purpose[0] = "training" if now.startswith("PPO") else now
        return reseed(cfg, now)

    def count(actor, prompts, cfg):
        counts[purpose[0]] = counts.get(purpose[0], 0) + len(prompts)
        return sample(actor, prompts, cfg)

    monkeypatch.setattr(ppo, "reseed", remember)
    monkeypatch.setattr(ppo, "sample_replies", count)
    return counts


def test_validation_and_report_of_a_run_have_the_sizes_that_the_flags_say(run, tmp_path,
                                                                         monkeypatch):
    """3 cycles of 32 replies; two validations on 20 prompts, three models on 14 test prompts."""
    counts = count_replies(monkeypatch)
    ppo.main([*TINY, "--init_from", str(run), "--batch_size", "32", "--eval_batches", "2",
              "--report_batches", "3", "--out", str(tmp_path / "run")])
    validation, test = (len(ppo.split(ppo.WORLD_PROMPTS)[name][:20])
                        for name in ("validation", "test"))
    assert counts["training"] == 3 * 32
    assert counts["validation"] == 2 * validation * (2 * 32 // validation) <= 2 * 64
    report = 3 * test * (3 * 32 // test)
    assert counts["report"] == report + 1 and report <= 3 * 96  # and the X-ray of one reply


def test_the_gradients_of_a_finished_stage_fill_no_memory(world):
    replies = [ppo.Reply(prompt, "a", True) for prompt in world[3]]
    model = ppo.finetune(world[1], replies, small_config("--sft_steps", "2"))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("length, count, first_two, last", [
    (3, 20, [0, 1], 2), (39, 20, [0, 1], 19), (40, 20, [0, 2], 38), (1000, 20, [0, 50], 950)])
def test_some_items_come_from_everywhere_in_the_list(length, count, first_two, last):
    chosen = ppo.some(list(range(length)), count)
    assert chosen[:2] == first_two and chosen[-1] == last and len(chosen) == min(length, count)


def test_validation_asks_prompts_from_everywhere_in_a_sorted_file(world, monkeypatch):
    _, actor, reward_model, _ = world
    asked = []

    def remember(actor, reference, score_fn, prompts, N, cfg):
        asked.append(prompts)
        return []

    monkeypatch.setattr(ppo, "evaluate", remember)
    prompts = [f"{number:03}" for number in range(200)]
    ppo.validate(actor, actor, reward_model.score, prompts, small_config())
    assert asked == [[f"{number:03}" for number in range(0, 200, 10)]]


def test_at_most_500_held_out_rankings_measure_the_reward(world, monkeypatch):
    groups = [[ppo.Reply(str(number), text, True) for text in ("a", "b")] for number in range(1100)]
    data = ppo.Data({"train": [], "validation": [], "test": []}, [], [], [], groups)
    asked = []

    def score(prompts, completions):
        asked.append(int(prompts[0]))
        return [2.0 if text == "a" else 1.0 for text in completions]

    assert ppo.reward_model_quality(score, world[1], data, small_config())["accuracy"] == 1
    assert asked == list(range(0, 1000, 2))


def test_with_an_own_model_validation_and_report_together_are_small_beside_the_training():
    """A reply that is only sampled costs about a third of one that PPO also learns from."""
    cfg = ppo.parse_config(["--model", "gpt2"])
    for batch_size in (32, 64):
        cfg.batch_size = batch_size
        validations = len([cycle for cycle in range(1, cfg.cycles + 1)
                           if cycle % cfg.eval_every == 0 or cycle == cfg.cycles])
        prompts = ["?"] * 20
        sampled = 20 * (validations * ppo.replies_each(cfg.eval_batches, prompts, cfg)
                        + 3 * ppo.replies_each(cfg.report_batches, prompts, cfg))
        assert sampled / 2 < cfg.cycles * batch_size / 3


def test_the_help_says_that_these_sizes_follow_the_batch(capsys):
    with pytest.raises(SystemExit):
        ppo.parse_config(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for flag in ["eval_batches", "report_batches"]:
        about = shown.split(f"--{flag} ")[-1].split("(default")[0]
        assert "in batches of batch_size" in about, about


# ---- xray.jsonl ----------------------------------------------------------------------------------
COLUMNS = ["log pi", "log ref", "KL", "r_t", "V(s_t)", "delta_t", "A_t", "return"]


def read_xray(out):
    return [json.loads(row) for row in (out / "xray.jsonl").read_text().splitlines()]


def test_xray_jsonl_has_four_fixed_prompts_and_two_replies_of_the_batch(run):
    lines = read_xray(run)
    assert [line["cycle"] for line in lines] == [0] * 4 + [1] * 6 + [2] * 6 + [3] * 6
    asked = {}
    for line in lines:
        if not line["from_batch"]:
            asked.setdefault(line["cycle"], []).append(line["prompt"])
        assert line["from_batch"] == ("rho" in line) == ("A used" in line)
    splits = ppo.split(ppo.WORLD_PROMPTS)
    assert len(asked) == 4 and all(prompts == asked[0] for prompts in asked.values())
    assert len(set(asked[0])) == 4 and set(asked[0]) <= set(splits["validation"])
    assert {line["prompt"] for line in lines if line["from_batch"]} <= set(splits["train"])


def test_every_number_of_xray_jsonl_is_that_of_the_formulas_and_of_the_saved_models(run):
    cfg = small_config()
    sft = ppo.load_model(ppo.ActorCritic, run / "sft", cfg)
    last = ppo.load_model(ppo.ActorCritic, run / "sft", cfg)
    last.load_state_dict(torch.load(run / "state.pt", weights_only=True)["actor"])
    judge = ppo.load_model(ppo.RewardModel, run / "reward_model", cfg)
    tokenizer = sft.tokenizer
    again = 0
    for line in read_xray(run):
        T = len(line["tokens"])
        assert 0 < T <= 12 and all(len(line[name]) == T for name in COLUMNS)
        assert line["finished"] == (line["tokens"][-1] == "<eos>")
        for t in range(T):
            kl = line["log pi"][t] - line["log ref"][t]
            score = line["score"] if t == T - 1 else 0
            V_next = line["V(s_t)"][t + 1] if t < T - 1 else 0
            A_next = line["A_t"][t + 1] if t < T - 1 else 0
            assert line["KL"][t] == pytest.approx(kl, abs=3e-4)
            assert line["r_t"][t] == pytest.approx(score - 0.1 * kl, abs=3e-4)
            delta = line["r_t"][t] + V_next - line["V(s_t)"][t]
            assert line["delta_t"][t] == pytest.approx(delta, abs=3e-4)
            assert line["A_t"][t] == pytest.approx(delta + 0.95 * A_next, abs=3e-4)
            assert line["return"][t] == pytest.approx(line["A_t"][t] + line["V(s_t)"][t], abs=3e-4)
        if line["cycle"] == 0 or line["from_batch"] and line["cycle"] == 1:
            assert line["log pi"] == line["log ref"] and set(line["KL"]) == {0.0}
        if line["from_batch"]:
            assert line["A used"] == pytest.approx(line["A_t"], abs=3e-4)
            assert any(rho != 1 for rho in line["rho"]) and all(rho > 0 for rho in line["rho"])

        prompt, mask = ppo.encode_prompts(sft, [line["prompt"]])
        ids = tokenizer(line["reply"]).input_ids + [tokenizer.eos_token_id] * line["finished"]
        if [tokenizer.decode([token]) for token in ids] != line["tokens"]:
            continue  # a reply in the middle of a character reads as other tokens
        again += 1
        reply_ids = torch.tensor([ids])
        ones = torch.ones_like(reply_ids).bool()
        for model, name in [(sft, "log ref"), (last, "log pi")]:
            if name == "log ref" or line["cycle"] == 3 and not line["from_batch"]:
                with torch.no_grad():
                    logits, values = model(prompt, mask, reply_ids, ones)
                log_probs = ppo.token_log_probs(logits / 0.7, reply_ids)[0].tolist()
                assert line[name] == pytest.approx(log_probs, abs=2e-4)
                if name == "log pi":
                    assert line["V(s_t)"] == pytest.approx(values[0].tolist(), abs=2e-4)
        [score] = judge.score([line["prompt"]], [line["reply"]], [line["finished"]])
        assert line["score"] == pytest.approx(score - (not line["finished"]), abs=2e-4)
    assert again > 3


def test_replies_are_recorded_often_at_first_and_rarely_later_and_in_the_last_cycle(world, tmp_path,
                                                                                   monkeypatch):
    """At most 3% of the replies of a run with the default settings are sampled for it."""
    tokenizer, actor, reward_model, prompts = world
    cfg = ppo.parse_config(["--out", str(tmp_path)])
    sampled = []

    def nothing(actor, reference, score_fn, prompts, cfg):
        sampled.append(len(prompts))
        return prompts

    monkeypatch.setattr(ppo, "sample_and_score", nothing)
    monkeypatch.setattr(ppo, "xray_lines", lambda cycle, *args: [{"cycle": cycle}])
    for cycle in range(cfg.cycles + 1):
        ppo.record_xray(cycle, actor, actor, reward_model.score, prompts, cfg)
    cycles = [line["cycle"] for line in read_xray(tmp_path)]
    assert cycles == [0, 1, 2, 3, 5, 7, 11, 17, 25, 38, 57, 60]
    assert sum(sampled) <= 0.03 * cfg.cycles * cfg.batch_size


def test_the_same_policy_gives_the_same_replies_whatever_was_drawn_before(world, tmp_path):
    """So a reply that changes from cycle to cycle has changed because the policy has."""
    _, actor, reward_model, prompts = world
    cfg = small_config("--out", str(tmp_path))
    for cycle in (1, 2):
        torch.manual_seed(cycle)
        ppo.record_xray(cycle, actor, actor, reward_model.score, prompts, cfg)
    lines = read_xray(tmp_path)
    for line in lines:
        del line["cycle"]
    assert len(lines) == 8 and lines[:4] == lines[4:]


def test_recording_replies_changes_nothing_in_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "record_xray", lambda *args: None)
    ppo.main([*TINY, "--init_from", str(run), "--out", str(tmp_path / "run")])
    same_results(run, tmp_path / "run")
    assert not (tmp_path / "run/xray.jsonl").exists()


def test_a_resumed_run_has_the_same_xray_jsonl_and_no_cycle_twice(run, tmp_path, monkeypatch):
    """Cycle 2 is repeated: it was recorded before the stop, and not saved."""
    out = tmp_path / "run"

    def stop(*args):
        raise KeyError("stopped in cycle 2")

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "validate", stop)
        with pytest.raises(KeyError):
            ppo.main([*TINY, "--init_from", str(run), "--save_every", "1", "--out", str(out)])
    assert [line["cycle"] for line in read_xray(out)].count(2) == 6
    ppo.main(["--resume", str(out)])
    assert (out / "xray.jsonl").read_bytes() == (run / "xray.jsonl").read_bytes()
