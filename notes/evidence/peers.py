"""Who learns more from the same number of replies: ppo_rlhf.py, or TRL's PPO, RLOO and GRPO?

    python notes/evidence/peers.py RUN --trl TRL_1_12/bin/python --newest NEWEST_TRL/bin/python \\
        --out peers.json --figure peers.png

RUN is the folder of a finished default run (`python ppo_rlhf.py --out RUN`). --trl and --newest
name the Python of two other environments. A program whose Python is not named is left out.
Five seeds take about half an hour of CPU time. A comparison that was stopped goes on from --out.

WHAT IS COMPARED
Every program starts from the SFT model of RUN. Every program gets its scores from the reward model
of RUN. A reply that does not end with EOS loses missing_eos_penalty, in every program. Every cycle
has 64 replies to prompts of the script's training set. Temperature, the longest reply and beta,
the price of KL, are those of RUN. TRL's learning rate falls to 0 in a straight line, as is usual.

The ruler: the script's own code measures every policy. J = reward - beta * KL, on the test prompts.
The table shows the fraction (J - J(SFT)) / (J* - J(SFT)). 0 is the SFT model, and 1 is the best
policy that exists. J(SFT) and J* are estimated once, from many replies of the SFT model and of the
policy in RUN. All programs are measured with these two numbers, on the same test prompts. For each
measurement torch gets the same seed. We measure the policy as it is after the cycle. The script
would keep the best of several policies; here it keeps the last one.

Time: CPU seconds of the training loop, in a process with one thread. Starting the program, loading
the models and measuring the policy do not count. The programs take turns, one process at a time.

WHAT EACH NEEDED TO WORK AT ALL
Versions. Both TRLs accept the script's versions of torch and transformers, so a TRL process can
import ppo_rlhf and measure its own policy. It copies the weights into an ActorCritic first, because
RLOO and GRPO change the model's forward.
    python -m venv trl112
    trl112/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0 pandas rich
    python -m venv trlnew
    trlnew/bin/pip install torch==2.13.0 transformers==5.23.0 trl
TRL 1.12.0 still has PPO, in trl.experimental. The newest TRL that we used is 1.16.0.

All three of TRL
  * train the attribute `lm` of our model. It is an ordinary GPT2LMHeadModel.
  * see the prompts that the script draws for this seed. PPO gets the very same ones, in another
    order. RLOO and GRPO get 16 prompts a cycle.
  * need bf16=False and gradient_checkpointing=False. Both are on by default, and slow on a CPU.
  * need no dropout. GPT-2 has 0.1 by default. The script never uses it. Here all rates are 0.
  * get weight_decay 0 and the script's two settings of AdamW: beta_2 0.95 and epsilon 1e-5.

TRL PPO
  * wants critic and reward model in another form: a body under the name base_model_prefix, and a
    function `score`. TokenScorer wraps ours. The scores are the same as those of the script.
  * needs per_device_train_batch_size = 64 and gradient_accumulation_steps = 1. With smaller pieces
    the optimizer makes one step per pass over the batch, whatever num_mini_batches says. With one
    piece it makes 2 steps per pass and 8 per cycle, as the script does. Each record has the number.
  * needs stop_token="eos". By default a reply goes on behind EOS.
  * has a critic of its own: a copy of the SFT model, with a new head that says 0 at first.
  * always whitens its advantages. KL is in the reward (k1). max_grad_norm has no effect.

TRL RLOO and GRPO
  * need position_ids. These trainers pass an attention mask only. Then GPT-2 counts the padding on
    the left, too, and a reply gets wrong log-probs if its prompt is shorter than the longest one.
    `generate` counts correctly. So they sample from one policy and learn about another. Positions
    repairs this. The table has RLOO once more without the repair ("unpatched"). Models with
    rotary positions do not have this problem, because only distances count there.
  * know prompts and replies as texts. reward_function gives them to our reward model. It finds EOS
    among the token ids.
  * need the folder of the SFT model: they load the reference from it once more.
  * make 4 replies to each of 16 prompts. They go through these 64 replies num_iterations = 2 times,
    in steps_per_generation = 2 pieces: 4 steps of the optimizer per cycle. The learning rate is
    5e-4 for RLOO and 1e-3 for GRPO. The script and TRL PPO make 8 steps with 3e-4.
  * RLOO puts KL into the reward (k1, summed over the reply). That is the script's objective. Its
    ratio and its clip are those of the whole reply, not of a token.
  * GRPO puts KL into the loss (k3, at each token). It needs scale_rewards="none" to have the same
    objective: by default it divides the reward by the deviation of the group, and KL not.

HOW THE SETTINGS WERE CHOSEN
The script has its defaults. For TRL we tried the settings below, once each, with seed 0 and the
models of one run. The comparison uses the seeds 1, 2 ... The numbers are the fraction after 20
and after 60 cycles, and the CPU seconds.
At the end, differences below 0.005 can be luck; after 20 cycles, below 0.03.

    ppo_rlhf.py   defaults                                                        0.968  0.990  18
    TRL PPO       learning rate 3e-4, 4 passes, critic from SFT with a new head   0.827  0.992  37  used
                  the same, critic from the reward model with a new head          0.965  0.973  40
                  learning rate 1e-3, 2 passes                                    0.910  0.979  25
    TRL RLOO      learning rate 5e-4, 2 passes                                    0.977  0.996  19  used
                  learning rate 3e-4, 4 passes                                    0.982  0.995  26
                  learning rate 1e-3, 2 passes                                    0.970  0.974  15
    TRL GRPO      learning rate 1e-3, 2 passes                                    0.975  0.989  17  used
                  learning rate 3e-4, 4 passes                                    0.945  0.976  26

--set NAME=VALUE repeats such a trial, for example --only rloo --set learning_rate=3e-4 with an
--out of its own. --set critic_from=reward_model or critic_from=new_head_on_reward_model changes
the critic of TRL PPO.
"""
import argparse
import copy
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import ppo_rlhf as ppo  # noqa: E402

