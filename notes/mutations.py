"""Would the tests notice a bug? Put small bugs into a copy of ppo_rlhf.py, one at a time, and run the tests on each.

    python notes/mutations.py                    # all of BUGS: one to two hours on one core
    python notes/mutations.py --jobs 4           # four at a time
    python notes/mutations.py --only detach      # those with this in their name
    python notes/mutations.py --check            # no tests: does every entry of BUGS fit the script?

A bug is caught when a test fails, or when nothing ends any more. A bug that survives is a promise without a test, or it
is no bug at all (then it does not belong here). Each entry is a name, a text that occurs exactly once in the script,
and the text that takes its place. When the script has changed and the text is gone, this program stops and says so.
Then change the entry, or drop it.

The tests are test_ppo_rlhf.py and notes/evidence/, without those of the pages in notes/. The quick tests come first.
Prints a line for each bug: what caught it, or SURVIVED, and the seconds. Exit status: 0 when 95% or more are caught; 1
when not; 2 when an entry does not fit the script, or the tests fail without any bug. Needs Linux or macOS.
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
# The tests of the pages would fail for another reason: the pages quote the script.
TESTS = ["test_ppo_rlhf.py"] + [f"notes/evidence/{path.name}" for path in sorted(ROOT.glob("notes/evidence/test_*.py"))
                                if path.name != "test_notes.py"]
NEEDLESS = shutil.ignore_patterns(".*", "__pycache__", "runs", "venv")
ENOUGH = 0.95

# Most bugs fall to a test that takes milliseconds. So these come first, and whole runs and several processes last.
CONFTEST = '''
import inspect

def cost(item):
    source = inspect.getsource(item.function)
    if "launch(" in source or "subprocess" in source or {"workers", "swapped"} & {*item.fixturenames}:
        return 2
    return "ppo.main(" in source or "run" in item.fixturenames or "converges" in item.name

def pytest_collection_modifyitems(items):
    items.sort(key=cost)
'''

BUGS = [
    # ---- 1  The six steps: sampling --------------------------------------------------------------
    ("sampling: temperature forgotten",
     "(logits.double() / temperature)", "logits.double()"),
    ("sampling: temperature inverted",
     "(logits.double() / temperature)", "(logits.double() * temperature)"),
    ("sampling: one random number for all",
     "torch.rand(len(logits), 1, dtype", "torch.rand(1, 1, dtype"),
    ("generate: padding on the left is read",
     "ids, mask, cache = prompt_ids, prompt_mask, None",
     "ids, mask, cache = prompt_ids, torch.ones_like(prompt_mask), None"),
    ("generate: the new token is not looked at",
     "torch.cat([mask, running.unsqueeze(1)], dim=1)",
     "torch.cat([mask, torch.zeros_like(running).unsqueeze(1)], dim=1)"),
    ("generate: the cache is not told the position",
     "position_ids(mask)[:, -ids.shape[1]:]", "position_ids(mask)[:, :ids.shape[1]]"),
    ("generate: filled up with EOS",
     "torch.where(running, tokens, pad_id)", "torch.where(running, tokens, eos_id)"),
    ("generate: tokens behind EOS stay",
     "        tokens = torch.where(running, tokens, pad_id)\n", ""),
    ("generate: EOS outside the mask",
     "mask_columns.append(running)", "mask_columns.append(running & (tokens != eos_id))"),
    ("generate: mask True after EOS",
     "mask_columns.append(running)", "mask_columns.append(torch.ones_like(running))"),
    ("generate: mask from ids != pad",
     "torch.stack(mask_columns, dim=1)", "torch.stack(reply_columns, dim=1) != pad_id"),
    ("generate: goes on after EOS",
     "running = running & (tokens != eos_id)", "running = running & True"),
    ("generate: stops with the first EOS",
     "if not running.any():", "if not running.all():"),
    ("generate: one token too few",
     "for _ in range(max_new_tokens):", "for _ in range(max_new_tokens - 1):"),
    ("log-probs of the chosen token not normalised",
     "return chosen - logits.logsumexp(dim=-1)", "return chosen - logits.amax(dim=-1)"),
    # ---- rewards ---------------------------------------------------------------------------------
    ("token_rewards: sign of the KL",
     "return -kl_coef * kl + score_at_end", "return kl_coef * kl + score_at_end"),
    ("token_rewards: mask forgotten",
     "kl = torch.where(mask, log_probs - ref_log_probs, 0)", "kl = log_probs - ref_log_probs"),
    ("token_rewards: score one position late",
     "last = mask.sum(dim=1, keepdim=True) - 1", "last = mask.sum(dim=1, keepdim=True)"),
    ("token_rewards: score one position early",
     "last = mask.sum(dim=1, keepdim=True) - 1", "last = mask.sum(dim=1, keepdim=True) - 2"),
    ("token_rewards: score on the last column",
     "torch.where(column == last, scores", "torch.where(column == mask.shape[1] - 1, scores"),
    ("token_rewards: score at every token",
     "torch.where(column == last, scores", "torch.where(column <= last, scores"),
    ("token_rewards: score in place of the last KL",
     "return -kl_coef * kl + score_at_end",
     "return torch.where(column == last, score_at_end, -kl_coef * kl)"),
    # ---- the critic ------------------------------------------------------------------------------
    ("critic: the first values are random",
     "    nn.init.zeros_(head[-1].weight)", "    nn.init.normal_(head[-1].weight)"),
    ("critic: detach is missing",
     "head(hidden.detach().float())", "head(hidden.float())"),
    # ---- TD residuals, GAE, whitening ------------------------------------------------------------
    ("TD: gamma * V(s_t)",
     "rewards + gamma * next_values - values", "rewards + gamma * values - values"),
    ("TD: gamma * V(s_t+2)",
     "F.pad(values[:, 1:], (0, 1))", "F.pad(values[:, 2:], (0, 2))"),
    ("TD: the last value bootstraps on itself",
     "F.pad(values[:, 1:], (0, 1))", "torch.cat([values[:, 1:], values[:, -1:]], dim=1)"),
    ("TD: V of the padding",
     "    values = torch.where(mask, values, 0)", "    values = values.clone()"),
    ("TD: gamma forgotten",
     "rewards + gamma * next_values", "rewards + next_values"),
    ("TD: mask forgotten in the result",
     "return torch.where(mask, rewards + gamma * next_values - values, 0)",
     "return rewards + gamma * next_values - values"),
    ("GAE: lambda without gamma",
     "deltas[:, t] + gamma * lam * advantage", "deltas[:, t] + lam * advantage"),
    ("GAE: gamma without lambda",
     "deltas[:, t] + gamma * lam * advantage", "deltas[:, t] + gamma * advantage"),
    ("GAE: forwards",
     "for t in reversed(range(deltas.shape[1])):", "for t in range(deltas.shape[1]):"),
    ("returns: without V",
     "returns = torch.where(mask, advantages + values, 0)",
     "returns = torch.where(mask, advantages, 0)"),
    ("returns: mask forgotten",
     "returns = torch.where(mask, advantages + values, 0)", "returns = advantages + values"),
    ("moments: mean over the padding",
     "mean = add_up(torch.where(mask, x, 0).sum().item())", "mean = add_up(x.sum().item())"),
    ("moments: variance over the padding",
     "add_up(torch.where(mask, (x - mean) ** 2, 0).sum().item())",
     "add_up(((x - mean) ** 2).sum().item())"),
    ("whiten: the mean is not added again",
     "        white = white + mean\n", "        pass\n"),
    ("whiten: shift_mean read the other way",
     "    if not shift_mean:\n", "    if shift_mean:\n"),
    ("whiten: mask forgotten",
     "return torch.where(mask, white, 0)", "return white"),
    ("whiten: divided by the variance",
     "math.sqrt(variance + 1e-8)", "(variance + 1e-8)"),
    # ---- the three losses ------------------------------------------------------------------------
    ("masked_mean: x * mask",
     "return torch.where(mask, x, 0).sum() / mask.sum()", "return (x * mask).sum() / mask.sum()"),
    ("masked_mean: mask forgotten",
     "return torch.where(mask, x, 0).sum() / mask.sum()", "return x.mean()"),
    ("masked_mean: over the padding too",
     "return torch.where(mask, x, 0).sum() / mask.sum()",
     "return torch.where(mask, x, 0).sum() / mask.numel()"),
    ("masked_mean: mean of the replies' means",
     "return torch.where(mask, x, 0).sum() / mask.sum()",
     "return (torch.where(mask, x, 0).sum(-1) / mask.sum(-1)).mean()"),
    ("policy loss: max for min",
     "torch.min(unclipped, clipped)", "torch.max(unclipped, clipped)"),
    ("policy loss: clip without min",
     "-masked_mean(torch.min(unclipped, clipped), mask)", "-masked_mean(clipped, mask)"),
    ("policy loss: no clip",
     "-masked_mean(torch.min(unclipped, clipped), mask)", "-masked_mean(unclipped, mask)"),
    ("policy loss: sign",
     "loss = -masked_mean(torch.min", "loss = masked_mean(torch.min"),
    ("policy loss: epsilon on the upper side only",
     "ratio.clamp(1 - clip_eps, 1 + clip_eps)", "ratio.clamp(max=1 + clip_eps)"),
    ("policy loss: epsilon on the lower side only",
     "ratio.clamp(1 - clip_eps, 1 + clip_eps)", "ratio.clamp(min=1 - clip_eps)"),
    ("policy loss: ratio inverted",
     "torch.where(mask, log_probs - old_log_probs, 0)",
     "torch.where(mask, old_log_probs - log_probs, 0)"),
    ("policy loss: mask forgotten in the ratio",
     "torch.exp(torch.where(mask, log_probs - old_log_probs, 0))",
     "torch.exp(log_probs - old_log_probs)"),
    ("policy loss: mask forgotten in the mean",
     "-masked_mean(torch.min(unclipped, clipped), mask)", "-torch.min(unclipped, clipped).mean()"),
    ("clip fraction: all tokens outside the interval",
     "braked = clipped < unclipped", "braked = (ratio - 1).abs() > clip_eps"),
    ("clip fraction: mask forgotten",
     "masked_mean(braked.float(), mask)", "braked.float().mean()"),
    ("value loss: mask forgotten",
     "error = torch.where(mask, values - returns, 0) ** 2", "error = (values - returns) ** 2"),
    ("value loss: no 1/2",
     "return 0.5 * masked_mean(error, mask)", "return masked_mean(error, mask)"),
    ("value clip: around the returns",
     "near = old_values + (values - old_values).clamp(",
     "near = returns + (values - returns).clamp("),
    ("value clip: the smaller error",
     "error = torch.max(error, torch.where", "error = torch.min(error, torch.where"),
    ("value clip: mask forgotten",
     "torch.max(error, torch.where(mask, near - returns, 0) ** 2)",
     "torch.max(error, (near - returns) ** 2)"),
    ("entropy: mean in place of sum",
     "(log_probs.exp() * log_probs).sum(dim=-1)", "(log_probs.exp() * log_probs).mean(dim=-1)"),
    ("entropy: NaN for an impossible token",
     "logits.log_softmax(dim=-1).clamp(min=-1e9)", "logits.log_softmax(dim=-1)"),
    # ---- 2  The models ---------------------------------------------------------------------------
    ("positions: the padding counts",
     "return (mask.long().cumsum(dim=1) - 1).clamp(min=0)",
     "return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)"),
    ("dropout is on",
     "self.lm = lm.eval()", "self.lm = lm.train()"),
    ("the head is as wide as the embeddings",
     "lm.get_output_embeddings().weight.shape[1]", "lm.config.get_text_config().hidden_size"),
    ("actor: attention to the padding",
     "attention_mask=mask[:, :-1].long(),", "attention_mask=torch.ones_like(mask[:, :-1]).long(),"),
    ("actor: no position ids",
     "position_ids=positions[:, :-1], logits_to_keep=T", "logits_to_keep=T"),
    ("actor: logits one position late",
     "input_ids=ids[:, :-1], attention_mask=mask[:, :-1].long(),\n"
     "                      position_ids=positions[:, :-1], logits_to_keep=T",
     "input_ids=ids, attention_mask=mask.long(),\n"
     "                      position_ids=positions, logits_to_keep=T"),
    ("actor: bfloat16 in the losses",
     "return out.logits.float(), state_values", "return out.logits, state_values"),
    ("critic: V knows the token",
     "out.hidden_states[-1][:, -T:]", "out.hidden_states[-1][:, -T:].roll(-1, 1)"),
    ("critic: V one position late",
     "out.hidden_states[-1][:, -T:]", "out.hidden_states[-1][:, -T:].roll(1, 1)"),
    ("sampler: attention to the padding",
     "attention_mask=mask.long(), position_ids=positions,",
     "attention_mask=torch.ones_like(mask).long(), position_ids=positions,"),
    ("sampler: no position ids",
     "attention_mask=mask.long(), position_ids=positions,", "attention_mask=mask.long(),"),
    ("sampler: bfloat16 logits",
     "return out.logits[:, -1].float(), out.past_key_values",
     "return out.logits[:, -1], out.past_key_values"),
    ("reward model: attention to the padding",
     "attention_mask=mask.long(), position_ids=position_ids(mask),",
     "attention_mask=torch.ones_like(mask).long(), position_ids=position_ids(mask),"),
    ("reward model: no position ids",
     "attention_mask=mask.long(), position_ids=position_ids(mask),", "attention_mask=mask.long(),"),
    ("reward model: reads column -1",
     "last = prompt_ids.shape[1] + reply_mask.sum(dim=1) - 1",
     "last = ids.shape[1] - 1 + 0 * reply_mask.sum(dim=1)"),
    ("reward model: reads the token before EOS",
     "last = prompt_ids.shape[1] + reply_mask.sum(dim=1) - 1",
     "last = prompt_ids.shape[1] + reply_mask.sum(dim=1) - 2"),
    ("reference is the actor itself",
     "return copy.deepcopy(model).requires_grad_(False)", "return model"),
    # ---- 3  Phase I ------------------------------------------------------------------------------
    ("rollout[index]: the first advantages",
     "setattr(selected, name, x[index])",
     'setattr(selected, name, x[:len(x[index])] if name == "advantages" else x[index])'),
    ("rollout[index]: the first returns",
     "setattr(selected, name, x[index])",
     'setattr(selected, name, x[:len(x[index])] if name == "returns" else x[index])'),
    ("rollout[index]: the first log-probs",
     "setattr(selected, name, x[index])",
     'setattr(selected, name, x[:len(x[index])] if name == "log_probs" else x[index])'),
    ("rollout[index]: all groups",
     "            if torch.is_tensor(x):\n",
     '            if torch.is_tensor(x) and name != "group":\n'),
    ("rollout[index]: all scores",
     "            if torch.is_tensor(x):\n",
     '            if torch.is_tensor(x) and name != "scores":\n'),
    ("rollout[index]: the first replies",
     "selected.replies = [self.replies[i] for i in numbers]",
     "selected.replies = self.replies[:len(numbers)]"),
    ("finished: shorter than the limit",
     "finished = ended.any(dim=1).tolist()",
     "finished = (mask.sum(dim=1) < cfg.max_new_tokens).tolist()"),
    ("finished: always",
     "finished = ended.any(dim=1).tolist()", "finished = [True] * len(mask)"),
    ("replies: <eos> is part of the text",
     "skip_special_tokens=True", "skip_special_tokens=False"),
    ("group: all equal",
     "[prompts.index(prompt) for prompt in prompts]", "[0 for prompt in prompts]"),
    ("group: all different",
     "[prompts.index(prompt) for prompt in prompts]", "[*range(len(prompts))]"),
    ("temperature only in sampling",
     "    logits = logits / temperature\n", ""),
    ("reading: mask forgotten in the log-probs",
     "log_probs.append(torch.where(part.mask, part_log_probs, 0))",
     "log_probs.append(part_log_probs)"),
    ("reading: mask forgotten in the values",
     "values.append(torch.where(part.mask, part_values, 0))", "values.append(part_values)"),
    ("penalty: for the replies that end",
     "[not reply.finished for reply in replies]", "[reply.finished for reply in replies]"),
    ("penalty: absent",
     "return scores - cfg.missing_eos_penalty * unfinished", "return scores"),
    ("penalty: sign",
     "return scores - cfg.missing_eos_penalty * unfinished",
     "return scores + cfg.missing_eos_penalty * unfinished"),
    ("rollout: reference read from the actor",
     "read_without_gradient(reference, rollout, cfg)",
     "read_without_gradient(actor, rollout, cfg)"),
    ("rollout: always whitened",
     "    if cfg.whiten_advantages:\n", "    if True:\n"),
    ("rollout: never whitened",
     "    if cfg.whiten_advantages:\n", "    if False:\n"),
    ("returns: from whitened advantages",
     "        rollout.advantages = whiten(rollout.advantages, rollout.mask)\n",
     "        rollout.advantages = whiten(rollout.advantages, rollout.mask)\n"
     "        rollout.returns = rollout.advantages + rollout.values\n"),
    # ---- swap points -----------------------------------------------------------------------------
    ("swap: assign_rewards is not called",
     "rollout.rewards = assign_rewards(rollout, cfg)",
     "rollout.rewards = token_rewards(rollout.log_probs, rollout.ref_log_probs, rollout.scores,"
     " rollout.mask, cfg.kl_coef)"),
    ("swap: estimate_advantages is not called",
     "rollout.advantages, rollout.returns = estimate_advantages(rollout, cfg)",
     "rollout.advantages, rollout.returns = gae(rollout.rewards, rollout.values, rollout.mask,"
     " cfg.gamma, cfg.lam)"),
    ("swap: actor_loss is not called",
     "clip_fraction = actor_loss(log_probs, rollout, cfg)",
     "clip_fraction = policy_loss(log_probs, rollout.log_probs,"
     " rollout.advantages, rollout.mask, cfg.clip_eps)"),
    ("swap: critic_loss is not called",
     "v_loss = critic_loss(values, rollout, cfg)",
     "v_loss = value_loss(values, rollout.returns, rollout.mask)"),
    ("swap: the report uses it",
     "rollouts.append(sample_and_score(", "rollouts.append(collect_rollout("),
    ("swap: the X-ray uses it",
     "rewards = rewards_of(r.log_probs", "rewards = token_rewards(r.log_probs"),
    ("assign_rewards: beta is always the default",
     "rollout.mask,\n                         cfg.kl_coef)",
     "rollout.mask,\n                         PPOConfig.kl_coef)"),
    ("estimate_advantages: gamma and lambda exchanged",
     "rollout.mask, cfg.gamma, cfg.lam)", "rollout.mask, cfg.lam, cfg.gamma)"),
    ("actor_loss: old log-probs are the new ones",
     "policy_loss(log_probs, rollout.log_probs,", "policy_loss(log_probs, log_probs.detach(),"),
    ("actor_loss: ratio against the reference",
     "policy_loss(log_probs, rollout.log_probs,", "policy_loss(log_probs, rollout.ref_log_probs,"),
    ("critic_loss: learns the advantages",
     "value_loss(values, rollout.returns, rollout.mask)",
     "value_loss(values, rollout.advantages, rollout.mask)"),
    ("critic_loss: learns the rewards",
     "value_loss(values, rollout.returns, rollout.mask)",
     "value_loss(values, rollout.rewards, rollout.mask)"),
    # ---- Phase II --------------------------------------------------------------------------------
    ("update: advantages from the present critic, no detach",
     "    pg_loss, clip_fraction = actor_loss(log_probs, rollout, cfg)",
     "    rollout.advantages = rollout.returns - values\n"
     "    pg_loss, clip_fraction = actor_loss(log_probs, rollout, cfg)"),
    ("update: c_V forgotten",
     "cfg.vf_coef * v_loss", "v_loss"),
    ("update: sign of the entropy bonus",
     "- cfg.ent_coef * mean_entropy", "+ cfg.ent_coef * mean_entropy"),
    ("update: mask forgotten in the entropy",
     "masked_mean(entropy(logits), rollout.mask)", "entropy(logits).mean()"),
    ("update: the entropy has no gradient",
     "masked_mean(entropy(logits), rollout.mask)",
     "masked_mean(entropy(logits.detach()), rollout.mask)"),
    ("update: parts are weighed by replies",
     "return loss, rollout.mask.sum(), metrics",
     "return loss, torch.tensor(len(rollout)), metrics"),
    ("approx_kl: sign",
     "log_ratio.exp() - 1 - log_ratio", "log_ratio.exp() - 1 + log_ratio"),
    ("first_log_ratio: the mean of all",
     '    metrics["first_log_ratio"] = history[0]["first_log_ratio"]\n', ""),
    ("metric lr: the critic's",
     'optimizer.param_groups[0]["lr"]', 'optimizer.param_groups[1]["lr"]'),
    ("minibatches: no shuffling",
     "torch.randperm(len(rollout)", "torch.arange(len(rollout)"),
    ("minibatches: a part is never used",
     "order.chunk(cfg.minibatches):", "order.chunk(cfg.minibatches)[:1]:"),
    ("epochs: only one",
     "range(cfg.ppo_epochs)", "range(1)"),
    # ---- the loop --------------------------------------------------------------------------------
    ("optimizer: Adam's usual 0.999",
     "betas=(0.9, 0.95), ", ""),
    ("optimizer: Adam's usual 1e-8",
     "eps=1e-5, ", ""),
    ("optimizer: weight decay",
     "weight_decay=0.0", "weight_decay=0.01"),
    ("optimizer: the critic learns no faster",
     '"lr": 10 * cfg.lr}', '"lr": cfg.lr}'),
    ("loop: replies_per_prompt makes the batch larger",
     "k=cfg.batch_size // cfg.replies_per_prompt)", "k=cfg.batch_size)"),
    ("loop: each process replies to all prompts",
     "repeat_each(share(drawn), cfg.replies_per_prompt)",
     "repeat_each(drawn, cfg.replies_per_prompt)"),
    ("loop: test prompts in training",
     'draw_prompts(prompts["train"], rng, cfg)',
     "draw_prompts(sum(prompts.values(), []), rng, cfg)"),
    ("loop: the learning rate does not fall",
     "end_factor=0.0", "end_factor=1.0"),
    ("loop: schedule not stepped",
     "        schedule.step()\n        if cycle == 0:", "        if cycle == 0:"),
    ("loop: validation on training prompts",
     'score_fn, prompts["validation"], cfg)', 'score_fn, prompts["train"], cfg)'),
    ("loop: validation on test prompts",
     'score_fn, prompts["validation"], cfg)', 'score_fn, prompts["test"], cfg)'),
    ("loop: the last cycle is not validated",
     "cfg.eval_every == 0 or cycle + 1 == cfg.cycles:", "cfg.eval_every == 0:"),
    ("loop: keeps the last policy",
     "    actor.load_state_dict(best.state_dict())\n", ""),
    ("loop: best is the actor itself",
     "best = frozen(actor)", "best = actor"),
    ("is_best: keeps the worst policy",
     'earlier["validation"] > mean(objectives) + luck',
     'earlier["validation"] < mean(objectives) + luck'),
    ("is_best: a lucky validation beats all later ones",
     'earlier["validation"] > mean(objectives) + luck', 'earlier["validation"] > mean(objectives)'),
    ("is_best: the first policy is kept",
     'earlier["validation"] > mean(objectives) + luck',
     'earlier["validation"] > mean(objectives) - luck'),
    # ---- 4  The stages before PPO ----------------------------------------------------------------
    ("stages: schedule not stepped",
     "        schedule.step()\n    if losses:", "    if losses:"),
    ("SFT: gradient ascent",
     "masked_mean(-token_log_probs(logits, reply_ids), mask)",
     "masked_mean(token_log_probs(logits, reply_ids), mask)"),
    ("SFT: trains the pretrained model itself",
     "actor = copy.deepcopy(pretrained)", "actor = pretrained"),
    ("labels: Gumbel's sign",
     "gumbel = -math.log(rng.expovariate(1))", "gumbel = math.log(rng.expovariate(1))"),
    ("labels: the noise has no unit",
     "+ cfg.label_noise * gumbel", "+ gumbel"),
    ("labels: worst first",
     "sorted(zip(impressions, range(K)), reverse=True)", "sorted(zip(impressions, range(K)))"),
    ("ranking loss: inverted",
     "scores[:, better] - scores[:, worse]", "scores[:, worse] - scores[:, better]"),
    ("ranking loss: neighbours only",
     "-F.logsigmoid(scores[:, better] - scores[:, worse]).mean()",
     "-F.logsigmoid(scores[:, :-1] - scores[:, 1:]).mean()"),
    ("ranking loss: sum of the pairs",
     "- scores[:, worse]).mean()", "- scores[:, worse]).sum()"),
    ("reward model: parts are weighed by replies",
     "torch.tensor(len(losses)), {}", "torch.tensor(len(replies)), {}"),
    ("normalize: mean forgotten",
     "(last.bias.data - scores.mean().item()) / scale", "last.bias.data / scale"),
    ("normalize: deviation forgotten",
     "scale = max(scores.std().item(), 1e-6)", "scale = 1.0"),
    ("normalize: the mean after the scale",
     "(last.bias.data - scores.mean().item()) / scale",
     "last.bias.data / scale - scores.mean().item()"),
    ("normalize: the weights keep their scale",
     "    last.weight.data = last.weight.data / scale\n", ""),
    ("reward model: trains SFT's weights",
     "RewardModel(copy.deepcopy(sft.lm)", "RewardModel(sft.lm"),
    ("stage 2: begins with any random numbers",
     '    rng = reseed(cfg, "rankings")\n', "    rng = random.Random(0)\n"),
    ("stage 2: rankings of replies to test prompts",
     'known = split(WORLD_PROMPTS)["train"]', 'known = split(WORLD_PROMPTS)["test"]'),
    ("stage 2: the human ranks replies to prompts that it does not know",
     "label_rankings(sft, known, cfg, rng)", 'label_rankings(sft, data.prompts["train"], cfg, rng)'),
    ("quality: pairs without an opinion count", "if abs(points[i] - points[j]) > 0:", "if points[i] != points[j]:"),
    ("stage 2: normalised on test prompts",
     'rng.choices(data.prompts["train"], k=640)', 'rng.choices(data.prompts["test"], k=640)'),
    # ---- 5  The world ----------------------------------------------------------------------------
    ("human: an unfinished reply costs nothing",
     "    if not reply.finished:\n        points -= 1\n", ""),
    ("human: repetition costs nothing",
     "    if len(set(triples)) < len(triples):\n        points -= 1\n", ""),
    ("human: another topic's word is fine",
     "honest = WORDS.intersection(words) == {word}", "honest = word in words"),
    ("human: rudeness is rewarded",
     "    if not harmless:\n        points -= 2\n", "    if not harmless:\n        points += 2\n"),
    # ---- 6  The report ---------------------------------------------------------------------------
    ("describe: sign of the KL",
     "(rollout.log_probs - rollout.ref_log_probs).sum(dim=1)",
     "(rollout.ref_log_probs - rollout.log_probs).sum(dim=1)"),
    ("describe: KL is a mean over tokens",
     "(rollout.log_probs - rollout.ref_log_probs).sum(dim=1)",
     "(rollout.log_probs - rollout.ref_log_probs).mean(dim=1)"),
    ("describe: sign of beta in the objective",
     'line["objective"] = score - kl_coef * kl', 'line["objective"] = score + kl_coef * kl'),
    ("describe: each process has its own table",
     "    return gather(table)\n", "    return table\n"),
    ("evaluate: replies of the prompts mixed up",
     "share(repeat_each(prompts, N))", "share(prompts * N)"),
    ("validate: other random numbers every time",
     '    reseed(cfg, "validation")', '    torch.seed()'),
    ("explained variance: of V, not of G",
     "_, total = moments(rollout.returns, rollout.mask)",
     "_, total = moments(rollout.values, rollout.mask)"),
    ("quality: own rankings read backwards",
     "points = list(range(len(replies), 0, -1))", "points = list(range(len(replies)))"),
    ("quality: equal pairs count",
     "if abs(points[i] - points[j]) > 0:", "if True:"),
    ("quality: measured on training prompts",
     'sample_groups(sft, data.prompts["validation"][:20], 32, cfg)',
     'sample_groups(sft, data.prompts["train"][:20], 32, cfg)'),
    ("J*: all samples count as the policy's",
     "torch.logaddexp(log_ratios, torch.zeros_like(log_ratios)) - math.log(2)", "log_ratios"),
    ("J*: all samples count as the reference's",
     "torch.logaddexp(log_ratios, torch.zeros_like(log_ratios)) - math.log(2)",
     "torch.zeros_like(log_ratios)"),
    ("J*: sign of the log ratios",
     "torch.logaddexp(log_ratios, torch", "torch.logaddexp(-log_ratios, torch"),
    ("J*: the mixture is a sum",
     "torch.zeros_like(log_ratios)) - math.log(2)", "torch.zeros_like(log_ratios))"),
    ("J*: mean in place of logsumexp",
     "log_terms.logsumexp(dim=1) - math.log(scores.shape[1])", "log_terms.mean(dim=1)"),
    ("J*: sum in place of mean",
     "log_terms.logsumexp(dim=1) - math.log(scores.shape[1])", "log_terms.logsumexp(dim=1)"),
    ("J*: beta forgotten in front",
     "return kl_coef * log_z,", "return log_z,"),
    ("J*: all prompts in one",
     "log_terms.logsumexp(dim=1) - math.log(scores.shape[1])",
     "(log_terms.flatten().logsumexp(dim=0) - math.log(scores.numel())).expand(len(scores))"),
    ("J*: the weights are not divided by Z",
     "(log_terms - log_z.unsqueeze(1)).exp()", "log_terms.exp()"),
    ("standard error: twice too large",
     "(4 * policy.shape[1])", "policy.shape[1]"),
    ("standard error: one sample, not two halves",
     "(policy.var(dim=1) + reference.var(dim=1)) / (4 * policy.shape[1])",
     "terms.var(dim=1) / terms.shape[1]"),
    ("standard error: of a prompt, not of the mean",
     "(variance.sum().sqrt() / len(terms))", "variance.mean().sqrt()"),
    ("effective sample size: mean over the prompts",
     "(weights ** 2).mean(dim=1)).min().item()", "(weights ** 2).mean(dim=1)).mean().item()"),
    ("effective sample size: 2N / largest weight",
     "(weights ** 2).mean(dim=1)).min().item()", "weights.amax(dim=1)).min().item()"),
    ("fraction: given for too few samples",
     "    if size < 10:\n", "    if size < 1:\n"),
    ("fraction: not counted from SFT",
     'way = result["objective"] - sft["objective"].mean().item()\n    if way > 0:\n'
     '        gone = (policy["objective"].mean() - sft["objective"].mean()).item()',
     'way = result["objective"]\n    if way > 0:\n'
     '        gone = policy["objective"].mean().item()'),
    ("fraction: counted from the pretrained model",
     'measure_optimum(columns["ppo"], columns["sft"],',
     'measure_optimum(columns["ppo"], columns["pretrained"],'),
    ("fraction: how far the pretrained model came",
     'measure_optimum(columns["ppo"], columns["sft"],',
     'measure_optimum(columns["pretrained"], columns["sft"],'),
    ("fraction's error: SFT counts as if the fraction were 0",
     '-2 * (1 - fraction) * sft["objective"]', '-2 * sft["objective"]'),
    ("fraction's error: J* counts as exact",
     "terms = (terms - fraction * kl_coef * weights) / way", "terms = terms / way"),
    ("optimum: the policy's log-probs of SFT's replies are SFT's",
     'read_without_gradient(models["ppo"], rollout, cfg)',
     'read_without_gradient(models["sft"], rollout, cfg)'),
    ("optimum: sign of the log ratios of SFT's replies",
     "(log_probs - rollout.log_probs).sum(dim=1).tolist()",
     "(rollout.log_probs - log_probs).sum(dim=1).tolist()"),
    ("optimum: only the log ratios of one process",
     "make_report(tables, gather(log_ratios),", "make_report(tables, log_ratios,"),
    ("spread: over all replies",
     'columns[name]["objective"].std(dim=1).mean().item()',
     'columns[name]["objective"].std().item()'),
    ("win rate: ties are losses",
     "(difference > 0).double() + 0.5 * (difference == 0).double()", "(difference > 0).double()"),
    ("win rate: SFT's",
     "human.unsqueeze(2) - sft_human.unsqueeze(1)", "sft_human.unsqueeze(1) - human.unsqueeze(2)"),
    ("win rate: across prompts",
     "human.unsqueeze(2) - sft_human.unsqueeze(1)",
     "human.flatten().unsqueeze(1) - sft_human.flatten().unsqueeze(0)"),
    ("win rate: without a human",
     "    if human.isnan().any():\n", "    if False:\n"),
    ("X-ray: always of the first reply",
     "round(x[row, t].item(), 3)", "round(x[0, t].item(), 3)"),
    # ---- 7  Data, models, rewards ----------------------------------------------------------------
    ("encode: replies without EOS",
     "            ids = ids + [model.tokenizer.eos_token_id]\n", "            ids = ids + []\n"),
    ("encode: EOS on replies that were cut",
     "        if reply.finished:\n", "        if True:\n"),
    ("encode: EOS on replies without room for it",
     "        sequences.append(ids[:model.cfg.max_new_tokens])\n",
     "        if len(ids) > model.cfg.max_new_tokens and reply.finished:\n"
     "            ids = ids[:model.cfg.max_new_tokens - 1] + ids[-1:]\n"
     "        sequences.append(ids[:model.cfg.max_new_tokens])\n"),
    ("encode: replies longer than the limit",
     "sequences.append(ids[:model.cfg.max_new_tokens])", "sequences.append(ids)"),
    ("encode: an empty prompt stays empty",
     "[ids or [model.tokenizer.eos_token_id] for ids in sequences]", "[ids for ids in sequences]"),
    ("encode: prompts padded on the right",
     'for ids in sequences], "left", model)', 'for ids in sequences], "right", model)'),
    ("encode: replies padded on the left",
     'pad(sequences, "right", model)', 'pad(sequences, "left", model)'),
    ("encode: padding is not masked",
     "mask = padded >= 0", "mask = padded >= -1"),
    ("tokenizer: padding is EOS",
     'pad_token="<pad>", eos_token', 'pad_token="<eos>", eos_token'),
    ("tokenizer: vocabulary from held-out prompts",
     'write_texts(random.Random(0), split(WORLD_PROMPTS)["train"]',
     "write_texts(random.Random(0), list(WORLD_PROMPTS)"),
    ("preference: rejected before chosen",
     '[line["chosen"], line["rejected"]]', '[line["rejected"], line["chosen"]]'),
    ("HH prompt: cut in the middle of a word",
     'prompt = re.match(r"(.*\\s)?", common, re.DOTALL).group()', "prompt = common"),
    ("HH prompt: its first line only",
     'common, re.DOTALL).group()', 'common).group()'),
    ("HH prompt: stays in the replies",
     "[text[len(prompt):] for text in texts]", "texts"),
    ("cut: keeps the wrong end",
     "text[-40 * room:] if keep_end", "text[-40 * room:] if not keep_end"),
    ("cut: one token too many",
     "len(tokenizer(part).input_ids) <= room:", "len(tokenizer(part).input_ids) <= room + 1:"),
    ("shorten: prompts keep their beginning",
     "model.tokenizer, True)", "model.tokenizer)"),
    ("shorten: no room left for EOS",
     "cut(reply.text, cfg.max_new_tokens - 1,", "cut(reply.text, cfg.max_new_tokens,"),
    ("shorten: a cut reply gets EOS",
     "Reply(prompt, text, text == reply.text)", "Reply(prompt, text, True)"),
    ("shorten: equal replies stay",
     "        if len(set(shorter)) == len(shorter):", "        if True:"),
    ("split: validation prompts in training",
     "if i % 11 not in (0, 5)]", "if i % 11 not in (0,)]"),
    ("split: test prompts in validation",
     '"validation": prompts[5::11]', '"validation": prompts[::11]'),
    ("split: a new one in every run",
     "prompts = list(dict.fromkeys(prompts))", "prompts = list(set(prompts))"),
    ("split: whole groups of alike prompts held out",
     '"test": prompts[::11], "validation": prompts[5::11]',
     '"test": prompts[:14], "validation": prompts[14:28]'),
    ("data: held-out prompts in pretraining and SFT",
     'world = split(WORLD_PROMPTS)["train"]', "world = list(WORLD_PROMPTS)"),
    ("data: own demonstrations with held-out prompts",
     "train[flag] = [replies for replies in lines if replies[0].prompt in allowed]",
     "train[flag] = list(lines)"),
    ("data: the reward model is measured on what it learned",
     'train["preferences"], held_out["preferences"])',
     'train["preferences"], train["preferences"])'),
    ("data: SFT imitates the rejected replies",
     'demos = [replies[0] for replies in train["demos"]',
     'demos = [replies[-1] for replies in train["demos"]'),
    ("data: SFT on pretraining's mixture",
     "write_texts(rng, world, SFT_MIX)", "write_texts(rng, world, PRETRAIN_MIX)"),
    ("data: PPO practises on the prompts of demonstrations",
     "[prompt for prompt in part if prompt in in_practice]", "list(part)"),
    ("hub model: padding may be EOS",
     "if tokenizer.pad_token in (None, tokenizer.eos_token):", "if tokenizer.pad_token is None:"),
    ("hub model: its tokenizer may end prompts",
     '        check(tokenizer("a")', '        check(True or tokenizer("a")'),
    ("hub model: it need not take positions",
     'check({"position_ids", "logits_to_keep"} <= accepted,', "check(True,"),
    ("bfloat16: not used",
     'lm.__class__ = type(original.__name__, (original,), {"forward": forward})', "pass"),
    ("bfloat16: the saved model has another name",
     'type(original.__name__, (original,)', 'type("Model", (original,)'),
    ("classifier: a long prompt hides the reply",
     'tokenizer.truncation_side = "left"', 'tokenizer.truncation_side = "right"'),
    ("classifier: its first label",
     "id2label[classify.model.config.num_labels - 1]", "id2label[0]"),
    ("classifier: does not see the prompt",
     "texts = [prompt + completion for", "texts = [completion for"),
    ("asking: prompts and completions exchanged",
     '"prompts": list(prompts),\n        "completions": list(completions),',
     '"prompts": list(completions),\n        "completions": list(prompts),'),
    ("asking: all replies count as finished",
     '"finished": list(finished)}', '"finished": [True] * len(finished)}'),
    ("asking: a function gets arguments that it does not name",
     "        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in named):",
     "        if False:"),
    ("asking: a function with **kwargs gets only what it names",
     "        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in named):",
     "        if True:"),
    ("asking: the same reply to other prompts",
     "    score_of = dict(zip(unique, scores))\n    return [score_of[reply] for",
     "    score_of = dict(zip([reply.text for reply in unique], scores))\n"
     "    return [score_of[reply.text] for"),
    ("asking: NaN is a score",
     "            check(math.isfinite(score),", "            check(True,"),
    ("asking: too few scores are fine",
     "        check(len(scores) == len(unique),", "        check(True,"),
    ("asking: an error does not say where",
     "--reward failed{WHERE[0]} on", "--reward failed on"),
    # ---- 8  The command line ---------------------------------------------------------------------
    ("init_from: settings of finished models can be changed",
     "                fixed.update({name: saved[name] for name in names})", "                pass"),
    ("processes: minibatches need not be divisible among them",
     "cfg.minibatches * WORLD)", "cfg.minibatches)"),
    # ---- 9  Training runs ------------------------------------------------------------------------
    ("random stream: the same in every step",
     'random.Random(f"{purpose} {cfg.seed}")', "random.Random(str(cfg.seed))"),
    ("random stream: seed ignored",
     'random.Random(f"{purpose} {cfg.seed}")', "random.Random(purpose)"),
    ("random stream: torch not seeded",
     "    torch.manual_seed(rng.getrandbits(63) + RANK)\n", "    rng.getrandbits(63)\n"),
    ("random stream: the same batch in every step of a stage",
     'yield reseed(cfg, f"{stage} {step}")', "yield reseed(cfg, stage)"),
    ("processes: all draw the same random numbers",
     "rng.getrandbits(63) + RANK", "rng.getrandbits(63)"),
    ("processes: each does everything",
     "return items[RANK * len(items) // WORLD:(RANK + 1) * len(items) // WORLD]", "return items"),
    ("processes: their shares overlap",
     "(RANK + 1) * len(items) // WORLD]", "(RANK + 1) * len(items) // WORLD + 1]"),
    ("processes: whitening is local",
     "    mean, variance = moments(x, mask)\n",
     "    mean = masked_mean(x, mask).item()\n"
     "    variance = masked_mean((x - mean) ** 2, mask).item()\n"),
    ("processes: their weights differ at first",
     "            dist.broadcast(parameter.data, 0)\n", "            pass\n"),
    ("processes: their reward models differ at first",
     "    same_in_all_processes(model)", "    pass"),
    ("processes: gradients not summed",
     "            dist.all_reduce(gradient)\n", "            pass\n"),
    ("processes: divided by the own token count only",
     "        total = add_up(total)\n", ""),
    ("processes: Ctrl-C stops only one",
     "stop = gather(pressed)", "stop = pressed"),
    ("update: gradients not zeroed",
     "    optimizer.zero_grad()\n", ""),
    ("update: micro batches averaged plainly",
     "        loss, count, metrics = loss_fn(model, part, cfg)\n",
     "        (loss, _, metrics), count = loss_fn(model, part, cfg), torch.tensor(1)\n"),
    ("update: metrics averaged plainly",
     "sums.get(name, 0.0) + x.item() * count.item()", "sums.get(name, 0.0) + x.item()"),
    ("update: gradient not divided",
     "    torch._foreach_div_(gradients, total)\n", ""),
    ("update: gradient not clipped",
     "parameters, cfg.max_grad_norm)", "parameters, math.inf)"),
    ("update: clipped before it is divided",
     "    torch._foreach_div_(gradients, total)\n"
     "    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)\n",
     "    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)\n"
     "    torch._foreach_div_(gradients, total)\n"),
    ("update: steps on NaN",
     "    check(norm.isfinite(),", "    check(True,"),
    ("resume: actor not restored",
     "                part.load_state_dict(state[name])",
     '                part.load_state_dict(state[name]) if name != "actor" else None'),
    ("resume: optimizer not restored",
     "                part.load_state_dict(state[name])",
     '                part.load_state_dict(state[name]) if name != "optimizer" else None'),
    ("resume: schedule not restored",
     "                part.load_state_dict(state[name])",
     '                part.load_state_dict(state[name]) if name != "schedule" else None'),
    ("resume: best policy not restored",
     "                part.load_state_dict(state[name])",
     '                part.load_state_dict(state[name]) if name != "best" else None'),
    ("resume: log not restored",
     '            log += state["log"]\n', ""),
    ("resume: the last cycle once more",
     "state.update(cycle=cycle + 1,", "state.update(cycle=cycle,"),
    ("resume: one cycle is left out",
     'first = state["cycle"]', 'first = state["cycle"] + 1'),
    ("resume: all cycles once more",
     'first = state["cycle"]', "first = 0"),
    ("resume: changed settings accepted",
     'check(state["settings"] == settings,', "check(True,"),
    ("saving: one cycle late",
     "due = (cycle + 1) % cfg.save_every == 0", "due = cycle % cfg.save_every == 0"),
    ("saving: not at the end",
     "% cfg.save_every == 0 or cycle + 1 == cfg.cycles", "% cfg.save_every == 0"),
    ("Ctrl-C: nothing saved",
     "RANK == 0 and (stop or due):", "RANK == 0 and due:"),
    ("Ctrl-C: goes on after the cycle",
     "            if stop:\n                raise", "            if False:\n                raise"),
    ("Ctrl-C: pressed twice, it waits all the same",
     "        if pressed:\n            raise KeyboardInterrupt\n", ""),
    ("Ctrl-C: its meaning is not restored",
     "        signal.signal(signal.SIGINT, before)", "        pass"),
    ("Ctrl-C: an error outside the main thread",
     "    if threading.current_thread() is not threading.main_thread():", "    if False:"),
    ("files: writes are not atomic",
     "        yield temporary\n        shutil.rmtree(path, ignore_errors=True)\n"
     "        os.replace(temporary, path)\n",
     "        yield path\n"),
    ("files: an earlier run is overwritten",
     'check(set(os.listdir(folder)) <= {"config.json.tmp"}, "it is not empty")', "pass"),
    ("files: heads are not loaded",
     '        model.head.load_state_dict(load_file(folder / "heads.safetensors"))\n', ""),
    # ---- 10  main --------------------------------------------------------------------------------
    ("main: a wrong reward function is found late",
     "    if score_fn:\n        ask_score_fn(score_fn,",
     "    if False:\n        ask_score_fn(score_fn,"),
    ("main: reference trained along",
     "reference, policy = frozen(sft), sft", "reference, policy = sft, sft"),
    ("report: on validation prompts",
     'test = data.prompts["test"][:20]', 'test = data.prompts["validation"][:20]'),
    ("report: on training prompts",
     'test = data.prompts["test"][:20]', 'test = data.prompts["train"][:20]'),
    ("report: PPO's line is SFT's",
     '"ppo": policy}', '"ppo": reference}'),
]


def stop(message: str):
    """End with one line and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def mutant(script: str, name: str, old: str, new: str) -> str:
    """The script with one bug. Stops here when the entry is wrong: it would be counted as caught, or as nothing."""
    if script.count(old) != 1:
        stop(f"{name!r}: its text occurs {script.count(old)} times in {SCRIPT.name}, not once")
    bad = script.replace(old, new)
    try:
        compile(bad, name, "exec")
    except SyntaxError as error:
        stop(f"{name!r} is no Python: {error}")
    return bad


