r"""The reward model (RM): a number for each response, learned from preference pairs.

Concept: the Bradley-Terry model. A pair says that `chosen` beat `rejected` for the same prompt. The
RM r(x, y) is a language model with a linear head on its last token, trained so that
sigma(r_chosen - r_rejected) is the probability of that verdict (Eq. 1, the vanilla loss).

    python rm.py --model runs/toy/sft --data runs/toy/pairs/train.jsonl --out runs/toy/rm0

writes a folder that `AutoModelForSequenceClassification.from_pretrained` reads, and `log.jsonl`.

Three names, the same in rm.py, metarm.py and ppo.py:

    text   a prompt or a response, as a string
    row    a prompt and a response as token ids: (prompt_ids, response_ids), the latter with its EOS
    group  the rows of one prompt: the two of a pair of D (chosen first), the k of a prompt of S

All rewards come from `encode` and `rewards_of`; `score` adds batches and float32. So one response
always gets one reward.
"""

import functools
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, logging
from transformers.utils import find_adapter_config_file

import data

Row = tuple[list[int], list[int]]
Group = Sequence[Row]


# ------------------------------------------------------------------------------- the loss (Eq. 1)
def preference_loss(chosen_rewards, rejected_rewards, weights=None) -> Tensor:
    """Returns Eq. 1, L = -mean w log sigma(r(x, y_w) - r(x, y_l)); w = 1 without weights.

    Shapes: all (n,), one entry per pair; returns a scalar in nats (log 2 = a coin toss).
    Raises: ValueError on other shapes. Source: paper, Eq. 1; Bradley & Terry 1952.
    """
    # Two shapes that differ, as (n,) and (n, 1), would broadcast: n * n pairs, and no error.
    shapes = [tuple(x.shape) for x in (chosen_rewards, rejected_rewards, weights) if x is not None]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0][0] < 1:
        raise ValueError(f"preference_loss needs tensors of one shape (n,), n >= 1; got {shapes}")
    # Not log(sigmoid(.)): at a margin of -100, float32's sigmoid is 0 and its log -inf. logsigmoid
    # returns -100 there, with a gradient of 1.
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)  # (n,)
    # Divide by n, not by the sum of this batch's weights: the weights already average 1 over D.
    return losses.mean() if weights is None else (weights * losses).mean()


# --------------------------------------------------------------------- from texts to a row of ids
def encode(tokenizer, prompt: str, response: str) -> Row:
    """Returns (ids of the prompt, ids of the response + EOS). Nothing is encoded anywhere else."""
    # The prefix goes before the prompt, once: a chat template may have written it already.
    prefix = prefix_of(tokenizer)
    # Prompt and response are tokenized APART. Together, a token could straddle the seam: the prompt
    # would have other ids for every response, and other ids than the policy generates from.
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if prompt_ids[: len(prefix)] != prefix:
        prompt_ids = prefix + prompt_ids
    response_ids = tokenizer(response, add_special_tokens=False).input_ids
    # EOS, too, stands once: it is where the head reads, and where the policy stops.
    if response_ids[-1:] != [end_id(tokenizer)]:
        response_ids = response_ids + [end_id(tokenizer)]
    return prompt_ids, response_ids


# --------------------------------------------------------------------------- rewards and accuracy
def rewards_of(forward: Callable, model, tokenizer, groups: Sequence[Group]) -> Tensor:
    """Returns the rewards (n,) of all rows. `forward` is the model, perhaps at other parameters."""
    rows = [row for group in groups for row in group]  # n of them, those of a prompt side by side
    # Optional, at the end of this file: each prompt is read once instead of once per response.
    prompt, response = (max(map(len, ids)) for ids in zip(*rows, strict=True))  # the longest
    saved = len(rows) * (max(row_lengths(groups)) - response) - len(groups) * prompt  # tokens
    if all(prompt_ids for prompt_ids, _ in rows) and shares_prompts(model, saved):
        return rewards_reading_prompts_once(forward, model, tokenizer, groups)
    # The head is applied to every token; the model picks its output at the last one: (n, 1).
    return forward(**collate(tokenizer, rows, model.device)).logits[:, 0]


