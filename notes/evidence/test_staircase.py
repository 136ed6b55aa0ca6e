"""The staircase: its rungs, by hand; its last rung is the script; its pages show what ran."""
import difflib
import json
import math
import re
import runpy
import sys

import pytest
import torch

import ppo_rlhf as ppo
from test_ppo_rlhf import HERE

NOTES = HERE / "notes"
sys.path.insert(0, str(NOTES))
import staircase  # noqa: E402

PAGES = {".md": NOTES / "staircase.md", ".zh.md": NOTES / "staircase.zh.md"}
LAST = len(staircase.RUNGS) - 1


# ==================================================================================================
# The rungs
# ==================================================================================================
def test_the_last_rung_is_the_script_without_entropy_bit_for_bit(run):
    assert not staircase.RUNGS[LAST].settings and not staircase.RUNGS[LAST].functions
    cfg = staircase.settings(str(run), 1, 3)
    actor, log, score_fn = staircase.learn(staircase.RUNGS[LAST], staircase.TRIALS["stairs"], cfg)
    plain = ppo.parse_config(["--init_from", str(run), "--cycles", "1", "--seed", "3",
                              "--ent_coef", "0"])
    own = staircase.load("sft", plain)
    prompts = ppo.split(ppo.WORLD_PROMPTS)
    own_log = ppo.train_ppo(own, ppo.frozen(own), score_fn, prompts, plain)
    for line in [*log, *own_log]:
        del line["seconds"]
    assert log == own_log and len(log) == 1
    for x, y in zip(actor.state_dict().values(), own.state_dict().values()):
        assert torch.equal(x, y)
    # The comparison would notice a change (not that of rung 6: in the first cycle KL is 0).
    other, _, _ = staircase.learn(staircase.RUNGS[LAST - 2], staircase.TRIALS["stairs"], cfg)
    assert any(not torch.equal(x, y)
               for x, y in zip(other.state_dict().values(), own.state_dict().values()))


def test_the_usual_settings_of_the_script_are_those_of_the_last_rung(run):
    cfg = staircase.settings(str(run), 1, 0, **staircase.RUNGS[LAST].settings)
    usual = ppo.PPOConfig()
    for name in ["ppo_epochs", "minibatches", "kl_coef", "gamma", "lam", "lr", "clip_eps"]:
        assert getattr(cfg, name) == getattr(usual, name), name


# Two replies, of three tokens and of two; the last column of the second one is padding.
MASK = torch.tensor([[True, True, True], [True, True, False]])
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -1.5, 0.0]])
REFERENCE = OLD - torch.tensor([[0.1, -0.2, 0.3], [0.4, 0.5, 0.0]])
SCORES = torch.tensor([2.0, -1.0])
VALUES = torch.tensor([[0.5, 1.0, 1.5], [0.0, -0.5, 0.0]])
RHO = [[1.0, 1.5, 0.5], [1.0, 0.5]]

# Computed by hand: A_t of the real tokens, and what the critic learns; None: what it says already.
TO_GO = [[2, 2, 2], [-1, -1]]
LESS_V = [[1.5, 1.0, 0.5], [-1.0, -0.5]]
EXPECTED = {
    0: ([[2, 2, 2], [-1, -1]], None),
    1: (TO_GO, None),
    2: ([[1.2, 1.2, 1.2], [-1.8, -1.8]], None),  # the mean over the five tokens is 0.8
    3: (LESS_V, TO_GO),
    4: (LESS_V, TO_GO),
    5: (LESS_V, TO_GO),
    6: ([[1.42625, 0.975, 0.5], [-0.975, -0.5]], [[1.92625, 1.975, 2.0], [-0.975, -1.0]]),
    7: ([[1.408175, 0.9665, 0.47], [-1.0625, -0.55]],
        [[1.908175, 1.9665, 1.97], [-1.0625, -1.05]])}


def functions(number):
    rung = staircase.ALGORITHMS[number]
    return [rung.functions.get(name, getattr(ppo, name))
            for name in ["token_rewards", "gae", "policy_loss"]]


def real(x):
    """The numbers of the real tokens, a list for each reply."""
    return [row[keep].tolist() for row, keep in zip(x, MASK)]


@pytest.mark.parametrize("number", EXPECTED)
def test_every_rung_by_hand_with_padding(number):
    token_rewards, gae, policy_loss = functions(number)
    rewards = token_rewards(OLD, REFERENCE, SCORES, MASK, 0.1)
    advantages, returns = gae(rewards, VALUES, MASK, 1.0, 0.95)
    A, G = EXPECTED[number]
    for row, expected in zip(real(advantages), A):
        assert row == pytest.approx(expected, abs=1e-6)
    for row, expected in zip(real(returns), G or real(VALUES)):
        assert row == pytest.approx(expected, abs=1e-6)
    assert rewards[1, 2] == advantages[1, 2] == returns[1, 2] == 0  # the padding

    new = OLD + torch.tensor([[1.0, 1.5, 0.5], [1.0, 0.5, 1.0]]).log()
    new[1, 2] = math.nan  # nothing may depend on the padding
    loss, clip_fraction = policy_loss(new, OLD, advantages, MASK, 0.2)
    terms, braked = [], 0
    for a_row, rho_row, log_row in zip(A, RHO, real(new)):
        for a, rho, log_prob in zip(a_row, rho_row, log_row):
            clipped = min(max(rho, 0.8), 1.2) * a
            if number <= 3:
                terms.append(log_prob * a)
            elif number == 4:
                terms.append(rho * a)
            else:
                terms.append(min(rho * a, clipped))
                braked += clipped < rho * a
    assert loss.item() == pytest.approx(-sum(terms) / 5, abs=1e-6)
    assert clip_fraction.item() == pytest.approx(braked / 5)


