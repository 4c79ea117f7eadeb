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

All rewards come from `encode` and `rewards_of`; `score` adds batches. So one response to a prompt
gets the same reward everywhere.
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
    # Divide by n, not by the sum of this batch's weights, which average 1 over all of D. (OCRM, a
    # rival in docs/study, weighs pairs; Eq. 1 does not.)
    return losses.mean() if weights is None else (weights * losses).mean()


# --------------------------------------------------------------------- from texts to a row of ids
def encode(tokenizer, prompt: str, response: str) -> Row:
    """Returns (ids of the prompt, ids of the response + EOS), as all of this project reads them."""
    # The prefix (BOS, [CLS]) goes before the prompt unless a chat template has written it already.
    prefix = prefix_of(tokenizer)
    # Prompt and response are tokenized APART. Together, a token could straddle the seam: the prompt
    # would have other ids for every response, and other ids than the policy generates from.
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if prompt_ids[: len(prefix)] != prefix:
        prompt_ids = prefix + prompt_ids
    response_ids = tokenizer(response, add_special_tokens=False).input_ids
    # Exactly one EOS, too: the head reads the reward there, and the policy stops there.
    if response_ids[-1:] != [end_id(tokenizer)]:
        response_ids = response_ids + [end_id(tokenizer)]
    return prompt_ids, response_ids


# --------------------------------------------------------------------------- rewards and accuracy
def rewards_of(forward: Callable, model, tokenizer, groups: Sequence[Group]) -> Tensor:
    """Returns the rewards (n,) of all rows.

    forward: the model, or a function that calls it at other parameters (theta' in metarm.py). All
    weights come from `forward`; `model` tells its device and what it can do.
    """
    rows = [row for group in groups for row in group]  # n of them, those of a prompt side by side
    # An optional speed-up (end of this file) reads each prompt once, not once per response.
    most_prompt, most_response = (max(map(len, ids)) for ids in zip(*rows, strict=True))  # tokens
    saved = len(rows) * (max(row_lengths(groups)) - most_response) - len(groups) * most_prompt
    if all(prompt_ids for prompt_ids, _ in rows) and shares_prompts(model, saved):
        return rewards_reading_prompts_once(forward, model, tokenizer.pad_token_id, groups)
    # The head is applied to every token; the model picks its output at the last one: (n, 1).
    return forward(**collate(tokenizer, rows, model.device)).logits[:, 0]


def pair_loss(forward: Callable, model, tokenizer, pairs: Sequence[Group]) -> Tensor:
    """Returns Eq. 1 of pairs (chosen row, rejected row); `forward` as in `rewards_of`."""
    rewards = rewards_of(forward, model, tokenizer, pairs).view(-1, 2)  # (pairs, 2)
    return preference_loss(*rewards.unbind(dim=1))


@torch.no_grad()
def score(model, tokenizer, prompts: list[str], responses: list[str], batch_size=64) -> Tensor:
    """Returns the rewards of n responses, a float32 CPU tensor (n,), in the order given.

    Call it outside autocast: rounding in bf16 would make a reward depend on the rest of the batch.
    Raises: ValueError on unequal counts; Mistake on a row longer than the model's positions.
    """
    items = [{"prompt": x, "response": y} for x, y in zip(prompts, responses, strict=True)]
    _, groups = encode_groups(model, tokenizer, items, f"texts scored by {model.name_or_path}")
    # Longest first: rows of like length share a batch, and the one that needs most memory is first.
    # Rows of one prompt, if given side by side, stay so: their prompt is read once.
    # {prompt: tokens of its longest row}: of equal keys, dict keeps the last, which sorted() makes
    # the longest.
    longest = dict(sorted(zip(prompts, row_lengths(groups), strict=True)))
    order = sorted(range(len(prompts)), key=lambda i: -longest[prompts[i]])
    rewards = torch.zeros(len(prompts))  # (n,)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        # encode_groups made one group per row. Join neighbours that have the same prompt.
        joined = [[groups[i][0] for i in same] for _, same in groupby(batch, prompts.__getitem__)]
        rewards[batch] = rewards_of(model, model, tokenizer, joined).float().cpu()
    model.train(was_training)
    if not rewards.isfinite().all():
        raise data.Mistake(f"{model.name_or_path}: gives NaN or infinite rewards; train it anew")
    return rewards


