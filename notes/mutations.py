"""Would the tests notice a bug? Put small bugs into a copy of ppo_rlhf.py, one at a time, and run the tests on each.

    python notes/mutations.py                    # all of BUGS: about half an hour on one core
    python notes/mutations.py --jobs 4           # four at a time
    python notes/mutations.py --only detach      # those with this in their name

A bug is caught when a test fails or nothing ends any more. A bug that survives is a promise without a test, or no bug
at all (then it does not belong here). Each is a name, a text that occurs exactly once in the script, and what to put in
its place; when the script has changed and the text is gone, this stops and says so: mend the entry, or drop it.

Prints a line per bug: what caught it, or SURVIVED, and the seconds. Exit status: 0 when 95% or more are caught; 1 when
not; 2 when an entry does not fit the script, or the tests fail without any bug. Needs Linux or macOS.
"""
import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ppo_rlhf.py"
NEEDLESS = shutil.ignore_patterns(".*", "__pycache__", "runs", "venv")
ENOUGH = 0.95

# Most bugs fall to a test that takes milliseconds, so these come first, and whole runs and several processes last.
CONFTEST = '''
import inspect

def cost(item):
    source = inspect.getsource(item.function)
    if "launch(" in source or "subprocess" in source:
        return 2
    return "ppo.main(" in source or "run" in item.fixturenames or "converges" in item.name

def pytest_collection_modifyitems(items):
    items.sort(key=cost)
'''

