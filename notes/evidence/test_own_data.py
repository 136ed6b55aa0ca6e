"""Your own data: files of prompts, demonstrations and preferences, conversations, columns for the
reward function, and texts that are too long."""
import copy
import json
import math
import random
import time

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import ppo_rlhf as ppo
from helpers import TEN, jsonl, read_jsonl, save_chat_model, with_chat_template, write_jsonl
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
    assert shown.count("the reward model learns from the built-in world, and knows nothing") == 1
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["reward_model"] == {"accuracy": None, "correlation": None}


@pytest.mark.parametrize("flags, warned", [
    ([], True), (["--reward", "rewards.py:length"], False), (["--preferences"], False)])
def test_a_warning_says_that_the_reward_model_does_not_know_own_prompts(
        flags, warned, own_files, capsys):
    if flags == ["--preferences"]:
        flags = flags_of(own_files, flags)
    cfg = small_config(*flags, *flags_of(own_files, ["--prompts"]))
    ppo.load_data(read_own(cfg), cfg)
    assert ("knows nothing of your prompts" in capsys.readouterr().out) == warned


def test_prompts_of_the_world_in_a_file_of_their_own_bring_no_warning(tmp_path, capsys):
    lines = [{"prompt": prompt} for prompt in list(ppo.WORLD_PROMPTS)[:22]]
    cfg = small_config("--prompts", write_jsonl(tmp_path / "some.jsonl", lines))
    ppo.load_data(read_own(cfg), cfg)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("mark, warned", [("{{ eos_token }}\n", False), ("<end>", True)])
def test_a_chat_template_that_does_not_end_a_reply_with_eos_is_named_once(
        mark, warned, world, tmp_path, capsys):
    tokenizer = with_chat_template(copy.deepcopy(world[1].tokenizer))
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", mark)
    lines = [{"prompt": [{"role": "user", "content": word}]} for word in ("a", "b")]
    cfg = small_config("--prompts", write_jsonl(tmp_path / "chat.jsonl", lines))
    ppo.read_own_data(tokenizer, cfg)
    assert capsys.readouterr().out.count("ends a reply with") == warned


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


@pytest.mark.parametrize("texts, prompt", [
    (["问：说一种颜色。答：红色很好。", "问：说一种颜色。答：不说。"], "问：说一种颜色。答："),
    (["问：你好吗？答：我很好。", "问：你好吗？答：我不好。"], "问：你好吗？答："),  # both begin with 我
    (["问：你好吗？答：我很好。谢谢。", "问：你好吗？答：我很好。再见。"], "问：你好吗？答："),
    (["今天天气怎么样？很好，出去走走吧。", "今天天气怎么样？很差。"], "今天天气怎么样？"),
    (["用户：你好\n助手：你好！\n用户：再见\n助手：再见。", "用户：你好\n助手：你好！\n用户：再见\n助手：再说。"],
     "用户：你好\n助手：你好！\n用户：再见\n助手："),
    (["\n\nHuman: Hi\n\nAssistant: I am fine.", "\n\nHuman: Hi\n\nAssistant: I am ill."],
     "\n\nHuman: Hi\n\nAssistant: "),
    (["\n\nHuman: Hi\n\nAssistant: A: no\n\nHuman: Ho\n\nAssistant: Yes",
      "\n\nHuman: Hi\n\nAssistant: A: no\n\nHuman: Ho\n\nAssistant: Never"],
     "\n\nHuman: Hi\n\nAssistant: A: no\n\nHuman: Ho\n\nAssistant: "),
    (["What is it? A dog.", "What is it? A door."], "What is it? A "),
    (["Human: Hi! How are you?", "Human: Hi! How about it?"], "Human: Hi! How "),  # of one speaker
    (["Two lines.\nHow are you?", "Two lines.\nHow about it?"], "Two lines.\nHow "),
    (["Yes.", "Yellow."], "")])
def test_the_common_beginning_ends_at_the_last_role_else_after_a_word_or_a_chinese_sentence(
        texts, prompt, tmp_path):
    fine = {"chosen": "Q: a", "rejected": "Q: b"}  # one line at least must have a prompt
    line = {"chosen": texts[0], "rejected": texts[1]}
    line, _ = ppo.read_jsonl(write_jsonl(tmp_path / "hh.jsonl", [line, fine]), "preferences")
    assert line.replies == [ppo.Reply(prompt, text[len(prompt):], True) for text in texts]


