"""TRL's own PPO formulas beside ours, on the same tensors: what agrees, what differs, and why.

    python -m venv trl-env
    trl-env/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0
    trl-env/bin/python notes/evidence/trl_formulas.py          # from the repository's root; half a minute

Of TRL's PPO (trl.experimental.ppo), most stands inside one method, PPOTrainer.train. No formula of it is typed again
here: `passage` cuts statements out of the installed source and compiles them as they are; what is a function there is
called; and at the end a real PPOTrainer trains beside our models with the same weights.

Exit code 1 if something that should agree does not, if a difference is not fully explained by its stated reason, or if
TRL's source is not the expected one.
"""
import ast
import copy
import inspect
import os
import random
import sys
import tempfile
import textwrap
import warnings
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace as Names
from unittest.mock import patch

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "CUDA_VISIBLE_DEVICES": ""}
warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
import trl.experimental.ppo.ppo_trainer as theirs  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

import ppo_rlhf as ppo  # noqa: E402

transformers.logging.set_verbosity_error()
CASES = 400  # in each of the two precisions
# What may remain where both compute the same: rounding, relative to the largest number (or to 1, if that is less).
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
PAD, EOS = 0, 1
EPSILON = 1e-7  # TRL divides logits by temperature + 1e-7


# ---- TRL's statements, out of the installed source -------------------------------------------------------------------
TREE = ast.parse(textwrap.dedent(inspect.getsource(theirs.PPOTrainer.train)))
ast.increment_lineno(TREE, inspect.getsourcelines(theirs.PPOTrainer.train)[1] - 1)
BLOCKS = [[(ast.unparse(statement), statement) for statement in body] for node in ast.walk(TREE)
          if isinstance(body := getattr(node, "body", None), list)]


def passage(first: str, last: str):
    """Of PPOTrainer.train, the statement that begins with `first` to the one that begins with `last`, compiled."""
    found = [block[i:j + 1] for block in BLOCKS for i, (start, _) in enumerate(block) if start.startswith(first)
             for j, (end, _) in enumerate(block) if j >= i and end.startswith(last)]
    if len(found) != 1:
        sys.exit(f"error: TRL {trl.__version__}: PPOTrainer.train has {len(found)} passages from `{first}` to `{last}`,"
                 " not one; this script is for TRL 1.12.0")
    return compile(ast.Module([statement for _, statement in found[0]], []), theirs.__file__, "exec")


def execute(code, before=Names(), **names):
    """Execute TRL's statements on our tensors, and on what was there `before` -> all names as they are then."""
    scope = vars(theirs) | vars(before) | names
    exec(code, scope)
    return Names(**scope)


TRUNCATE = passage("postprocessed_response = response", "sequence_length = ")
PHASE_ONE = passage("contain_eos_token = ", "returns = ")         # penalty, masks, rewards, whitening, GAE
WHITEN = passage("advantages = masked_whiten", "advantages = torch.masked_fill")
MICRO_BATCH = passage("mb_advantage = ", "loss = ")               # from the two models' outputs to the loss
STATISTICS = passage("pg_clipfrac = ", "approxkl = ")
MEAN_ENTROPY = passage("entropy_stats[", "entropy_stats[")
PER_REPLY = passage("mean_kl = ", "rlhf_reward = ")
KL = passage("logr = ", "kl = ")
GENERATION = passage("generation_kwargs = ", "generation_config = ")
LOSS = next(text for block in BLOCKS for text, _ in block if text.startswith("loss = "))


def trl_phase_one(spoken, log_probs, ref_log_probs, values, scores, stop=EOS, pad=PAD, **args):
    """TRL's Phase I on what a sampler said, spoken [B,T], which goes on behind EOS; up to the raw advantages."""
    tokens = Names(pad_token_id=pad, eos_token_id=EOS)
    args = Names(**dict(missing_eos_penalty=None, kl_estimator="k1", kl_coef=0.1, whiten_rewards=False, gamma=1.0,
                        lam=1.0) | args)
    names = {"self": Names(args=args, stop_token_id=stop, processing_class=tokens), "processing_class": tokens}
    cut = execute(TRUNCATE, response=spoken, query=spoken, **names)
    return execute(PHASE_ONE, responses=spoken, postprocessed_responses=cut.postprocessed_response, logprobs=log_probs,
                   sequence_lengths=cut.sequence_length, ref_logprobs=ref_log_probs, values=values,
                   scores=scores.clone(), args=args, **names)


class Playback:
    """An actor that says given tokens [B,T], so that our own `generate` decides what of them is the reply."""

    def __init__(self, tokens):
        self.tokens = tokens

    def next_token(self, ids, mask, cache):
        """The cache is only the number of tokens so far."""
        step = cache or 0
        spoken = self.tokens[:, step:step + 1]                            # [B,1]
        logits = torch.full((len(ids), self.tokens.max() + 1), -torch.inf)  # [B,V]
        return logits.scatter(-1, spoken, 0.0), step + 1


