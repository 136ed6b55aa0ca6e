"""Rewards and models of your own, bfloat16, and batches that are divided to save memory."""
import copy
import json
import math
import shutil
import sys
import types
from contextlib import nullcontext

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM,
                          BertForSequenceClassification, BloomConfig, GenerationConfig, GPT2Config,
                          GPT2ForSequenceClassification, GPT2Model, Lfm2Config, LlamaConfig,
                          OPTConfig, PreTrainedTokenizerFast, Qwen2Config, RobertaConfig,
                          RobertaForSequenceClassification, T5Config, T5ForConditionalGeneration,
                          pipeline)

import ppo_rlhf as ppo
from helpers import TEN, gradients_of_one_update, read_config, snapshot, write_jsonl
from test_ppo_rlhf import NAN, TINY, random_batch, read_metrics, small_actor, small_config

# ==================================================================================================
# A reward function of your own
# ==================================================================================================
REPLIES = [ppo.Reply("Hi\n", "Yes.", True), ppo.Reply("Ho\n", "No", False)]
GIVEN = {"prompts": ["Hi\n", "Ho\n"], "completions": ["Yes.", "No"], "finished": [True, False]}


def test_a_function_in_a_file_is_a_reward(run, tmp_path):
    (tmp_path / "my.py").write_text(
        "def length(completions):\n    return [len(text) / 10 for text in completions]\n")
    out = tmp_path / "run"
    ppo.main([*TINY, "--init_from", str(run), "--reward", f"{tmp_path}/my.py:length",
              "--out", str(out)])
    assert not (out / "reward_model").exists()
    assert all(math.isfinite(float(row["reward"])) for row in read_metrics(out))
    report = json.loads((out / "report.json").read_text())
    assert math.isfinite(report["ppo"]["reward"])


@pytest.mark.parametrize("text, place", [
    ("import json\ndef score(completions):\n    return json.loads('{')\n", "(my_own.py, line 3)"),
    ("x = 1\nopen('no such file')\n", "(my_own.py, line 2)")])
def test_a_mistake_in_a_reward_is_named_with_the_line_of_the_users_file(text, place, tmp_path):
    (tmp_path / "my_own.py").write_text(text)
    with pytest.raises(ppo.UserError) as error, ppo.modules_forgotten():
        score_fn = ppo.load_reward(small_config("--reward", f"{tmp_path}/my_own.py:score"))
        ppo.ask_score_fn(score_fn, [ppo.Reply("a", "b", True)])
    assert place in str(error.value) and "is not model" not in str(error.value)


def test_a_reward_in_the_program_that_calls_main_does_not_run_it_again(tmp_path, monkeypatch):
    path = tmp_path / "my_ppo.py"
    path.write_text("raise SystemExit('it runs a second time')\n")
    program = types.ModuleType("__main__")
    program.__file__ = str(path)
    program.score = lambda completions: [2.0] * len(completions)
    monkeypatch.setitem(sys.modules, "__main__", program)
    score_fn = ppo.load_reward(small_config("--reward", f"{path}:score"))
    assert ppo.ask_score_fn(score_fn, [ppo.Reply("a", "b", True)]) == [2.0]


@pytest.mark.parametrize("signature, names", [
    ("", []), ("prompts", ["prompts"]), ("completions", ["completions"]),
    ("finished", ["finished"]), ("prompts, completions", ["prompts", "completions"]),
    ("finished, prompts", ["prompts", "finished"]),
    ("finished, completions", ["completions", "finished"]),
    ("completions, finished, prompts", ["prompts", "completions", "finished"]),
    ("*, completions", ["completions"]), ("completions, weight=2.0", ["completions"]),
    ("**kwargs", ["prompts", "completions", "finished"]),
    ("prompts, **kwargs", ["prompts", "completions", "finished"])])
def test_a_reward_function_gets_the_arguments_that_it_names(signature, names):
    """In any order, always as lists; with **kwargs it gets all."""
    seen = {}
    source = f"def score({signature}):\n    seen.update(locals())\n    return [0.5, 2]\n"
    namespace = {"seen": seen}
    exec(source, namespace)
    assert ppo.ask_score_fn(namespace["score"], REPLIES) == [0.5, 2.0]
    seen.update(seen.pop("kwargs", {}))
    seen.pop("weight", None)
    assert seen == {name: GIVEN[name] for name in names}


class Judge:
    def __call__(self, completions):
        return [float(len(text)) for text in completions]


@pytest.mark.parametrize("score_fn", [
    Judge(), Judge().__call__, lambda completions: torch.tensor([4.0, 2.0]),
    lambda completions: (len(text) for text in completions)],
    ids=["object", "method", "tensor", "generator"])
def test_whatever_can_be_called_and_gives_numbers_is_a_reward_function(score_fn):
    assert ppo.ask_score_fn(score_fn, REPLIES) == [4.0, 2.0]


@pytest.mark.parametrize("signature", ["texts", "completions, texts", "prompt, completion",
                                       "completions, /", "*completions"])