def test_the_gradients_of_log_prob_and_ratio_are_equal_before_the_first_update():
    advantages = torch.tensor([[1.0, -2.0, 0.5], [3.0, -1.0, 0.0]])
    found = []
    for loss_fn in [staircase.log_prob_loss, staircase.ratio_loss, ppo.policy_loss]:
        log_probs = OLD.clone().requires_grad_()
        loss, _ = loss_fn(log_probs, OLD, advantages, MASK, 0.2)
        found += torch.autograd.grad(loss, log_probs)
    assert torch.allclose(found[0], found[1]) and torch.allclose(found[0], found[2])


def test_minus_value_is_gae_with_lambda_one(rollout):
    mine = staircase.minus_value(rollout.rewards * rollout.mask, rollout.values * rollout.mask,
                                 rollout.mask, 1.0, 1.0)
    own = ppo.gae(rollout.rewards * rollout.mask, rollout.values * rollout.mask, rollout.mask,
                  1.0, 1.0)
    for x, y in zip(mine, own):
        assert torch.allclose(x, y, atol=1e-5)


def test_with_the_score_alone_reward_to_go_is_the_whole_return():
    rewards = staircase.score_alone(OLD, REFERENCE, SCORES, MASK, 0.1)
    whole, _ = staircase.whole_return(rewards, VALUES, MASK, 1.0, 0.95)
    to_go, _ = staircase.reward_to_go(rewards, VALUES, MASK, 1.0, 0.95)
    assert torch.equal(whole, to_go)
    with_kl = ppo.token_rewards(OLD, REFERENCE, SCORES, MASK, 0.1)
    whole, _ = staircase.whole_return(with_kl, VALUES, MASK, 1.0, 0.95)
    to_go, _ = staircase.reward_to_go(with_kl, VALUES, MASK, 1.0, 0.95)
    assert not torch.allclose(whole, to_go)


def test_each_step_changes_one_function_and_the_fifth_also_the_settings():
    for number in range(1, LAST + 1):
        new, old = (staircase.parts(staircase.RUNGS[i]) for i in (number, number - 1))
        changed = [name for name in new if new[name] != old[name]]
        assert changed == [["gae"], ["gae"], ["gae"], ["settings", "policy_loss"],
                           ["policy_loss"], ["gae"], ["token_rewards"]][number - 1]
    for rung in staircase.RUNGS:
        for function in rung.functions.values():
            assert len(staircase.code(function)) <= 10


def test_the_trials_change_what_they_say():
    given = (OLD, REFERENCE, SCORES, MASK, 0.1)
    plain = staircase.score_alone(*given)
    torch.manual_seed(0)
    coins = torch.stack([staircase.with_luck(staircase.score_alone)(*given) - plain
                         for _ in range(40)])
    assert set(coins[:, :, 0].flatten().tolist()) == {3.0, -3.0} and not coins[:, :, 1:].any()
    shifted = staircase.with_shift(staircase.score_alone)(*given)
    assert real(shifted) == [[0, 0, -3], [0, -6]]
    with_mean = staircase.minus_mean(shifted, VALUES, MASK, 1.0, 1.0)[0]
    assert torch.allclose(with_mean, staircase.minus_mean(plain, VALUES, MASK, 1.0, 1.0)[0],
                          atol=1e-5)


# ==================================================================================================
# The pages
# ==================================================================================================
def read(page):
    return page.read_text(encoding="utf-8")