@pytest.mark.parametrize("flag", ["preferences", "demos"])
def test_a_prompt_that_is_given_and_repeated_in_all_replies_is_taken_off(flag, tmp_path):
    """If one reply does not repeat it, those that do are replies that happen to begin so."""
    names = ["completion"] if flag == "demos" else ["chosen", "rejected"]
    lines = [{"prompt": f"Say {i}.\n"} | {name: f"Say {i}.\n{name}" for name in names}
             for i in range(3)]
    replies = [line.replies for line in read_jsonl(tmp_path, flag, *lines)]
    assert replies == [[ppo.Reply(f"Say {i}.\n", name, True) for name in names] for i in range(3)]
    lines[2][names[-1]] = "Something else."
    assert [[reply.text for reply in line.replies] for line in read_jsonl(tmp_path, flag, *lines)
            ] == [[line[name] for name in names] for line in lines]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blank_lines_do_not_count_and_are_counted_in_the_numbers_of_lines(newline, tmp_path):
    rows = ['{"prompt": "a"}', "", "  \t", '{"prompt": "b\u2028c"}', '{"text": "d"}', "", ""]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(newline.join(rows[:4] + rows[5:]).encode())
    assert [line.replies for line in ppo.read_jsonl(str(path), "prompts")] == [
        [ppo.Reply("a", "", True)], [ppo.Reply("b\u2028c", "", True)]]
    path.write_bytes(newline.join(rows).encode())
    with pytest.raises(ppo.UserError, match="line 5: its fields are text, but --prompts needs"):
        ppo.read_jsonl(str(path), "prompts")


def test_pairs_without_a_difference_and_empty_demonstrations_are_left_out_and_counted(tmp_path,
                                                                                      capsys):
    lines = [*TEN[:3], TEN[3] | {"rejected": "Good.", "completion": ""}, *TEN[4:]]
    for flag in ["preferences", "demos"]:
        read = read_jsonl(tmp_path, flag, *lines)
        assert [line.replies[0].prompt for line in read] == [
            f"Question {i}?\n" for i in range(10) if i != 3]
        assert f"--{flag}: 1 of 10 lines left out: they have no" in capsys.readouterr().out
    assert len(read_jsonl(tmp_path, "prompts", *lines)) == 10
    read_jsonl(tmp_path, "preferences", *TEN)
    assert "left out" not in capsys.readouterr().out


# ---- EOS and BOS that are written out ------------------------------------------------------------
@pytest.mark.parametrize("text, rest", [
    ("Yes.<eos>", "Yes."), ("Yes.<eos>\n", "Yes."), ("Yes.", "Yes."), ("Yes.\n", "Yes.\n"),
    ("A <eos> is a token.", "A <eos> is a token.")])
def test_an_eos_that_ends_a_reply_as_text_is_taken_off_and_one_token_is_there(text, rest, world):
    tokenizer, actor, *_ = world
    [line] = ppo.shorten([as_line([ppo.Reply("Say it.\n", text, True)])], actor,
                         small_config("--max_new_tokens", "40"))
    assert line.replies == [ppo.Reply("Say it.\n", rest, True)]
    _, _, [ids], _ = ppo.encode(actor, line.replies)
    assert ids.tolist() == [*tokenizer(rest).input_ids, tokenizer.eos_token_id]


def test_an_eos_as_text_is_no_difference_between_two_replies(world):
    pair = [ppo.Reply("Hi\n", text, True) for text in ("Yes.<eos>", "Yes.")]
    [line] = ppo.shorten([as_line(pair)], world[1], small_config())
    assert not ppo.is_usable(line, "preferences")


def beginning_with_bos(tokenizer, adds_it):
    """A copy that knows <s>, and puts it before every text or does not."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds_it:
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    assert (tokenizer("a").input_ids[0] == tokenizer.bos_token_id) == adds_it
    return tokenizer


@pytest.mark.parametrize("adds_it", [True, False])
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_a_prompt_that_begins_with_bos_as_text_has_one_bos(kind, adds_it, world, tmp_path):
    """The tokenizer's or, if it adds none, that of the text. A chat template writes one, too."""
    actor = copy.copy(world[1])
    actor.tokenizer = with_chat_template(beginning_with_bos(world[0], adds_it),
                                         "{{ bos_token }}" if kind == "messages" else "")
    prompt = "<s>Hi" if kind == "text" else [{"role": "user", "content": "Hi"}]
    lines = read_jsonl(tmp_path, "prompts", {"prompt": prompt}, tokenizer=actor.tokenizer)
    [line] = ppo.shorten(lines, actor, small_config())
    [ids], _ = ppo.encode_prompts(actor, [line.replies[0].prompt])
    bos = actor.tokenizer.bos_token_id
    assert ids[0] == bos and ids.tolist().count(bos) == 1
    shown = actor.tokenizer.decode(ids)
    assert shown == ("<s>Hi" if kind == "text" else "<s><user>Hi<assistant>")