def pair_loss(forward: Callable, model, tokenizer, pairs: Sequence[Group]) -> Tensor:
    """Returns Eq. 1 of pairs (chosen row, rejected row); `forward` as in `rewards_of`."""
    rewards = rewards_of(forward, model, tokenizer, pairs).view(-1, 2)  # (pairs, 2)
    return preference_loss(*rewards.unbind(dim=1))


@torch.no_grad()
def score(model, tokenizer, prompts: list[str], responses: list[str], batch_size=64) -> Tensor:
    """Returns the rewards of n responses, a float32 CPU tensor (n,), in the order given.

    Computed without autocast: a reward must not depend on who else is in the batch.
    Raises: ValueError on unequal counts; Mistake on a row longer than the model's positions.
    """
    items = [{"prompt": x, "response": y} for x, y in zip(prompts, responses, strict=True)]
    _, groups = encode_groups(model, tokenizer, items, f"texts scored by {model.name_or_path}")
    # Longest first: rows of like length meet, and the batch that needs the most memory comes first.
    # Rows of one prompt, if given side by side, stay so: their prompt is read once.
    # A dict keeps the last entry of each prompt; sorted, that is the tokens of its longest row.
    longest = dict(sorted(zip(prompts, row_lengths(groups), strict=True)))
    order = sorted(range(len(prompts)), key=lambda i: -longest[prompts[i]])
    rewards = torch.zeros(len(prompts))  # (n,)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        # encode_groups made a group of each row. Join those of one prompt that are neighbours.
        some = [[groups[i][0] for i in same] for _, same in groupby(batch, prompts.__getitem__)]
        rewards[batch] = rewards_of(model, model, tokenizer, some).float().cpu()
    model.train(was_training)
    return rewards


def accuracy(model, tokenizer, pairs: list[dict], batch_size: int = 64) -> float:
    """Returns the share of pairs whose chosen response gets more reward (a tie counts half)."""
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    responses = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    # (2 pairs,) -> (pairs, 2) -> two columns (pairs,)
    chosen, rejected = score(model, tokenizer, prompts, responses, batch_size).view(-1, 2).unbind(1)
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


# A reader of the paper may stop after the next two, which make the model. The rest is what it takes
# in practice.
# ------------------------------------------------------ the model: a language model with a new head
class Float32Head(torch.nn.Linear):
    """A linear layer computed in float32 (or float64), inside a bf16 autocast region too.

    bf16 keeps 8 bits: around r = 4 its steps are 0.03. Two close responses would get EQUAL rewards,
    and the gradient of the difference loss, which lives on small differences, would vanish.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), self.weight.to(wide), bias)


def load_reward_model(path: str, seed: int | None = None):
    """Returns (model, tokenizer) of a `save_pretrained` folder or hub name: float32, in eval mode.

    seed=None: the folder must hold a trained reward head. With a seed, a language model gets a new
    head from it: where RM 0 and the RM of every MetaRM round start (paper, Figure 4).
    Eval mode is for TRAINING, too: with dropout, J would climb the noise between two random masks.
    Raises: Mistake, naming the path and the fix, on anything that is no such model.
    """
    auto_class = AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as they were
        torch.default_generator.manual_seed(seed or 0)  # not torch.manual_seed: CUDA's would follow
        model, tokenizer, new = load_pretrained(auto_class, path, LM_HEADS, num_labels=1)
        if new and seed is None:
            raise data.Mistake(f"{path}: no reward head ({new[0]}); train one from it with rm.py")
        # transformers' heads read the last token that is NOT the pad id. Were EOS the pad id (as
        # in GPT-2 recipes), that would be the one before EOS or, if that is all, the prompt's.
        if tokenizer.pad_token_id in (None, end_id(tokenizer)):
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for config in (model.config, model.config.get_text_config()):  # two in image + text models
        config.pad_token_id = tokenizer.pad_token_id
        config.use_cache = False  # a row is read once, so that a cache would only take memory
    # The last layer with one output is the head: encoders have a layer or two before it.
    heads = [m for m in model.modules() if type(m) is torch.nn.Linear and m.out_features == 1]
    heads[-1].__class__ = Float32Head  # the same parameters under the same names, another forward
    try_out(model, tokenizer, path, lambda groups: rewards_of(model, model, tokenizer, groups))
    return model, tokenizer


# ------------------------------------------- rows: their begin and end, padding, length, and groups
# Used by all files: `encode` and `pad` are the only ways from texts to tensors.
@functools.cache
def prefix_of(tokenizer) -> list[int]:
    """Returns what the tokenizer puts before a text by itself (BOS, [CLS])."""
    # One letter with and without them: what comes before the letter's own ids is the prefix.
    special, plain = (tokenizer("a", add_special_tokens=x).input_ids for x in (True, False))
    starts = [i for i in range(len(special)) if special[i : i + len(plain)] == plain]
    return special[: starts[0]] if starts else []


def end_id(tokenizer) -> int:
    """Returns the id that ends a response: EOS, or an encoder's [SEP]. Raises Mistake if none."""
    for end in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if end is not None:
            return end
    raise data.Mistake(f"{tokenizer.name_or_path}: its tokenizer has no EOS (nor SEP) token")


