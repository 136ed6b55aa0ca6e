"""Your own data: files of prompts, demonstrations and preferences, and texts that are too long."""
import json
import math
import random
import time

import pytest
from transformers import AutoTokenizer

import ppo_rlhf as ppo
from helpers import TEN, jsonl, write_jsonl
from test_ppo_rlhf import HERE, TINY, read_metrics, slow, small_config

GOOD, FAIR, BAD = "听你这么说，我很心疼。出去走走吧。", "可以听音乐、运动或者聊天。", "这跟我有什么关系？"


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """Files in Chinese. The preferences mix pairs, rankings and pairs without a prompt."""
    folder = tmp_path_factory.mktemp("data")
    prompts = []
    for word in "难过 孤单 焦虑 沮丧 紧张".split():
        for ask in ["怎么办？", "你在吗？", "为什么？", "帮帮我。"]:
            prompts.append(f"我今天很{word}，{ask}\n")
    preferences = []
    for i, prompt in enumerate(prompts):
        kinds = [{"prompt": prompt, "chosen": GOOD, "rejected": BAD},
                 {"prompt": prompt, "ranked": [GOOD, FAIR, BAD]},
                 {"chosen": prompt + GOOD, "rejected": prompt + BAD}]
        preferences.append(kinds[i % 3])
    demos = [{"prompt": prompt, "completion": FAIR} for prompt in prompts]
    files = {"--prompts": [{"prompt": prompt} for prompt in prompts],
             "--demos": demos, "--preferences": preferences}
    return {flag: write_jsonl(folder / f"{flag[2:]}.jsonl", lines)
            for flag, lines in files.items()}


def flags_of(files, names):
    flags = []
    for name in names:
        flags += [name, files[name]]
    return flags


def read_own(cfg):
    return ppo.read_own_data(None, cfg)


def as_line(replies):
    return ppo.Line(list(replies), [], {})


# ---- Whole runs ----------------------------------------------------------------------------------
def test_own_data_runs_the_whole_pipeline_and_has_no_human(own_files, tmp_path, capsys):
    out = tmp_path / "run"
    ppo.main([*TINY, *flags_of(own_files, own_files), "--out", str(out)])
    report, shown = json.loads((out / "report.json").read_text()), capsys.readouterr().out
    for name in ["pretrained", "sft", "ppo"]:
        for x in "helpful warm honest harmless human win_rate".split():
            assert report[name][x] is None
        for x in "reward kl objective length finished spread".split():
            assert math.isfinite(report[name][x])
    assert 0 <= report["reward_model"]["accuracy"] <= 1
    assert report["reward_model"]["correlation"] is None
    assert {row["human"] for row in read_metrics(out)} == {""}
    tables = shown.split("RESULT")[1].split("user")[0]
    assert "human" not in tables and "nan" not in shown.lower()
    tokenizer = AutoTokenizer.from_pretrained(out / "sft")
    assert tokenizer.decode(tokenizer("我今天很难过").input_ids) == "我今天很难过"


@pytest.mark.parametrize("names", [["--prompts"], ["--preferences"], ["--prompts", "--preferences"],
                                   ["--demos", "--preferences"]], ids=" ".join)
def test_each_file_replaces_its_source_and_held_out_prompts_occur_in_no_stage(own_files, names):
    cfg = small_config(*flags_of(own_files, names))
    data = ppo.load_data(read_own(cfg), cfg)
    assert sorted(map(len, data.prompts.values())) == [2, 2, 16]  # of 20 prompts
    held_out = {*data.prompts["validation"], *data.prompts["test"]}
    seen = data.texts + data.demos + sum(data.rankings, [])
    assert held_out.isdisjoint(reply.prompt for reply in seen)
    assert held_out.isdisjoint(data.prompts["train"])
    own = names != ["--prompts"]
    assert (seen[0].prompt in ppo.WORLD_PROMPTS) == (not own)
    if own:
        assert len(data.rankings) == 16 and len(data.held_out) == 4
        assert {len(replies) for replies in data.rankings} == {2, 3}
        imitated = FAIR if "--demos" in names else GOOD  # the best of each ranking
        assert {reply.text for reply in data.demos} == {imitated}
        assert all(reply.prompt in held_out for reply in sum(data.held_out, []))