def block(text, name):
    """What stands between the marks of a page, without the fence of a code block."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)[1]
    return re.sub(r"^```.*\n?", "", found, flags=re.MULTILINE).rstrip("\n")


@pytest.fixture(scope="module")
def lines():
    """The record: a line for each training."""
    return json.loads(block(read(PAGES[".md"]), "record"))


@pytest.mark.parametrize("page", PAGES)
def test_the_page_shows_the_code_that_runs(page):
    text = read(PAGES[page])
    for number, rung in enumerate(staircase.RUNGS):
        shown = block(text, f"code {number}")
        new = staircase.parts(rung)
        if number:
            old = staircase.parts(staircase.RUNGS[number - 1])
            new = {name: rows for name, rows in new.items() if rows != old[name]}
            sides = [[], []]
            for piece in shown.split("\n\n"):
                for side in (1, 2):
                    rows = list(difflib.restore(piece.split("\n"), side))
                    sides[side - 1].append("\n".join(rows))
            assert sides[0] == ["\n".join(old[name]) for name in new]
            shown = "\n\n".join(sides[1])
        assert shown == "\n\n".join("\n".join(rows) for rows in new.values())
        for name in ["token_rewards", "gae", "policy_loss"]:
            if name in new and name not in rung.functions:  # the script's own source
                source = (HERE / "ppo_rlhf.py").read_text(encoding="utf-8")
                assert all(row in source for row in new[name])


@pytest.mark.parametrize("page", PAGES)
def test_code_tables_and_record_on_the_page_are_what_the_program_writes(page, lines):
    text = read(PAGES[page])
    assert staircase.filled(text, staircase.blocks(lines, page)) == text


@pytest.mark.parametrize("page", PAGES)
def test_the_first_table_has_the_means_of_the_record(page, lines):
    rows = block(read(PAGES[page]), "table stairs").splitlines()[2:]
    assert len(rows) == len(staircase.RUNGS)
    for number, row in enumerate(rows):
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        for name, cell in zip(staircase.COLUMNS["stairs"], cells):
            found = [line[name] for line in lines
                     if line["trial"] == "stairs" and line["rung"] == number]
            assert len(found) == 5
            middle = sum(found) / 5
            spread = math.sqrt(sum((x - middle) ** 2 for x in found) / 4 / 5)
            shown = [float(x) for x in cell.split(" ± ")]
            assert shown == pytest.approx([middle, spread], abs=0.0051), (number, name)


@pytest.mark.parametrize("page", PAGES)
def test_every_measured_number_in_the_prose_is_in_a_table_or_in_the_record(page, lines):
    text = read(PAGES[page])
    tables = set()
    for name in ["gradients", *staircase.TRIALS]:
        tables |= {*re.findall(r"-?\d+\.\d+", block(text, f"table {name}"))}
    prose = re.sub(r"<!-- (?!end|numbers).*?<!-- end -->|`[^`]*`|\$.*?\$", "", text, flags=re.DOTALL)
    known = {"0.1", "0.95", "0.0003", "0.001"}  # settings
    known |= {"0.97", "1.9"}  # of the run that all starts from
    for line in lines:  # one training alone
        for name in ["reward", "human"]:
            if name in line:
                known.add(f"{line[name]:.2f}")
    known |= {"1.3"}  # a heading of article C
    numbers = {number.replace("−", "-") for number in re.findall(r"[-−]?\b\d+\.\d+", prose)}
    assert numbers - known <= tables, numbers - known - tables


def test_both_pages_have_the_same_parts_and_numbers():
    english, chinese = (read(page) for page in PAGES.values())
    for pattern in [r"^#+ ", r"<!-- [a-z]+ \d -->", r"\b[STNPL]\d+\b"]:
        found = [re.findall(pattern, re.sub(r"^.*record.*$", "", text, flags=re.MULTILINE),
                            re.MULTILINE) for text in (english, chinese)]
        assert len(found[0]) and found[0] == found[1], pattern
    for name in staircase.TRIALS:
        numbers = [re.findall(r"-?\d+\.\d+", block(text, f"table {name}"))
                   for text in (english, chinese)]
        assert numbers[0] == numbers[1]


# ==================================================================================================
# The program
# ==================================================================================================
@pytest.mark.parametrize("flags, words", [
    ("", "--init_from"),
    ("--init_from nowhere", "nowhere"),
    ("--init_from RUN --seeds 0", "--seeds"),
    ("--init_from RUN --seeds two", "two"),
    ("--init_from RUN --cycles 5", "--cycles"),
    ("--init_from RUN --lr 1", "--lr"),
    ("--init_from OTHER", "reward model")])
def test_a_wrong_call_ends_in_one_line(flags, words, run, tmp_path, monkeypatch, capsys):
    if "OTHER" in flags:  # a run that had another reward, so there is no reward model
        (tmp_path / "sft").mkdir()
        (tmp_path / "sft/heads.safetensors").touch()
        (tmp_path / "config.json").write_text((run / "config.json").read_text())
    flags = flags.replace("RUN", str(run)).replace("OTHER", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["staircase.py", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(NOTES / "staircase.py"), run_name="__main__")
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and not shown.out
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and words in shown.err
    assert not (run / "staircase").exists()


def test_a_short_training_is_measured_and_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr(staircase, "train", lambda *given: {"given": list(given)})
    folder = tmp_path / "run"
    folder.mkdir()
    first = staircase.kept(str(folder), "stairs-0-1-10", staircase.train, "stairs", 0, 1, 10)
    monkeypatch.setattr(staircase, "train", None)  # the second time nothing is trained
    assert staircase.kept(str(folder), "stairs-0-1-10", staircase.train) == first
    (folder / "staircase/stairs-0-1-10.json").write_text("{")
    with pytest.raises(ppo.UserError, match="delete it"):
        staircase.kept(str(folder), "stairs-0-1-10", staircase.train)
