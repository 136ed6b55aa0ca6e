"""Small functions for more than one file of tests."""
import copy
import json
import os

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import ppo_rlhf as ppo
from test_ppo_rlhf import read_metrics

# The environment of a program that a test starts: two threads would wait for each other.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}

# Ten lines that can be the file of --prompts, --demos and --preferences.
TEN = [{"prompt": f"Question {i}?\n", "completion": "Yes.", "chosen": "Good.", "rejected": "Bad."}
       for i in range(10)]


def jsonl(*lines):
    """Dicts as the text of a JSONL file."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write_jsonl(path, lines):
    path.write_text(jsonl(*lines), encoding="utf-8")
    return str(path)


def read_jsonl(folder, flag, *lines, tokenizer=None):
    """What the script reads from these lines."""
    return ppo.read_jsonl(write_jsonl(folder / f"{flag}.jsonl", lines), flag, tokenizer)


def with_chat_template(tokenizer, beginning=""):
    """<user>Hello<assistant>Hello!<eos>"""
    tokenizer.chat_template = beginning + (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    return tokenizer


def save_chat_model(folder, tokenizer):
    """A small model with a chat template, as from a hub."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_layer=1, n_embd=32, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    with_chat_template(copy.deepcopy(tokenizer)).save_pretrained(folder)
    return str(folder)


def snapshot(*folders):
    """All files and folders below these folders, with what they contain."""
    contents = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix != ".pyc" and path.name != "__pycache__":
                contents[path] = path.read_bytes() if path.is_file() else None
    return contents


def same_results(a, b):
    """Two runs ended alike, bit for bit. Only the seconds may differ."""
    assert read_metrics(a) == read_metrics(b)
    for name in ["pretrain", "sft", "reward_model", "policy"]:
        for file in ["model.safetensors", "heads.safetensors"]:
            assert (a / name / file).read_bytes() == (b / name / file).read_bytes(), (name, file)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (a, b)]
    for report in reports:
        del report["seconds"]
    assert reports[0] == reports[1]


def read_config(out):
    return json.loads((out / "config.json").read_text())


def gradients_of_one_update(actor, rollout, cfg):
    """The gradients that update_policy leaves in a copy of the actor. The weights do not move."""
    actor = copy.deepcopy(actor)
    still = torch.optim.SGD(actor.parameters(), lr=0.0)
    ppo.update_policy(actor, still, rollout, cfg)
    return [parameter.grad for parameter in actor.parameters() if parameter.grad is not None]