def all_mutants() -> dict[str, str]:
    """Name -> the script with this bug. Stops here when an entry does not fit the script."""
    script = SCRIPT.read_text(encoding="utf-8")
    mutants = {}
    for name, old, new in BUGS:
        if name in mutants:
            stop(f"{name!r} is there twice")
        bad = mutant(script, name, old, new)
        if bad == script or bad in mutants.values():
            stop(f"{name!r} changes nothing, or the same as another bug")
        mutants[name] = bad
    return mutants


def run_tests(script: str, limit: float | None) -> tuple[str, float]:
    """Run the tests on this text in a folder of their own -> (what caught it, or "" if nothing did; seconds)."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shutil.copytree(ROOT, folder, ignore=NEEDLESS, dirs_exist_ok=True)
        Path(folder, SCRIPT.name).write_text(script, encoding="utf-8")
        Path(folder, "conftest.py").write_text(CONFTEST)
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--rootdir", folder,
             "--basetemp", Path(folder, "tmp"), *TESTS], cwd=folder, start_new_session=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        try:
            shown, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"nothing ended within {limit:.0f} s", time.perf_counter() - start
        finally:  # the tests start processes of their own, which must not outlive them
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.perf_counter() - start
    if process.returncode == 0:
        return "", seconds
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", shown, re.MULTILINE)
    last_line = shown.strip().splitlines()[-1] if shown.strip() else "no output"
    return (failed[0] if failed else last_line), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="NAME", help="only the bugs with NAME in their name")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time; 1 GB and a core each")
    parser.add_argument("--check", action="store_true", help="run no tests; only see whether BUGS fits the script")
    options = parser.parse_args()
    # A shell may start programs in the background with Ctrl-C ignored. The tests inherit that, and some press Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mutants = all_mutants()
    if options.check:
        print(f"{len(mutants)} bugs, and each fits the script")
        return
    chosen = {name: text for name, text in mutants.items() if options.only in name}
    if not chosen:
        stop(f"no bug has {options.only!r} in its name")

    failed, seconds = run_tests(SCRIPT.read_text(encoding="utf-8"), None)
    if failed:
        stop(f"the tests fail without any bug: {failed}")
    print(f"{'(no bug)':60} {seconds:6.1f} s  passes", flush=True)
    limit, survivors = 60 + 3 * seconds * options.jobs, []
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            results = pool.map(lambda text: run_tests(text, limit), chosen.values())
            for name, (caught, seconds) in zip(chosen, results):
                if not caught:
                    survivors.append(name)
                print(f"{name:60} {seconds:6.1f} s  {caught or 'SURVIVED'}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # the tests that run now are waited for
            raise
    share = 1 - len(survivors) / len(chosen)
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} caught: {share:.1%}", *survivors, sep="\n  survived: ")
    sys.exit(share < ENOUGH)


if __name__ == "__main__":
    main()
