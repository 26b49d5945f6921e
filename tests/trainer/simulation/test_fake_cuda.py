"""The CUDA device that is none, in processes of their own: it has to stand before torch."""

import os
import subprocess
import sys

import pytest
import torch

from tests.environment import with_gpus

LOAD = "from trainer.simulation import fake_cuda; fake_cuda.load()\n"
STEP = """
import threading
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode(), torch.device("cuda:0"):
    weight = torch.zeros(4, 4, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        product = torch.nn.functional.layer_norm(torch.zeros(4, 4) @ weight, (4,))
    weight.register_hook(lambda gradient: print(threading.current_thread().name))
    product.sum().backward()
    print(product.device, product.dtype, weight.grad.dtype)
    try:
        product + torch.zeros(4, 4, device="cpu")
    except RuntimeError as error:
        print("refused")
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=with_gpus(os.environ) | environment)


def test_autograd_and_cudas_autocast_work_on_fake_tensors(tmp_path):
    made = run(LOAD + STEP, XDG_CACHE_HOME=str(tmp_path))
    told = made.stdout.splitlines()
    assert told[1:] == ["cuda:0 torch.float32 torch.float32", "refused"], made.stderr  # layer_norm: fp32 on CUDA alone
    if torch.version.cuda is None:
        assert told[0] == "MainThread", "a process that ends with its last backward pass may be ended while it does"
        assert len(list(tmp_path.glob("fluxfill/fake_cuda-*.so"))) == 1


@pytest.mark.skipif(torch.version.cuda is not None, reason="nothing is compiled for a torch that has CUDA")
def test_without_a_compiler_it_says_what_to_do(tmp_path):
    made = run(LOAD, XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))
    assert "no C++ compiler (g++, clang++, c++). Install one" in made.stderr and "--simulate" in made.stderr


def test_it_has_to_come_before_torch():
    made = run("import torch\n" + LOAD)
    assert "torch is imported already" in made.stderr