def collate(tokenizer, rows: Sequence[Row], device="cpu") -> dict[str, Tensor]:
    """Returns {"input_ids", "attention_mask"} of rows, both (n, longest row), padded on the RIGHT.

    Real tokens then sit at the positions 0, 1, 2 ... that the model was trained with, and in a
    causal model none sees a pad. (ppo.py pads prompts on the left: generation goes on at the end.)
    """
    return pad([prompt + response for prompt, response in rows], tokenizer.pad_token_id, device)


def pad(rows: list[list[int]], pad_id: int, device="cpu", left=False) -> dict[str, Tensor]:
    """Returns {"input_ids", "attention_mask"} of n lists of ids, both (n, longest list)."""
    side = "left" if left else "right"
    tensors = [torch.tensor(row).long() for row in rows]  # .long(): an empty list would give floats
    ids = torch.nn.utils.rnn.pad_sequence(tensors, True, pad_id, side)
    # 1 at real tokens. (True: the batch comes first.)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in tensors], True, 0, side)
    # Filled on the CPU and sent once: to write row by row to a GPU takes a launch for each.
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def encode_groups(model, tokenizer, items: list[dict], source: str, max_length: int = 0):
    """Returns (items kept, their groups). An item is a line of D, S or SFT, as data.py reads them.

    With max_length > 0, an item with a longer row is dropped as a whole, and counted on stderr.
    Raises: Mistake naming `source` and the item if one does not fit the model, or if none is left.
    """
    limit = positions(model)
    kept = []
    groups = []
    keys = ("chosen", "rejected", "response")  # chosen first, as a group of D has it
    for number, item in enumerate(items, 1):
        responses = item.get("responses") or [item[key] for key in keys if key in item]
        group = [encode(tokenizer, item["prompt"], response) for response in responses]
        [length] = row_lengths([group])
        # As a whole: a pair of one response has no loss, and all prompts of S need the same k.
        if max_length and length > max_length:
            continue
        # Never cut to fit: the RM would judge a text that nobody wrote, without its end.
        if length > limit:
            why = f"{length} tokens, but {model.name_or_path} has {limit} positions"
            raise data.Mistake(f"{source}, row {number}: {why}; --max_length {limit} drops it")
        kept.append(item)
        groups.append(group)
    if len(kept) < len(items):
        print(f"{source}: dropped {len(items) - len(kept)} of {len(items)} rows", file=sys.stderr)
        if not kept:
            raise data.Mistake(f"{source}: no row fits into --max_length {max_length}; raise it")
    return kept, groups


