"""Memory of the process, on a real model: what a plan says, while loading, after a forward pass, a save and a cast."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_cptquant import BitPlan
from hf_cptquant.memory import peak_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

# Memory over that of the interpreter, which has run a tiny packed model before and drawn the real plan, so that all
# libraries are loaded and hold what they hold on to (matplotlib keeps some megabytes of a picture of that size)
PRELUDE = """
import gc, json, re, sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from hf_cptquant import CPTQuantConfig
from hf_cptquant.plots import plot_plan
from hf_cptquant.record import QuantizationRecord

tokens = torch.arange(10)[None]


def memory(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])


folder, work, *plan = map(Path, sys.argv[1:])
shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
LlamaForCausalLM(LlamaConfig(**shape)).bfloat16().save_pretrained(work / "tiny")
config = CPTQuantConfig(dataset=torch.ones(4, 32, dtype=torch.long), sequence_length=32, group_size=32, quality="fast")
tiny = AutoModelForCausalLM.from_pretrained(work / "tiny", quantization_config=config)
tiny.save_pretrained(work / "tiny packed")
with torch.no_grad():
    AutoModelForCausalLM.from_pretrained(work / "tiny packed")(tokens)
drawn = QuantizationRecord.load(plan[0] if plan else folder)
plot_plan(drawn.plan, drawn.table, work / "plan.png")
gc.collect()

found = {}
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
base = memory("VmRSS")
"""
LOADING = """
model = AutoModelForCausalLM.from_pretrained(folder)
found["peak of loading"] = memory("VmHWM") - base


def measure(what):
    gc.collect()
    found[what] = memory("VmRSS") - base
    found[what + ", footprint"] = model.get_memory_footprint()


measure("loaded")
with torch.no_grad():
    model(tokens)
measure("after a forward pass")
model.save_pretrained(work / "saved")
measure("after a save")
model.to(torch.float16).to(torch.bfloat16)
measure("after a cast and back")
with torch.no_grad():
    model(tokens)
measure("at last")
print(json.dumps(found))
"""

QUANTIZING = """
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CPTQuantConfig(plan=plan[0], quality="fast"))
print(json.dumps({"peak": memory("VmHWM") - base, "footprint": model.get_memory_footprint()}))
"""


def run(script: str, *arguments: Path) -> dict[str, int]:
    """Bytes that a script prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PRELUDE + script, *arguments], check=True, capture_output=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_loaded_model_takes_what_its_plan_says(quantized, tmp_path):
    folder = quantized[1]
    found = run(LOADING, folder, tmp_path)
    planned = BitPlan.load(folder).nbytes
    checkpoint = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    assert found.pop("peak of loading") <= 1.3 * checkpoint
    for what, size in found.items():
        if what.endswith("footprint"):
            assert size == pytest.approx(planned, rel=0.02), found
        else:
            assert size <= 1.1 * planned, found


def test_rounding_to_nearest_takes_less_than_the_model_and_two_blocks(quantized, smollm2, tmp_path):
    found, plan = run(QUANTIZING, smollm2, tmp_path, quantized[1]), BitPlan.load(quantized[1])
    assert found["footprint"] == pytest.approx(plan.nbytes, rel=0.02)
    block = max(sum(module.original_bytes for module in members.values()) for members in plan.by_block().values())
    assert found["peak"] <= plan.original_bytes + 2 * block


def test_the_peak_is_that_of_this_process_and_not_of_the_one_that_started_it():
    large = torch.ones(2**28)  # 1 GiB
    script = "from hf_cptquant.memory import peak_bytes; print(peak_bytes()['cpu'])"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert 2**24 < int(done.stdout) < large.nbytes <= peak_bytes()["cpu"]


def test_where_the_system_does_not_tell_the_peak_it_is_that_of_both(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "VmRSS:\t1024 kB\n")
    assert peak_bytes()["cpu"] == 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