def test_a_reward_function_with_other_names_is_one_line(signature):
    namespace = {}
    exec(f"def score({signature}):\n    return [len(completions[i]) for i in (0, 1)]\n", namespace)
    with pytest.raises(ppo.UserError, match="--reward failed.*'Yes.'.*(argument|index)") as error:
        ppo.ask_score_fn(namespace["score"], REPLIES)
    assert "\n" not in str(error.value)


def test_a_reply_that_occurs_twice_is_scored_once():
    """A reply is the same if prompt, text and end are the same."""
    asked = []

    def score(prompts, completions, finished):
        asked.append(list(zip(prompts, completions, finished)))
        return range(len(completions))

    yes, no = REPLIES
    cut_off, elsewhere = yes._replace(finished=False), yes._replace(prompt="Ho\n")
    replies = [yes, no, yes, cut_off, elsewhere, no]
    assert ppo.ask_score_fn(score, replies) == [0, 1, 0, 2, 3, 1]
    assert asked == [[tuple(reply) for reply in (yes, no, cut_off, elsewhere)]]


def test_an_error_of_the_reward_function_in_ppo_names_the_cycle(run, tmp_path):
    (tmp_path / "my.py").write_text(
        "batches = []\n"
        "def once(completions):\n"
        "    if len(completions) > 4:\n"  # an X-ray has four
        "        batches.append(completions)\n"
        "    if len(batches) == 2:\n"  # the first one is for the critic's first value
        "        raise KeyError('no such word')\n"
        "    return [1.0] * len(completions)\n")
    flags = ["--init_from", str(run), "--reward", f"{tmp_path}/my.py:once"]
    with pytest.raises(ppo.UserError, match=r"in PPO, cycle \d on replies.*no such word"):
        ppo.main([*TINY, *flags, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(("labels", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
def test_a_classifier_with_its_own_tokenizer_is_a_reward(world, labels, dtype, tmp_path):
    """Its last label counts. Of a text that is too long it sees the end: there is the reply.
    It computes in float32, also if it was saved in bfloat16: there many replies score the same."""
    tokenizer = copy.deepcopy(world[0])
    tokenizer.model_max_length = 64
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_layer=1, n_embd=16, n_head=2,
                        num_labels=labels, pad_token_id=tokenizer.pad_token_id)
    model = GPT2ForSequenceClassification(config).eval().to(dtype)
    model.save_pretrained(tmp_path / "judge")
    model = model.float()
    tokenizer.save_pretrained(tmp_path / "judge")
    score_fn = ppo.load_reward(small_config("--reward", str(tmp_path / "judge")))
    replies = [ppo.Reply(prompt, text, True) for prompt, text in [
        ("I feel sad.\n", "Call a friend."), ("Hello\n", "No."), ("Hello " * 99 + "\n", "No.")]]
    expected = []
    for reply in replies:
        ids = tokenizer(reply.prompt + reply.text).input_ids[-64:]
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).logits[0, -1].item())
    assert len(ids) == 64
    assert ppo.ask_score_fn(score_fn, replies) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_classifier_whose_tokenizer_names_no_limit_sees_as_much_as_it_has_positions(kind, world,
                                                                                     tmp_path):
    """RoBERTa cannot use the first ones of its positions: up to that of the padding."""
    tokenizer, sizes = world[0], dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, num_labels=1,
                                      vocab_size=len(world[0]), initializer_range=0.3)
    assert tokenizer.model_max_length > 1e9
    torch.manual_seed(0)
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(max_position_embeddings=64, **sizes))
    else:
        model = RobertaForSequenceClassification(RobertaConfig(
            max_position_embeddings=66, pad_token_id=tokenizer.pad_token_id, **sizes))
        assert tokenizer.pad_token_id == 1
    model.eval().save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    score_fn = ppo.load_reward(small_config("--reward", str(tmp_path / "judge")))
    for prompt in ["Hi\n", "Hello " * 99]:
        [score] = ppo.ask_score_fn(score_fn, [ppo.Reply(prompt, "No.", True)])
        ids = tokenizer(prompt + "No.").input_ids[-64:]
        with torch.no_grad():
            assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-4)
    assert len(ids) == 64


def test_the_reward_is_tried_on_the_longest_prompt_before_anything_is_written(tmp_path):
    lines = [line | {"prompt": line["prompt"] * (1 + 20 * (i == 4))} for i, line in enumerate(TEN)]
    path = write_jsonl(tmp_path / "prompts.jsonl", lines)
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions):\n"
        "    assert max(map(len, prompts)) < 200, 'too long for me'\n"
        "    return [0.0] * len(prompts)\n")
    before = snapshot(tmp_path)
    with pytest.raises(ppo.UserError, match="--reward failed on replies .*too long for me"):
        ppo.main([*TINY, "--prompts", path, "--reward", f"{tmp_path}/mine.py:short", "--out",
                  str(tmp_path / "run")])
    assert snapshot(tmp_path) == before


# ---- A folder as a reward ------------------------------------------------------------------------
def test_the_reward_model_of_a_run_scores_as_it_did_there(run):
    model = ppo.load_model(ppo.RewardModel, run / "reward_model", small_config())
    assert model.head[-1].weight.abs().max() > 0
    score_fn = ppo.load_reward(small_config("--reward", str(run / "reward_model")))
    replies = [ppo.Reply("I feel sad.\n", text, True) for text in ("Call a friend.", "No.")]
    scores = ppo.ask_score_fn(score_fn, replies)
    with torch.no_grad():
        assert scores == pytest.approx(model(*ppo.encode(model, replies)).tolist(), abs=1e-5)
    assert scores[0] != scores[1]


