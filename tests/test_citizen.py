"""A packed model lives as any other in PyTorch, accelerate and peft: moved, copied, offloaded, compiled, trained on."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from conftest import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_cptquant import CPTQuantConfig
from hf_cptquant.errors import CheckpointError, ConfigError, ModelError
from hf_cptquant.modules import QuantLinear, packed_modules
from hf_cptquant.transformers_backend import refuse_sharding

# 4 bits in the int4 kernel's layout, 3 bits in planes for it, 8 bits in the int8 kernel's, the narrow k_proj and v_proj
# as on disk
SETTINGS = {
    "bits": (3, 4, 8),
    "bits_override": {"*.[qkv]_proj": 4, "*.gate_proj": 4, "*.up_proj": 4, "*.down_proj": 8, "*.o_proj": 3},
    "allocation": "kmeans",
    "granularity": "module",
    "group_size": 32,
    "quality": "fast",
    "sequence_length": 32,
    "num_samples": 4,
}
BLOCKS = {f"model.layers.{index}": "disk" if index else "cpu" for index in range(3)}
OUTSIDE = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")


def config_for(tokens: torch.Tensor, **settings) -> CPTQuantConfig:
    return CPTQuantConfig(**{**SETTINGS, "dataset": tokens, **settings})


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "llama"
    tiny_model("llama").bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(dense_folder, tokens, tmp_path_factory):
    """A tiny packed model in bfloat16 and its folder."""
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config_for(tokens))
    folder = tmp_path_factory.mktemp("packed") / "llama"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def model(saved):
    """A tiny packed model of its own for each test, reloaded."""
    return AutoModelForCausalLM.from_pretrained(saved[1])


@torch.no_grad()
def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[:2]).logits


def layouts(model: nn.Module) -> set[str]:
    return {module.layout for module in packed_modules(model).values()}


def integers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: module.quantized().integers for name, module in packed_modules(model).items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact.double()).norm() / exact.double().norm()).item()


def test_the_tiny_model_has_every_layout(model):
    assert {"wire", "cpu_int8"} <= layouts(model)
    assert {module.scheme.bits for module in packed_modules(model).values()} == {3, 4, 8}


@pytest.mark.parametrize(
    ("name", "dtype"), [("half", torch.float16), ("float", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_casts_change_scales_and_not_integers(name, dtype, model, tokens):
    before, expected = integers(model), logits_of(copy.deepcopy(model).to(dtype), tokens)
    assert getattr(model, name)() is model
    assert equal(integers(model), before)
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {dtype}
    assert torch.equal(logits_of(model, tokens), expected)


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch_save])
def test_copies_are_complete_and_independent(copied, model, tokens, tmp_path):
    twin, expected = copied(model), logits_of(model, tokens)
    assert torch.equal(logits_of(twin, tokens), expected)
    assert layouts(twin) == layouts(model)
    twin.half()
    twin.bfloat16()
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    twin.save_pretrained(tmp_path / "twin")  # the copy, not the model that it was copied from
    assert not logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "twin"), tokens).any()
    assert torch.equal(logits_of(model, tokens), expected)
    twin.dequantize()
    assert len(packed_modules(model)) == 3 * 7


def test_state_dict_is_the_checkpoint_and_loads(saved, model, tokens):
    state = saved[0].state_dict()
    assert {state[f"{name}.weight_packed"].dtype for name in packed_modules(model)} == {torch.int32}
    expected = logits_of(model, tokens)
    for module in packed_modules(model).values():
        module.weight_scale.mul_(2)
    assert not torch.equal(logits_of(model, tokens), expected)
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(logits_of(model, tokens), expected)


def test_resized_embeddings(model, tokens, tmp_path):
    expected = logits_of(model, tokens)
    model.resize_token_embeddings(520, mean_resizing=False)
    resized = logits_of(model, tokens)
    assert resized.shape[-1] == 520
    assert torch.equal(resized[..., :512], expected)
    model.save_pretrained(tmp_path / "resized")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "resized"), tokens), resized)


def gradient_of_embeddings(model, tokens):
    embeddings = model.get_input_embeddings()(tokens[:2]).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=tokens[:2], use_cache=False).loss.backward()
    return embeddings.grad


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(model, tokens):
    model.train()
    expected = gradient_of_embeddings(model, tokens)
    calls = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    assert torch.equal(gradient_of_embeddings(model, tokens), expected)
    assert len(calls) == 2  # forward, and again on the way back
    assert expected.abs().max() > 0


def test_inference_mode(model, tokens):
    expected = logits_of(model, tokens)
    with torch.inference_mode():
        assert torch.equal(model(tokens[:2]).logits, expected)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {**OUTSIDE, **BLOCKS}], ids=["auto", "cpu", "disk"])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_device_maps(device_map, offload_buffers, saved, tokens, tmp_path):
    model, folder = saved
    placed = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "disk", offload_buffers=offload_buffers
    )
    away = {name for name, module in packed_modules(placed).items() if module.weight_packed.device.type == "meta"}
    expected = {name for name in packed_modules(model) if "layers.0" not in name}
    assert away == (expected if offload_buffers and device_map not in ("auto", {"": "cpu"}) else set())
    dense = copy.deepcopy(model).dequantize()
    of_torch, exact = logits_of(dense, tokens), logits_of(dense.double(), tokens)
    for _ in range(2):  # what a forward pass loads it gives back
        assert relative_error(logits_of(placed, tokens), exact) <= 2 * relative_error(of_torch, exact)
    placed.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert equal(again.state_dict(), model.state_dict())


def to_cpu_memory(model, folder):
    return cpu_offload(model, offload_buffers=True)


def to_disk(model, folder):
    return disk_offload(model, folder, offload_buffers=True)


def by_device_map(model, folder):
    return dispatch_model(model, {**OUTSIDE, **BLOCKS}, main_device="cpu", offload_dir=folder, offload_buffers=True)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("offload", [to_cpu_memory, to_disk, by_device_map])
def test_accelerate_offloads_a_packed_model(offload, saved, model, tokens, tmp_path):
    """Packed weights leave the modules, too, come back at each call, and stay when accelerate is done."""
    dense = copy.deepcopy(model).dequantize()
    of_torch, exact = logits_of(dense, tokens), logits_of(dense.double(), tokens)
    offloaded = offload(model, tmp_path / "disk")
    away = {name for name, module in packed_modules(offloaded).items() if module.weight_packed.device.type == "meta"}
    kept = "layers.0" if offload is by_device_map else "nothing"
    assert away == {name for name in packed_modules(saved[0]) if kept not in name}
    for _ in range(2):
        assert relative_error(logits_of(offloaded, tokens), exact) <= 2 * relative_error(of_torch, exact)
    if offload is by_device_map:  # of the others transformers does not know, and cannot save any model
        offloaded.save_pretrained(tmp_path / "again")
        assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict(), saved[0].state_dict())
    expected = logits_of(saved[0], tokens)
    remove_hook_from_submodules(offloaded)
    assert torch.equal(logits_of(offloaded.to("cpu"), tokens), expected)
    assert layouts(offloaded) == layouts(saved[0])


def test_a_damaged_checkpoint_is_found_when_offloaded_too(saved, tmp_path):
    folder = tmp_path / "damaged"
    saved[0].save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight_scale"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.up_proj: weight_scale holds NaN"):
        AutoModelForCausalLM.from_pretrained(
            folder, device_map={**OUTSIDE, **BLOCKS}, offload_folder=tmp_path / "disk", offload_buffers=True
        )


def test_an_offloaded_model_is_quantized_as_one_in_memory(dense_folder, saved, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        dense_folder,
        quantization_config=config_for(tokens),
        device_map={**OUTSIDE, **BLOCKS},
        offload_folder=tmp_path / "disk",
    )
    assert equal(integers(model), integers(saved[0]))
    assert torch.equal(logits_of(model, tokens), logits_of(saved[0], tokens))


def test_the_model_compiles_to_one_graph(model, tokens):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits_of(compiled, tokens), logits_of(model, tokens))


def test_compiled_generation_with_a_static_cache(model, tokens):
    torch._dynamo.reset()
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens[:2, :8])}
    expected = model.generate(tokens[:2, :8], **how)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(model.generate(tokens[:2, :8], cache_implementation="static", **how), expected)
    assert len(expected.unique()) > 4  # there is something to agree on


def steps_of(model: nn.Module, x: torch.Tensor, count: int) -> list[float]:
    """Losses of so many steps of AdamW on one batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=2e-3), []
    for _ in range(count):
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_lora_on_a_real_model(quantized, tmp_path):
    model, folder = copy.deepcopy(quantized[0]), quantized[1]
    x = torch.arange(1000, 1032).view(1, -1)
    before = integers(model)
    footprint = sum(buffer.nbytes for buffer in model.buffers())
    model = prepare_model_for_kbit_training(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(buffer.nbytes for buffer in model.buffers()) == footprint  # packed weights are not cast
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    losses = steps_of(adapted.train(), x, 4)
    assert losses[-1] < 0.8 * losses[0]
    assert equal(before, {name.removeprefix("base_model.model.").replace(".base_layer", ""): value
                          for name, value in integers(adapted).items()})  # fmt: skip
    adapted.eval().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 6e6

    base = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(folder))
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(x).logits
        assert torch.equal(reloaded(x).logits, expected)
        with reloaded.disable_adapter():
            assert not torch.equal(reloaded(x).logits, expected)
    with pytest.raises(ModelError, match="cannot be written; call dequantize"):
        reloaded.merge_and_unload()
    reloaded.get_base_model().dequantize()
    merged = reloaded.merge_and_unload()
    assert not packed_modules(merged)
    with torch.no_grad():
        assert relative_error(merged(x).logits, expected) < 1e-4


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_on_every_linear_layer(kind, safe_merge, tokens, tiny_folder):
    config = config_for(tokens, bits=(4,), bits_override=None)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(kind), quantization_config=config)
    names = set(packed_modules(model))
    lora = LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2")
    adapted = get_peft_model(model, lora).train()
    assert {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")} == names
    losses = steps_of(adapted, tokens[:2], 4)
    assert losses[-1] < losses[0]
    expected = logits_of(adapted.eval(), tokens)
    with pytest.raises(ModelError, match="cannot be written; call dequantize"):
        adapted.merge_and_unload(safe_merge=safe_merge)
    adapted.get_base_model().dequantize()
    merged = adapted.merge_and_unload(safe_merge=safe_merge)
    assert {type(merged.get_submodule(name)) for name in names} == {Conv1D if kind == "gpt2" else nn.Linear}
    assert relative_error(logits_of(merged, tokens), expected) < 1e-4


def test_the_computed_weight_is_read_only(model):
    module = next(iter(packed_modules(model).values()))
    assert isinstance(module, QuantLinear)
    assert isinstance(module, nn.Linear)
    assert type(module.weight + 0) is type(module.weight.data) is torch.Tensor
    with pytest.raises(ModelError, match="cannot be written"):
        module.weight.data += 1
    with pytest.raises(ModelError, match="cannot be written"):
        module.weight.data = torch.zeros_like(module.weight)


SHARDED = """
import sys
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from hf_cptquant import CPTQuantConfig

torch.distributed.init_process_group("gloo")
dense, packed = sys.argv[1:]
tokens = torch.ones(4, 32, dtype=torch.long)
for folder, config in ((packed, None), (dense, CPTQuantConfig(dataset=tokens, sequence_length=32))):
    extra = {} if config is None else {"quantization_config": config}
    try:
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2), **extra)
    except ValueError as error:
        print(f"rank {torch.distributed.get_rank()}: {type(error).__name__}: {error}", flush=True)
torch.distributed.destroy_process_group()
"""


def test_tensor_parallelism_is_refused_on_every_process(saved, dense_folder, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run([*launch, dense_folder, saved[1]], check=True, capture_output=True, text=True)
    for rank in (0, 1):
        message = f"rank {rank}: ConfigError: tp_size=2: packed weights cannot be sharded over processes"
        assert done.stdout.count(message) == 2, done.stderr
    assert "load with device_map='auto'" in done.stdout


def test_what_is_not_sharded_is_not_refused(model):
    model.config.distributed_config = type("Config", (), {"tp_size": 1, "fsdp_size": None})()
    refuse_sharding(model)
    model.config.distributed_config.fsdp_size = 2
    with pytest.raises(ConfigError, match="fsdp_size=2"):
        refuse_sharding(model)