def our_reply(spoken, pad=PAD):
    """reply_ids and mask [B,T] of our `generate`, padded to TRL's width."""
    prompt = torch.full((len(spoken), 1), 2)
    reply_ids, mask = ppo.generate(Playback(spoken), prompt, prompt > 0, spoken.shape[1], EOS, pad)
    width = (0, spoken.shape[1] - mask.shape[1])
    return F.pad(reply_ids, width, value=pad), F.pad(mask, width)


# ---- Part 1: hundreds of random cases --------------------------------------------------------------------------------
def random_case(number: int, dtype):
    """Tensors of random shape; every fourth: any lengths | some replies are EOS alone | one length | none ends."""
    torch.manual_seed(number)
    rng = random.Random(number)
    B, T, P, V = rng.randint(2, 8), rng.randint(1, 12), rng.randint(1, 4), rng.randint(8, 40)
    spoken = torch.randint(2, V, (B, T))
    column = {0: torch.randint(0, T + T // 2 + 1, (B,)), 1: torch.randint(0, 2, (B,)) * (T + 1),
              2: torch.full((B,), rng.randrange(T)), 3: torch.full((B,), T)}[number % 4]
    spoken = torch.where(torch.arange(T) == column.unsqueeze(1), EOS, spoken)
    log_probs = -2 * torch.rand(B, T, dtype=dtype)
    plain = number % 3 == 0  # gamma = lambda = 1
    return Names(
        B=B, P=P, spoken=spoken, log_probs=log_probs, scores=3 * torch.randn(B, dtype=dtype),
        ref_log_probs=log_probs + torch.randn(B, T, dtype=dtype), values=torch.randn(B, T, dtype=dtype),
        logits=(3 * torch.randn(B, P + T, V, dtype=dtype)).requires_grad_(),
        new_values=torch.randn(B, P + T, dtype=dtype).requires_grad_(),
        args=dict(missing_eos_penalty=rng.choice((None, 1.0, 2.5)), kl_coef=rng.uniform(0, 0.5),
                  gamma=1.0 if plain else rng.uniform(0.5, 1), lam=1.0 if plain else rng.random()),
        loss=Names(temperature=rng.choice((0.3, 0.7, 1.0, 1.5)), cliprange=rng.uniform(0.05, 0.4),
                   cliprange_value=rng.uniform(0.1, 1), vf_coef=0.1))


def unbiased_moments(x, mask, moments=ppo.moments):
    """In place of ppo.moments: variance with n - 1. A quotient of integer tensors is float32, in TRL too."""
    mean, variance = moments(x, mask)
    return mean, variance * (mask.sum() / (mask.sum() - 1)).item()


UNBIASED = patch.object(ppo, "moments", unbiased_moments)


def whitened_rewards(rewards, mask):
    """TRL's option to whiten rewards keeps their mean."""
    mean, _ = ppo.moments(rewards, mask)
    return torch.where(mask, ppo.whiten(rewards, mask) + mean, 0)


def clipped_value_loss(values, returns, mask, old_values, limit):
    """TRL's value loss: the larger error of V and of V held near its old value."""
    near = old_values + (values - old_values).clamp(-limit, limit)
    error, near_error = torch.where(mask, values - returns, 0) ** 2, torch.where(mask, near - returns, 0) ** 2
    return 0.5 * ppo.masked_mean(torch.max(error, near_error), mask)


def phase_one(c):
    """Yield (what, TRL's, ours), and where both differ on purpose a fourth: ours, once the reason is taken away.

    At last, return TRL's Phase I and our reply_ids and mask.
    """
    beta, gamma, lam = (c.args[name] for name in ("kl_coef", "gamma", "lam"))
    inputs = c.spoken, c.log_probs, c.ref_log_probs, c.values, c.scores
    p = trl_phase_one(*inputs, **c.args)
    longer = ~p.padding_mask_p1  # the reply and one step more
    reply_ids, mask = our_reply(c.spoken)
    yield "reply tokens", p.postprocessed_responses, reply_ids
    yield "mask of real tokens", ~p.padding_mask, mask

    finished = ((reply_ids == EOS) & mask).any(dim=1).tolist()
    replies = [ppo.Reply(str(i), "", done) for i, done in enumerate(finished)]
    penalty = Names(missing_eos_penalty=c.args["missing_eos_penalty"] or 0.0)
    torch.set_default_dtype(c.scores.dtype)  # of the tensor that score_replies makes
    scores = ppo.score_replies(lambda prompts: c.scores.tolist(), replies, penalty)
    torch.set_default_dtype(torch.float32)
    yield "scores minus the penalty without EOS", p.scores, scores
    rewards = ppo.token_rewards(c.log_probs, c.ref_log_probs, scores, mask, beta)
    longer_rewards = ppo.token_rewards(p.logprobs, p.ref_logprobs, scores, longer, beta)
    yield "token rewards, added up per reply", p.rewards.sum(dim=1), rewards.sum(dim=1)
    yield "token rewards, column by column", p.rewards, rewards, longer_rewards

    ours = ppo.gae(rewards, c.values, mask, gamma, lam)
    explained = ppo.gae(longer_rewards, c.values, longer, gamma, lam)
    for what, a, b, more in zip(("advantages", "returns"), (p.advantages, p.returns), ours, explained):
        if gamma == lam == 1:
            yield f"{what}, gamma = lambda = 1", torch.where(mask, a, 0), b
        else:
            yield what, torch.where(mask, a, 0), b, torch.where(mask, more, 0)
        if (full := mask[:, -1]).any():  # all that were cut off, and the longest: no room for a step behind EOS
            yield f"{what}, rows without padding", a[full], b[full]
    white = trl_phase_one(*inputs, **c.args | {"whiten_rewards": True}).rewards
    with UNBIASED:
        unbiased = whitened_rewards(longer_rewards, longer)
    yield "whitened rewards", white, whitened_rewards(rewards, mask), unbiased

    k = execute(PER_REPLY, p)
    log_probs, ref_log_probs = (torch.where(mask, x, 0) for x in (c.log_probs, c.ref_log_probs))
    rollout = ppo.Rollout(replies, None, None, None, reply_ids, mask, log_probs, None, ref_log_probs, scores)
    ours = ppo.column_means(ppo.describe([rollout], beta))
    yield "KL of a reply, mean", k.mean_kl, torch.tensor(ours["kl"], dtype=torch.double)
    yield "score - beta * KL, mean", k.rlhf_reward, torch.tensor(ours["objective"], dtype=torch.double)
    return p, reply_ids, mask


def phase_two(c, p, reply_ids, mask):
    """As phase_one. Both sides have TRL's returns, advantages and, except for the first line, temperature."""
    advantages = execute(WHITEN, advantages=p.advantages, padding_mask=p.padding_mask).advantages
    with UNBIASED:
        unbiased = ppo.whiten(p.advantages, mask)
    yield "whitened advantages", advantages, ppo.whiten(p.advantages, mask), unbiased

    def micro_batch(args):
        return execute(MICRO_BATCH, p, args=args, advantages=advantages, micro_batch_inds=torch.arange(c.B), model=None,
                       forward=lambda *_: (Names(logits=c.logits * 1), c.new_values.unsqueeze(-1)),
                       query_responses=c.spoken, context_length=c.P)

    m = micro_batch(c.loss)
    # A constant added to all logits changes no entropy, but TRL's form of it loses digits unless the largest is near 0.
    s = execute(STATISTICS, m, logits=m.logits - m.logits.amax(dim=-1, keepdim=True))

    def read(temperature):
        outputs = c.logits[:, c.P - 1:-1], c.new_values[:, c.P - 1:-1]
        rollout = Names(prompt_ids=None, prompt_mask=None, reply_ids=reply_ids, mask=mask)
        return ppo.read_replies(lambda *batch: outputs, rollout, temperature)

    plain, (log_probs, values, logits) = read(c.loss.temperature)[0], read(c.loss.temperature + EPSILON)
    yield "log-probs", *(torch.where(mask, x, 0) for x in (m.new_logprobs, plain, log_probs))
    yield "entropy per token", s.entropy, ppo.entropy(logits)
    loss, clip_fraction = ppo.policy_loss(log_probs, p.logprobs, advantages, mask, c.loss.cliprange)
    yield "policy loss", m.pg_loss, loss
    yield "policy loss, gradient by the logits", *gradients(c.logits, m.pg_loss, loss)
    yield "clip fraction", s.pg_clipfrac, clip_fraction
    losses = [clipped_value_loss(values, p.returns, part, p.values, c.loss.cliprange_value)
              for part in (mask, ~p.padding_mask_p1)]
    yield "value loss, clipped", m.vf_loss, *losses
    yield "value loss, gradient by the values", *gradients(c.new_values, m.vf_loss, *losses)
    free = micro_batch(Names(**vars(c.loss) | {"cliprange_value": 1e9}))  # so far that nothing is clipped
    losses = [ppo.value_loss(values, p.returns, part) for part in (mask, ~p.padding_mask_p1)]
    yield "value loss, not clipped", free.vf_loss, *losses

    e = execute(MEAN_ENTROPY, entropy=s.entropy, entropy_stats=torch.zeros(1, 1, 1, dtype=c.values.dtype),
                ppo_epoch_idx=0, minibatch_idx=0, gradient_accumulation_idx=0)
    means = [ppo.masked_mean(s.entropy, part) for part in (mask, torch.ones_like(mask))]
    yield "mean entropy", e.entropy_stats[0, 0, 0], *means


def compare(case):
    yield from phase_two(case, *(yield from phase_one(case)))


def gradients(x, *losses):
    return [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]


def distance(a, b) -> float:
    """Largest |a - b|, relative to the largest |a| if that is above 1; infinite if there is a NaN."""
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    return (a - b).abs().max().nan_to_num(torch.inf).item() / max(a.abs().max().item(), 1.0)


REASONS = {  # for every line that differs on purpose
    "token rewards, column by column": "TRL puts the score one step behind EOS, if there is room",
    "advantages": "that step: its V enters, and gamma and lambda act once more",
    "returns": "that step",
    "whitened rewards": "that step counts too; variance with n - 1",
    "whitened advantages": "variance with n - 1; ours with n",
    "log-probs": "logits / (temperature + 1e-7); ours / temperature",
    "value loss, clipped": "that step is in the mean too",
    "value loss, gradient by the values": "that step",
    "value loss, not clipped": "that step is in the mean too",
    "mean entropy": "TRL's metric averages over the padding too",
}
FAULTS = []  # what should have agreed, or been explained, and was not


def verdict(fine, what: str) -> str:
    if not fine:
        FAULTS.append(what)
    return "" if fine else "  <-- FAULT"


def size(x: float) -> str:
    return f"{x:9.1e}" if x else "    exact"


def part_one():
    largest = defaultdict(lambda: defaultdict(float))  # what -> (dtype, compared as it is or explained) -> distance
    for dtype in TOLERANCE:
        for number in range(CASES):
            for what, a, *rest in compare(random_case(number, dtype)):
                for which, b in enumerate(rest):
                    largest[what][dtype, which] = max(largest[what][dtype, which], distance(a, b))
    print(f"PART 1: {CASES} random cases in each precision, largest difference\n\n{'SAME':40}  float32   float64")
    for what in (what for what in largest if what not in REASONS):
        found = [largest[what][dtype, 0] for dtype in TOLERANCE]
        fine = all(x <= limit for x, limit in zip(found, TOLERANCE.values()))
        print(f"{what:40}" + " ".join(map(size, found)) + verdict(fine, what))
    print(f"\n{'DIFFERENT ON PURPOSE':40} as it is   without the reason\n{'':40}  float64   float32   float64   reason")
    for what, reason in REASONS.items():
        found = [largest[what][key] for key in ((torch.float64, 0), (torch.float32, 1), (torch.float64, 1))]
        fine = found[0] > 1e-9 and all(x <= limit for x, limit in zip(found[1:], TOLERANCE.values()))
        print(f"{what:40}" + " ".join(map(size, found)) + f"   {reason}{verdict(fine, what)}")


# ---- Part 2: small examples, each a number of TRL's beside ours ------------------------------------------------------
def show(what: str, trl_shows: str, ours: str, holds):
    print(f"{what:64} {trl_shows:>24} {ours:>18}{verdict(holds, what)}")


def one_reply(neighbour: bool, value: float = 0.0, behind: float = 0.0, **args):
    """Reply of 3 tokens with score 1 and no KL, alone or beside one of 6 tokens -> TRL's Phase I, our advantages."""
    spoken = torch.tensor([[5, 6, EOS, 7, 8, 9], [5, 6, 7, 8, 9, EOS]])[:1 + neighbour, :6 if neighbour else 3]
    values = torch.full(spoken.shape, value)
    values[:, 3:4] += behind
    zeros, scores = torch.zeros(spoken.shape), torch.ones(len(spoken))
    _, mask = our_reply(spoken)
    rewards = ppo.token_rewards(zeros, zeros, scores, mask, 0.1)
    advantages, _ = ppo.gae(rewards, values, mask, args.get("gamma", 1.0), args.get("lam", 1.0))
    return trl_phase_one(spoken, zeros, zeros, values, scores, **args), advantages


def small_examples():
    print(f"\n\nPART 2: small examples\n\n{'':64} {'TRL':>24} {'ours':>18}")
    for what, column, least, case in (
            ("A of the 1st of 3 tokens, gamma 0.9, V 0: alone | beside a longer", 0, 0.08, dict(gamma=0.9)),
            ("A of EOS, lambda 0.95, V 0.5: alone | beside a longer", 2, 0.02, dict(lam=0.95, value=0.5))):
        found = [[x[0, column].item() for x in (p.advantages, ours)] for p, ours in (
            one_reply(neighbour, **case) for neighbour in (False, True))]
        (trl_alone, alone), (trl_beside, beside) = found
        show(what, f"{trl_alone:.3f} | {trl_beside:.3f}", f"{alone:.3f} | {beside:.3f}",
             trl_alone - trl_beside > least and alone == beside)
    for lam in 0.95, 1.0:
        (p, ours), (p_more, ours_more) = (one_reply(True, behind=behind, lam=lam) for behind in (0.0, 1.0))
        leak = [(more - less)[0, 2].item() for more, less in ((p_more.advantages, p.advantages), (ours_more, ours))]
        show(f"A of EOS, lambda {lam}: rises with V behind EOS by", *(f"{x:.3f}" for x in leak),
             abs(leak[0] - (1 - lam)) < 1e-6 and leak[1] == 0)

    for what, wanted, spoken, options in (
            ("real tokens of 3 up to EOS and 3 behind, stop_token None", (6, 3), (5, 6, EOS, 7, 8, 9), {"stop": None}),
            ("real tokens of 3 with EOS, when padding is EOS", (2, 3), (5, 6, EOS, EOS, EOS, EOS), {"pad": EOS}),
            ("real tokens of 4 with EOS, when the 2nd is a sampled pad", (1, 4), (5, PAD, 6, EOS), {})):
        spoken = torch.tensor([spoken])
        p = trl_phase_one(spoken, *torch.zeros(3, *spoken.shape), torch.ones(1), **options)
        found = (~p.padding_mask).sum().item(), our_reply(spoken, options.get("pad", PAD))[1].sum().item()
        show(what, *map(str, found), found == wanted)

    one, x = torch.tensor([[True, False]]), torch.tensor([[2.0, 3.0]])
    result = theirs.masked_whiten(x, one)[0, 0].item(), ppo.whiten(x, one)[0, 0].item()
    show("whitening a single token", *(f"{value:.1f}" for value in result), result[0] != result[0] and result[1] == 0)
    x = torch.tensor([[2.0, torch.nan]])
    result = theirs.masked_mean(x, one).item(), ppo.masked_mean(x, one).item()
    show("masked mean with NaN in the padding", *(f"{value:.1f}" for value in result), result == (result[0], 2.0))
    logits = torch.tensor([[[0.0, 0.0, -torch.inf]]])
    s = execute(STATISTICS, pg_losses=x, pg_losses2=x, padding_mask=one, micro_batch_inds=slice(None), logits=logits,
                logprobs_diff=x)
    show("entropy of two equal tokens and an impossible one", f"{s.entropy.item():.4f}",
         f"{ppo.entropy(logits).item():.4f}", s.entropy.isnan().all())
    torch.manual_seed(0)
    low, tokens = torch.randn(8, 16, 1000).mul(3).bfloat16(), torch.randint(0, 1000, (8, 16))
    exact = low.double().log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    error = [(x.double() - exact).abs().max().item() for x in (
        theirs.selective_log_softmax(low, tokens), ppo.token_log_probs(low.float(), tokens))]  # ActorCritic: float32
    show("log-probs of bfloat16 logits, largest error", *(f"{x:.1e}" for x in error), error[0] > 100 * error[1])

    # Exactly, over all tokens of a small vocabulary: both estimators have KL as their mean, but used as a reward, only
    # k1 leads to KL's gradient. What a policy gradient follows is sum_a pi_a * kl_a * grad log pi_a.
    z, ref = torch.randn(2, 12, dtype=torch.double)
    log_pi, log_ref = z.requires_grad_().log_softmax(-1), ref.log_softmax(-1)
    true_kl = (log_pi.exp() * (log_pi - log_ref)).sum()
    wanted, = gradients(z, true_kl)

    def errors(kl):
        followed, = gradients(z, (log_pi.exp() * kl).detach() @ log_pi)
        return (log_pi.exp() @ kl - true_kl).abs().item(), ((followed - wanted).norm() / wanted.norm()).item()

    no_score, all_real = torch.zeros(1, dtype=torch.double), torch.ones(1, 12, dtype=torch.bool)
    ours = errors(-ppo.token_rewards(log_pi[None], log_ref[None], no_score, all_real, kl_coef=1.0)[0])
    for estimator in "k1", "k3":
        found = errors(execute(KL, args=Names(kl_estimator=estimator), ref_logprobs=log_ref, logprobs=log_pi).kl)
        show(f"KL as reward, {estimator} (ours: k1): error of its mean | of its gradient",
             *("{:.1e} | {:.1e}".format(*pair) for pair in (found, ours)),
             max(found[0], *ours) < 1e-12 and (found[1] < 1e-12) == (estimator == "k1"))

    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, attention_dropout=0.5)).train()
    tokens, change = torch.arange(8).unsqueeze(0), []
    for switch_off in theirs.disable_dropout_in_model, lambda model: ppo.HeadedModel(model, cfg=CFG):
        switch_off(llama)
        change.append((llama(tokens).logits - llama(tokens).logits).abs().max().item())
    show("Llama with attention_dropout 0.5, read twice: logits change by", *(f"{x:.3f}" for x in change),
         change[0] > 1e-3 and change[1] == 0)


