"""What `test_plain_reload.py` runs in an environment without this package: load, save again, load that.

The argument is a JSON file of jobs. Beside each job's `out` it writes the weights after the first forward pass, which
is where compressed-tensors decompresses them, and prints as JSON what failed and whose packages these are.
"""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file


@torch.no_grad()
def reload(folder: Path, out: Path, model_class: str, tokens: list[int], options: dict, resaved: bool) -> None:
    config = transformers.CompressedTensorsConfig(**options) if options else None
    model = getattr(transformers, model_class).from_pretrained(
        folder, **({"quantization_config": config} if options else {})
    )
    if resaved:
        model.save_pretrained(out.with_name(f"{out.name}-compressed"))
    inputs = torch.tensor([tokens])
    decoder = {"decoder_input_ids": inputs} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=inputs, **decoder).logits
    weights = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file({**weights, "logits": logits.clone()}, out.with_suffix(".safetensors"))
    if resaved:
        model.save_pretrained(out.with_name(f"{out.name}-dense"))


def main() -> None:
    failures = {}
    for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
        try:
            reload(Path(job.pop("folder")), Path(job.pop("out")), **job)
        except (AttributeError, RuntimeError) as error:
            failures[name] = f"{type(error).__name__}: {error}"
    packages = ("torch", "transformers", "compressed-tensors")
    print(
        json.dumps(
            {
                "failures": failures,
                "ours": importlib.util.find_spec("hf_cptquant") is not None,
                "versions": {name: importlib.metadata.version(name) for name in packages},
            }
        )
    )


main()