def test_ppo_practises_on_the_given_prompts_and_not_on_those_of_demonstrations(own_files, tmp_path):
    other = write_jsonl(tmp_path / "demos.jsonl", TEN)
    files = dict(own_files, **{"--demos": other})
    cfg = small_config(*flags_of(files, ["--prompts", "--demos", "--preferences"]))
    data = ppo.load_data(read_own(cfg), cfg)
    given = {line.replies[0].prompt for line in read_own(cfg)["prompts"]}
    for prompts in data.prompts.values():
        assert prompts and set(prompts) <= given


def test_with_own_prompts_alone_the_human_ranks_replies_to_prompts_that_it_knows(
        own_files, tmp_path, capsys, monkeypatch):
    """It has no opinion on others: NaN for all of them, and a ranking by NaN is no ranking."""
    judged, judge = [], ppo.judge

    def remember(reply):
        verdict = judge(reply)
        if ppo.WHERE[0] == "" and not (tmp_path / "run/reward_model").exists():
            judged.append(verdict["human"])
        return verdict

    monkeypatch.setattr(ppo, "judge", remember)
    ppo.main([*TINY, *flags_of(own_files, ["--prompts"]), "--out", str(tmp_path / "run")])
    assert len(judged) >= 48 and not any(math.isnan(points) for points in judged[:48])
    shown = capsys.readouterr().out
    assert "nan" not in shown.lower() and "as the human does" not in shown
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["reward_model"] == {"accuracy": None, "correlation": None}


def test_every_file_of_the_chinese_example_can_be_read():
    folder = HERE / "notes/data_zh"
    flags = flags_of({f"--{flag}": str(folder / f"{flag}.jsonl") for flag in ppo.OWN_DATA},
                     [f"--{flag}" for flag in ppo.OWN_DATA])
    cfg = small_config(*flags)
    own = read_own(cfg)
    assert all(len(lines) > 10 for lines in own.values())
    ppo.load_data(own, cfg)


def test_long_prompts_and_a_byte_order_mark_are_no_mistake(tmp_path, capsys):
    lines = [line | {"prompt": f"{i} and so on. " * 999} for i, line in enumerate(TEN)]
    path = tmp_path / "long.jsonl"
    path.write_text(jsonl(*lines), encoding="utf-8-sig")
    ppo.main([*TINY, "--preferences", str(path), "--out", str(tmp_path / "run")])
    assert "10 of 10 lines cut to fit" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "run")) == 3


# ---- Reading a line ------------------------------------------------------------------------------
@pytest.mark.parametrize("ranked", [False, True])
def test_a_preference_without_prompt_is_split_at_a_word(ranked, tmp_path):
    """As in HH-RLHF: the common beginning ends in "I", which is a part of "It" in one of them."""
    talk = "\n\nHuman: Hello there\n\nAssistant: I"
    texts = [talk + " think so.", talk + "t is late."]
    line = {"ranked": texts} if ranked else dict(zip(["chosen", "rejected"], texts))
    [line] = ppo.read_jsonl(write_jsonl(tmp_path / "hh.jsonl", [line]), "preferences")
    prompt = "\n\nHuman: Hello there\n\nAssistant: "
    assert line.replies == [ppo.Reply(prompt, "I think so.", True),
                       ppo.Reply(prompt, "It is late.", True)]


def test_without_a_common_beginning_the_prompt_is_empty_and_not_in_all_lines(tmp_path):
    pairs = [{"chosen": "Yes.", "rejected": "Never."}, {"chosen": "Q: a", "rejected": "Q: b"}]
    first, second = ppo.read_jsonl(write_jsonl(tmp_path / "pairs.jsonl", pairs), "preferences")
    assert first.replies == [ppo.Reply("", "Yes.", True), ppo.Reply("", "Never.", True)]
    assert second.replies == [ppo.Reply("Q: ", "a", True), ppo.Reply("Q: ", "b", True)]
    with pytest.raises(ppo.UserError, match="no line has a prompt: chosen and rejected begin alike"):
        ppo.read_jsonl(write_jsonl(tmp_path / "pairs.jsonl", pairs[:1]), "preferences")


