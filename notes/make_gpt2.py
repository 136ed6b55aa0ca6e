"""Make a folder with a model of GPT-2's own size and random weights, for trying `--model FOLDER` without a download.

    python notes/make_gpt2.py FOLDER

124 million parameters and 50,257 tokens, as in GPT-2 (small). Time and memory are those of the real model; the text is
not: it knows nothing. The tokens are learned from the sources of Python's own library.
"""
import sys
import sysconfig
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

library = Path(sysconfig.get_path("stdlib"))
sources = [path.read_text(encoding="utf-8", errors="ignore") for path in library.rglob("*.py")
           if "site-packages" not in path.parts]
tokenizer = GPT2Tokenizer(vocab={}, merges=[]).train_new_from_iterator([sources], vocab_size=50257)
model = GPT2LMHeadModel(GPT2Config(bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id))
tokenizer.save_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[1])
print(f"{sys.argv[1]}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")