# name -> (which Python, what it is called in the table)
PROGRAMS = {
    "ours": ("own", "ppo_rlhf.py"),
    "ppo": ("trl", "TRL PPO"),
    "rloo": ("newest", "TRL RLOO"),
    "grpo": ("newest", "TRL GRPO"),
    "rloo_unpatched": ("newest", "TRL RLOO, unpatched")}
SCORED_AFTER = [5, 10, 20, 40, 60]  # cycles
RULER_BATCHES = 112  # replies that measure the optimum, in batches of 64; the report takes 28
PACKAGES = ["torch", "transformers", "trl", "accelerate", "datasets"]

# What each program was told beyond the common settings; the docstring says how these were found.
PPO_SETTINGS = {
    "learning_rate": 3e-4,
    "num_ppo_epochs": 4,
    "num_mini_batches": 2,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-5}
GROUP_SETTINGS = {
    "num_generations": 4,
    "num_iterations": 2,
    "steps_per_generation": 2,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-5}
GROUP_RATES = {"RLOO": 5e-4, "GRPO": 1e-3}  # learning rates


# ==================================================================================================
# The worker: one program, one seed, one process. It runs in the environment of that program.
# ==================================================================================================
class Task:
    """What all programs share: settings, models and prompts of the run."""

    def __init__(self, run: Path, seed: int, cycles: int, scratch: str):
        self.cfg = ppo.parse_config(["--init_from", str(run), "--seed", str(seed),
                                     "--cycles", str(cycles), "--device", "cpu"])
        self.run = run
        self.scratch = scratch  # TRL's trainers want a folder, even if they write nothing
        self.sft = self.load(ppo.ActorCritic, "sft")
        self.reference = ppo.frozen(self.sft)
        self.reward_model = ppo.frozen(self.load(ppo.RewardModel, "reward_model"))
        self.score_fn = self.reward_model.score
        self.tokenizer = self.sft.tokenizer
        self.prompts = ppo.split(ppo.WORLD_PROMPTS)

    def load(self, model_class, name: str):
        """A model of the run, without dropout: some trainers call train(), ours never does."""
        model = ppo.load_model(model_class, self.run / name, self.cfg)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    def training_prompts(self, replies_per_prompt: int) -> list[str]:
        """The prompts of all cycles, one cycle after the other; each is named once.

        ppo_rlhf.py draws the same prompts in the same order, if replies_per_prompt is the same.
        """
        cfg = copy.copy(self.cfg)
        cfg.replies_per_prompt = replies_per_prompt
        asked = []
        for cycle in range(cfg.cycles):
            rng = ppo.reseed(cfg, f"PPO {cycle}")
            repeated = ppo.draw_prompts(self.prompts["train"], rng, cfg)
            asked += repeated[::replies_per_prompt]
        return asked