BUGS = [
    # ---- 1  The task and your own data -------------------------------------------------------------------------------
    ("human: an unfinished reply costs nothing",
     "points -= (len(set(triples)) < len(triples)) + (not finished)", "points -= len(set(triples)) < len(triples)"),
    ("human: repetition costs nothing",
     "points -= (len(set(triples)) < len(triples)) + (not finished)", "points -= not finished"),
    ("human: another topic's word is fine", "honest = word in words and WORDS.isdisjoint(set(words) - {word})",
     "honest = word in words"),
    ("human: rudeness is rewarded", "- 2 * (not harmless)", "+ 2 * (not harmless)"),
    ("HH prompt cut in the middle of a word",
     'line["prompt"] = re.match(r"(.*\\s)?", os.path.commonprefix(replies), re.DOTALL).group()',
     'line["prompt"] = os.path.commonprefix(replies)'),
    ("HH prompt: its first line only", "os.path.commonprefix(replies), re.DOTALL)", "os.path.commonprefix(replies))"),
    ("HH prompt stays in the replies", 'replies = [reply[len(line["prompt"]):] for reply in replies]',
     "replies = [reply for reply in replies]"),
    ("preference: rejected before chosen", '[line["chosen"], line["rejected"]]', '[line["rejected"], line["chosen"]]'),
    ("cut keeps the wrong end", "(-1, text[-40 * room:]) if keep_end", "(-1, text[-40 * room:]) if not keep_end"),
    ("cut: one piece too many", "pieces[:max(fits - 1, 1)]", "pieces[:max(fits, 1)]"),
    ("shorten: prompts keep their beginning", "model.tokenizer, keep_end=True)", "model.tokenizer)"),
    ("shorten: no room left for EOS", "cut(row.reply, cfg.max_new_tokens - 1,", "cut(row.reply, cfg.max_new_tokens,"),
    ("shorten: a cut reply gets EOS", "Row(prompt, reply, reply == row.reply)", "Row(prompt, reply, True)"),
    ("split: validation prompts in training", "if i % 11 not in (0, 5)]", "if i % 11 not in (0,)]"),
    ("split: test prompts in validation", '"validation": prompts[5::11]', '"validation": prompts[::11]'),
    ("split: a new one in every run", "prompts = list(dict.fromkeys(prompts))", "prompts = list(set(prompts))"),
    ("split: whole groups of alike prompts held out", '"test": prompts[::11], "validation": prompts[5::11]',
     '"test": prompts[:14], "validation": prompts[14:28]'),
    ("data: held-out prompts in pretraining and SFT",
     'rng, world = reseed(cfg, "texts"), split(WORLD_PROMPTS)["train"]',
     'rng, world = reseed(cfg, "texts"), list(WORLD_PROMPTS)'),
    ("data: own demonstrations with held-out prompts", '(rows[0].prompt in seen) == wanted', "True"),
    ("data: the reward model is measured on what it learned",
     'train["preferences"], held_out["preferences"])', 'train["preferences"], train["preferences"])'),
    ("data: SFT imitates the rejected replies",
     'demos = [rows[0] for rows in train["demos"]', 'demos = [rows[-1] for rows in train["demos"]'),
    ("data: SFT on pretraining's mixture", "write_texts(rng, world, SFT_MIX)", "write_texts(rng, world, PRETRAIN_MIX)"),
    ("tokenizer: vocabulary from held-out prompts",
     'write_texts(random.Random(0), split(WORLD_PROMPTS)["train"]',
     "write_texts(random.Random(0), list(WORLD_PROMPTS)"),
    ("tokenizer: padding is EOS", 'pad_token="<pad>", eos_token', 'pad_token="<eos>", eos_token'),
    # ---- 2  The models -----------------------------------------------------------------------------------------------
    ("encode: replies without EOS", "(reply + [eos] * done)[:room]", "reply[:room]"),
    ("encode: EOS on replies that were cut", "[eos] * done)[:room]", "[eos])[:room]"),
    ("encode: EOS on replies without room for it", "(reply + [eos] * done)[:room]",
     "reply[:room - done] + [eos] * done"),
    ("encode: an empty prompt stays empty", "[prompt or [eos] for prompt in", "[prompt for prompt in"),
    ("encode: prompts padded on the right", "padding_side=side)  #", "padding_side='right')  #"),
    ("encode: padding is not masked", "padded >= 0]", "padded >= -1]"),
    ("encode: replies padded on the left", "padding_side=side)  #", "padding_side='left')  #"),
    ("join: positions count the padding", "return ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0)",
     "return ids, mask, torch.arange(ids.shape[1], device=ids.device).expand_as(ids)"),
    ("join: attention to the padding", "return ids, mask, (mask.cumsum", "return ids, mask * 0 + 1, (mask.cumsum"),
    ("read: no position ids", "position_ids=positions, logits_to_keep", "logits_to_keep"),
    ("dropout is on", "self.lm = lm.eval()", "self.lm = lm.train()"),
    ("dropout of the layer itself stays", 'if "drop" in name and type(x) is float', "if False"),
    ("the head is as wide as the embeddings", "lm.get_output_embeddings().weight.shape[1]",
     "lm.config.get_text_config().hidden_size"),
    ("a tokenizer that ends prompts is taken", '        check(tokenizer("a")', '        check(True or tokenizer("a")'),
    ("stage 2 begins with any random numbers", '    rng = reseed(cfg, "rankings")\n', "    rng = random.Random(0)\n"),
    ("generate: a method that not every cache has", "reorder_cache(running)", "batch_select_indices(running)"),
    ("talk: --reward human goes through", " or cfg.talk)", ")"),
    ("dropout comes with gradient checkpointing", "layer.training = torch.is_grad_enabled()",
     "self.lm.train(torch.is_grad_enabled())"),
    ("bfloat16 in the losses", "return out.logits.float()", "return out.logits"),
    ("actor: logits one position late", "*(x[:, :-1] for x in inputs), keep=T", "*inputs, keep=T"),
    ("critic: V knows the token", "out.hidden_states[-1][:, -T:]", "out.hidden_states[-1][:, -T:].roll(-1, 1)"),
    ("critic: V one position late", "out.hidden_states[-1][:, -T:]", "out.hidden_states[-1][:, -T:].roll(1, 1)"),
    ("critic: detach is missing", "[:, -T:].detach().float()", "[:, -T:].float()"),
    ("reward model: reads column -1", "last = prompt_ids.shape[1] - 1 + reply_mask.sum(dim=1)",
     "last = inputs[0].shape[1] - 1 + 0 * reply_mask.sum(dim=1)"),
    ("reward model: reads the token before EOS",
     "last = prompt_ids.shape[1] - 1 +", "last = prompt_ids.shape[1] - 2 +"),
    ("reference is the actor itself", "return copy.deepcopy(model).requires_grad_(False)", "return model"),
    ("reference trained along, in main", "reference, policy = frozen(sft), sft", "reference, policy = sft, sft"),
    ("hub model: padding may be EOS", "if tokenizer.pad_token in (None, tokenizer.eos_token):",
     "if tokenizer.pad_token is None:"),
    ("log-probs of the chosen token not normalised",
     "- logits.logsumexp(dim=-1)\n\n\ndef entropy", "- logits.amax(dim=-1)\n\n\ndef entropy"),
    ("entropy: mean in place of sum", "(log_probs.exp() * log_probs).sum(dim=-1)",
     "(log_probs.exp() * log_probs).mean(dim=-1)"),
    ("masked_mean: x * mask",
     "return torch.where(mask, x, 0).sum() / mask.sum()", "return (x * mask).sum() / mask.sum()"),
    ("masked_mean: mask forgotten", "return torch.where(mask, x, 0).sum() / mask.sum()", "return x.mean()"),
    ("masked_mean: over the padding too", "x, 0).sum() / mask.sum()", "x, 0).sum() / mask.numel()"),
    ("masked_mean: mean of the replies' means", "return torch.where(mask, x, 0).sum() / mask.sum()",
     "return (torch.where(mask, x, 0).sum(-1) / mask.sum(-1)).mean()"),
    # ---- 3  Stages 0 to 2, several processes, resuming ---------------------------------------------------------------
    ("processes: each does everything",
     "return items[RANK * len(items) // WORLD:(RANK + 1) * len(items) // WORLD]", "return items"),
    ("processes: gradients not summed", "        dist.all_reduce(gradient)\n", "        pass\n"),
    ("processes: divided by the own token count only", "in zip(*gather(sums)))", "in zip(*sums))"),
    ("processes: whitening is local", "    mean, variance = moments(x, mask)\n",
     "    mean = masked_mean(x, mask)\n    variance = masked_mean((x - mean) ** 2, mask)\n"),
    ("processes: all draw the same random numbers", "rng.getrandbits(63) + RANK", "rng.getrandbits(63)"),
    ("random stream: the same in every step", 'random.Random(f"{stage} {cfg.seed}")', "random.Random(str(cfg.seed))"),
    ("random stream: seed ignored", 'random.Random(f"{stage} {cfg.seed}")', "random.Random(stage)"),
    ("random stream: torch not seeded", "        generator.manual_seed(seed)\n", "        pass\n"),
    ("writes are not atomic",
     "        yield temporary\n        shutil.rmtree(path, ignore_errors=True)\n        os.replace(temporary, path)\n",
     "        yield path\n"),
    ("resume: optimizer not restored", "                    part.load_state_dict(state[name])",
     '                    part.load_state_dict(state[name]) if name != "optimizer" else None'),
    ("resume: schedule not restored", "                    part.load_state_dict(state[name])",
     '                    part.load_state_dict(state[name]) if name != "schedule" else None'),
    ("resume: best policy not restored", "                    part.load_state_dict(state[name])",
     '                    part.load_state_dict(state[name]) if name != "best" else None'),
    ("resume: log not restored", 'first, log[:] = state["step"], state["log"]', 'first = state["step"]'),
    ("resume: the last step once more", '"step": step + 1,', '"step": step,'),
    ("resume: another stage's state taken", 'if state["stage"] == stage:', "if True:"),
    ("resume: changed settings accepted", 'check(state["settings"] == settings,', "check(True,"),
    ("Ctrl-C: nothing saved", "RANK == 0 and (stop or (step + 1)", "RANK == 0 and ((step + 1)"),
    ("descend: gradients not zeroed", "    optimizer.zero_grad()\n", ""),
    ("descend: micro batches averaged plainly", "            loss, count, metrics = loss_fn(model, part)\n",
     "            (loss, _, metrics), count = loss_fn(model, part), 1\n"),
    ("descend: gradient not divided", "    torch._foreach_div_(gradients, count)\n", ""),
    ("descend: gradient not clipped", "parameters, cfg.max_grad_norm)", "parameters, math.inf)"),
    ("descend: clipped before it is divided",
     "    torch._foreach_div_(gradients, count)\n"
     "    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)\n",
     "    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)\n"
     "    torch._foreach_div_(gradients, count)\n"),
    ("descend: steps on NaN", "    check(norm.isfinite(),", "    check(True,"),
    ("stages: schedule not stepped", "        schedule.step()\n    if losses:", "    if losses:"),
    ("SFT: gradient ascent", "return masked_mean(-token_log_probs(logits, reply_ids)",
     "return masked_mean(token_log_probs(logits, reply_ids)"),
    ("SFT trains the pretrained model itself", "minimize(copy.deepcopy(pretrained), imitation_loss",
     "minimize(pretrained, imitation_loss"),
    ("label noise: Gumbel's sign", '["human"] - cfg.label_noise', '["human"] + cfg.label_noise'),
    ("label noise: unit ignored", "- cfg.label_noise * math.log", "- math.log"),
    ("labels: worst first", "sorted(rows, key=impression, reverse=True)", "sorted(rows, key=impression)"),
    ("ranking loss inverted", "scores[:, better] - scores[:, worse]", "scores[:, worse] - scores[:, better]"),
    ("ranking loss: neighbours only", "return -F.logsigmoid(scores[:, better] - scores[:, worse]).mean()",
     "return -F.logsigmoid(scores[:, :-1] - scores[:, 1:]).mean()"),
    ("ranking loss: sum of the pairs", "- scores[:, worse]).mean()", "- scores[:, worse]).sum()"),
    ("normalize: mean forgotten", "    last.bias.data -= scores.mean().item()\n", ""),
    ("normalize: deviation forgotten", "        parameter.data /= max(scores.std().item(), 1e-6)", "        pass"),
    ("normalize: the mean after the scale",
     "    last.bias.data -= scores.mean().item()\n    for parameter in last.parameters():\n"
     "        parameter.data /= max(scores.std().item(), 1e-6)",
     "    for parameter in last.parameters():\n        parameter.data /= max(scores.std().item(), 1e-6)\n"
     "    last.bias.data -= scores.mean().item()\n    "),
    ("reward model trains SFT's weights", "RewardModel(copy.deepcopy(sft.lm)", "RewardModel(sft.lm"),
    ("rankings on test prompts", 'label_rankings(sft, split(WORLD_PROMPTS)["train"]',
     'label_rankings(sft, split(WORLD_PROMPTS)["test"]'),
    # ---- 4  Phase I --------------------------------------------------------------------------------------------------
    ("sampling: temperature forgotten", "(logits.double() / temperature)", "logits.double()"),
    ("sampling: temperature inverted", "(logits.double() / temperature)", "(logits.double() * temperature)"),
    ("sampling: one random number for all", "torch.rand(len(logits), 1, dtype", "torch.rand(1, 1, dtype"),
    ("generate: padding on the left is read", "ids, attention, cache = prompt_ids, prompt_mask.long(), None",
     "ids, attention, cache = prompt_ids, torch.ones_like(prompt_ids), None"),
    ("generate: the cache is not told the position", "positions[:, -1:] + 1", "positions[:, -1:]"),
    ("generate: the cache keeps other rows", "reorder_cache(running)",
     "reorder_cache(torch.arange(len(running)))"),
    ("generate: the mask of other rows", "rows, tokens, positions, attention = (x[running] for x in",
     "rows, tokens, positions, attention = (x[:len(running)] if x is attention else x[running] for x in"),
    ("generate: the positions of other rows", "rows, tokens, positions, attention = (x[running] for x in",
     "rows, tokens, positions, attention = (x[:len(running)] if x is positions else x[running] for x in"),
    ("generate: the new token is not looked at", "F.pad(attention, (0, 1), value=1)",
     "F.pad(attention, (0, 1), value=0)"),
    ("generate: filled up with EOS", "max_new_tokens), pad_id, device", "max_new_tokens), eos_id, device"),
    ("generate: EOS outside the mask", "= tokens, True  #", "= tokens, tokens != eos_id  #"),
    ("generate: mask from ids != pad", "return reply_ids[:, :t + 1], mask[:, :t + 1]",
     "return reply_ids[:, :t + 1], reply_ids[:, :t + 1] != pad_id"),
    ("generate: goes on after EOS", "running = (tokens != eos_id).nonzero()",
     "running = torch.ones_like(tokens).nonzero()"),
    ("generate: stops with the first EOS", "if len(running) == 0:", "if len(running) < len(rows):"),
    ("generate: one token too few", "for t in range(max_new_tokens):", "for t in range(max_new_tokens - 1):"),
    ("finished: shorter than the limit", "finished = ((reply_ids == eos) & mask).any(dim=1).tolist()",
     "finished = (mask.sum(dim=1) < cfg.max_new_tokens).tolist()"),
    ("finished: always", "finished = ((reply_ids == eos) & mask).any(dim=1).tolist()", "finished = [True] * len(mask)"),
    ("temperature only in sampling", "    logits = logits / temperature\n", ""),
    ("read_all: mask forgotten", "return [torch.where(batch[3], torch.cat(column), 0) for column",
     "return [torch.cat(column) for column"),
    ("penalty for the replies that end",
     "missing_eos_penalty * (not row.finished)", "missing_eos_penalty * row.finished"),
    ("penalty absent", " - missing_eos_penalty * (not row.finished)", ""),
    ("penalty absent in rollouts", "rate(score_fn, rows, cfg.missing_eos_penalty), device",
     "rate(score_fn, rows), device"),
    ("penalty absent in the optimum",
     "[rate(score_fn, rows, cfg.missing_eos_penalty) for", "[rate(score_fn, rows) for"),
    ("rate: the same reply to other prompts",
     "    score_of = dict(zip(unique, scores))\n    return [score_of[row] -",
     "    score_of = dict(zip([row.reply for row in unique], scores))\n    return [score_of[row.reply] -"),
    ("sign of the KL term", "-kl_coef * (log_probs - ref_log_probs), 0)", "kl_coef * (log_probs - ref_log_probs), 0)"),
    ("token_rewards: mask forgotten", "rewards = torch.where(mask, -kl_coef * (log_probs - ref_log_probs), 0)",
     "rewards = -kl_coef * (log_probs - ref_log_probs)"),
    ("score one position late", "mask.sum(dim=1, keepdim=True) - 1  ", "mask.sum(dim=1, keepdim=True)  "),
    ("score one position early", "mask.sum(dim=1, keepdim=True) - 1  ", "mask.sum(dim=1, keepdim=True) - 2  "),
    ("score on the last column", "is_last = column == mask.sum(dim=1, keepdim=True) - 1",
     "is_last = (column == mask.shape[1] - 1).expand_as(mask)"),
    ("score at every token", "is_last = column == mask.sum(dim=1, keepdim=True) - 1",
     "is_last = column < mask.sum(dim=1, keepdim=True)"),
    ("score in place of the last KL", "return rewards + torch.where(is_last, scores.unsqueeze(1), 0)",
     "return torch.where(is_last, scores.unsqueeze(1), rewards)"),
    ("TD: gamma * V(s_t)", "gamma * next_values - values, 0)", "gamma * values - values, 0)"),
    ("TD: gamma * V(s_t+2)", "F.pad(values[:, 1:], (0, 1))", "F.pad(values[:, 2:], (0, 2))"),
    ("TD: the last value bootstraps on itself", "F.pad(values[:, 1:], (0, 1))",
     "torch.cat([values[:, 1:], values[:, -1:]], dim=1)"),
    ("TD: V of the padding", "    values = torch.where(mask, values, 0)\n    next", "    next"),
    ("TD: gamma forgotten", "rewards + gamma * next_values", "rewards + next_values"),
    ("TD: mask forgotten in the result", "return torch.where(mask, rewards + gamma * next_values - values, 0)",
     "return rewards + gamma * next_values - values"),
    ("GAE: lambda without gamma", "deltas[:, t] + gamma * lam *", "deltas[:, t] + lam *"),
    ("GAE: forwards", "for t in reversed(range(deltas.shape[1])):", "for t in range(deltas.shape[1]):"),
    ("returns without V", "torch.where(mask, advantages + values, 0)", "torch.where(mask, advantages, 0)"),
    ("returns: mask forgotten", "torch.where(mask, advantages + values, 0)", "advantages + values"),
    ("returns from whitened advantages", "        advantages = whiten(advantages, mask)\n",
     "        advantages = whiten(advantages, mask)\n        returns = torch.where(mask, advantages + values, 0)\n"),
    ("moments: mean over the padding", "mean = sum(gather([torch.where(mask, x, 0).sum().item()]))",
     "mean = sum(gather([x.sum().item()]))"),
    ("moments: variance over the padding", "torch.where(mask, (x - mean) ** 2, 0).sum().item()]))",
     "((x - mean) ** 2).sum().item()]))"),
    ("whiten: rewards lose their mean", "white if shift_mean else white + mean", "white"),
    ("whiten: mask forgotten", "return torch.where(mask, white if shift_mean else white + mean, 0)",
     "return white if shift_mean else white + mean"),
    ("whiten: divided by the variance", "(variance + 1e-8) ** -0.5", "(variance + 1e-8) ** -1"),
    ("rollout: reference read from the actor", "read_all(reference, batch, cfg)", "read_all(actor, batch, cfg)"),
    ("rollout: rewards lose their mean", "whiten(rewards, mask, shift_mean=False)", "whiten(rewards, mask)"),
    ("rollout: gamma and lambda swapped", "mask, cfg.gamma, cfg.lam)", "mask, cfg.lam, cfg.gamma)"),
    ("collect: beta is always the default", "scores, mask, cfg.kl_coef)", "scores, mask, Config.kl_coef)"),
    # ---- 5  Phase II -------------------------------------------------------------------------------------------------
    ("min to max in the surrogate", "torch.min(surrogate, clipped)", "torch.max(surrogate, clipped)"),
    ("clip without min", "-masked_mean(torch.min(surrogate, clipped), mask)", "-masked_mean(clipped, mask)"),
    ("no clip", "-masked_mean(torch.min(surrogate, clipped), mask)", "-masked_mean(surrogate, mask)"),
    ("sign of the surrogate", "return -masked_mean(torch.min", "return masked_mean(torch.min"),
    ("epsilon on the upper side only", "ratio.clamp(1 - clip_eps, 1 + clip_eps)", "ratio.clamp(max=1 + clip_eps)"),
    ("epsilon on the lower side only", "ratio.clamp(1 - clip_eps, 1 + clip_eps)", "ratio.clamp(min=1 - clip_eps)"),
    ("ratio inverted",
     "torch.where(mask, log_probs - old_log_probs, 0))", "torch.where(mask, old_log_probs - log_probs, 0))"),
    ("ratio: mask forgotten", "torch.exp(torch.where(mask, log_probs - old_log_probs, 0))",
     "torch.exp(log_probs - old_log_probs)"),
    ("policy loss: mask forgotten", "-masked_mean(torch.min(surrogate, clipped), mask)",
     "-torch.min(surrogate, clipped).mean()"),
    ("clip fraction: tokens outside the leash", "masked_mean((clipped < surrogate).float(), mask)",
     "masked_mean(((ratio - 1).abs() > clip_eps).float(), mask)"),
    ("clip fraction: mask forgotten", "masked_mean((clipped < surrogate).float(), mask)",
     "(clipped < surrogate).float().mean()"),
    ("value loss: mask forgotten",
     "error = torch.where(mask, values - returns, 0) ** 2", "error = (values - returns) ** 2"),
    ("value loss: no 1/2", "return 0.5 * masked_mean(error, mask)", "return masked_mean(error, mask)"),
    ("value clip around the returns", "near = old_values + (values - old_values).clamp(",
     "near = returns + (values - returns).clamp("),
    ("value clip: the smaller error", "error = torch.max(error, torch.where", "error = torch.min(error, torch.where"),
    ("value clip: mask forgotten", "torch.max(error, torch.where(mask, near - returns, 0) ** 2)",
     "torch.max(error, (near - returns) ** 2)"),
    ("value clip around the present values",
     "rollout.values[index], cfg.value_clip)", "values.detach(), cfg.value_clip)"),
    ("old log-probs recomputed each time", "policy_loss(log_probs, old_log_probs, rollout",
     "policy_loss(log_probs, log_probs.detach(), rollout"),
    ("ratio against the reference", "rollout.mask[index], rollout.log_probs[index]",
     "rollout.mask[index], rollout.ref_log_probs[index]"),
    ("advantages from the present critic, no detach", "old_log_probs, rollout.advantages[index], mask",
     "old_log_probs, rollout.returns[index] - values, mask"),
    ("advantages not shuffled along", "rollout.advantages[index], mask", "rollout.advantages[:len(index)], mask"),
    ("returns not shuffled along", "rollout.returns[index], mask", "rollout.returns[:len(index)], mask"),
    ("critic learns the advantages", "rollout.returns[index], mask", "rollout.advantages[index], mask"),
    ("critic learns the rewards", "rollout.returns[index], mask", "rollout.rewards[index], mask"),
    ("c_V forgotten", "cfg.vf_coef * v_loss", "v_loss"),
    ("sign of the entropy bonus", "- cfg.ent_coef * mean_entropy", "+ cfg.ent_coef * mean_entropy"),
    ("entropy: mask forgotten", "masked_mean(entropy(logits if cfg.ent_coef else logits.detach()), mask)",
     "entropy(logits if cfg.ent_coef else logits.detach()).mean()"),
    ("entropy: never any gradient", "entropy(logits if cfg.ent_coef else logits.detach())", "entropy(logits.detach())"),
    ("approx_kl: sign", "log_ratio.exp() - 1 - log_ratio", "log_ratio.exp() - 1 + log_ratio"),
    ("first_log_ratio is the mean of all", ' | {"first_log_ratio": history[0]["first_log_ratio"]}', ""),
    ("minibatches: no shuffling", "torch.randperm(len(rollout.mask)", "torch.arange(len(rollout.mask)"),
    ("minibatches: a part is never used", ".chunk(cfg.minibatches)]", ".chunk(cfg.minibatches)[:1]]"),
    ("only one epoch", "for _ in range(cfg.ppo_epochs)\n", "for _ in range(1)\n"),
    ("explained variance: of V, not of G",
     "max(moments(returns, mask)[1], 1e-8)", "max(moments(values, mask)[1], 1e-8)"),
    ("beta adapts the wrong way", "min(max(kl / target - 1, -0.2), 0.2)", "min(max(1 - kl / target, -0.2), 0.2)"),
    ("metric: sign of the KL",
     "(r.log_probs - r.ref_log_probs).sum(dim=1)", "(r.ref_log_probs - r.log_probs).sum(dim=1)"),
    ("metric: sign of beta in the objective", '"objective": score - kl_coef * kl', '"objective": score + kl_coef * kl'),
    # ---- 6  The loop -------------------------------------------------------------------------------------------------
    ("loop: test prompts in training", 'rng.choices(prompts["train"], k=cfg.batch_size',
     "rng.choices(sum(prompts.values(), []), k=cfg.batch_size"),
    ("loop: replies_per_prompt makes the batch larger", "k=cfg.batch_size // cfg.replies_per_prompt)",
     "k=cfg.batch_size)"),
    ("loop: Adam's usual 0.999", "betas=(0.9, 0.95), ", ""),
    ("loop: Adam's usual 1e-8", "eps=1e-5, ", ""),
    ("loop: schedule not stepped", "        schedule.step()\n        if (cycle", "        if (cycle"),
    ("loop: beta adapts from the start value", 'adapt_kl_coef(log[-1]["kl_coef"],', "adapt_kl_coef(Config.kl_coef,"),
    ("loop: validation on training prompts", 'score_fn, prompts["validation"], 16', 'score_fn, prompts["train"], 16'),
    ("loop: keeps the worst policy",
     'row["validation"] > metrics["validation"] + luck', 'row["validation"] < metrics["validation"] + luck'),
    ("loop: a lucky validation beats all later ones", 'metrics["validation"] + luck', 'metrics["validation"]'),
    ("loop: the first policy is kept", 'metrics["validation"] + luck', 'metrics["validation"] - luck'),
    ("loop: keeps the last policy", "    actor.load_state_dict(best.state_dict())\n", ""),
    ("loop: best is the actor itself", "best, log = frozen(actor), []", "best, log = actor, []"),
    ("loop: the last cycle is not validated",
     "cfg.eval_every == 0 or cycle + 1 == cfg.cycles:", "cfg.eval_every == 0:"),
    # ---- 7  The report -----------------------------------------------------------------------------------------------
    ("report: on validation prompts",
     'test, N = data.prompts["test"][:20]', 'test, N = data.prompts["validation"][:20]'),
    ("report: PPO's line is SFT's", '("sft", reference), ("ppo", policy))', '("sft", reference), ("ppo", reference))'),
    ("evaluate: replies of the prompts mixed up", "[prompt for prompt in prompts[:20] for _ in range(N)]",
     "[prompt for _ in range(N) for prompt in prompts[:20]]"),
    ("quality: own rankings read backwards", "range(len(rows), 0, -1)", "range(len(rows))"),
    ("quality: equal pairs count", " if abs(h - other) > 0]", "]"),
    ("J*: mean in place of logsumexp", "(log_weights.logsumexp(dim=1) - math.log(scores.shape[1]))",
     "log_weights.mean(dim=1)"),
    ("J*: sum in place of mean", " - math.log(scores.shape[1]))", ")"),
    ("J*: beta forgotten in front", "j_star = kl_coef * (log", "j_star = (log"),
    ("J*: all prompts in one", "weights = log_weights.softmax(dim=1)",
     "log_weights = log_weights.view(1, -1)\n    weights = log_weights.softmax(dim=1)"),
    ("effective sample size: 1 / largest weight", "1 / (weights ** 2).sum(dim=1)", "1 / weights.amax(dim=1)"),
    ("fraction: not counted from SFT", "(j_ppo - j_sft) / (j_star - j_sft)", "j_ppo / j_star"),
    ("fraction: SFT's objective is the pretrained model's",
     'j_sft, j_ppo = report["sft"]', 'j_sft, j_ppo = report["pretrained"]'),
    ("win rate: ties are losses", "((1 + difference.sign()) / 2 + 0 * difference)",
     "((difference > 0).float() + 0 * difference)"),
    ("win rate: SFT's", "human.unsqueeze(2) - sft.unsqueeze(1)", "sft.unsqueeze(1) - human.unsqueeze(2)"),
    ("win rate: across prompts", "for lines in (table, sft_table))", "for lines in (table, sft_table))\n"
     "    human, sft = human.view(1, -1), sft.view(1, -1)"),
    # ---- 8  Files, and main ------------------------------------------------------------------------------------------
    ("an earlier run is overwritten",
     'check({*os.listdir(cfg.out)} <= {"config.json.tmp"}, "it is not empty")', "pass"),
    ("heads are not loaded", '        model.head.load_state_dict(load_file(folder / "heads.safetensors"))\n', ""),
    ("classifier: a long prompt hides the reply", 'tokenizer.truncation_side = "left"',
     'tokenizer.truncation_side = "right"'),
    ("classifier: its first label", "id2label[classify.model.config.num_labels - 1]", "id2label[0]"),
    ("classifier: does not see the prompt", "classify([prompt + reply for", "classify([reply for"),
    ("fast products: on any processor", 'not ("AMD" in cpu.get("cpu_name", "") and cpu["avx512_f"]) or ', ""),
    ("fast products: beside a GPU", ' and cpu["avx512_f"]) or torch.cuda.is_available():', ' and cpu["avx512_f"]):'),
    ("fast products: bfloat16's instructions not hidden",
     '    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"', "    pass"),
    ("fast products: never off again", "        matmul.fp32_precision = before", "        pass"),
    ("fast products: attention fused", "nn.attention.SDPBackend.MATH", "nn.attention.SDPBackend.FLASH_ATTENTION"),
]