# ---- Conversations -------------------------------------------------------------------------------
def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


HI, YES, NO = user("Hi"), assistant("Yes."), assistant("No.")
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def chat(world):
    """The tokenizer of a model that was trained to chat."""
    return with_chat_template(copy.deepcopy(world[0]))


CONVERSATIONS = {
    "prompts": [{"prompt": [HI]}],
    "demos": [{"messages": [HI, YES]}, {"prompt": [HI], "completion": [YES]},
              {"prompt": [HI], "completion": "Yes."}, {"prompt": "Hi", "completion": [YES]},
              {"prompt": [HI], "completion": [HI, YES]}],
    "preferences": [{"prompt": [HI], "chosen": [YES], "rejected": [NO]},
                    {"prompt": [HI], "chosen": "Yes.", "rejected": "No."},
                    {"prompt": [HI], "ranked": [[YES], "No."]},
                    {"prompt": "Hi", "chosen": [YES], "rejected": [NO]},
                    {"prompt": "Hi", "chosen": [HI, YES], "rejected": [HI, NO]},
                    {"chosen": [HI, YES], "rejected": [HI, NO]}]}


@pytest.mark.parametrize("flag, line", [
    pytest.param(flag, line, id=f"{flag} {json.dumps(line)}")
    for flag, lines in CONVERSATIONS.items() for line in lines])
def test_messages_become_texts_by_the_chat_template_of_the_model(flag, line, chat, world, tmp_path):
    """However the conversation is written down, prompt and replies are the same."""
    actor = copy.copy(world[1])
    actor.tokenizer = chat
    [read] = ppo.shorten(read_jsonl(tmp_path, flag, line, tokenizer=chat), actor, small_config())
    texts = {"prompts": [""], "demos": ["Yes."], "preferences": ["Yes.", "No."]}[flag]
    assert read.replies == [ppo.Reply("<user>Hi<assistant>", text, True) for text in texts]
    assert read.messages == [HI] and read.fields == line


@pytest.mark.parametrize("flag, line, prompt, texts", [
    ("demos", {"messages": [SYSTEM, HI, NO, user("Why?"), YES]},
     "<system>Be brief.<user>Hi<assistant>No.<eos><user>Why?<assistant>", ["Yes.<eos>"]),
    ("demos", {"messages": [NO, HI, YES]}, "<assistant>No.<eos><user>Hi<assistant>", ["Yes.<eos>"]),
    ("preferences", {"prompt": [SYSTEM, HI, NO, HI], "chosen": [YES], "rejected": [NO]},
     "<system>Be brief.<user>Hi<assistant>No.<eos><user>Hi<assistant>", ["Yes.<eos>", "No.<eos>"]),
    ("prompts", {"prompt": [HI, NO, HI]}, "<user>Hi<assistant>No.<eos><user>Hi<assistant>", [""])])
def test_only_the_last_message_of_a_long_conversation_is_the_reply(flag, line, prompt, texts, chat,
                                                                   tmp_path):
    [read] = read_jsonl(tmp_path, flag, line, tokenizer=chat)
    assert read.replies == [ppo.Reply(prompt, text, True) for text in texts]


def test_a_reply_of_messages_is_without_its_prompt_also_beside_a_line_of_plain_text(chat, tmp_path):
    lines = [{"messages": [HI, YES]}, {"prompt": "How are you?", "completion": " Fine."}]
    read = read_jsonl(tmp_path, "demos", *lines, tokenizer=chat)
    assert [line.replies[0].text for line in read] == ["Yes.<eos>", " Fine."]


