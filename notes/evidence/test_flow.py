"""The picture of one cycle, notes/figures/flow.svg: what it names and claims is so in ppo_rlhf.py.

In the picture, class="code" marks a name, class="shape" the shape of the name before it, and
class="kept" a pill with tensors that Phase II needs. The Chinese picture is the same drawing.
"""
import copy
import inspect
import re
import xml.etree.ElementTree as ET
from dataclasses import fields

import pytest

import ppo_rlhf as ppo
from test_ppo_rlhf import HERE, small_config

FIGURES = HERE / "notes" / "figures"
PICTURES = ["flow.svg", "flow.zh.svg"]
SVG = "{http://www.w3.org/2000/svg}"
SHAPES = dict(re.findall(r"^    (\w+): .*?# (\[[A-Z,]+\])", inspect.getsource(ppo.Rollout), re.M))
SIX_STEPS = {"generate", "token_rewards", "state_values", "td_residuals", "gae",
             "policy_loss", "value_loss", "entropy"}
HALF_A_LAPTOP = 683  # pixels


def source(name):
    return (FIGURES / name).read_text(encoding="utf-8")


def elements(name):
    return list(ET.fromstring(source(name)).iter())


def marks(element):
    return set(element.get("class", "").split())


def codes(parts):
    return [part.text for part in parts if "code" in marks(part)]


def exists(name):
    """Is it a field of Rollout or PPOConfig, or a function or class of the script?"""
    known = {field.name for kind in (ppo.Rollout, ppo.PPOConfig) for field in fields(kind)}
    return name in known or getattr(getattr(ppo, name, None), "__module__", None) == ppo.__name__


@pytest.mark.parametrize("name", PICTURES)
def test_every_name_in_the_picture_exists(name):
    names = codes(elements(name))
    assert SIX_STEPS <= set(names)
    assert [word for word in names if not exists(word)] == []


@pytest.mark.parametrize("name", PICTURES)
def test_shapes_in_the_picture_are_those_of_the_rollout(name):
    seen = set()
    for text in ET.fromstring(source(name)).iter(SVG + "text"):
        parts = [part for part in text.iter() if marks(part) & {"code", "shape"}]
        for field, shape in zip(parts, parts[1:]):
            if "code" in marks(field) and "shape" in marks(shape):
                assert (field.text, shape.text) == (field.text, SHAPES[field.text])
                seen.add(field.text)
    assert SHAPES.keys() - seen == {"group", "prompt_mask"}  # these two are not drawn


def test_phase_2_needs_what_the_picture_keeps_and_nothing_else(world):
    drawn = elements("flow.svg")
    kept = {name for pill, text in zip(drawn, drawn[1:])
            if "kept" in marks(pill) and text.tag == SVG + "text" for name in codes(text.iter())}
    kept.add("prompt_mask")  # belongs to prompt_ids
    _, actor, reward_model, prompts = world
    cfg = small_config()
    rollout = ppo.collect_rollout(actor, ppo.frozen(actor), reward_model.score, prompts, cfg)

    def without(*names):
        smaller = copy.copy(rollout)
        for name in names:
            setattr(smaller, name, None)
        return smaller

    assert ppo.ppo_loss(actor, without(*(SHAPES.keys() - kept)), cfg)[0].isfinite()
    for name in kept:
        with pytest.raises((AttributeError, TypeError)):
            ppo.ppo_loss(actor, without(name), cfg)


@pytest.mark.parametrize("name", PICTURES)
def test_epochs_and_minibatches_in_the_picture_are_the_defaults(name):
    times = re.search(r">(\d+) \D+ × (\d+) \D+<", source(name))
    cfg = ppo.PPOConfig()
    assert [int(times[1]), int(times[2])] == [cfg.ppo_epochs, cfg.minibatches]


def test_both_languages_are_one_drawing():
    def drawing(name):
        for part in elements(name):
            attributes = {key: value for key, value in part.items() if not key.endswith("}lang")}
            same = marks(part) & {"code", "shape", "number"} or part.tag == SVG + "style"
            yield part.tag, attributes, part.text if same else "a label"

    assert list(drawing("flow.svg")) == list(drawing("flow.zh.svg"))


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_stands_alone_and_can_be_read(name):
    text, parts = source(name), elements(name)
    tags = {part.tag.removeprefix(SVG) for part in parts}
    assert {"title", "desc"} <= tags
    assert not tags & {"script", "foreignObject", "image", "a"}
    assert text.count("://") == 1  # the name of SVG itself
    assert "@import" not in text and "<?" not in text and "<!DOCTYPE" not in text

    inside = {"#" + part.get("id") for part in parts if part.get("id")}
    assert set(re.findall(r"url\((.*?)\)", text)) <= inside
    attributes = [item for part in parts for item in part.items()]
    assert {value for key, value in attributes if key.endswith("href")} <= inside
    assert not [key for key, _ in attributes if key.startswith("on")]

    assert "@media (prefers-color-scheme: dark)" in text
    assert len(text.encode()) < 40_000
    width = float(parts[0].get("viewBox").split()[2])
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", text)]
    assert min(sizes) * HALF_A_LAPTOP / width >= 11
