"""Talk to the models of a finished run.

    python notes/talk.py RUN                       # RUN is the folder of the run
    python notes/talk.py RUN --temperature 0.2     # with any flag of ppo_rlhf.py
    echo "I feel sad. What can I do?" | python notes/talk.py RUN

Type a line. Each of the run's models replies to it: pretrain, sft, and policy, which PPO has
trained. In front of each reply stand its score and its KL to the SFT model. The score is the one
that PPO saw: it comes from the run's reward, and a reply without an end loses the penalty. The line
is the whole prompt, so the models do not remember what you typed before.

An end of file ends the talk (Ctrl-D; on Windows Ctrl-Z and Enter). Nothing is written to the run's
folder.
"""
import json
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where ppo_rlhf.py is
import ppo_rlhf as ppo

MODELS = ["pretrain", "sft", "policy"]


def read_lines():
    """The lines of the input as text, whatever bytes they are."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", errors="replace").rstrip("\r\n")


def no_score(completions):
    """Takes the place of --reward human, which has no opinion of most lines."""
    return [0.0] * len(completions)


def load_score_fn(run: Path, cfg):
    """The reward function that the run was trained with."""
    if cfg.reward == "human":
        return no_score
    if cfg.reward == "model":
        return ppo.load_model(ppo.RewardModel, run / "reward_model", cfg).score
    return ppo.load_reward(cfg)


def prompt_of(text: str, model, as_message: bool, cfg) -> str:
    """A typed line as a prompt that fits into the model, in the form in which the run had its prompts."""
    fields = {"prompt": text + "\n"}  # all prompts of the built-in world end in \n
    if as_message:
        fields = {"prompt": [{"role": "user", "content": text}]}
    line = ppo.parse_line(json.dumps(fields), "prompts", model.tokenizer)
    [short] = ppo.shorten([line], model, cfg)
    return short.replies[0].prompt


def reply_to(prompt: str, model, reference, score_fn, cfg) -> str:
    """One reply of one model, with its score and KL."""
    rollout = ppo.sample_and_score(model, reference, score_fn, [prompt], cfg)
    [line] = ppo.describe([rollout], cfg.kl_coef)
    score = line["reward"]
    if cfg.reward == "human":
        score += line["human"]  # NaN if the line is not a prompt of the built-in world
    return f"score {score:6.2f}  KL {line['kl']:6.2f}  {ppo.one_line(line['reply'])}"


def talk(run: Path, flags: list[str]):
    cfg = ppo.parse_config(["--init_from", str(run), *flags])
    models = {name: ppo.load_model(ppo.ActorCritic, run / name, cfg) for name in MODELS}
    score_fn = load_score_fn(run, cfg)
    as_message = False
    with suppress(ppo.UserError):  # the files may be gone
        own = ppo.read_own_data(models["sft"].tokenizer, cfg)
        as_message = any(line.messages for line in sum(own.values(), []))
    ppo.say('Type a line, such as "I feel sad. What can I do?"; an end of file (Ctrl-D) ends.')
    ppo.reseed(cfg, "talk")
    for text in read_lines():
        prompt = prompt_of(text, models["sft"], as_message, cfg)
        for name, model in models.items():
            ppo.say(f"  {name:10}" + reply_to(prompt, model, models["sft"], score_fn, cfg))


def main():
    flags = sys.argv[1:]
    if flags in (["-h"], ["--help"]):
        print(__doc__)
        return
    ppo.check(flags and flags[0], "name the folder of a run: python notes/talk.py RUN")
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    ppo.logging.disable_progress_bar()
    ppo.logging.set_verbosity_error()
    ppo.logging.get_logger("huggingface_hub").setLevel("ERROR")
    talk(Path(flags[0]), flags[1:])


if __name__ == "__main__":
    try:
        main()
    except ppo.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