@pytest.mark.parametrize("flag, line, why", [
    ("preferences", {"chosen": [HI, YES], "rejected": [user("Ho"), NO]}, "different conversations"),
    ("preferences", {"prompt": [HI], "chosen": [YES], "rejected": [user("Ho"), NO]}, "different"),
    ("preferences", {"prompt": "Ho", "chosen": [HI, YES], "rejected": [HI, NO]}, "different"),
    ("demos", {"messages": [HI]}, "assistant"), ("demos", {"messages": [YES]}, "user"),
    ("demos", {"messages": [HI, YES, user("Bye.")]}, "assistant"),
    ("demos", {"messages": [HI, user("Bye.")]}, "its last message is not of the assistant"),
    ("demos", {"messages": []}, "empty|message"),
    ("demos", {"prompt": [HI], "completion": []}, "empty|message"),
    ("demos", {"messages": "Hello there friend"}, "message"),
    ("prompts", {"prompt": []}, "at least one message"), ("prompts", {"prompt": ["Hi"]}, "role"),
    ("prompts", {"prompt": [{"from": "human", "value": "Hi"}]}, "role"),
    ("prompts", {"prompt": [{"role": "user"}]}, "content"),
    ("prompts", {"prompt": [user(None)]}, "content"),
    ("prompts", {"prompt": [user([{"type": "text", "text": "Hi"}])]}, "content")],
    ids=lambda x: json.dumps(x) if isinstance(x, dict) else None)
def test_messages_that_are_no_conversation_are_refused(flag, line, why, chat, tmp_path):
    """Many chat templates print nothing or "None" for a field that is missing."""
    with pytest.raises(ppo.UserError, match=f"line 1: .*({why})") as error:
        read_jsonl(tmp_path, flag, line, tokenizer=chat)
    assert "Error:" not in str(error.value)  # its own words, not Python's


@pytest.mark.parametrize("known", [False, True])
def test_messages_need_a_model_with_a_chat_template(known, world, tmp_path):
    with pytest.raises(ppo.UserError, match="line 1: these are messages, and the model has no"):
        read_jsonl(tmp_path, "prompts", {"prompt": [HI]}, tokenizer=world[0] if known else None)


def test_a_template_that_writes_the_prompt_in_another_way_beside_a_reply_is_refused(chat, tmp_path):
    """The reply could not be told from the prompt."""
    counting = with_chat_template(copy.deepcopy(chat), "{{ messages | length }}")
    with pytest.raises(ppo.UserError, match="line 1: the chat template changes the prompt"):
        read_jsonl(tmp_path, "demos", {"messages": [HI, YES]}, tokenizer=counting)


def test_conversations_run_the_whole_pipeline(world, tmp_path):
    base, lines = save_chat_model(tmp_path / "chat", world[0]), []
    for i in range(10):
        asked = [user(f"Question {i}?")]
        lines.append({"prompt": asked, "completion": [YES], "chosen": [YES], "rejected": [NO]})
    path, out = write_jsonl(tmp_path / "talk.jsonl", lines), tmp_path / "run"
    files = ["--prompts", path, "--demos", path, "--preferences", path]
    ppo.main([*TINY, "--model", base, *files, "--out", str(out)])
    prompts = {line["prompt"] for line in read_xray(out)}
    assert prompts and prompts <= {f"<user>Question {i}?<assistant>" for i in range(10)}
    assert len(read_metrics(out)) == 3


# ---- Columns for the reward function -------------------------------------------------------------
SUMS = [{"prompt": f"{a} + {b} = ", "answer": str(a + b), "level": a} for a in range(4)
        for b in range(5)]
TRL_REWARD = """
def reward(completions, answer, **kwargs):
    texts = [text[0]["content"] if isinstance(text, list) else text for text in completions]
    return [float(wanted in text) for text, wanted in zip(texts, answer)]
"""


def read_xray(out):
    return [json.loads(row) for row in (out / "xray.jsonl").read_text().splitlines()]


def test_a_function_written_for_trl_gets_the_right_answer_for_each_reply(world, tmp_path):
    """Four replies to each prompt, shuffled prompts, held-out prompts, and replies that are equal.

    The function sees the answer "3" for "1 + 2 = ". So the scores tell whether each reply was
    compared with the answer to its own prompt.
    """
    (tmp_path / "mine.py").write_text(TRL_REWARD + """
def checked(prompts, completions, answer, level, replies, finished, **kwargs):
    assert sorted(kwargs) == ["prompt"] and kwargs["prompt"] == prompts and replies == completions
    assert len(prompts) == len(completions) == len(answer) == len(level) == len(finished)
    for prompt, wanted, a in zip(prompts, answer, level):
        first, second = prompt.removesuffix(" = ").split(" + ")
        assert int(first) + int(second) == int(wanted) and a == int(first)
    return reward(completions, answer)
""")
    prompts = write_jsonl(tmp_path / "sums.jsonl", SUMS)
    demos = write_jsonl(tmp_path / "demos.jsonl", [
        line | {"completion": ["1 2 3", "4 5 6"][i % 2]} for i, line in enumerate(SUMS)])
    out = tmp_path / "run"
    ppo.main([*TINY, "--prompts", prompts, "--demos", demos, "--replies_per_prompt", "4",
              "--sft_steps", "60", "--missing_eos_penalty", "0", "--out", str(out),
              "--reward", f"{tmp_path}/mine.py:checked"])
    answers, scores = {line["prompt"]: line["answer"] for line in SUMS}, set()
    for line in read_xray(out):
        assert line["score"] == (answers[line["prompt"]] in line["reply"])
        scores.add(line["score"])
    assert scores == {0, 1}