def stop(message: str):
    """End with one line and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def mutant(script: str, name: str, old: str, new: str) -> str:
    """The script with one bug. Stops here when the entry is wrong: it would be counted as caught, or as nothing."""
    if script.count(old) != 1 or old == new:
        stop(f"{name!r}: its text occurs {script.count(old)} times in {SCRIPT.name}, not once")
    try:
        compile(bad := script.replace(old, new), name, "exec")
    except SyntaxError as error:
        stop(f"{name!r} is no Python: {error}")
    return bad


def run_tests(script: str, limit: float | None) -> tuple[str, float]:
    """Run the tests on this text in a folder of their own -> (what caught it, or "" if nothing did; seconds)."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shutil.copytree(ROOT, folder, ignore=NEEDLESS, dirs_exist_ok=True)  # there are tests that read the texts
        Path(folder, SCRIPT.name).write_text(script, encoding="utf-8")
        Path(folder, "conftest.py").write_text(CONFTEST)
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--rootdir", folder,
             "--basetemp", Path(folder, "tmp"), "test_ppo_rlhf.py"], cwd=folder, start_new_session=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        try:
            shown = process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            return f"nothing ended within {limit:.0f} s", time.perf_counter() - start
        finally:  # the tests start processes of their own, which must not outlive them
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", shown, re.MULTILINE)
    last_line = shown.strip().splitlines()[-1] if shown.strip() else ""
    return (failed[0] if failed else last_line) if process.returncode else "", time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="NAME", help="only the bugs with NAME in their name")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time; 1 GB and a core each")
    options = parser.parse_args()
    script = SCRIPT.read_text(encoding="utf-8")
    mutants = [(name, mutant(script, name, *texts)) for name, *texts in BUGS]  # all are checked, --only or not
    if not len(dict(mutants)) == len({text for _, text in mutants}) == len(mutants):
        stop("a bug or a name is there twice")
    mutants = [(name, text) for name, text in mutants if options.only in name]
    if not mutants:
        stop(f"no bug has {options.only!r} in its name")

    failed, seconds = run_tests(script, None)
    if failed:
        stop(f"the tests fail without any bug: {failed}")
    print(f"{'(no bug)':54} {seconds:6.1f} s  passes", flush=True)
    limit, survivors = 60 + 3 * seconds * options.jobs, []
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            for (name, _), (caught, seconds) in zip(mutants, pool.map(lambda item: run_tests(item[1], limit), mutants)):
                survivors += [] if caught else [name]
                print(f"{name:54} {seconds:6.1f} s  {caught or 'SURVIVED'}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # the tests that run now are waited for
            raise
    share = 1 - len(survivors) / len(mutants)
    print(f"\n{len(mutants) - len(survivors)} of {len(mutants)} caught: {share:.1%}", *survivors, sep="\n  survived: ")
    sys.exit(share < ENOUGH)


if __name__ == "__main__":
    main()