class Scorer:
    """Measures the policy at some points of training, and the CPU time without these pauses."""

    def __init__(self, task: Task):
        self.task = task
        self.due = {cycle for cycle in SCORED_AFTER if cycle < task.cfg.cycles}
        self.due.add(task.cfg.cycles)
        self.probe = copy.deepcopy(task.sft)  # it gets the weights of the policy that is measured
        self.points = []
        self.cpu = 0.0
        self.wall = 0.0
        self.resume()

    def resume(self):
        self.cpu_start, self.wall_start = time.process_time(), time.perf_counter()

    def pause(self):
        self.cpu += time.process_time() - self.cpu_start
        self.wall += time.perf_counter() - self.wall_start

    def after_cycle(self, cycle: int, lm):
        """Called by each program after each cycle, with its policy, a GPT2LMHeadModel."""
        if cycle not in self.due:
            return
        self.pause()
        self.probe.lm.load_state_dict(lm.state_dict())
        # The program that is measured must not notice that somebody else draws random numbers.
        with ppo.random_numbers_of_its_own():
            point = measure(self.probe, self.task)
        point.update(cycle=cycle, replies=cycle * self.task.cfg.batch_size,
                     cpu_seconds=self.cpu, wall_seconds=self.wall)
        self.points.append(point)
        print(f"cycle {cycle}: objective {point['objective']:.4f}, kl {point['kl']:.2f}, "
              f"{self.cpu:.0f} CPU seconds", flush=True)
        self.resume()


def measure(actor, task: Task) -> dict[str, float]:
    """Mean reward, KL and objective of an ActorCritic on the test prompts, by the script's code.

    objective_error is the standard error of the mean objective, for these prompts.
    """
    cfg = copy.copy(task.cfg)
    cfg.seed = 0  # the same random numbers for all policies
    ppo.reseed(cfg, "peers")
    test = task.prompts["test"]
    N = ppo.replies_each(cfg.report_batches, test, cfg)
    table = ppo.evaluate(actor, task.reference, task.score_fn, test, N, cfg)
    means = ppo.column_means(table)
    point = {name: means[name] for name in ["objective", "reward", "kl", "human", "finished"]}
    variances = ppo.column(table, "objective", N).var(dim=1) / N                      # [prompts]
    point["objective_error"] = (variances.sum().sqrt() / len(test)).item()
    return point


def ruler(task: Task, settings: dict) -> dict:
    """J(SFT) and J*, from replies of the SFT model and of the policy that RUN has trained.

    That policy must only be good enough to show the best replies often. Its own J does not matter.
    """
    policy = ppo.frozen(task.load(ppo.ActorCritic, "policy"))
    task.cfg.report_batches = RULER_BATCHES
    models = {"sft": task.reference, "ppo": policy}
    report, _ = ppo.compare_models(models, task.score_fn, task.prompts["test"], task.cfg)
    return {"sft": report["sft"]["objective"], "optimum": report["optimum"]}


# ---- ppo_rlhf.py ---------------------------------------------------------------------------------
def train_ours(task: Task, settings: dict) -> dict:
    """The script's own loop. It calls record_cycle at the end of every cycle, and so do we."""
    cfg = task.cfg
    cfg.eval_every = cfg.cycles  # one validation, at the end: then the last policy is kept
    cfg.out = cfg.resume = ""    # nothing is written
    for name, value in settings.items():
        ppo.check(hasattr(cfg, name), f"ppo_rlhf.py has no setting {name}")
        setattr(cfg, name, value)
    ppo.say = lambda text="": None
    actor = task.sft
    scorer = Scorer(task)
    record_cycle = ppo.record_cycle

    def record_and_score(log, cycle, *rest):
        record_cycle(log, cycle, *rest)
        scorer.after_cycle(cycle + 1, actor.lm)

    ppo.record_cycle = record_and_score
    ppo.train_ppo(actor, task.reference, task.score_fn, task.prompts, cfg)
    return {"points": scorer.points}