def positions(model) -> int:
    """Returns the most tokens that a row may have."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this, a row's positions depend on the batch
        limit = rope.get("original_max_position_embeddings", limit)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from padding_idx + 1, so that the first go unused.
        if limit and "position" in name and getattr(module, "padding_idx", None) is not None:
            return limit - module.padding_idx - 1
    return limit or sys.maxsize  # without a limit: relative positions, or a recurrent model


def row_lengths(groups: Sequence[Group]) -> list[int]:
    """Returns the tokens of each group's longest row."""
    return [max(len(prompt_ids) + len(ids) for prompt_ids, ids in group) for group in groups]


# ------------------------------------------------ loading and trying out checkpoints (ppo.py, too)
# Whatever transformers loads is taken, if it passes these two. `load_pretrained` looks at what the
# folder holds, `try_out` at what the model does with padding. Both refuse in one line.
# Weights of a language model's checkpoint that its reward model has no use for.
LM_HEADS = r"^(lm_head|lm_loss|(lm_|discriminator_|generator_)?predictions|generator_lm_head|"
LM_HEADS += r"embed_out|pred_layer|sop_classifier|vocab_(transform|layer_norm|projector)|decoder|"
LM_HEADS += r"cls\.(predictions|seq_relationship))(\.|$)"


def load_pretrained(auto_class, path: str, may_be_unused: str = "$^", **options):
    """Returns (model, tokenizer, weights that were new), of RMs and policies: float32 on the CPU.

    Float32 whatever the checkpoint's dtype: at a learning rate of 1e-6, no bf16 weight would move.
    may_be_unused: pattern of the names that the checkpoint may have beside the model's.
    Raises: Mistake naming the path if it holds no whole and finite checkpoint of this kind.
    """
    logging.set_verbosity_error()  # "newly initialised: score.weight" is said by us, if it matters
    logging.disable_progress_bar()
    # Since torch 2.11, cuDNN's attention comes first on H100 and B200. Its backward pass gives NaN
    # for masked rows of 64 modulo 128 tokens (pytorch#196678), and each shape costs a plan.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # A hub name is owner/name. Anything else that is no folder would be asked of the hub in vain.
    if not Path(path).is_dir() and (path.count("/") != 1 or path[0] in "./~"):
        raise data.Mistake(f"{path}: no such folder; a hub name is like openai-community/gpt2")
    if find_adapter_config_file(path):  # the loader would leave the adapter out, or train only it
        raise data.Mistake(f"{path}: a PEFT adapter; merge it first, or see docs/trainers/lora.py")
    options |= {"dtype": torch.float32, "use_safetensors": True}  # no pickles, no code from the hub
    # Weights of another shape are then reported in `info` instead of raised, as missing ones are.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}

    def load(part, **options):
        try:
            return part.from_pretrained(path, trust_remote_code=False, **options)
        except Exception as e:  # a dozen types, which mean the same to the user
            raise data.Mistake(f"{path}: not a whole {auto_class.__name__} ({e!r:.200})") from e

    config, tokenizer = load(AutoConfig), load(AutoTokenizer)
    # Weights of 4 or 8 bits take no gradient: all steps would be run, and nothing would move.
    if any(getattr(x, "quantization_config", 0) for x in (config, config.get_text_config())):
        raise data.Mistake(f"{path}: quantised weights cannot train; see docs/trainers/lora.py")
    model, info = load(auto_class, **options)
    # What is new may only be a head: weights of the trunk must come from the checkpoint (but for
    # the pooler of an encoder, which a masked language model lacks).
    new = sorted(info["missing_keys"])
    trunk = f"{model.base_model_prefix}."
    wrong = [f"{key} has another shape" for key in sorted(info["mismatched_keys"])]
    wrong += [f"{key} is missing" for key in new if key.startswith(trunk) and "pooler" not in key]
    # And what is left over may only be the old head: a reward head of another name must not go.
    for key in sorted(info["unexpected_keys"]):
        wrong += [] if re.search(may_be_unused, key) else [f"its weight {key} would not be used"]
    for name, p in model.named_parameters():
        wrong += [] if torch.isfinite(p).all() else [f"{name} holds NaN or infinity"]
        wrong += [] if p.requires_grad else [f"{name} is frozen (see docs/trainers/lora.py)"]
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        wrong.append(f"its tokenizer has {len(tokenizer)} tokens, more than its embedding")
    if wrong:
        raise data.Mistake(f"{path}: {wrong[0]}; give a sound {type(model).__name__} checkpoint")
    return model.eval(), tokenizer, new


