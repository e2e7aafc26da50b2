"""The kernels for CUDA without a GPU: right in Triton's interpreter, compiled for GPUs, and chosen where they run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_cptquant import kernels
from hf_cptquant.kernels import REFERENCE, TRITON, TRITON_DENSE, WIRE, choose_layout, kernel_of
from hf_cptquant.modules import QuantLinear
from hf_cptquant.plan import LayerScheme

triton = pytest.importorskip("triton")
CUDA, SCHEME = torch.device("cuda"), LayerScheme(4, 128)
SHARED_MEMORY = 99 * 1024  # that one program can have on the GPUs of capability 8.0 and more that have least (8.6, 8.9)


def test_kernels_in_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", str(Path(__file__).with_name("triton_interpreted.py"))]
    done = subprocess.run(
        command, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("capability", "dtype", "bits", "group_size", "zero_point"),
    [
        pytest.param(90, "bf16", 4, 128, False, id="9.0-bfloat16-4-sym"),
        pytest.param(80, "fp32", 3, 64, True, id="8.0-float32-3-asym"),
    ],
)
def test_kernels_compile_for_gpus_and_fit_their_shared_memory(
    capability, dtype, bits, group_size, zero_point, tmp_path, monkeypatch
):
    from triton.backends.compiler import GPUTarget

    from hf_cptquant.kernels import triton_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {
        **dict.fromkeys(("x", "scales", "bias", "out"), f"*{dtype}"),
        **dict.fromkeys(("words", "zero_points"), "*i32"),
        **dict.fromkeys(("rows", "out_features", "in_features"), "i32"),
    }
    constants = {"GROUP": group_size, "BITS": bits} | ({} if zero_point else {"zero_points": None, "bias": None})
    rows, (outputs, inputs) = triton_kernel.PRODUCT_ROWS[1], triton_kernel.PRODUCT_TILE
    for kernel, tile in (
        (triton_kernel.one_row_kernel, triton_kernel.ONE_ROW_TILE),
        (triton_kernel.dense_kernel, triton_kernel.DENSE_TILE),
        (triton_kernel.product_kernel, (outputs, inputs)),
    ):
        values = {**constants, "TILE_M": rows, "TILE_N": tile[0], "TILE_K": tile[1]}
        names = kernel.arg_names
        source = triton.compiler.ASTSource(
            kernel,
            signature={name: "constexpr" if name in values else types[name] for name in names},
            constexprs={(names.index(name),): value for name, value in values.items() if name in names},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=triton_kernel.OPTIONS)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_MEMORY


@pytest.fixture
def machine(monkeypatch):
    """Which GPU there is, and whether triton is installed, as far as the choice goes."""

    def pretend(capability=(9, 0), hip=None, installed=True):
        kernels.without_triton.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        if not installed:
            monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)

    yield pretend
    kernels.without_triton.cache_clear()


def test_cuda_takes_tritons_kernel_for_every_scheme(machine):
    machine((8, 0))
    for scheme in (SCHEME, LayerScheme(3, 16, False), LayerScheme(8)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            choice = choose_layout(scheme, 40, 256, CUDA, dtype)
            assert (choice.layout, choice.reason) == (WIRE, "Triton's kernel up to 256 rows, dequantize beyond")
            found = [kernel_of(WIRE, (40, 256), rows, dtype, CUDA) for rows in (0, 1, 256, 257)]
            assert found == [TRITON_DENSE, TRITON, TRITON, TRITON_DENSE]


@pytest.mark.parametrize(
    ("device", "dtype", "pretended", "reason"),
    [
        ("cuda", torch.bfloat16, {"installed": False}, "cuda, since triton is not installed"),
        ("cuda", torch.bfloat16, {"capability": (7, 5)}, "cuda with capability 7.5, since Triton needs 8.0"),
        ("cuda", torch.bfloat16, {"hip": "6.4"}, "ROCm, on which Triton's was never tried"),
        ("cuda", torch.float64, {}, "torch.float64, which Triton's does not take"),
        ("xpu", torch.bfloat16, {}, "xpu, on which Triton's was never tried"),
        ("mps", torch.bfloat16, {}, "mps, which Triton does not compile for"),
    ],
    ids=str,
)
def test_reference_says_why_it_is_taken_and_logs_it(device, dtype, pretended, reason, machine, logged):
    machine(**pretended)
    choice = choose_layout(SCHEME, 64, 128, torch.device(device), dtype)
    assert choice.layout == WIRE
    assert choice.reason.startswith(f"no packed kernel for {reason}")
    assert kernel_of(WIRE, (64, 128), 1, dtype, torch.device(device)) == REFERENCE
    if device != "mps":  # torch has no fake tensors there
        with FakeTensorMode():
            QuantLinear(128, 64, SCHEME, dtype=dtype, device=device).settle()
        assert f"Packed layers run slowly here: {choice.reason}." in logged.text