# ---- All of TRL ----------------------------------------------------------------------------------
def common_settings(task: Task) -> dict:
    """TrainingArguments that all TRL trainers get."""
    return {
        "output_dir": task.scratch,
        "seed": task.cfg.seed,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "temperature": task.cfg.temperature,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no"}


def scoring_callback(scorer: Scorer, lm, steps_per_cycle: int):
    """A callback of transformers' Trainer: it scores the policy when a cycle is complete."""
    from transformers import TrainerCallback

    class ScoringCallback(TrainerCallback):
        def on_train_begin(self, *rest, **more):
            scorer.resume()  # building the trainer does not count

        def on_step_end(self, args, state, *rest, **more):
            cycle, left = divmod(state.global_step, steps_per_cycle)
            if left == 0:
                scorer.after_cycle(cycle, lm)

    return ScoringCallback()


# ---- TRL 1.12's PPO ------------------------------------------------------------------------------
class TokenScorer(torch.nn.Module):
    """A body of GPT-2 and one of our heads, in the form in which TRL wants critic and reward model.

    TRL reads the attribute that base_model_prefix names, and calls score(hidden [B,L,width]), which
    must give [B,L,1]. For the reward it takes the number at the last real token, as we do.
    """

    base_model_prefix = "transformer"

    def __init__(self, lm, head):
        super().__init__()
        self.transformer = copy.deepcopy(lm.transformer)
        self.score = copy.deepcopy(head)


def make_critic(task: Task, kind: str) -> TokenScorer:
    """The critic that TRL's PPO begins with. A new head says 0."""
    new_head = ppo.value_head(task.cfg.n_embd)
    critics = {
        "new_head_on_sft": (task.sft.lm, new_head),
        "new_head_on_reward_model": (task.reward_model.lm, new_head),
        "reward_model": (task.reward_model.lm, task.reward_model.head)}
    return TokenScorer(*critics[kind]).requires_grad_(True)  # the reward model is frozen


def train_ppo(task: Task, settings: dict) -> dict:
    """TRL 1.12's PPOTrainer. One optimizer step per minibatch, 8 per cycle, as ours."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    cfg = task.cfg
    arguments = dict(
        common_settings(task),
        # The batch must be one piece. With more pieces TRL takes one step per pass over the
        # batch, and not one per minibatch.
        per_device_train_batch_size=cfg.batch_size,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=cfg.batch_size,
        total_episodes=cfg.cycles * cfg.batch_size,
        response_length=cfg.max_new_tokens,
        stop_token="eos",  # without it replies go on behind EOS
        missing_eos_penalty=cfg.missing_eos_penalty,
        kl_coef=cfg.kl_coef,
        num_sample_generations=0)
    arguments.update(PPO_SETTINGS)
    critic_from = settings.pop("critic_from", "new_head_on_sft")
    arguments.update(settings)
    ids = task.tokenizer(task.training_prompts(1)).input_ids
    dataset = Dataset.from_list([{"input_ids": prompt} for prompt in ids])
    scorer = Scorer(task)
    trainer = PPOTrainer(
        args=PPOConfig(**arguments), processing_class=task.tokenizer, model=task.sft.lm,
        ref_model=task.reference.lm,
        reward_model=TokenScorer(task.reward_model.lm, task.reward_model.head),
        value_model=make_critic(task, critic_from),
        train_dataset=dataset, eval_dataset=dataset.select(range(2)),
        callbacks=[scoring_callback(scorer, task.sft.lm, 1)])
    trainer.remove_callback(PrinterCallback)
    steps = count_steps(trainer.optimizer.optimizer)  # the first one is accelerate's wrapper
    trainer.train()
    return {"points": scorer.points, "optimizer_steps": steps[0]}


def count_steps(optimizer) -> list[int]:
    """A list with one number, which grows with each step of the optimizer."""
    steps = [0]

    def add_one(*rest):
        steps[0] += 1

    optimizer.register_step_post_hook(add_one)
    return steps


# ---- The newest TRL's RLOO and GRPO --------------------------------------------------------------
def reward_function(task: Task):
    """The run's reward model in the form of TRL: texts and token ids -> a list of numbers."""

    def reward(prompts, completions, completion_ids, **more):
        replies = []
        for prompt, text, ids in zip(prompts, completions, completion_ids):
            finished = task.tokenizer.eos_token_id in ids
            replies.append(ppo.Reply(prompt, text, finished))
        return ppo.score_replies(task.score_fn, replies, task.cfg).tolist()  # penalty included

    return reward


class Positions:
    """Gives position_ids to models, if nobody else does; `on` can be set to False.

    TRL passes an attention mask and no position_ids. Then GPT-2 counts the padding in front of a
    short prompt, too. `generate` does not count it, so TRL would sample from one policy and learn
    as if it had sampled from another.
    """

    def __init__(self, models: list, on: bool):
        self.on = on
        for model in models:
            model.forward = self.wrapped(model.forward)

    def wrapped(self, forward):
        """A forward that counts positions from the first real token: attention_mask [B,L]."""

        @functools.wraps(forward)  # `generate` looks at the names of the arguments
        def with_positions(*args, attention_mask=None, position_ids=None, **more):
            if self.on and position_ids is None and attention_mask is not None:
                position_ids = ppo.position_ids(attention_mask)
            return forward(*args, attention_mask=attention_mask, position_ids=position_ids, **more)

        return with_positions


def compare_log_probs(trainer, task: Task, positions: Positions, scorer: Scorer) -> dict:
    """Compare a trainer's log-probs with ours, on the first batch that it asks for.

    Policy and reference both have the SFT weights then. The result is filled in during training:
    "unpatched" and "patched" -> [largest, mean] difference in nats, over the real tokens.
    """
    theirs = trainer._get_per_token_logps_and_entropies
    differences = {}

    def compared(model, ids, attention_mask, T, *rest, **more):
        if not differences:
            scorer.pause()
            right_way = positions.on
            prompt_mask, mask = attention_mask.bool().split([ids.shape[1] - T, T], dim=1)
            prompt_ids, reply_ids = ids.split([ids.shape[1] - T, T], dim=1)
            with torch.no_grad():
                logits, _ = task.reference(prompt_ids, prompt_mask, reply_ids, mask)  # [B,T,V]
                ours = ppo.token_log_probs(logits / task.cfg.temperature, reply_ids)    # [B,T]
                for name in ["unpatched", "patched"]:
                    positions.on = name == "patched"
                    found = []
                    for one in [model, trainer.ref_model]:
                        log_probs = theirs(one, ids, attention_mask, T, *rest, **more)[0]
                        found.append((log_probs - ours)[mask].abs())
                    found = torch.cat(found)
                    differences[name] = [found.max().item(), found.mean().item()]
            positions.on = right_way
            scorer.resume()
        return theirs(model, ids, attention_mask, T, *rest, **more)

    trainer._get_per_token_logps_and_entropies = compared
    return differences


def group_settings(algorithm: str, task: Task, settings: dict) -> dict:
    """The arguments of RLOOConfig or GRPOConfig."""
    cfg = task.cfg
    arguments = dict(
        common_settings(task),
        max_completion_length=cfg.max_new_tokens,
        beta=cfg.kl_coef,
        disable_dropout=True,  # in the reference, too, which TRL loads itself
        shuffle_dataset=False,
        max_grad_norm=cfg.max_grad_norm)
    if algorithm == "GRPO":
        # Divided by the group's deviation, the reward would have another weight than KL.
        arguments["scale_rewards"] = "none"
    arguments.update(GROUP_SETTINGS)
    arguments["learning_rate"] = GROUP_RATES[algorithm]
    arguments.update(settings)
    pieces = arguments["steps_per_generation"]
    arguments["per_device_train_batch_size"] = cfg.batch_size // pieces
    arguments["gradient_accumulation_steps"] = 1
    arguments["max_steps"] = cfg.cycles * pieces * arguments["num_iterations"]
    return arguments


def train_groups(algorithm: str, patched: bool, task: Task, settings: dict) -> dict:
    """RLOOTrainer or GRPOTrainer of the newest TRL: several replies to each prompt, no critic."""
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback

    arguments = group_settings(algorithm, task, settings)
    steps_per_cycle = arguments["steps_per_generation"] * arguments["num_iterations"]
    prompts = task.training_prompts(arguments["num_generations"])
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    scorer = Scorer(task)
    trainer_class = getattr(trl, f"{algorithm}Trainer")
    trainer = trainer_class(
        model=task.sft.lm, reward_funcs=reward_function(task),
        args=getattr(trl, f"{algorithm}Config")(**arguments), train_dataset=dataset,
        processing_class=task.tokenizer,
        callbacks=[scoring_callback(scorer, task.sft.lm, steps_per_cycle)])
    trainer.remove_callback(PrinterCallback)
    positions = Positions([trainer.model, trainer.ref_model], on=patched)
    differences = compare_log_probs(trainer, task, positions, scorer)
    trainer.train()
    return {
        "points": scorer.points,
        "optimizer_steps": trainer.state.global_step,
        "log_prob_differences": differences}


WORKERS = {
    "ruler": ruler,
    "ours": train_ours,
    "ppo": train_ppo,
    "rloo": functools.partial(train_groups, "RLOO", True),
    "grpo": functools.partial(train_groups, "GRPO", True),
    "rloo_unpatched": functools.partial(train_groups, "RLOO", False),
    "grpo_unpatched": functools.partial(train_groups, "GRPO", False)}


def work(args):
    """Run one program and write its result to args.out."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # TRL calls older names of transformers
    settings = {}
    for setting in args.set:
        name, value = setting.split("=")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    with ppo.quiet_libraries(), tempfile.TemporaryDirectory() as scratch:
        task = Task(args.run, args.seed, args.cycles, scratch)
        result = WORKERS[args.worker](task, dict(settings))
    result["settings"] = settings
    result["versions"] = versions()
    args.out.write_text(json.dumps(result))


def versions() -> dict[str, str]:
    """The versions of what runs here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


# ==================================================================================================
# The driver: it starts the workers one after the other, collects their results, and shows them.
# ==================================================================================================
def start_worker(python: str, name: str, seed: int, args) -> dict:
    """Run this file as a worker in another Python -> its result."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1",
                       TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [python, __file__, str(args.run), "--worker", name, "--seed", str(seed),
                   "--cycles", str(args.cycles), "--out", str(result)]
        for setting in args.set:
            command += ["--set", setting]
        subprocess.run(command, env=environment, check=True)
        return json.loads(result.read_text())


def processor() -> str:
    """The processor's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the repository, with a plus sign if ppo_rlhf.py has been changed since."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True,
                              check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "ppo_rlhf.py"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.returncode else "")