@pytest.mark.parametrize("kind, why", [
    ("a run's policy", "its head is that of an ActorCritic"),
    ("a language model", "no weights for score.weight"),
    ("a reward model without its head", "no weights for score.weight"),
    ("a classifier without its head", "no weights for .*classifier.*weight"),
    ("a whole run", "Unrecognized model")])
def test_a_folder_without_a_trained_head_is_no_reward(kind, why, run, world, tmp_path):
    """The library would make a random one, and PPO would learn to please it."""
    folder = tmp_path / "folder"
    if kind == "a run's policy":
        folder = run / "policy"
    elif kind == "a whole run":
        folder = run
    elif kind == "a language model":
        save_foreign_model(folder, "gpt2", world[0], "missing")
    elif kind == "a reward model without its head":
        shutil.copytree(run / "reward_model", folder)
        (folder / "heads.safetensors").unlink()
    else:
        BertForMaskedLM(BertConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=len(world[0]))).save_pretrained(folder)
        world[0].save_pretrained(folder)
    with pytest.raises(ppo.UserError, match=f"--reward {folder} is not .*: .*{why}") as error:
        ppo.load_reward(small_config("--reward", str(folder)))
    assert "\n" not in str(error.value)


# ---- A file as a module --------------------------------------------------------------------------
@pytest.fixture
def ask(tmp_path):
    """Load a reward and ask it, as main does: what it imports is forgotten afterwards."""
    def load_and_ask(reward):
        with ppo.modules_forgotten():
            score_fn = ppo.load_reward(small_config("--reward", f"{tmp_path}/{reward}"))
            return ppo.ask_score_fn(score_fn, REPLIES)
    return load_and_ask


def write_reward(folder, name, value, neighbour="helper.py"):
    """A reward that imports its value from a neighbour."""
    folder.mkdir(exist_ok=True)
    (folder / neighbour).parent.mkdir(exist_ok=True)
    (folder / neighbour).write_text(f"VALUE = {value}\n")
    module = neighbour.removesuffix(".py").split("/")[0]
    (folder / name).write_text(f"from {module} import VALUE\n\ndef score(completions):\n"
                               "    return [VALUE] * len(completions)\n")


@pytest.mark.parametrize("neighbour", ["helper.py", "package/__init__.py"])
def test_a_reward_file_imports_its_neighbours_and_the_next_run_those_of_its_own_folder(
        neighbour, ask, tmp_path):
    before = sys.path[:], set(sys.modules)
    for folder, value in [("one", 1.5), ("two", 12.5)]:
        write_reward(tmp_path / folder, "mine.py", value, neighbour)
        assert ask(f"{folder}/mine.py:score") == [value, value]
    assert sys.path == before[0]
    assert not {"mine", "helper", "package"} & (set(sys.modules) - before[1])


def test_a_reward_file_that_was_changed_is_loaded_anew_wherever_it_lies(ask, tmp_path, monkeypatch):
    """In a notebook, the folder of the file is often the one that Python imports from."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for value in ["1.5", "12.25"]:  # not equally long: Python looks at size and time of a file
        (tmp_path / "mine_in_path.py").write_text(
            f"def score(completions):\n    return [{value}] * len(completions)\n")
        assert ask("mine_in_path.py:score") == [float(value)] * 2
    sys.modules.pop("mine_in_path", None)


def test_a_reward_file_can_start_processes(ask, tmp_path):
    """They import it by its name, with its neighbours."""
    (tmp_path / "helper.py").write_text("FACTOR = 2.5\n")
    (tmp_path / "parallel.py").write_text("""
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from helper import FACTOR

def one(text):
    return FACTOR * len(text)