@pytest.mark.parametrize("as_messages", [False, True])
def test_columns_follow_their_replies_in_any_order_and_number(as_messages, chat, tmp_path):
    lines = SUMS
    if as_messages:
        lines = [line | {"prompt": [user(line["prompt"])]} for line in SUMS]
    own = dict.fromkeys(ppo.OWN_DATA, [])
    own["prompts"] = read_jsonl(tmp_path, "prompts", *lines, tokenizer=chat)
    seen = {}

    def reward(completions, answer, **kwargs):
        seen.update(kwargs, completions=completions, answer=answer)
        return [float(wanted) for wanted in answer]

    rng = random.Random(0)
    replies, expected = [], []
    for line, number in zip(own["prompts"], [0, 3, 1, 2] * 5):
        for text in ["x", "y", "x", "z"][:number]:
            replies.append(ppo.Reply(line.replies[0].prompt, text, text != "z"))
    rng.shuffle(replies)
    answer_to = {line.replies[0].prompt: line.fields["answer"] for line in own["prompts"]}
    expected = [float(answer_to[reply.prompt]) for reply in replies]
    assert ppo.ask_score_fn(ppo.with_columns(reward, own), replies) == expected
    asked = list(dict.fromkeys(replies))  # each reply once
    assert len(asked) < len(replies)
    assert seen["answer"] == [answer_to[reply.prompt] for reply in asked]
    assert seen["replies"] == [reply.text for reply in asked]
    assert seen["finished"] == [reply.finished for reply in asked]
    fields_of = {line.replies[0].prompt: line.fields for line in own["prompts"]}
    for name in ["prompts", "prompt"]:
        assert seen[name] == [fields_of[reply.prompt]["prompt"] for reply in asked]
    assert seen["completions"] == [[assistant(reply.text)] if as_messages else reply.text
                                   for reply in asked]


def test_columns_are_those_of_the_prompts_file_and_none_where_a_line_has_none(tmp_path):
    """A prompt of the demonstrations has no answer, and a reward function is told so."""
    lines = [{"prompt": "a", "answer": 1}, {"prompt": "b"}]
    own = {"prompts": read_jsonl(tmp_path, "prompts", *lines),
           "demos": read_jsonl(tmp_path, "demos", {"prompt": "c", "completion": "d", "source": 2}),
           "preferences": []}
    seen = {}

    def reward(**given):
        seen.update(given)
        return [0.0] * 3

    replies = [ppo.Reply(prompt, "x", True) for prompt in "bca"]
    ppo.ask_score_fn(ppo.with_columns(reward, own), replies)
    assert seen == {"prompts": ["b", "c", "a"], "completions": ["x"] * 3, "replies": ["x"] * 3,
                    "finished": [True] * 3, "answer": [None, None, 1], "prompt": ["b", "c", "a"]}


def test_one_prompt_with_two_answers_is_refused(tmp_path):
    """The script tells prompts apart by their text: one of the answers would be lost."""
    path = write_jsonl(tmp_path / "sums.jsonl", [*SUMS, SUMS[3] | {"answer": "17"}])
    (tmp_path / "mine.py").write_text(TRL_REWARD)
    with pytest.raises(ppo.UserError, match="answer"):
        ppo.main([*TINY, "--prompts", path, "--reward", f"{tmp_path}/mine.py:reward",
                  "--cycles", "0", "--out", str(tmp_path / "run")])


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
    lines = ppo.shorten([as_line(same), as_line(different)], world[1], small_config())
    assert [ppo.is_usable(line, "preferences") for line in lines] == [False, True]
    assert [reply.text[:3] for reply in lines[1].replies] == ["goo", "bad"]


@slow
@pytest.mark.parametrize("word", ["one two.\n", "天", "word ", "w", " "])
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