def new_record(args) -> dict:
    """The record before the first program has run. The ruler is made here."""
    config = json.loads((args.run / "config.json").read_text())
    for name in ["out", "resume", "init_from"]:
        config.pop(name)  # paths of this machine
    best = start_worker(sys.executable, "ruler", 0, args)
    if not best["optimum"]["objective_error"] > 0:  # it is NaN if J* hangs on a few replies
        sys.exit(f"error: the policy in {args.run} is too far from the optimum to measure it")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "machine": {"processor": processor(), "cores": os.cpu_count(),
                    "system": platform.platform()},
        "cycles": args.cycles,
        "settings": {"ours": dict(config, cycles=args.cycles),
                     "ppo": PPO_SETTINGS, "groups": GROUP_SETTINGS, "group rates": GROUP_RATES},
        "ruler": best,
        "runs": []}


def compare(args) -> dict:
    """Run what is not in the record yet. The record is written after every program."""
    if args.out.exists():
        record = json.loads(args.out.read_text())
        if record["cycles"] != args.cycles:
            sys.exit(f"error: {args.out} is a record of {record['cycles']} cycles")
    else:
        record = new_record(args)
    pythons = {"own": sys.executable, "trl": args.trl, "newest": args.newest}
    done = {(run["program"], run["seed"]) for run in record["runs"]}
    for seed in range(1, args.seeds + 1):  # 0 was used to choose the settings
        for program, (where, title) in PROGRAMS.items():
            wanted = pythons[where] and (not args.only or program in args.only)
            if not wanted or (program, seed) in done:
                continue
            print(f"\n{title}, seed {seed}", flush=True)
            result = start_worker(pythons[where], program, seed, args)
            record["runs"].append(dict(result, program=program, seed=seed))
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def fraction(record: dict, point: dict) -> float:
    """How far a policy came on the way from SFT to the optimum."""
    sft, best = record["ruler"]["sft"], record["ruler"]["optimum"]["objective"]
    return (point["objective"] - sft) / (best - sft)