# ---- Part 3: a real PPOTrainer beside our models ---------------------------------------------------------------------
WORDS = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2} | {f"w{i}": i for i in range(3, 24)}
# TRL's loss has no entropy, so ours has none here.
CFG = ppo.Config(device="cpu", kl_coef=0.05, missing_eos_penalty=1.0, vf_coef=0.1, ent_coef=0, max_grad_norm=1e9,
                 ppo_epochs=1, minibatches=1, whiten_advantages=True, lam=1.0)
FOLDER = tempfile.TemporaryDirectory()  # TRL wants one


def clipped_critic_loss(values, rollout, cfg):
    """TRL always clips the values; ours does not."""
    return clipped_value_loss(values, rollout.returns, rollout.mask, rollout.values, 0.2)


ppo.critic_loss = clipped_critic_loss


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                                unk_token="<unk>", padding_side="left")


def make_model(kind, seed: int):
    """A GPT-2 with random weights that often samples EOS, and never pad; its head is random too."""
    torch.manual_seed(seed)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_positions=64, n_embd=32, n_layer=2, n_head=2,
                                    initializer_range=0.3, tie_word_embeddings=False, eos_token_id=EOS,
                                    pad_token_id=PAD, bos_token_id=EOS))
    lm.transformer.ln_f.bias.data[0], lm.lm_head.weight.data[:, 0] = 10.0, 0.0  # makes column 0 a bias
    lm.lm_head.weight.data[PAD, 0], lm.lm_head.weight.data[EOS, 0] = -10.0, 0.15
    model = kind(lm, make_tokenizer(), CFG)
    torch.nn.init.normal_(model.head[-1].weight)
    return model


