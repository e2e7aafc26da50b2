"""The direction of imports, and what importing the package does and does not load."""

import ast
import subprocess
import sys
from pathlib import Path

import hf_cptquant

PACKAGE = Path(hf_cptquant.__file__).parent
# From the bottom up: a module may import those above it in this list.
ORDER = [
    "forwards", "arithmetic", "memory", "errors", "bitmap", "plan", "runtimes", "table", "results", "record", "recipe",
    "config", "ranks", "work_folder", "grid", "packing", "kernels", "doctor", "modules", "tied", "experts",
    "model_view", "base_card", "sources", "images", "sound", "calibration", "self_text", "sensitivity", "allocation",
    "plots", "rounding", "quantize", "recovery", "section", "card", "checkpoint", "leaderboard", "hub", "predictions",
    "evaluate", "folder_evaluation", "refinement", "pipeline", "llama_cpp", "transformers_backend",
]  # fmt: skip
EDGES = ["metrics", "demo", "options", "terminal", "cli"]


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    depth = len(path.relative_to(PACKAGE).parts)
    layers = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            layers |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return layers


def test_imports_go_only_upward():
    for path in PACKAGE.rglob("*.py"):
        name = layer(path)
        if name == "__init__":
            continue
        allowed = set(ORDER) if name in EDGES else set(ORDER[: ORDER.index(name)])
        allowed |= set(EDGES) if name == "cli" else set()
        assert imported_layers(path) - {name} <= allowed, path


def test_allocation_knows_neither_torch_nor_models():
    for path in (PACKAGE / "allocation").glob("*.py"):
        assert "torch" not in path.read_text(encoding="utf-8").replace("no torch", "")


def test_importing_registers_once_and_loads_no_optional_library():
    script = """
import importlib, sys
import hf_cptquant, hf_cptquant.transformers_backend as backend
heavy = {"matplotlib", "datasets", "pyarrow", "evaluate", "typer", "gguf"} & set(sys.modules)
assert not heavy, heavy
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers
sizes = len(configs), len(quantizers)
importlib.reload(backend)
importlib.reload(hf_cptquant)
hf_cptquant.transformers_backend.register()
assert (len(configs), len(quantizers)) == sizes
from transformers.utils.quantization_config import CompressedTensorsConfig
foreign = configs["compressed-tensors"].from_dict({"quant_method": "compressed-tensors", "config_groups": {}})
assert type(foreign) is CompressedTensorsConfig
"""
    subprocess.run([sys.executable, "-c", script], check=True)