# ---- Cutting what is too long --------------------------------------------------------------------
class HalfWords:
    """A tokenizer whose tokens are half words of two letters."""

    def __call__(self, text):
        self.input_ids = []
        for word in text.split():
            self.input_ids += [half for half in (word[:2], word[2:]) if half]
        return self


@pytest.mark.parametrize("room, keep_end, expected", [
    (100, False, "One two three. Four five.\n\nSix seven. Eight nine"),
    (16, False, "One two three. Four five.\n\n"),
    (8, False, "One two three. "),
    (4, False, "One two "),
    (1, False, "On"),
    (16, True, "Six seven. Eight nine"),
    (5, True, "Eight nine"),
    (2, True, "nine")])
def test_long_text_is_cut_at_a_paragraph_else_a_sentence_else_a_word(room, keep_end, expected):
    text = "One two three. Four five.\n\nSix seven. Eight nine"
    assert ppo.cut(text, room, HalfWords(), keep_end) == expected


def test_no_text_is_longer_than_its_room_and_a_cut_reply_has_no_eos(world):
    """Prompts keep their end, replies their beginning."""
    tokenizer, actor, *_ = world
    rng, cfg = random.Random(0), small_config("--max_new_tokens", "20")
    text = "".join(rng.choice("abc é 天空。\n.! ") for _ in range(4000))
    lines = []
    for start in range(0, 1500, 40):
        prompt = text[start:1500 + start % 700]
        replies = [text[b:b + rng.randrange(60)] + "x" for b in (start + 1, start + 2)]
        lines.append(as_line(ppo.Reply(prompt, reply, True) for reply in replies))
    short = ppo.shorten(lines, actor, cfg)
    assert len(short) == len(lines)
    finished = set()
    for line, before in zip(short, lines):
        for reply, old in zip(line.replies, before.replies):
            assert len(tokenizer(reply.prompt).input_ids) <= 256 - 20
            assert len(tokenizer(reply.text).input_ids) <= 19
            assert old.prompt.endswith(reply.prompt) and old.text.startswith(reply.text)
            assert reply.finished == (reply.text == old.text)
            finished.add(reply.finished)
    assert finished == {True, False}


def test_a_very_long_prompt_keeps_its_end_and_a_very_long_reply_its_beginning(world):
    text = " ".join(str(i) for i in range(20_000))
    [line] = ppo.shorten([as_line([ppo.Reply(text, text, True)])], world[1], small_config())
    [reply] = line.replies
    assert reply.prompt.endswith(" 19998 19999") and reply.text.startswith("0 1 2 ")
    assert len(world[0](reply.prompt).input_ids) > 200


def test_replies_that_became_equal_are_no_ranking_any_more(world):
    same = [ppo.Reply("Hi\n", "very " * 40 + end, True) for end in ("good", "bad")]
    different = [ppo.Reply("Hi\n", end + " very" * 40, True) for end in ("good", "bad")]
    [line] = ppo.shorten([as_line(same), as_line(different)], world[1], small_config())
    assert [reply.text[:3] for reply in line.replies] == ["goo", "bad"]


@pytest.mark.parametrize("word", [
    "one two.\n", "天", *(pytest.param(word, marks=slow) for word in ("word ", "w", " "))])
def test_a_line_of_ten_megabytes_is_cut_within_seconds(word, tmp_path, monkeypatch):
    text = word * (10_000_000 // len(word.encode()))
    line = {"prompt": text + "?", "completion": text, "chosen": "Good. " + text,
            "rejected": "Bad. " + text}
    path = write_jsonl(tmp_path / "long.jsonl", [line, *TEN])

    def until_here(cfg):
        raise ppo.UserError("until here")

    monkeypatch.setattr(ppo, "open_folder", until_here)
    start = time.process_time()
    with pytest.raises(ppo.UserError, match="until here"):
        ppo.main([*TINY, "--demos", path, "--preferences", path])
    assert time.process_time() - start < 8