def score(completions):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return list(pool.map(one, completions))
""")
    assert ask("parallel.py:score") == [10, 5]


@pytest.mark.parametrize("name", ["random", "time", "ppo_rlhf"])
def test_a_reward_file_with_the_name_of_a_module_is_refused(name, ask, tmp_path):
    """Another one would be imported in its place, or it in place of another one."""
    (tmp_path / f"{name}.py").write_text("def score(completions): return [0.0, 0.0]\n")
    module = sys.modules[name]
    with pytest.raises(ppo.UserError, match="Python has a module of that name; rename it"):
        ask(f"{name}.py:score")
    assert sys.modules[name] is module


@pytest.mark.parametrize("body, why", [
    ("return {0: 1.0, 1: 2.0}", "dict|list"), ("return torch.zeros(2, 2)", "one element|scalar"),
    ("return [1j, 1j]", "real number"), ("return [10 ** 400, 0]", "too large"),
    ("return '12'", "real number"), ("sys.exit(0)", "SystemExit|exit")])
def test_what_is_no_list_of_numbers_is_one_line(body, why, ask, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"import sys, torch\n\ndef score(completions):\n    {body}\n")
    with pytest.raises(ppo.UserError, match=f"--reward failed.*({why})") as error:
        ask("mine.py:score")
    assert "\n" not in str(error.value)


def test_a_reward_function_that_turns_gradients_off_turns_them_off_for_itself_only():
    def score(completions):
        torch.set_grad_enabled(False)
        return [0.0] * len(completions)

    try:
        ppo.ask_score_fn(score, REPLIES)
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


# ---- What a reward function sees -----------------------------------------------------------------
TAGGED = "Let me think. <answer>Yes.</answer>"


def test_a_reward_sees_special_tokens_other_than_eos_and_padding(world, monkeypatch):
    """Answer tags are such. What the script decodes becomes the same tokens again."""
    actor = copy.copy(world[1])
    tokenizer = actor.tokenizer = copy.deepcopy(world[0])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    ids = tokenizer(TAGGED).input_ids
    assert tokenizer.convert_tokens_to_ids("</answer>") == ids[-1]
    row = torch.tensor([[*ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * 3]])
    mask = torch.arange(row.shape[1]).unsqueeze(0) <= len(ids)
    assert ppo.decode(tokenizer, row) == [TAGGED]
    monkeypatch.setattr(ppo, "generate", lambda *args: (row, mask))
    cfg = actor.cfg = small_config("--max_new_tokens", "40")
    rollout = ppo.sample_replies(actor, ["Hi\n"], cfg)
    assert rollout.replies == [ppo.Reply("Hi\n", TAGGED, True)]
    _, _, again, _ = ppo.encode(actor, rollout.replies)
    assert again.tolist() == [[*ids, tokenizer.eos_token_id]]


def test_the_score_of_a_reply_with_tags_counts_them_in_a_whole_run(world, tmp_path):
    """A model whose next token is always <answer>: 12 tokens, 12 points."""
    tokenizer = copy.deepcopy(world[0])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    lm = AutoModelForCausalLM.from_config(make_config("gpt2", vocab_size=len(tokenizer)))
    always(lm, {}, otherwise=tokenizer.convert_tokens_to_ids("<answer>"))
    lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "mine.py").write_text(
        "def tags(completions):\n    return [text.count('<answer>') for text in completions]\n")
    flags = ["--model", str(tmp_path / "base"), "--sft_steps", "0", "--cycles", "1"]
    ppo.main([*TINY, *flags, "--prompts", write_jsonl(tmp_path / "prompts.jsonl", TEN), "--reward",
              f"{tmp_path}/mine.py:tags", "--missing_eos_penalty", "0", "--out",
              str(tmp_path / "run")])
    [row] = read_metrics(tmp_path / "run")
    assert float(row["reward"]) == 12


# ==================================================================================================
# A model of your own
# ==================================================================================================
def make_config(architecture, **options):
    """The settings of a very small model. Where it can, it has two layers and dropout."""
    if architecture == "gpt2":
        return GPT2Config(n_positions=128, n_layer=1, n_embd=32, n_head=2, **options)
    if architecture == "opt":
        return OPTConfig(hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=128, dropout=0.5, **options)
    options.update(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                   num_attention_heads=2, max_position_embeddings=128)
    if architecture == "llama":
        return LlamaConfig(**options)
    if architecture == "qwen2":
        return Qwen2Config(num_key_value_heads=1, **options)
    return Lfm2Config(num_key_value_heads=1, layer_types=["conv", "full_attention"], **options)


ARCHITECTURES = ["gpt2", "llama", "qwen2", "opt", "lfm2"]


def save_foreign_model(folder, architecture, tokenizer, pad):
    """A model as from a hub. pad: "missing", "eos" (the same token), "neither" (no EOS either)."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else None
    tokenizer.eos_token = None if pad == "neither" else tokenizer.eos_token
    torch.manual_seed(0)
    config = make_config(architecture, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0,
                         pad_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("architecture, pad", [
    ("gpt2", "missing"), ("llama", "eos"), ("qwen2", "neither")])
def test_any_causal_language_model_runs_the_whole_pipeline(world, architecture, pad, tmp_path):
    """Afterwards EOS and padding are two tokens, and the models are of the same architecture."""
    eos = save_foreign_model(tmp_path / "base", architecture, world[0], pad).eos_token
    out = tmp_path / "run"
    ppo.main([*TINY, "--model", str(tmp_path / "base"), "--out", str(out), "--max_new_tokens", "8"])
    tokenizer = AutoTokenizer.from_pretrained(out / "policy")
    lm = AutoModelForCausalLM.from_pretrained(out / "policy")
    assert lm.config.model_type == architecture and lm.config.max_position_embeddings == 128
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == (eos or "<eos>")
    words = lm.get_input_embeddings().num_embeddings
    assert tokenizer.pad_token_id < words and tokenizer.eos_token_id < words
    assert read_config(out)["lr"] == ppo.REAL_MODEL["lr"]
    assert all(float(row["first_log_ratio"]) < 1e-5 for row in read_metrics(out))


@torch.no_grad()
def always(lm, following: dict[int, int], otherwise: int):
    """Set the weights of a GPT-2 so that a token follows each token, nearly certainly."""
    width = lm.config.n_embd
    for name, weight in lm.named_parameters():
        if not name.endswith(("wte.weight", "ln_f.weight")):
            weight.zero_()  # no attention, no positions: only the last token counts
    rows = torch.randn(len(lm.transformer.wte.weight), width, generator=torch.Generator())
    rows[:, 0] = 8  # what all tokens have in common
    lm.transformer.wte.weight.copy_(rows)
    lm.lm_head.weight = torch.nn.Parameter(torch.zeros_like(rows))  # no longer tied to wte
    lm.config.tie_word_embeddings = False
    hidden = lm.transformer.ln_f(rows)
    lm.lm_head.weight[otherwise, 0] = 20
    for token, next_token in following.items():
        lm.lm_head.weight[next_token] += 20 * hidden[token] - 15 * hidden.mean(dim=0)


def save_model_that_stops_elsewhere(folder, kind, tokenizer):
    """A model that stops at another token than its tokenizer says, or never."""
    if kind == "the tokenizer has no special token":
        bpe = Tokenizer(models.BPE(
            {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    b = tokenizer("b").input_ids[0]
    config = make_config("gpt2", vocab_size=len(tokenizer), bos_token_id=b,
                         eos_token_id={"several in the configuration": [b, b + 1]}.get(kind, b))
    lm = AutoModelForCausalLM.from_config(config)
    if kind == "another token in the generation configuration":
        lm.generation_config = GenerationConfig(eos_token_id=b, pad_token_id=b, max_new_tokens=2)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", [
    "the tokenizer has no special token", "another token in the generation configuration",
    "several in the configuration"])
def test_a_saved_policy_stops_in_the_librarys_pipeline_as_it_does_here(kind, world, tmp_path):
    """After "a" come "b", "c" and EOS, and after EOS it would begin anew."""
    save_model_that_stops_elsewhere(tmp_path / "base", kind, world[0])
    cfg = small_config("--temperature", "0.01")
    actor = ppo.ActorCritic(*ppo.load_pretrained(tmp_path / "base", cfg), cfg)
    tokenizer = actor.tokenizer
    a, b, c = (tokenizer(letter).input_ids[0] for letter in "abc")
    eos = tokenizer.eos_token_id
    always(actor.lm, {a: b, b: c, c: eos, eos: b}, otherwise=b)
    assert ppo.sample_replies(actor, ["a"], cfg).reply_ids.tolist() == [[b, c, eos]]

    ppo.save_model(actor, tmp_path / "policy")
    write = pipeline("text-generation", model=str(tmp_path / "policy"), device="cpu")
    [result] = write("a", max_new_tokens=9, do_sample=False, return_full_text=False)
    assert result["generated_text"] == "bc"
    [ids] = write.model.generate(torch.tensor([[a]]), max_new_tokens=9)
    assert ids.tolist() == [a, b, c, eos]


def test_own_model_prompts_and_reward_without_texts_start_ppo_from_the_model_as_it_is(world,
                                                                                      tmp_path):
    save_foreign_model(tmp_path / "base", "gpt2", world[0], "missing")
    (tmp_path / "mine.py").write_text("def score(completions):\n"
                                      "    return [len(text) for text in completions]\n")
    steps = [TINY.index("--sft_steps"), TINY.index("--pretrain_steps")]
    flags = [flag for i, flag in enumerate(TINY) if i not in [i + k for i in steps for k in (0, 1)]]
    flags += ["--model", str(tmp_path / "base"), "--out", str(tmp_path / "run"), "--cycles", "1",
              "--reward", f"{tmp_path}/mine.py:score",
              "--prompts", write_jsonl(tmp_path / "prompts.jsonl", TEN)]
    ppo.main(flags)
    assert read_config(tmp_path / "run")["sft_steps"] == 0
    base, _ = ppo.load_pretrained(tmp_path / "base", small_config())
    sft, _ = ppo.load_pretrained(tmp_path / "run/sft", small_config())
    words = len(world[0])  # behind them there may be a new token for padding
    for name, weight in base.state_dict().items():
        assert torch.equal(sft.state_dict()[name][:words], weight[:words]), name


@pytest.mark.parametrize("flags, steps", [
    ("--prompts P --reward R", 0), ("--prompts P --demos P --reward R", 450),
    ("--prompts P --preferences P --reward R", 450), ("--prompts P --preferences P", 450),
    ("--reward R", 450), ("--prompts P --reward R --sft_steps 7", 7)])
def test_sft_is_left_out_only_where_there_is_no_text_for_it(flags, steps):
    assert ppo.parse_config(["--model", "gpt2", *flags.split()]).sft_steps == steps
    assert ppo.parse_config(["--prompts", "P", "--reward", "R"]).sft_steps == 450  # tiny


def test_an_adapter_is_refused_and_its_merged_model_is_not(world, tmp_path):
    """As it is loaded, an adapter has no parameter that learns: KL would stay 0."""
    peft = pytest.importorskip("peft")
    save_foreign_model(tmp_path / "base", "gpt2", world[0], "missing")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM",
                               fan_in_fan_out=True)
    adapter = peft.get_peft_model(lm, settings)
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.merge_and_unload().save_pretrained(tmp_path / "merged")
    for folder in ["adapter", "merged"]:
        world[0].save_pretrained(tmp_path / folder)
    with pytest.raises(ppo.UserError, match="nothing to train; merge the adapter"):
        ppo.load_pretrained(tmp_path / "adapter", small_config())
    ppo.load_pretrained(tmp_path / "merged", small_config())


def test_a_model_without_a_parameter_to_train_is_refused(world):
    frozen = copy.deepcopy(world[1].lm).requires_grad_(False)
    with pytest.raises(ppo.UserError, match="nothing to train"):
        ppo.try_model(frozen)
    frozen.lm_head.requires_grad_(True)
    ppo.try_model(frozen)


NO_LANGUAGE_MODELS = {
    "bert": (lambda words: BertForMaskedLM(BertConfig(
        vocab_size=words, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.3)), "no causal language|takes no position_ids"),
    "t5": (lambda words: T5ForConditionalGeneration(T5Config(
        vocab_size=words, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
        "Unrecognized configuration class"),
    "no head": (lambda words: GPT2Model(make_config("gpt2", vocab_size=words,
                                                    tie_word_embeddings=False)),
                "it has no lm_head.weight")}


@pytest.mark.parametrize("kind", NO_LANGUAGE_MODELS)
def test_a_model_that_is_no_causal_language_model_is_one_line(kind, world, tmp_path):
    make, why = NO_LANGUAGE_MODELS[kind]
    make(len(world[0])).save_pretrained(tmp_path / "base")
    world[0].save_pretrained(tmp_path / "base")
    with pytest.raises(ppo.UserError, match=f"no usable model in .*({why})") as error:
        ppo.load_pretrained(tmp_path / "base", small_config())
    assert "\n" not in str(error.value)


def test_a_model_without_its_tokenizer_is_one_line(world, tmp_path):
    """The library makes an empty one, without a word."""
    save_foreign_model(tmp_path / "base", "gpt2", world[0], "missing")
    for path in (tmp_path / "base").glob("*token*"):
        path.unlink()
    with pytest.raises(ppo.UserError, match="tokenizer"):
        ppo.load_pretrained(tmp_path / "base", small_config())


# ---- NaN -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_logits_that_are_not_finite_stop_the_sampling_and_name_the_cycle(bad, monkeypatch):
    actor = small_actor()
    with torch.no_grad():
        actor.lm.transformer.ln_f.bias[3] = bad
    monkeypatch.setattr(ppo, "WHERE", [" in PPO, cycle 7"])
    prompt_ids, prompt_mask, *_ = random_batch()
    with pytest.raises(ppo.UserError, match="NaN or infinity in PPO, cycle 7; try a lower"):
        ppo.generate(actor, prompt_ids, prompt_mask, 5, 1, 0)


def test_a_token_that_can_never_come_is_no_error():
    logits = torch.randn(3, 23)
    logits[:, 4] = -math.inf
    ppo.check_logits(logits)
    ppo.check_logits(torch.full((2, 5), -1e30))
    with pytest.raises(ppo.UserError):
        ppo.check_logits(torch.where(torch.arange(3).unsqueeze(1) == 1, -math.inf, logits))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("where", ["in a layer", "in the embedding of one word"])
def test_a_model_with_nan_is_refused_before_any_training_and_no_learning_rate_is_blamed(
        where, architecture, world, tmp_path):
    save_foreign_model(tmp_path / "base", architecture, world[0], "missing")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    words = lm.get_input_embeddings().weight
    weight = words if where == "in the embedding of one word" else list(lm.parameters())[3]
    with torch.no_grad():
        weight[-3] = NAN
    lm.save_pretrained(tmp_path / "base")
    with pytest.raises(ppo.UserError, match="NaN or infinity before any training") as error:
        ppo.load_pretrained(tmp_path / "base", small_config())
    assert "learning rate" not in str(error.value)


@pytest.mark.parametrize("ends", [False, True])
def test_a_tokenizer_that_ends_prompts_with_eos_is_refused(world, ends, tmp_path):
    old = save_foreign_model(tmp_path, "llama", world[0], "missing")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=old._tokenizer, eos_token="<eos>",
                                        pad_token="<pad>")
    if ends:
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ppo.UserError, match="ends prompts") if ends else nullcontext():
        ppo.load_pretrained(tmp_path, small_config())


def test_a_model_that_takes_no_positions_is_refused(world, tmp_path):
    tokenizer = world[0]
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ppo.UserError, match="takes no position_ids"):
        ppo.load_pretrained(tmp_path, small_config())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_invariants_of_reading_hold_for_every_architecture(architecture):
    """A reply alone is read as in a padded batch, and the sampler's cache as one pass."""
    torch.manual_seed(0)
    config = make_config(architecture, vocab_size=23, bos_token_id=1, eos_token_id=1,
                         pad_token_id=0, initializer_range=0.3)
    actor = ppo.ActorCritic(AutoModelForCausalLM.from_config(config))
    torch.nn.init.normal_(actor.head[-1].weight)
    prompt_ids, prompt_mask, reply_ids, mask = random_batch()
    with torch.no_grad():
        logits, values = actor(prompt_ids, prompt_mask, reply_ids, mask)
        for i, T in enumerate(mask.sum(dim=1).tolist()):
            real = prompt_mask[i]
            alone = actor(prompt_ids[i:i + 1, real], prompt_mask[i:i + 1, real],
                          reply_ids[i:i + 1, :T], mask[i:i + 1, :T])
            assert torch.allclose(logits[i, :T], alone[0][0], atol=1e-4)
            assert torch.allclose(values[i, :T], alone[1][0], atol=1e-4)
        ids, mask = ppo.generate(actor, prompt_ids, prompt_mask, 9, eos_id=1, pad_id=0,
                                 temperature=1e-4)  # so low that it takes the likeliest token
        logits, _ = actor(prompt_ids, prompt_mask, ids, mask)
    assert torch.equal(logits.argmax(dim=-1)[mask], ids[mask])


