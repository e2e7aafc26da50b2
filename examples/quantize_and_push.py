"""Quantize a model, push it to the Hub, and load it from there, at the commit that was made.

Log in before with `hf auth login`, or set HF_TOKEN.

uv run python examples/quantize_and_push.py facebook/opt-125m me/opt-125m-cptquant data.txt
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cptquant import CPTQuantConfig

source, repo_id, data = sys.argv[1:]
config = CPTQuantConfig(dataset=data, num_samples=16, sequence_length=512, quality="fast")
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)

commit = model.push_to_hub(repo_id, private=True, commit_message="Four bits and a half", max_shard_size="2GB")
print(commit.commit_url)

model = AutoModelForCausalLM.from_pretrained(repo_id, revision=commit.oid)
tokenizer = AutoTokenizer.from_pretrained(repo_id, revision=commit.oid)
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=8)[0]))