@torch.no_grad()
def try_out(model, tokenizer, path: str, answer: Callable[[list[Group]], Tensor]) -> None:
    """Reads short rows alone and padded together, and refuses a model whose answers differ.

    So what is supported is a rule, and it is checked: a model must honour the attention mask. This
    also finds out whether it can read on from a cache (`model.can_cache`, for ppo.generate), and
    from one prompt's cache for many responses (`model.shares_prompts`, end of this file).
    answer: groups -> one number per row: its reward, or the log-probability of its response.
    """
    # Two prompts and four responses, of four lengths: together, three of the rows are padded.
    texts = {"Hello, how are you?": ["Fine.", "I am well, thank you."], "Hi": ["It is so.", "No"]}
    groups = [[encode(tokenizer, x, y) for y in ys] for x, ys in texts.items()]
    fault = f"{path}: a {type(model).__name__} does not read a padded row as it reads it alone"
    model.shares_prompts = False
    try:
        alone = torch.cat([answer([[row]]) for group in groups for row in group])  # (4,)
        together = answer(groups)  # (4,)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        if data.out_of_memory(error):  # not the model's fault
            raise
        raise data.Mistake(f"{fault} ({error!r:.200})") from error
    # float32 rounds in the sixth digit; a mask that is ignored shows in the fourth at the latest.
    close = {"rtol": 0, "atol": 5e-5 * (alone.abs().max().item() + 1e-2)}
    if not torch.allclose(alone, together, **close):
        raise data.Mistake(f"{fault}; use another model")
    # Equal answers agree, however wrong: as of a head that reads the first token, or the padding.
    if torch.allclose(alone, alone[:1], **close):
        raise data.Mistake(f"{path}: gives all responses one reward; use another model")
    try:
        model.shares_prompts = True
        model.can_cache = torch.allclose(alone, answer(groups), **close)
    except Exception as error:  # no cache, or one of another kind: its rows are read in full
        if data.out_of_memory(error):
            raise
        model.can_cache = False
    # Rows this short would not feel a window over the last tokens: such models read rows in full.
    # (ppo.generate reads on token by token, as transformers does.)
    config = model.config.get_text_config()
    windows = any(getattr(config, x, None) for x in ("sliding_window", "attention_chunk_size"))
    model.shares_prompts = model.can_cache and not windows


def save_model(model, tokenizer, folder) -> None:
    """Writes a model folder with its tokenizer, as transformers does."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --------------------------------------------------------- device and precision (used by all files)
def pick_device() -> torch.device:
    """Returns the device that METARM_DEVICE names, else CUDA's if there is one, else the CPU."""
    return torch.device(os.getenv("METARM_DEVICE") or ["cpu", "cuda"][torch.cuda.is_available()])