# ==================================================================================================
# bfloat16
# ==================================================================================================
def in_bfloat16(actor):
    """A copy that computes as on a GPU with --bf16."""
    actor = copy.deepcopy(actor)
    ppo.compute_in_bfloat16(actor.lm, "cpu")
    return actor


def test_bfloat16_reaches_the_language_model_and_not_what_uses_its_output(world, rollout):
    exact = ppo.read_replies(world[1], rollout, 0.7)[0]
    actor = in_bfloat16(world[1])
    seen = []

    def spy(module, inputs, output):
        seen.append(output.dtype)

    actor.lm.transformer.h[-1].mlp.c_proj.register_forward_hook(spy)
    actor.head[1].register_forward_hook(spy)
    log_probs, values, logits = ppo.read_replies(actor, rollout, 0.7)
    assert seen == [torch.bfloat16, torch.float32]
    assert {log_probs.dtype, values.dtype, logits.dtype} == {torch.float32}
    assert 0 < (log_probs - exact)[rollout.mask].abs().max() < 0.1
    logits, cache = actor.next_token(rollout.prompt_ids, rollout.prompt_mask, None)
    assert logits.dtype == torch.float32
    scores = ppo.RewardModel(actor.lm)(rollout.prompt_ids, rollout.prompt_mask, rollout.reply_ids,
                                       rollout.mask)
    assert scores.dtype == torch.float32