def our_models():
    """Actor with critic, reference, reward model: the same weights in every call."""
    return [make_model(kind, seed) for seed, kind in enumerate((ppo.ActorCritic, ppo.ActorCritic, ppo.RewardModel))]


class Scored(torch.nn.Module):
    """One of our models in the form that TRL wants a value or reward model in."""
    base_model_prefix = "transformer"

    def __init__(self, model):
        super().__init__()
        self.transformer, self.score = copy.deepcopy(model.lm.transformer), copy.deepcopy(model.head)


def trained(lr: float = 0.0, updates: int = 1, **settings):
    """Let a PPOTrainer train -> its local variables at the end of each update, and the gradients at each step."""
    actor, reference, reward_model = our_models()
    value_model, rng = Scored(actor), random.Random(0)
    optimizer = torch.optim.SGD([*actor.lm.parameters(), *value_model.parameters()], lr=lr)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
    prompts = Dataset.from_list([{"input_ids": [rng.randrange(3, len(WORDS)) for _ in range(rng.randint(1, 6))]}
                                 for _ in range(32)])
    settings = dict(per_device_train_batch_size=16, gradient_accumulation_steps=1, num_ppo_epochs=1, lam=CFG.lam,
                    total_episodes=16 * updates, response_length=16, stop_token="eos", missing_eos_penalty=1.0,
                    max_grad_norm=1e-3) | settings
    quiet = dict(output_dir=FOLDER.name, bf16=False, gradient_checkpointing=False, use_cpu=True,
                 report_to="none", num_sample_generations=0, save_strategy="no", disable_tqdm=True)
    trainer = theirs.PPOTrainer(
        theirs.PPOConfig(**settings, **quiet), make_tokenizer(), actor.lm, reference.lm, Scored(reward_model), prompts,
        value_model, eval_dataset=prompts, optimizers=(optimizer, constant))
    trainer.accelerator.print = lambda *text: None
    states, steps = [], []
    optimizer.register_step_pre_hook(lambda *_: steps.append((flat(actor.lm), flat(value_model.score))))
    # Every update ends with a call of `log`; the caller's frame holds the tensors of TRL's algorithm.
    trainer.log = lambda metrics: states.append(Names(steps=len(steps), **sys._getframe(1).f_locals))
    trainer.train()
    return states, steps


