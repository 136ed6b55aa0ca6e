"""What the tests of the workshop share.

They all run with `pytest` in the root of the repository, and each file runs alone too:
pytest notes/evidence/test_processes.py
"""
import copy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from test_ppo_rlhf import NOTHING, TINY, small_config  # first of all: it keeps the network out

import torch

import ppo_rlhf as ppo


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of one complete run with tiny settings. No test may change it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    ppo.main([*TINY, "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def world():
    """A tokenizer, an actor and a reward model, all untrained, and a few prompts."""
    cfg = small_config()
    prompts = ppo.split(ppo.WORLD_PROMPTS)["train"][:8]
    actor = ppo.base_model(NOTHING, cfg)
    reward_model = ppo.RewardModel(copy.deepcopy(actor.lm), actor.tokenizer, cfg)
    torch.nn.init.normal_(reward_model.head[-1].weight)
    return actor.tokenizer, actor, reward_model, prompts


@pytest.fixture(scope="session")
def rollout(world):
    """Replies of very different lengths: a mean of means would not be the mean."""
    _, actor, reward_model, prompts = world
    torch.manual_seed(2)
    cfg = small_config("--max_new_tokens", "30")
    rollout = ppo.collect_rollout(actor, ppo.frozen(actor), reward_model.score, prompts, cfg)
    lengths = torch.tensor([30, 1, 2, 1, 20, 3, 1, 5]).unsqueeze(1)
    rollout.mask &= torch.arange(rollout.mask.shape[1]) < lengths
    return rollout