def test_weights_and_gradients_stay_float32_and_the_update_is_nearly_the_same(world, rollout):
    cfg = small_config("--minibatches", "1", "--ppo_epochs", "1", "--max_grad_norm", "1e9")
    actor = in_bfloat16(world[1])
    assert {parameter.dtype for parameter in actor.parameters()} == {torch.float32}
    exact = gradients_of_one_update(world[1], rollout, cfg)
    rounded = gradients_of_one_update(actor, rollout, cfg)
    assert {gradient.dtype for gradient in rounded} == {torch.float32}
    a, b = (torch.cat([gradient.flatten() for gradient in gs]) for gs in (exact, rounded))
    assert not torch.equal(a, b) and torch.cosine_similarity(a, b, dim=0) > 0.98


def test_copies_of_a_bfloat16_model_compute_in_bfloat16_too(world, rollout):
    """The reference is one: if it rounded otherwise, KL would not be 0 at first."""
    actor = in_bfloat16(world[1])
    log_probs, values = ppo.read_without_gradient(actor, rollout, small_config())
    for model in [copy.deepcopy(actor), ppo.frozen(actor)]:
        again, values_again = ppo.read_without_gradient(model, rollout, small_config())
        assert torch.equal(again, log_probs) and torch.equal(values_again, values)
    reward_model = ppo.RewardModel(copy.deepcopy(actor.lm), actor.tokenizer, small_config())
    assert type(reward_model.lm) is type(actor.lm)
    with torch.no_grad():  # a copy has weights of its own
        model.lm.get_output_embeddings().weight.mul_(2)
    assert not torch.equal(ppo.read_without_gradient(model, rollout, small_config())[0], log_probs)
    again, _ = ppo.read_without_gradient(actor, rollout, small_config())
    assert torch.equal(again, log_probs)