def curves(record: dict, program: str) -> list[list[dict]]:
    """The points of a program, one list per seed."""
    return [run["points"] for run in record["runs"] if run["program"] == program]


def spread(numbers: list[float]) -> str:
    """median (lowest to highest)"""
    return f"{median(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"


def show_table(record: dict):
    """Print the table, as Markdown."""
    best = record["ruler"]["optimum"]
    print(f"\nJ(SFT) = {record['ruler']['sft']:.4f}, J* = {best['objective']:.4f} "
          f"+- {best['objective_error']:.4f}\n")
    print("Median over the seeds (lowest to highest).\n")
    print("| program | seeds | fraction after 20 cycles | at the end | KL | CPU seconds |")
    print("|---|---|---|---|---|---|")
    for program, (_, title) in PROGRAMS.items():
        lines = curves(record, program)
        if not lines:
            continue
        at_20 = [fraction(record, point) for line in lines for point in line
                 if point["cycle"] == 20]
        ends = [line[-1] for line in lines]
        final = [fraction(record, point) for point in ends]
        kl = median(point["kl"] for point in ends)
        seconds = median(point["cpu_seconds"] for point in ends)
        print(f"| {title} | {len(lines)} | {spread(at_20) if at_20 else ''} | {spread(final)} "
              f"| {kl:.2f} | {seconds:.0f} |")
    errors = [run["points"][-1]["objective_error"] for run in record["runs"]]
    way = best["objective"] - record["ruler"]["sft"]
    print(f"\nStandard error of one fraction at the end: at most {max(errors) / way:.4f}")
    for run in record["runs"]:
        if run["program"] in ["rloo", "grpo"] and run["seed"] == 1:
            show_differences(PROGRAMS[run["program"]][1], run["log_prob_differences"])