def accuracy(model, tokenizer, pairs: list[dict], batch_size: int = 64) -> float:
    """Returns the share of pairs whose chosen response gets more reward (a tie counts half)."""
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    responses = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    # (2 pairs,) -> (pairs, 2) -> two columns (pairs,)
    chosen, rejected = score(model, tokenizer, prompts, responses, batch_size).view(-1, 2).unbind(1)
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


# A reader of the paper needs two more definitions, which make the model, then `epoch_batches`
# (samples X_t) and `fit`, the loop of Algorithm 1. The rest is for practice: any transformers
# model, resumed runs, speed.
# ------------------------------------------------------ the model: a language model with a new head
class Float32Head(torch.nn.Linear):
    """A linear layer computed in float32 (or float64), even within bf16 autocast.

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
    head, drawn from it. RM 0 and the RM of every MetaRM round start this way (paper, Figure 4).
    Eval mode is for TRAINING, too: with dropout, J would climb the noise between two random masks.
    Raises: Mistake, naming the path and the fix, if it is not such a model.
    """
    auto_class = AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as they were
        torch.default_generator.manual_seed(seed or 0)  # not torch.manual_seed: CUDA's would follow
        model, tokenizer, new = load_pretrained(auto_class, path, LM_HEADS, num_labels=1)
        if new and seed is None:
            raise data.Mistake(f"{path}: no reward head ({new[0]}); train one from it with rm.py")
        # transformers' heads read the last token that is NOT the pad id. If EOS were the pad id (as
        # in GPT-2 recipes), they would read the token before EOS, for an empty response the prompt.
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


# ------------------------------------------------ rows: prefix and end, padding, length, and groups
# Used by all files: `encode` and `pad` are the only ways from texts to tensors.
@functools.cache
def prefix_of(tokenizer) -> list[int]:
    """Returns what the tokenizer puts before a text by itself (BOS, [CLS])."""
    # Tokenize one letter with and without special tokens: what is before its own ids is the prefix.
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

    Real tokens then have the positions 0, 1, 2 ... that the model was trained with, and in a causal
    model none sees a pad. (ppo.py pads prompts on the left: generation appends on the right.)
    """
    return pad([prompt + response for prompt, response in rows], tokenizer.pad_token_id, device)


def pad(rows: list[list[int]], pad_id: int, device="cpu", left=False) -> dict[str, Tensor]:
    """Returns {"input_ids", "attention_mask"} of n lists of ids, both (n, longest list)."""
    side = "left" if left else "right"
    tensors = [torch.tensor(row).long() for row in rows]  # .long(): an empty list gives floats
    ids = torch.nn.utils.rnn.pad_sequence(tensors, True, pad_id, side)
    # 1 at real tokens. (True: the batch comes first.)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in tensors], True, 0, side)
    # Fill on the CPU and send once: writing to a GPU row by row takes one launch per row.
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
        # Drop the whole item: a pair needs both responses, and all prompts of S need the same k.
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
    """Returns how many tokens a row may have at most."""
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
    """Returns the number of tokens of each group's longest row."""
    return [max(len(prompt_ids) + len(ids) for prompt_ids, ids in group) for group in groups]


# ------------------------------------------------ loading and trying out checkpoints (ppo.py, too)
# Any model that transformers loads is accepted if it passes two functions: `load_pretrained` checks
# what the folder holds, `try_out` what the model does with padding. Both raise a one-line Mistake.
# LM_HEADS: names of weights in a language model's checkpoint that its reward model does not need.
LM_HEADS = r"^(lm_head|lm_loss|(lm_|discriminator_|generator_)?predictions|generator_lm_head|"
LM_HEADS += r"embed_out|pred_layer|sop_classifier|vocab_(transform|layer_norm|projector)|decoder|"
LM_HEADS += r"cls\.(predictions|seq_relationship))(\.|$)"