@pytest.mark.parametrize("device, bf16, hardware, wanted", [
    ("cuda", True, True, True), ("cuda:1", True, True, True), ("cuda", True, False, False),
    ("cuda", False, True, False), ("cpu", True, True, False)])
def test_bfloat16_is_used_only_on_gpus_that_have_it_in_hardware(device, bf16, hardware, wanted,
                                                               monkeypatch):
    """A T4 says that it supports bfloat16: it emulates it, and is slow then."""
    def is_bf16_supported(including_emulation=True):
        return hardware or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    cfg = small_config()
    cfg.device, cfg.bf16 = device, bf16
    assert ppo.wants_bfloat16(cfg) is wanted


def test_a_saved_bfloat16_model_is_an_ordinary_one(world, tmp_path):
    actor = in_bfloat16(world[1])
    ppo.save_model(actor, tmp_path / "sft")
    config = json.loads((tmp_path / "sft/config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["dtype"] == "float32"
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    again = ppo.load_model(ppo.ActorCritic, tmp_path / "sft", small_config())
    assert type(lm) is type(again.lm) is type(world[1].lm)
    for name, weight in actor.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


# ==================================================================================================
# Micro batches
# ==================================================================================================
@pytest.mark.parametrize("size", ["1", "3"])
def test_micro_batches_give_the_gradient_of_the_whole_minibatch(world, rollout, size):
    flags = ["--minibatches", "1", "--ppo_epochs", "1", "--ent_coef", "0.1", "--max_grad_norm",
             "1e9"]
    whole = gradients_of_one_update(world[1], rollout, small_config(*flags))
    cfg = small_config(*flags, "--micro_batch_size", size)
    parts = gradients_of_one_update(world[1], rollout, cfg)
    assert len(whole) == len(parts) and any(x.abs().max() > 1e-3 for x in whole)
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(whole, parts))


@pytest.mark.parametrize("loss_fn", ["imitation_loss", "reward_model_loss"])
def test_micro_batches_give_the_same_step_in_the_stages_before_ppo(world, loss_fn):
    """Replies of different lengths, and rankings of different lengths."""
    texts = ["Yes.", "Call a friend.", "Nobody cares.", "Take a slow walk. You can do this!"]
    replies = [ppo.Reply("I feel sad.\n", text, True) for text in texts]
    model, batch = world[1], replies
    if loss_fn == "reward_model_loss":
        model, batch = world[2], [replies, replies[:2], replies[1:]]
    gradients, metrics = [], []
    for size in ["64", "1"]:
        model = copy.deepcopy(model)
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        cfg = small_config("--micro_batch_size", size, "--max_grad_norm", "1e9")
        metrics.append(ppo.optimizer_step(model, still, getattr(ppo, loss_fn), batch, cfg))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    assert any(x.abs().max() > 1e-3 for x in gradients[0])
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-3) for a, b in zip(*gradients))


