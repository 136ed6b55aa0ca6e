"""Make a model with the size of GPT-2 and random weights, to try --model without a download.

    python notes/make_gpt2.py FOLDER

It has 124 million parameters and 50,257 tokens, as GPT-2 (small) has. It needs as much time and
memory as the real model. Its text means nothing, because it has learned nothing. The tokens come
from the source files of Python's own library.
"""
import argparse
import sysconfig
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="where to save the model")
folder = parser.parse_args().folder
sources = []
for path in Path(sysconfig.get_path("stdlib")).rglob("*.py"):
    if "site-packages" not in path.parts:
        sources.append(path.read_text(encoding="utf-8", errors="ignore"))
empty = GPT2Tokenizer(vocab={}, merges=[])
tokenizer = empty.train_new_from_iterator([sources], vocab_size=50257)
eos = tokenizer.eos_token_id
model = GPT2LMHeadModel(GPT2Config(bos_token_id=eos, eos_token_id=eos))
tokenizer.save_pretrained(folder)
model.save_pretrained(folder)
print(f"{folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")