def autocast(device: torch.device, bf16: bool = False) -> torch.autocast:
    """Returns a model's precision: float32 or, with bf16=True and on CUDA, bf16 products.

    bf16 is for policies (weights stay float32); on a CPU it would only cost precision. Reward
    models get float32: a climb (Eq. 3) moves a weight by about 1e-6, less than bf16 can see, and L
    and J at theta' would be computed from weights rounded anew. On SmolLM2-135M from weights stored
    in bf16, with a climb of 0.02, bf16 shows .73 and .84 of float32's rise of J (two batches), TF32
    products .83 and .91 (simulated on a CPU, rounded to nearest; cut off, 6.1 and 2.3).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda")


# ------------------------------------------------- the one training loop: RM, MetaRM, SFT and DPO
# `fit` draws batches and counts steps. What a step does is a function that it is given: most are
# made by `gradient_step` from a loss; metarm.py's is one step of Algorithm 1.
def epoch_batches(lengths: list[int], batch_size: int, seed: int, flag: str = "--batch_size"):
    """Returns one epoch of len(lengths) items as lists of indices (a smaller last one is left out).

    Padding is computed like any token, so rows of like length share a batch: shuffle, cut into
    pools of 16 batches, sort each by length, cut it into batches, shuffle these.
    Raises: Mistake if there are fewer items than one batch.
    """
    if len(lengths) < batch_size:
        raise data.Mistake(f"{len(lengths)} rows fill no batch; lower {flag} {batch_size}")
    # A generator of its own: who else draws random numbers does not change the order of the data.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator)
    batches = []
    for drawn in order[: len(order) // batch_size * batch_size].split(16 * batch_size):
        # sorted() is stable: rows of equal length stay shuffled.
        pool = sorted(drawn.tolist(), key=lambda i: lengths[i])
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    # Without this, each pool would go from its short rows to its long ones.
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def gradient_step(model, loss_of, micro_batch_size, max_grad_norm, weight_of=len, bf16=False):
    """Returns step(optimizer, batch, number) -> {"loss", "grad_norm"}: an optimizer step on it.

    loss_of: groups -> scalar mean. A batch is cut into micro-batches to save memory. Each mean
    counts by its share of the batch (`weight_of`: rows; in SFT tokens): same gradient.
    max_grad_norm: a longer gradient is scaled down to it. bf16: as in `autocast`.
    The step raises FloatingPointError, before anything has moved, on NaN and infinity.
    """

    def step(optimizer, batch: list[Group], number: int) -> dict[str, float]:
        losses = []  # of the micro-batches: scalars, which sum to the mean over the batch
        for start in range(0, len(batch), micro_batch_size):
            part = batch[start : start + micro_batch_size]
            with autocast(model.device, bf16):
                loss = loss_of(part) * weight_of(part) / weight_of(batch)
            loss.backward()  # adds to .grad, and frees this micro-batch's graph
            losses.append(loss.detach())  # .item() here would wait for the GPU in every micro-batch
        total = sum(torch.stack(losses).tolist())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
        # Before the step, which would carry NaN from one weight into all.
        if not total + norm < torch.inf:
            raise FloatingPointError(f"step {number}: loss {total}, gradient {norm}; lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": total, "grad_norm": norm}

    return step


def fit(
    model, groups, step, checkpoint, lr, batch_size, epochs, seed, look=None, log_every=1, sort=True
) -> list[dict]:
    """Trains on groups and returns log.jsonl, which grows line by line beside the checkpoint.

    AdamW; the learning rate decays linearly from lr to 0, as in the paper.
    step(optimizer, batch of groups, number) -> stats: `gradient_step`, or a step of Algorithm 1.
    checkpoint: a `Checkpoint` of this run. seed: of the order of the groups.
    look() -> stats, before every log_every-th step and at the end.
    sort: rows of like length share a batch. Not for a mean over tokens: it would favour short rows.
    """
    lengths = row_lengths(groups) if sort else [0] * len(groups)
    # Draw all batches first: a resumed run then knows those of the steps to come.
    batches = sum((epoch_batches(lengths, batch_size, seed + i) for i in range(epochs)), [])
    steps = len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / steps)
    done, _ = checkpoint.resume(model=model, optimizer=optimizer, decay=decay)
    for number in tqdm(range(done, steps), total=steps, initial=done, mininterval=1):
        stats = {"step": number, "steps": steps}
        if look and number % log_every == 0:
            stats |= look()
        stats |= step(optimizer, [groups[i] for i in batches[number]], number)
        decay.step()
        # The log first: of two that a kill can part, resume() cuts back the log.
        checkpoint.log(stats)
        checkpoint.save(number + 1)
    if look:
        checkpoint.log({"step": steps, "steps": steps} | look())
    return data.read_jsonl(checkpoint.work / "log.jsonl")


class Checkpoint:
    """Saves and restores a stage: checkpoint.pt, and logs of one line per step. (PPO's, too.)

    work: the folder of both. options: the command's, by name; `checkpoint_minutes` among them.
    A checkpoint belongs to the options and to `trained_on`: a resumed run must not mix two.
    """

    def __init__(self, work: Path, options: dict, trained_on=()):
        # Out of memory, a run goes on with smaller micro-batches: the batches stay the same.
        fixed = options | {"checkpoint_minutes": 0, "micro_batch_size": 0}
        # A checksum of the data, and not its file's name: the file may have been written anew.
        self.run = f"{sorted(fixed.items())} {zlib.crc32(repr(trained_on).encode())}"
        self.work = work
        self.minutes = options["checkpoint_minutes"]
        self.last = time.monotonic()

    def resume(self, **parts) -> tuple[int, dict]:
        """Returns (steps done, what `save` kept), with all parts and random numbers put back.

        parts: what changes from step to step and has a state_dict: models, optimizer, schedule.
        """
        self.parts = parts
        saved = {"step": 0, "kept": {}}
        if (path := self.work / "checkpoint.pt").exists():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if saved["options"] != self.run:
                raise data.Mistake(f"{self.work} is of other options or data; delete it")
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            torch.set_rng_state(saved["rng"])
            # The machine that goes on may have fewer GPUs, or none.
            torch.cuda.set_rng_state_all(saved["cuda_rng"][: torch.cuda.device_count()])
        for log in self.work.glob("*.jsonl"):  # later steps will be logged again
            lines = log.read_bytes().splitlines(keepends=True)  # a str would split at U+2028, too
            data.write_text(log, b"".join(lines[: saved["step"]]).decode())
        return saved["step"], saved["kept"]

    def log(self, stats: dict, name: str = "log.jsonl") -> None:
        data.append_jsonl(self.work / name, stats)

    def save(self, step: int, **kept) -> None:
        """Writes checkpoint.pt, if the last one is old enough."""
        if time.monotonic() - self.last < 60 * self.minutes:
            return
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        saved |= {"step": step, "kept": kept, "options": self.run}
        saved |= {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
        # Renamed when it is whole: a kill while it is written leaves the last one.
        torch.save(saved, self.work / "checkpoint.pt.tmp")
        os.replace(self.work / "checkpoint.pt.tmp", self.work / "checkpoint.pt")
        self.last = time.monotonic()


# ------------------------------------------------------------------------------------- the command
def training_options(parser) -> None:
    """Adds the options that rm.py and metarm.py share."""
    add = parser.add_argument
    add("--model", required=True, help="language model to start from (folder or hub name)")
    add("--data", required=True, help="preference pairs D, .jsonl or .jsonl.gz")
    add("--eval_data", default="", help="held-out pairs for the accuracy in log.jsonl")
    add("--out", required=True, help="folder to write the reward model to")
    add("--lr", type=float, default=5e-6, help="AdamW's, decaying to 0 (alpha of Eq. 5)")
    add("--batch_size", type=int, default=16, help="pairs per step")
    add("--micro_batch_size", type=int, default=16, help="pairs (or prompts of S) per pass: memory")
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--max_length", type=int, default=0, help="drop longer rows, in tokens; 0: refuse them")
    add("--max_grad_norm", type=float, default=1.0, help="longer gradients are scaled down to it")
    add("--log_every", type=int, default=20, help="steps between two looks at held-out pairs")
    add("--checkpoint_minutes", type=float, default=5.0, help="a kill costs this much work at most")
    add("--seed", type=int, default=0, help="of a new head, and of the order of the data")


def look_at(model, tokenizer, path: str, max_length: int) -> Callable:
    """Returns look() -> {"accuracy": share of the file's pairs that the model orders right}."""
    # Read now: a mistake in the file shows before the work.
    pairs, _ = encode_groups(model, tokenizer, data.read_preferences(path), path, max_length)
    return lambda: {"accuracy": accuracy(model, tokenizer, pairs)}


def train(args) -> None:
    """The command: Eq. 1 on D."""
    pairs = data.read_preferences(args.data)
    with data.output_folder(args.out) as work:
        model, tokenizer = load_reward_model(args.model, args.seed)
        model.to(pick_device())
        _, D = encode_groups(model, tokenizer, pairs, args.data, args.max_length)
        loss_of = functools.partial(pair_loss, model, model, tokenizer)  # at its own parameters
        step = gradient_step(model, loss_of, args.micro_batch_size, args.max_grad_norm)
        look = args.eval_data and look_at(model, tokenizer, args.eval_data, args.max_length)
        how = (args.lr, args.batch_size, args.epochs, args.seed, look, args.log_every)  # of fit
        log = fit(model, D, step, Checkpoint(work, vars(args), D), *how)
        save_model(model, tokenizer, work)
    print(f"{args.out}: {len(D)} pairs; at the end {log[-1]}")


def main(argv: list[str] | None = None) -> int:
    parser = data.new_parser("rm.py", __doc__)
    training_options(parser)
    return data.command(parser, train, argv)


# --------------------------------------------------- an optional speed-up: read each prompt once
# The rows of a group answer ONE prompt (P tokens), so a decoder can read it once, and each of the k
# responses (T tokens) on a copy of its cache: P + kT tokens instead of k(P + T). Gradients flow
# through the cache; the rewards are the same. `rewards_of` and ppo.states_of use it.
# To do without it, set model.shares_prompts = False (and in ppo.generate model.can_cache = False).
def shares_prompts(model, saved: int = 0) -> bool:
    """Whether to `read_prompts_once`: `try_out` found it right, and it pays to save these tokens.

    saved: tokens of the rows read in full, less those of prompts and responses, padding counted.
    It takes two passes instead of one. On a CPU that costs nothing. On a GPU a pass over 30 layers
    and back is some 6,000 kernel launches, 60 ms for one row as for fifty: at 135M weights in
    float32, the work of some 3,000 tokens, which also take 1.6 GB per 1,000 (bf16: 1.3 GB). So on a
    GPU rows are read in full, unless 2,048 tokens are saved: that bounds what it costs in memory.
    """
    return getattr(model, "shares_prompts", False) and (model.device.type == "cpu" or saved >= 2048)


def name_of_cache(output) -> str:
    """Returns the key of the cache in a model's output: it varies with model and version."""
    return next(name for name in ("cache", "past_key_values", "cache_params") if name in output)


def rewards_reading_prompts_once(forward, model, tokenizer, groups: Sequence[Group]) -> Tensor:
    """Returns what `rewards_of` returns, (n,)."""
    to_tensors = functools.partial(pad, pad_id=tokenizer.pad_token_id, device=model.device)
    # Prompts are padded on the left: all responses then start in one column, behind their prompt.
    prompts = to_tensors([group[0][0] for group in groups], left=True)  # (m, p)
    responses = to_tensors([ids for group in groups for _, ids in group])  # (n, t)
    owner = torch.tensor([i for i, group in enumerate(groups) for _ in group]).to(model.device)
    return read_prompts_once(forward, model, prompts, responses, owner)[1].logits[:, 0]


def read_prompts_once(forward, model, prompts: dict, responses: dict, owner: Tensor, **options):
    """Returns (output on the prompts, output on the responses).

    Shapes: input_ids and attention_mask of prompts (m, p), padded on the left; of responses (n, t),
    on the right; owner (n,): response i answers prompt owner[i]. options: of the pass over prompts.
    """
    position = (prompts["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # real tokens only
    before = forward(**prompts, position_ids=position, use_cache=True, **options)
    cache = name_of_cache(before)
    before[cache].reorder_cache(owner)  # one copy of its prompt's cache for each response
    mask = torch.cat([prompts["attention_mask"][owner], responses["attention_mask"]], dim=1)
    inputs = {"input_ids": responses["input_ids"], "attention_mask": mask, cache: before[cache]}
    inputs["position_ids"] = (mask.cumsum(dim=1) - 1)[:, position.shape[1] :]
    return before, forward(**inputs, use_cache=True)


if __name__ == "__main__":
    sys.exit(main())
