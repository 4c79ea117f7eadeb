"""What the tests share: tiny random checkpoints of several architectures, written to disk as a hub folder would be."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

TEXT = ["Human: my phone is broken, please help.", "Assistant: Sorry, we will send a new phone today.",
        "the parcel is late and the invoice is wrong", "thank you for your patience, we refund the charge"] * 4
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=128)
ARCHITECTURES = {
    "gpt2": lambda v: transformers.GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "llama": lambda v: transformers.LlamaConfig(vocab_size=v, num_key_value_heads=2, **SMALL),
    "llama-tied": lambda v: transformers.LlamaConfig(vocab_size=v, tie_word_embeddings=True, **SMALL),
    "qwen2": lambda v: transformers.Qwen2Config(vocab_size=v, num_key_value_heads=2, **SMALL),
    "qwen3": lambda v: transformers.Qwen3Config(vocab_size=v, num_key_value_heads=2, head_dim=8, **SMALL),
    "gemma": lambda v: transformers.GemmaConfig(vocab_size=v, num_key_value_heads=1, head_dim=8, **SMALL),
    "gpt_neox": lambda v: transformers.GPTNeoXConfig(vocab_size=v, **SMALL),
    "opt": lambda v: transformers.OPTConfig(vocab_size=v, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2,
                                            num_attention_heads=4, ffn_dim=48, max_position_embeddings=128),
}


def make_tokenizer(bos=None, eos="<eos>", pad="<pad>", padding_side="right", encoder=False):
    """A byte-level BPE of ~400 tokens; `bos` is put before every text by itself, as Llama's and OPT's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in dict.fromkeys([bos, eos, pad, "[CLS]" if encoder else None]) if token]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"[CLS] $A {eos}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", eos)])
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token=eos, cls_token="[CLS]", pad_token=pad,
                                                    padding_side=padding_side)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A",
                                                                 special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad,
                                                padding_side=padding_side)


def make_policy(folder, architecture="llama", seed=0, **tokenizer_options):
    """A random causal LM with its tokenizer, saved to `folder`; returns str(folder)."""
    tokenizer = make_tokenizer(**tokenizer_options)
    config = ARCHITECTURES[architecture](len(tokenizer))
    config.eos_token_id, config.bos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id, None
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("policy") / "llama")