def test_the_size_of_micro_batches_changes_no_log_prob_value_or_score(world, rollout):
    _, actor, reward_model, _ = world
    results = []
    for size in ["64", "3"]:
        cfg = small_config("--micro_batch_size", size)
        model = copy.deepcopy(reward_model)
        model.cfg = cfg
        scores = torch.tensor(ppo.ask_score_fn(model.score, rollout.replies))
        results.append([*ppo.read_without_gradient(actor, rollout, cfg), scores])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*results))


def test_a_reward_may_change_the_lists_that_it_gets(tmp_path):
    """Messages of one prompt are shared by its replies, and by the whole run."""
    messages = [{"role": "user", "content": "Hi"}]
    line = ppo.Line([ppo.Reply("<user>Hi", "", True)], messages, {"prompt": messages})

    def greedy(prompts, completions):
        for prompt, completion in zip(prompts, completions):
            prompt.extend(completion)
        return [float(len(prompt)) for prompt in prompts]

    score_fn = ppo.with_columns(greedy, {"prompts": [line], "demos": [], "preferences": []})
    replies = [ppo.Reply("<user>Hi", text, True) for text in ("a", "b")]
    assert ppo.ask_score_fn(score_fn, replies) == ppo.ask_score_fn(score_fn, replies)
    assert messages == [{"role": "user", "content": "Hi"}]


def test_a_reward_that_seeds_torch_changes_no_random_number_of_the_run():
    def seeding(completions):
        torch.manual_seed(0)
        return [torch.rand(1).item() for _ in completions]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ppo.ask_score_fn(seeding, [ppo.Reply("a", "b", True)])
    assert torch.equal(torch.rand(3), expected)


def test_a_set_of_scores_is_refused():
    with pytest.raises(ppo.UserError, match="it returned a set"):
        ppo.ask_score_fn(lambda completions: {3.0, 1.0}, [ppo.Reply("a", text, True)
                                                          for text in ("b", "c")])


def test_pairs_that_a_reward_finds_equal_count_half(capsys):
    """A reward that is never wrong and often undecided is better than a coin."""
    replies = [ppo.Reply("q", text, True) for text in ("best", "good", "fair", "bad")]
    data = ppo.Data({"validation": []}, [], [], [], [replies])
    quality = ppo.reward_model_quality(
        lambda completions: [float(text == "best") for text in completions], None, data,
        ppo.Config())
    assert quality["accuracy"] == pytest.approx((3 + 3 * 0.5) / 6)
    assert "coin" not in capsys.readouterr().out


def test_a_reward_model_reads_a_reply_to_its_end_and_no_further_than_its_positions(world):
    """With a tokenizer of its own, a reply can have more tokens than --max_new_tokens."""
    lm, tokenizer = world[1].lm, world[1].tokenizer
    model = ppo.ActorCritic(lm, tokenizer, small_config("--max_new_tokens", "8"))
    text = "walk " * 20
    ids = tokenizer(text).input_ids
    assert len(ids) > 8
    _, _, reply_ids, mask = ppo.encode(model, [ppo.Reply("Hi", text, True)])
    assert reply_ids[0].tolist() == [*ids, tokenizer.eos_token_id]
    prompt_ids, _, reply_ids, _ = ppo.encode(model, [ppo.Reply("Hi", "walk " * 1000, True)])
    assert prompt_ids.shape[1] + reply_ids.shape[1] == ppo.positions_of(lm)
