"""What the tests share: tiny random checkpoints of several architectures, saved in folders."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import rm

torch.set_num_threads(1)
tr.logging.set_verbosity_error()

# Tests compare with exact figures, which the CPU gives. So they see no CUDA device, nor do the
# processes that they start; those marked `cuda` see it. (init: before the variable hides it.)
GPUS = torch.cuda.device_count()
if GPUS:
    torch.cuda.init()
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0

TEXT = """Human: my phone is broken, please help.
Assistant: Sorry, we will send a new phone today.
the parcel is late and the invoice is wrong
thank you for your patience, we refund the charge"""
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 48, "max_position_embeddings": 128}
TWO = {**SMALL, "num_key_value_heads": 2}
GEMMA = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
ARCHITECTURES = {  # vocabulary size -> configuration
    "gpt2": lambda v: tr.GPT2Config(vocab_size=v, **GPT2),
    "llama": lambda v: tr.LlamaConfig(vocab_size=v, **TWO),
    "llama-tied": lambda v: tr.LlamaConfig(vocab_size=v, tie_word_embeddings=True, **SMALL),
    # Qwen2's tokenizer adds <|endoftext|> by itself.
    "qwen2": lambda v: tr.Qwen2Config(vocab_size=v + 1, **TWO),
    "qwen3": lambda v: tr.Qwen3Config(vocab_size=v, head_dim=8, **TWO),
    "gemma": lambda v: tr.GemmaConfig(vocab_size=v, **GEMMA),
    "gpt_neox": lambda v: tr.GPTNeoXConfig(vocab_size=v, **SMALL),
    "opt": lambda v: tr.OPTConfig(vocab_size=v, word_embed_proj_dim=32, ffn_dim=48, **SMALL),
}
MORE = {  # a window of attention; no attention
    "mistral": lambda v: tr.MistralConfig(vocab_size=v, sliding_window=8, **TWO),
    "gemma3": lambda v: tr.Gemma3TextConfig(vocab_size=v, sliding_window=8, **GEMMA),
    "mamba": lambda v: tr.MambaConfig(vocab_size=v, hidden_size=32, num_hidden_layers=2),
}


def make_tokenizer(bos=None, eos="<eos>", pad="<pad>", padding_side="right", encoder=False):
    """Returns a byte-level BPE of ~400 tokens; like Llama's, it puts `bos` before every text."""
    first = "[CLS]" if encoder else bos
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in dict.fromkeys([bos, eos, pad, first]) if token]
    options = {"vocab_size": 400, "special_tokens": special, "show_progress": False}
    options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT.splitlines() * 4, trainers.BpeTrainer(**options))
    if first:
        template = f"[CLS] $A {eos}" if encoder else f"{bos} $A"
        ids = {token: tokenizer.token_to_id(token) for token in (first, eos)}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(ids.items())
        )
    names = {"pad_token": pad, "padding_side": padding_side}
    names |= {"sep_token": eos, "cls_token": first} if encoder else {}
    names |= {} if encoder else {"bos_token": bos, "eos_token": eos}
    return tr.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save(folder, auto_class, config, tokenizer, seed=0, **options) -> str:
    torch.manual_seed(seed)
    getattr(tr, auto_class).from_config(config, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_policy(folder, architecture="llama", seed=0, **tokenizer_options) -> str:
    tokenizer = make_tokenizer(**tokenizer_options)
    config = (ARCHITECTURES | MORE)[architecture](len(tokenizer))
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    config.pad_token_id = None
    return save(folder, "AutoModelForCausalLM", config, tokenizer, seed)


def make_image_and_text(folder, positions=128, **tokenizer_options) -> str:
    """Writes a Gemma 3, whose settings stand one level down, in config.text_config."""
    tokenizer = make_tokenizer(**tokenizer_options)
    n, end, pad = len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
    text = {**GEMMA, "sliding_window": 8, "max_position_embeddings": positions}
    text |= {"vocab_size": n + 3, "eos_token_id": end, "pad_token_id": pad}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    ids = {"image_token_index": n, "boi_token_index": n + 1, "eoi_token_index": n + 2}
    ids |= {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    return save(folder, "AutoModelForImageTextToText", tr.Gemma3Config(**ids), tokenizer)


def weights_of(folder) -> dict:
    return load_file(f"{folder}/model.safetensors")


def change_weights(folder, change) -> None:
    weights = change(weights_of(folder))
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})


def vector(tensors):
    """Returns all values in one vector; of FSDP2's, those of all shards."""
    tensors = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return torch.cat([t.detach().flatten() for t in tensors])


def write_rows(path, rows) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


THINGS = "phone parcel invoice charge refund help".split()


def make_pairs(n: int) -> list[dict]:
    pairs = []
    for i in range(n):
        prompt = f"Human: my {THINGS[i % 6]} is {'late, ' * (i % 3)}{i}"
        chosen, rejected = f" thank you, {THINGS[i % 4]}", " Sorry" * (i % 3)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: runs on a CUDA device, and is skipped without one")


@pytest.fixture(autouse=True)
def devices(request, monkeypatch):
    if request.node.get_closest_marker("cuda"):
        if not GPUS:
            pytest.skip("needs a CUDA device")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: GPUS)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("toy") / "policy")


@pytest.fixture(scope="session")
def toy(policy_folder):
    """A folder with a policy, pairs of D, S, and an RM with another tokenizer (it gets text)."""
    w, pairs = Path(policy_folder).parent, make_pairs(40)
    S = [{"prompt": x["prompt"], "responses": [x["chosen"], x["rejected"], " no"]} for x in pairs]
    write_rows(w / "meta.jsonl", S)
    base = make_policy(w / "base", "gpt2", bos="<bos>", pad=None)
    argv = f"--model {base} --data {write_rows(w / 'pairs.jsonl', pairs)} --out {w}/rm --lr 1e-3"
    assert rm.main([*argv.split(), "--batch_size", "8", "--epochs", "4"]) == 0
    return w
