r"""MetaRM on LoRA adapters (PEFT): a frozen bf16 decoder, float32 adapters and reward head.

    bash run.sh                      # first: the paths below are the toy run's
    python docs/trainers/lora.py     # writes runs/lora/adapter; merged with the base, runs/lora/rm
    python docs/trainers/lora.py --model meta-llama/Llama-2-7b-hf --data D.jsonl --meta S.jsonl \
        --micro_batch_size 2 --gradient_checkpointing --max_length 512 --steps 0

Eqs. 3 and 5 move what is trainable: theta is the adapters and the head, and so is theta'.
The trap: adapters in bf16. AdamW's steps of 1e-4, and the climb, would be rounded away.
Dropout must be off here, too (lora_dropout=0): J would climb the noise between two masks.
"""

import argparse
import sys
from pathlib import Path

import peft
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import metarm
import rm


def load(path, base_dtype=torch.bfloat16, r=16):
    """Returns (PEFT model, its tokenizer)."""
    model, tokenizer = rm.load_reward_model(path, seed=0)  # float32 on the CPU; then rounded
    # Not model.to(): it would round buffers, too, and RoPE's inv_freq in bf16 gives wrong angles to
    # far positions. Not the head: PEFT trains a copy of it, in its dtype.
    for module in model.modules():
        if not isinstance(module, rm.Float32Head):
            for p in module.parameters(recurse=False):
                p.data = p.data.to(base_dtype)
    torch.manual_seed(0)  # of the adapters
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=r, lora_alpha=2 * r, target_modules="all-linear")
    return peft.get_peft_model(model, lora).eval(), tokenizer


def turn(model, optimizer, L, J, eta, checkpointing=False):
    """Takes one turn of Algorithm 1. L and J: lists of micro-batches, functions of `forward`."""
    if not checkpointing:
        return metarm.metarm_step(model, optimizer, L, J, eta, normalize=True, max_grad_norm=1.0)
    # Checkpointing runs layers again in backward. The weights must be at theta' then, too.
    optimizer.zero_grad()
    for part in J:
        (part(model) / len(J)).backward()
    with metarm.lookahead(model, eta, normalize=True):
        for part in L:
            (part(model) / len(L)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {"grad_norm": norm.item()}


def checkpoint_gradients(model):
    model.get_base_model().shares_prompts = False  # that needs a cache; checkpointing has none
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints in train mode only ...
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # ... where dropout would be on
            module.p = 0.0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="runs/toy/sft", help="language model: folder or hub name")
    add("--data", default="runs/toy/pairs/train.jsonl", help="preference pairs D")
    add("--meta", default="runs/toy/metarm-1/meta/samples.jsonl", help="meta set S")
    add("--out", default="runs/lora")
    add("--lr", type=float, default=1e-4)
    add("--eta", type=float, default=metarm.DEFAULT_LENGTH, help="length of the climb")
    add("--batch_size", type=int, default=16, help="pairs of D, and prompts of S, per step")
    add("--micro_batch_size", type=int, default=16, help="of these per pass")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--max_length", type=int, default=0, help="drop longer rows, in tokens")
    add("--steps", type=int, default=3, help="0: one epoch of D")
    args = parser.parse_args(argv)

    model, tokenizer = load(args.model)
    model.to(rm.pick_device())
    base = model.get_base_model()  # rm.py asks it for its device, and how to call it
    if args.gradient_checkpointing:
        checkpoint_gradients(model)
    theta = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(theta, lr=args.lr, weight_decay=0.0)
    pairs, samples = data.read_preferences(args.data), data.read_meta(args.meta)
    _, D = rm.encode_groups(base, tokenizer, pairs, args.data, args.max_length)
    _, S = rm.encode_groups(base, tokenizer, samples, args.meta, args.max_length)

    def L(forward, groups):  # Eq. 1
        return rm.pair_loss(forward, base, tokenizer, groups)

    def J(forward, groups):  # Eq. 2
        rewards = rm.rewards_of(forward, base, tokenizer, groups)  # (m k,)
        return metarm.difference_loss(rewards.view(len(groups), -1))

    batches = list(rm.epoch_batches(rm.row_lengths(D), args.batch_size, seed=0))
    batches = batches[: args.steps or None]
    batches_of_S, size = [], min(args.batch_size, len(S))
    while len(batches_of_S) < len(batches):
        batches_of_S += rm.epoch_batches([0] * len(S), size, seed=len(batches_of_S))
    for step, (of_D, of_S) in enumerate(zip(batches, batches_of_S, strict=False)):
        X_t = metarm.micro_batches(L, [D[i] for i in of_D], args.micro_batch_size)
        X_s = metarm.micro_batches(J, [S[i] for i in of_S], args.micro_batch_size)
        figures = turn(model, optimizer, X_t, X_s, args.eta, args.gradient_checkpointing)
        print(f"step {step}: {figures}")

    model.save_pretrained(f"{args.out}/adapter")
    # Merged in float32: bf16 would round the adapters away. ppo.py and eval.py read this folder.
    merged = model.cpu().float().merge_and_unload()
    rm.save_model(merged, tokenizer, f"{args.out}/rm")


if __name__ == "__main__":
    try:
        main()
    except (data.Mistake, metarm.NotFinite) as error:  # one line, as in the repository's commands
        sys.exit(f"lora.py: error: {error}")
