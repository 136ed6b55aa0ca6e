"""Rewards and models of your own, bfloat16, and batches that are divided to save memory."""
import copy
import json
import math
from contextlib import nullcontext

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (AutoModelForCausalLM, AutoTokenizer, BloomConfig, GPT2Config,
                          GPT2ForSequenceClassification, Lfm2Config, LlamaConfig, OPTConfig,
                          PreTrainedTokenizerFast, Qwen2Config)

import ppo_rlhf as ppo
from helpers import gradients_of_one_update, read_config
from test_ppo_rlhf import TINY, random_batch, read_metrics, small_config

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
        "def once(completions):\n"
        "    if 4 < len(completions) <= 8:\n"  # a batch of PPO; before it comes an X-ray of four
        "        raise KeyError('no such word')\n"
        "    return [1.0] * len(completions)\n")
    flags = ["--init_from", str(run), "--reward", f"{tmp_path}/my.py:once"]
    with pytest.raises(ppo.UserError, match=r"in PPO, cycle \d on replies.*no such word"):
        ppo.main([*TINY, *flags, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_with_its_own_tokenizer_is_a_reward(world, labels, tmp_path):
    """Its last label counts. Of a text that is too long it sees the end: there is the reply."""
    tokenizer = copy.deepcopy(world[0])
    tokenizer.model_max_length = 64
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_layer=1, n_embd=16, n_head=2,
                        num_labels=labels, pad_token_id=tokenizer.pad_token_id)
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "judge")
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