def flat(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def our_rollout(t):
    """The trainer's rollout as ours."""
    prompt_mask, mask = t.queries != PAD, ~t.padding_mask
    finished = ((t.responses == EOS) & mask).any(dim=1).tolist()
    replies = [ppo.Reply(str(i), "", done) for i, done in enumerate(finished)]
    log_probs, ref_log_probs, values = (torch.where(mask, x, 0) for x in (t.logprobs, t.ref_logprobs, t.values))
    return ppo.Rollout(replies, torch.arange(len(mask)), t.queries, prompt_mask, t.responses, mask, log_probs, values,
                       ref_log_probs, t.scores, t.rewards, t.advantages, t.returns)


def our_steps(rollout, lr: float = 0.0, updates: int = 1, **changes):
    """`update_policy` with SGD -> metrics of each update, the gradients at each step, the actor as it is then."""
    actor, steps = our_models()[0], []
    optimizer = torch.optim.SGD(actor.parameters(), lr=lr)
    optimizer.register_step_pre_hook(lambda *_: steps.append((flat(actor.lm), flat(actor.head))))
    cfg = copy.copy(CFG)
    vars(cfg).update(changes)
    return [ppo.update_policy(actor, optimizer, rollout, cfg) for _ in range(updates)], steps, actor


def log_ratio(actor, rollout):
    """log pi - log pi_old of the actor as it is now, [B,T]."""
    log_probs, _ = ppo.read_without_gradient(actor, rollout, CFG)
    return log_probs - rollout.log_probs


def agree(what: str, a, b):
    found = distance(a, b)
    print(f"{what:64} {size(found)}{verdict(found <= TOLERANCE[torch.float32], what)}")


def real_trainer():
    """TRL's tensors and gradients against ours; then the same rollout for what differs."""
    print("\n\nPART 3: a real PPOTrainer beside our models with the same weights, float32\n\n"
          f"{'SAME':64} largest difference")
    (t,), steps = trained(lr=0.03, num_ppo_epochs=3)
    rollout = our_rollout(t)
    mask = rollout.mask
    actor, reference, judge = our_models()
    log_probs, values = ppo.read_without_gradient(actor, rollout, CFG)
    ref_log_probs, _ = ppo.read_without_gradient(reference, rollout, CFG)
    with torch.no_grad():
        judged = judge(rollout.prompt_ids, rollout.prompt_mask, rollout.reply_ids, mask).tolist()
    scores = ppo.score_replies(lambda prompts: judged, rollout.replies, CFG)
    rewards = ppo.token_rewards(log_probs, ref_log_probs, scores, mask, CFG.kl_coef)
    advantages, returns = ppo.gae(rewards, values, mask, CFG.gamma, CFG.lam)
    agree("log pi of the sampled tokens (TRL: from the sampling loop)", rollout.log_probs, log_probs)
    agree("log pi_ref", rollout.ref_log_probs, ref_log_probs)
    agree("V(s_t)", rollout.values, values)
    agree("scores minus the penalty", t.scores, scores)
    agree("returns, gamma = lambda = 1", torch.where(mask, t.returns, 0), returns)
    with UNBIASED:
        agree("whitened advantages, ours with n - 1", t.advantages, ppo.whiten(advantages, mask))
    metrics, our_gradients, _ = our_steps(rollout, lr=0.03, updates=3)
    for i, (a, b) in enumerate(zip(steps, our_gradients)):
        clipped = metrics[i]["clip_fraction"]
        agree(f"gradient, all {len(b[0]):,} weights of the policy, epoch {i + 1} ({clipped:.0%} clipped)", a[0], b[0])
    log_rho = log_ratio(our_steps(rollout, lr=0.03, updates=2)[2], rollout)
    agree("approximate KL, epoch 3, as TRL's: (log rho)^2 / 2, padding too", t.approxkl_stats[2, 0, 0],
          (log_rho ** 2).mean() / 2)
    agree("the same, as ours: rho - 1 - log rho, real tokens", torch.tensor(metrics[2]["approx_kl"]),
          ppo.masked_mean(log_rho.exp() - 1 - log_rho, mask))
    lengths, ended = mask.sum(dim=1), sum(reply.finished for reply in rollout.replies)
    print(f"    (16 replies of {lengths.min()} to {lengths.max()} tokens, {mask.float().mean():.0%} of the positions; "
          f"{ended} ended with EOS)")

    (even,), even_steps = trained(stop_token=None)  # all replies have 16 tokens: there is no step behind EOS
    (found,), our_gradients, _ = our_steps(our_rollout(even))
    agree("all of one length: gradient of the critic's head", even_steps[0][1], our_gradients[0][1])
    for name, stats in (("policy_loss", even.pg_loss_stats), ("value_loss", even.vf_loss_stats),
                        ("clip_fraction", even.pg_clipfrac_stats), ("entropy", even.entropy_stats)):
        agree(f"all of one length: {name}", stats.flatten(), torch.tensor([found[name]]))

    (small,), small_steps = trained(per_device_train_batch_size=1, gradient_accumulation_steps=16)
    assert (small.responses == t.responses).all()  # the same replies; only their division differs
    by_reply = replace(rollout, advantages=rollout.advantages * lengths.float().mean() / lengths.unsqueeze(1))
    whole, weighted = our_steps(rollout)[1], our_steps(by_reply)[1]
    agree("16 micro batches: gradient, ours with every reply weighted alike", small_steps[0][0], weighted[0][0])

    print(f"\n{'DIFFERENT':64} {'TRL':>24} {'ours':>18}")
    parts = our_steps(rollout, micro_batch_size=1)[1]
    change = [((a[0][0] - b[0][0]).norm() / b[0][0].norm()).item() for a, b in ((small_steps, steps), (parts, whole))]
    show("policy gradient of 16 micro batches against one of 16: changes by", *(f"{x:.1%}" for x in change),
         change[0] > 0.01 and change[1] < 1e-5)
    states, _ = trained(updates=2, per_device_train_batch_size=4, gradient_accumulation_steps=4, num_mini_batches=4)
    first, last = states[0].steps, states[1].steps - states[0].steps
    count = len(our_steps(rollout, minibatches=4)[1])
    show("num_mini_batches 4: optimizer steps per pass (last batch of data)", f"{first} ({last})", f"{count} ({count})",
         (first, last, count) == (1, 4, 4))
    norms = steps[0][0].norm().item(), our_steps(rollout, max_grad_norm=1e-3)[1][0][0].norm().item()
    show("max_grad_norm 0.001: length of the policy gradient at the step", *(f"{x:.4f}" for x in norms),
         norms[0] > 0.1 and norms[1] <= 1e-3)
    kls = t.approxkl_stats[2, 0, 0].item(), metrics[2]["approx_kl"]
    show("approximate KL to the old policy, epoch 3 (reasons: see above)", *(f"{x:.4f}" for x in kls),
         abs(kls[0] - kls[1]) > 1e-3)
    first_ratio_in_bfloat16()


def first_ratio_in_bfloat16():
    """log rho before any step: TRL's old log-probs come from the sampling loop, ours from a pass like the update's."""
    actor, queries = our_models()[0], torch.randint(3, len(WORDS), (32, 5))
    actor.lm.bfloat16()
    config = execute(GENERATION, args=Names(response_length=16, temperature=CFG.temperature)).generation_config
    with torch.no_grad():
        texts, scores = theirs.batch_generation(actor.lm, queries, len(queries), PAD, config)
        reply_ids, mask = our_reply(texts[:, 5:])
        logits = theirs.forward(actor.lm, texts, PAD).logits[:, 4:-1] / (CFG.temperature + EPSILON)
        old, new = (theirs.selective_log_softmax(x, reply_ids) for x in (scores, logits))
        rollout = ppo.Rollout([ppo.Reply("", "", True)] * len(queries), None, queries, queries != PAD, reply_ids, mask)
        our_old, _ = ppo.read_without_gradient(actor, rollout, CFG)
        our_new, _, _ = ppo.read_replies(actor, rollout[::2], CFG.temperature)  # a minibatch of every other reply
    change = (new - old)[mask].abs(), (our_new - our_old[::2])[mask[::2]].abs()
    show("weights in bfloat16: |log rho| before any step, mean | largest",
         *(f"{x.mean():.1e} | {x.max():.0e}" for x in change), change[0].mean() > 1e-3 > change[1].mean())


# ---- Part 4: the defaults, and main ----------------------------------------------------------------------------------
DEFAULTS = {  # TRL's name -> ours
    "kl_coef": "kl_coef", "gamma": "gamma", "lam": "lam", "cliprange": "clip_eps", "vf_coef": "vf_coef",
    "num_ppo_epochs": "ppo_epochs", "num_mini_batches": "minibatches", "temperature": "temperature",
    "missing_eos_penalty": "missing_eos_penalty", "response_length": "max_new_tokens", "learning_rate": "lr",
    "max_grad_norm": "max_grad_norm"}


def defaults():
    trl_has, ours = ({field.name: field.default for field in fields(kind)} for kind in (theirs.PPOConfig, ppo.Config))
    print(f"\n\nPART 4: defaults\n\n{'TRL':35}ours")
    rows = [(name, trl_has[name], our_name, ours[our_name]) for name, our_name in DEFAULTS.items()]
    rows += [("cliprange_value", trl_has["cliprange_value"], "values clipped", "never"),
             ("whiten_rewards", trl_has["whiten_rewards"], "rewards whitened", "never"),
             ("advantages whitened", "always", "whiten_advantages", ours["whiten_advantages"]),
             ("stop_token", trl_has["stop_token"], "a reply ends with EOS", "always"),
             ("entropy in the loss", "never", "ent_coef", ours["ent_coef"])]
    for name, default, our_name, our_default in rows:
        print(f"{name:22}{default!s:>10}   {our_name:22}{our_default!s:>10}")
    fine = "entropy" not in LOSS and [name for name in trl_has if "whiten" in name] == ["whiten_rewards"]
    print(f"TRL's loss: {LOSS}{verdict(fine, 'TRL has an entropy term, or an option for whitening')}")


def main():
    print(f"TRL {trl.__version__}, trl.experimental.ppo; torch {torch.__version__}, "
          f"transformers {transformers.__version__}\n")
    part_one()
    small_examples()
    real_trainer()
    defaults()
    print(f"\n{len(FAULTS)} faults", *FAULTS, sep="\n  ")
    sys.exit(len(FAULTS) > 0)


if __name__ == "__main__":
    main()