def show_differences(title: str, differences: dict):
    """How far TRL's log-probs are from ours, with and without position_ids."""
    parts = []
    for name, (largest, average) in differences.items():
        parts.append(f"{name} at most {largest:.2g} nats, {average:.2g} on average")
    print(f"\n{title}, log-probs of the first batch against ours: {'; '.join(parts)}")


def draw_figure(record: dict, path: Path):
    """What is missing, over replies and over CPU seconds: median line, and range of the seeds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
    for program, (_, title) in PROGRAMS.items():
        lines = curves(record, program)
        if not lines:
            continue
        by_cycle = list(zip(*lines))  # the points of all seeds after the same cycle
        replies = [0] + [points[0]["replies"] for points in by_cycle]
        seconds = [0] + [median(p["cpu_seconds"] for p in points) for points in by_cycle]
        middle, low, high = [1.0], [1.0], [1.0]
        for points in by_cycle:
            missing = [1 - fraction(record, point) for point in points]
            middle.append(median(missing))
            low.append(min(missing))
            high.append(max(missing))
        for axis, x in zip(axes, [replies, seconds]):
            [drawn] = axis.plot(x, middle, marker="o", markersize=3, label=title)
            axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.12, linewidth=0)
    for axis, label in zip(axes, ["replies", "CPU seconds, one thread"]):
        axis.set_yscale("log")
        axis.set_yticks([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005])
        axis.yaxis.set_major_formatter(lambda y, position: f"{y:.1%}")
        axis.yaxis.set_minor_formatter("")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("missing of the way from SFT to J*")
    axes[1].legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished default run")
    parser.add_argument("--trl", help="the Python of an environment with TRL 1.12.0")
    parser.add_argument("--newest", help="the Python of an environment with the newest TRL")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=60, help="64 replies each")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, help="leave out all others")
    parser.add_argument("--out", type=Path, default=Path("peers.json"),
                        help="the record; a run that was stopped goes on from it")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="another setting for all programs of this call, to try it out")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    record = compare(args)
    show_table(record)
    if args.figure:
        draw_figure(record, args.figure)


if __name__ == "__main__":
    main()