def load_pretrained(auto_class, path: str, may_be_unused: str = "$^", **options):
    """Returns (model, tokenizer, names of newly initialised weights): float32, on the CPU.

    Float32 whatever the checkpoint's dtype: at a learning rate of 1e-6, no bf16 weight would move.
    may_be_unused: pattern of names of weights that the checkpoint may have and the model has not.
    Raises: Mistake naming the path if it holds no whole and finite checkpoint of this kind.
    """
    logging.set_verbosity_error()  # "newly initialised: score.weight" is said by us, if it matters
    logging.disable_progress_bar()
    # Since torch 2.11, cuDNN's attention comes first on H100 and B200. Its backward pass gives NaN
    # for masked rows of 64 modulo 128 tokens (pytorch#196678), and it plans anew for each shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # A hub name is owner/name. Anything else that is not a folder is a mistake: do not ask the hub.
    if not Path(path).is_dir() and (path.count("/") != 1 or path[0] in "./~"):
        raise data.Mistake(f"{path}: no such folder; a hub name is like openai-community/gpt2")
    if find_adapter_config_file(path):  # it would be ignored, or trained alone
        raise data.Mistake(f"{path}: a PEFT adapter; merge it first, or see docs/trainers/lora.py")
    options |= {"dtype": torch.float32, "use_safetensors": True}  # no pickles, no code from the hub
    # Weights of another shape, like missing ones, are then reported in `info` and raise no error.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}

    def load(part, **options):
        try:
            return part.from_pretrained(path, trust_remote_code=False, **options)
        except Exception as e:  # a dozen types, which mean the same to the user
            raise data.Mistake(f"{path}: not a whole {auto_class.__name__} ({e!r:.200})") from e

    config, tokenizer = load(AutoConfig), load(AutoTokenizer)
    # Weights of 4 or 8 bits get no gradient: training would run, and they would not change.
    if any(getattr(x, "quantization_config", 0) for x in (config, config.get_text_config())):
        raise data.Mistake(f"{path}: quantised weights cannot train; see docs/trainers/lora.py")
    model, info = load(auto_class, **options)
    # Only a head may be new: weights of the trunk must come from the checkpoint (except the pooler
    # of an encoder, which a masked language model lacks).
    new = sorted(info["missing_keys"])
    trunk = f"{model.base_model_prefix}."
    wrong = [f"{key} has another shape" for key in sorted(info["mismatched_keys"])]
    wrong += [f"{key} is missing" for key in new if key.startswith(trunk) and "pooler" not in key]
    # And only the old head may be unused: a reward head under another name must not get lost.
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

    A model is supported if it honours the attention mask. It gets model.can_cache, whether it can
    read on from a cache (for ppo.generate), and model.shares_prompts, whether it can read many
    responses from one prompt's cache (end of this file).
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
    # Rounding in float32 shows in the sixth digit, an ignored mask in the fourth at the latest.
    close = {"rtol": 0, "atol": 5e-5 * (alone.abs().max().item() + 1e-2)}
    if not torch.allclose(alone, together, **close):
        raise data.Mistake(f"{fault}; use another model")
    # A head that reads the first token, or padding, would pass: all its answers are the same.
    if torch.allclose(alone, alone[:1], **close):
        raise data.Mistake(f"{path}: gives all responses one reward; use another model")
    try:
        model.shares_prompts = True
        model.can_cache = torch.allclose(alone, answer(groups), **close)
    except Exception as error:  # no cache, or another kind of cache: rows are read in full
        if data.out_of_memory(error):
            raise
        model.can_cache = False
    # These rows are too short to test attention with a window: such models read rows in full.
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


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """Returns a context for forward passes: with bf16=True, on CUDA, products are in bf16.

    bf16 is for policies (weights stay float32); on a CPU it would only cost precision. Reward
    models get float32: a climb (Eq. 3) moves a weight by about 1e-6, less than bf16 or TF32 can
    resolve, so J and L would not see theta' but rounded weights. In a simulation (SmolLM2-135M, a
    climb of 0.02), J rose by .7 to .9 of its rise in float32 where products were rounded to nearest
    (bf16, TF32), and by 2 to 6 times that rise where TF32 cut digits off.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda")


# ------------------------------------------------- the one training loop: RM, MetaRM, SFT and DPO
# `fit` draws batches and calls a function `step` on each. `gradient_step` makes that function from
# a loss, for RM, SFT and DPO; metarm.py has its own, one step of Algorithm 1.
def epoch_batches(lengths: list[int], batch_size: int, seed: int, flag: str = "--batch_size"):
    """Returns one epoch of len(lengths) items, as one list of indices per batch.

    All batches are full: what is left over of the shuffled items is left out of this epoch.
    Padding is computed like any token, so rows of like length share a batch: shuffle, cut into
    pools of 16 batches, sort each by length, cut it into batches, shuffle these.
    Raises: Mistake if there are fewer items than one batch.
    """
    if len(lengths) < batch_size:
        raise data.Mistake(f"{len(lengths)} rows fill no batch; lower {flag} {batch_size}")
    # Its own generator: no other use of random numbers changes the order of the data.
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
    """Returns step(optimizer, batch, number) -> {"loss", "grad_norm"}: one optimizer step.

    loss_of: groups -> scalar mean. A batch is cut into micro-batches to save memory. Each of their
    means is weighted by its share of the batch, so that the gradient is the same as without cuts.
    weight_of(groups): what the mean is over: their number or, in SFT, the tokens of the responses.
    max_grad_norm: a longer gradient is scaled down to it. bf16: as in `autocast`.
    The step raises FloatingPointError, before anything has moved, on NaN and infinity.
    """

    def step(optimizer, batch: list[Group], number: int) -> dict[str, float]:
        losses = []  # one scalar per micro-batch; their sum is the mean over the batch
        for start in range(0, len(batch), micro_batch_size):
            part = batch[start : start + micro_batch_size]
            with autocast(model.device, bf16):
                loss = loss_of(part) * weight_of(part) / weight_of(batch)
            loss.backward()  # adds to .grad, and frees this micro-batch's graph
            losses.append(loss.detach())  # .item() here would wait for the GPU in every micro-batch
        total = sum(torch.stack(losses).tolist())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
        # Check before the step: AdamW would carry NaN into every weight. (NaN < inf is False.)
        if not total + norm < torch.inf:
            raise FloatingPointError(f"step {number}: loss {total}, gradient {norm}; lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": total, "grad_norm": norm}

    return step


def fit(
    model, groups, step, checkpoint, lr, batch_size, epochs, seed, look=None, log_every=1, sort=True
) -> list[dict]:
    """Trains on groups; returns the rows of log.jsonl, which gets one per step.

    AdamW; the learning rate decays linearly from lr to 0. (The paper says so of SFT.)
    step(optimizer, batch of groups, number) -> stats: `gradient_step`, or a step of Algorithm 1.
    checkpoint: the `Checkpoint` of this run. seed: for the order of the groups.
    look() -> more stats, called before every log_every-th step and at the end.
    sort: rows of like length share a batch. False for a mean over tokens, as short rows would then
        weigh more.
    """
    lengths = row_lengths(groups) if sort else [0] * len(groups)
    # Draw the batches of all steps first: a resumed run then has the same ones.
    batches = sum((epoch_batches(lengths, batch_size, seed + i) for i in range(epochs)), [])
    steps = len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / steps)
    done, _ = checkpoint.resume(model=model, optimizer=optimizer, decay=decay)
    # t = 0 .. T-1 of Algorithm 1
    for number in tqdm(range(done, steps), total=steps, initial=done, mininterval=1):
        stats = {"step": number, "steps": steps}
        if look and number % log_every == 0:
            stats |= look()
        # X_t of Algorithm 1, n pairs of D (in SFT n texts), and the step that uses it
        stats |= step(optimizer, [groups[i] for i in batches[number]], number)
        decay.step()
        # The log first: if a kill comes between the two, resume() cuts the log back.
        data.append_jsonl(checkpoint.work / "log.jsonl", stats)
        checkpoint.save(number + 1)
    if look:
        data.append_jsonl(checkpoint.work / "log.jsonl", {"step": steps, "steps": steps} | look())
    return data.read_jsonl(checkpoint.work / "log.jsonl")


class Checkpoint:
    """Saves and restores a training run: checkpoint.pt, and logs of one line per step.

    work: the folder of both. options: {name: value} of the command, with `checkpoint_minutes`.
    trained_on: the data. A run resumes only with the same options, data and models.
    """

    def __init__(self, work: Path, options: dict, trained_on=()):
        # These two may change: after running out of memory, one resumes with smaller micro-batches.
        fixed = options | {"checkpoint_minutes": 0, "micro_batch_size": 0}
        # Checksums: under the same names, there may be other data now, or another RM or reference.
        folders = {options.get(key) for key in ("model", "ref_policy", "reward_model")} - {None, ""}
        files = [file for x in sorted(folders) for file in sorted(Path(x).glob("*.safetensors"))]
        weights = [zlib.crc32(file.read_bytes()) for file in files]
        self.run = f"{sorted(fixed.items())} {zlib.crc32(repr(trained_on).encode())} {weights}"
        self.work = work
        self.minutes = options["checkpoint_minutes"]
        self.last = time.monotonic()

    def resume(self, **parts) -> tuple[int, dict]:
        """Returns (steps done, `kept` of save); restores all parts and the random number generator.

        parts: whatever changes from step to step and has a state_dict: models, optimizer, schedule.
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
            # The machine that resumes may have fewer GPUs, or none.
            torch.cuda.set_rng_state_all(saved["cuda_rng"][: torch.cuda.device_count()])
        for log in self.work.glob("*.jsonl"):  # later steps will be logged again
            lines = log.read_bytes().splitlines(keepends=True)  # a str would split at U+2028, too
            data.write_text(log, b"".join(lines[: saved["step"]]).decode())
        return saved["step"], saved["kept"]

    def save(self, step: int, **kept) -> None:
        """Writes checkpoint.pt, if the last one is old enough."""
        if time.monotonic() - self.last < 60 * self.minutes:
            return
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        saved |= {"step": step, "kept": kept, "options": self.run}
        saved |= {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
        # Rename the finished file: a kill during the writing leaves the previous checkpoint.
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
    add("--log_every", type=int, default=20, help="steps between looks: held-out pairs, the climb")
    add("--checkpoint_minutes", type=float, default=5.0, help="a kill costs this much work at most")
    add("--seed", type=int, default=0, help="of a new head, and of the order of the data")


def look_at(model, tokenizer, path: str, max_length: int) -> Callable:
    """Returns look() -> {"accuracy": share of the file's pairs that the model orders right}."""
    # Read the file now: a mistake in it should show before training.
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
    """Returns whether to use `read_prompts_once`: is it right for this model, and does it pay?

    saved: how many tokens fewer it reads, padding counted. Its price is a second pass. On a CPU a
    pass costs nothing by itself. On a GPU its kernel launches do: with 30 layers and 135M weights
    in float32, they take the time of some 3,000 tokens (computed, not measured). It is used from
    2,048 saved tokens on: a little slower at first, but they would also take some 3 GB of memory.
    """
    return getattr(model, "shares_prompts", False) and (model.device.type == "cpu" or saved >= 2048)


def name_of_cache(output) -> str:
    """Returns the key of the cache in a model's output: it varies with model and version."""
    return next(name for name in ("cache", "past_key_values", "cache_params") if name in output)


def rewards_reading_prompts_once(forward, model, pad_id, groups: Sequence[Group]) -> Tensor:
    """Returns what `rewards_of` returns, (n,)."""
    # Prompts (m, p) are padded on the left: all responses (n, t) then start in one column, right
    # after their prompts. A group's first row, like all its rows, begins with the prompt's ids.
    prompts = pad([group[0][0] for group in groups], pad_id, model.device, left=True)
    responses = pad([ids for group in groups for _, ids in group], pad_id, model.device)
    owner = torch.tensor([i for i, group in enumerate(groups) for _ in group]).to(model.device)
    return read_prompts_once(forward, model, prompts, responses, owner)[1].logits[:, 0]


def read_prompts_once(forward, model, prompts: dict, responses: dict, owner: Tensor, **options):
    """Returns (output on the prompts, output on the responses).

    Shapes: input_ids and attention_mask of prompts (m, p), padded on the left; of responses (n, t),
    on the right; owner (n,): response i answers prompt owner[i]. options: for the first pass.
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