def test_what_a_users_split_of_the_worlds_prompts_holds_out_is_in_no_text(tmp_path):
    """The world's prompts in another order are split in another way."""
    path = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": prompt}) for prompt in reversed(list(ppo.WORLD_PROMPTS))]
    path.write_text("\n".join(rows))
    cfg = ppo.Config(prompts=str(path))
    data = ppo.load_data(ppo.read_own_data(None, cfg), cfg)
    held_out = {*data.prompts["validation"], *data.prompts["test"]}
    assert len(held_out) == 28
    assert not held_out & {reply.prompt for reply in data.texts + data.demos}
    assert not held_out & set(ppo.world_to_train_on(data.prompts))


def test_a_shorter_limit_moves_no_prompt_from_training_to_the_test(tmp_path, world, capsys):
    """Lines that become useless still count when the prompts are divided."""
    rows = []
    for i in range(66):
        beginning = "very " * 12 if i % 7 == 0 else ""  # with a small limit these are equal
        rows.append({"prompt": f"Question {i}?\n", "chosen": beginning + "good",
                     "rejected": beginning + "bad"})
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    prompts = []
    for limit in (40, 8):
        cfg = ppo.Config(preferences=str(path), max_new_tokens=limit)
        own = ppo.read_own_data(None, cfg)
        own = {flag: ppo.shorten(lines, world[1], cfg) for flag, lines in own.items()}
        prompts.append(ppo.load_data(own, cfg).prompts)
    assert prompts[0] == prompts[1]
    assert "10 of 66 lines left out" in capsys.readouterr().out


def test_an_empty_best_reply_is_not_imitated(tmp_path):
    rows = [{"prompt": f"q{i}\n", "chosen": "" if i % 2 else "Yes.", "rejected": "No."}
            for i in range(20)]
    cfg = ppo.Config(preferences=str(write_jsonl(tmp_path / "pairs.jsonl", rows)))
    demos = ppo.load_data(ppo.read_own_data(None, cfg), cfg).demos
    assert demos and all(reply.text == "Yes." for reply in demos)


def test_a_demonstration_with_the_label_false_is_left_out(tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "Shut up.", "label": False}, *TEN]
    path = write_jsonl(tmp_path / "demos.jsonl", rows)
    lines = ppo.read_jsonl(str(path), "demos")
    assert "Shut up." not in [line.replies[0].text for line in lines] and len(lines) == len(TEN)
    assert "1 of 11 lines left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["question", "instruction", "query"])
def test_a_prompt_by_another_name_is_not_thrown_away(name, tmp_path):
    row = {name: "Why?", "chosen": "The light is bent.", "rejected": "The sky is."}
    path = write_jsonl(tmp_path / "pairs.jsonl", [row] * 3)
    with pytest.raises(ppo.UserError, match=f"its prompt is called {name}"):
        ppo.read_jsonl(str(path), "preferences")


def test_lines_without_a_common_beginning_are_counted(tmp_path, capsys):
    rows = [{"chosen": f"Q: {i}? A: yes", "rejected": f"Q: {i}? A: no"} for i in range(3)]
    rows += [{"chosen": "yes", "rejected": "no"}]
    ppo.read_jsonl(str(write_jsonl(tmp_path / "pairs.jsonl", rows)), "preferences")
    assert "1 of 4 lines have no prompt" in capsys.readouterr().out


def test_messages_whose_template_drops_the_question_are_refused(world):
    tokenizer = with_chat_template(copy.deepcopy(world[1].tokenizer))
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role in ['user', 'assistant'] %}"
        "<{{ message.role }}>{{ message.content }}{% endif %}{% endfor %}<assistant>")
    ends = {"role": "assistant", "content": "Yes."}
    for messages, complaint in [
            ([{"role": "user", "content": "Hi"}, ends], "its prompt ends with the assistant"),
            ([{"role": "stranger", "content": "Hello there"}], "leaves out the last message")]:
        with pytest.raises(ppo.UserError, match=complaint):
            ppo.render(messages, [""], tokenizer)


def test_a_template_that_opens_the_reply_with_a_mark_renders_prompts(world):
    """As DeepSeek-R1's: the prompt ends in <think>, and finished replies do not begin so."""
    tokenizer = with_chat_template(copy.deepcopy(world[1].tokenizer))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "add_generation_prompt %}<assistant>", "add_generation_prompt %}<assistant><think>")
    line = ppo.parse_line('{"prompt": [{"role": "user", "content": "Hi"}]}', "prompts", tokenizer)
    assert line.replies == [ppo.Reply("<user>Hi<assistant><think>", "", True)]
