"""The reward model (RM): from preference pairs to a number a response.

Concept: the Bradley-Terry model. A pair says that `chosen` beat `rejected` for the same prompt; the RM r(x, y) is
a language model with a linear head on its last token, trained so that sigma(r_chosen - r_rejected) is the
probability of that verdict (paper, Eq. 1: the vanilla loss). Everything else that needs a reward - the meta step,
PPO, the report - goes through `encode`, `collate` and `score` below, so that one text always gets one reward.

    python rm.py --model runs/toy/sft --data runs/toy/pairs/train.jsonl --eval_data runs/toy/pairs/valid.jsonl \
                 --out runs/toy/rm0          [--weight_by runs/toy/ppo-1/policy --tau 0.01: OCRM, see `pair_weights`]

writes a folder that `AutoModelForSequenceClassification.from_pretrained` reads, its tokenizer, and `log.jsonl`
(the loss each step; accuracy on the held-out pairs every `--log_every` steps).
"""

import inspect
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F

import data


# ---------------------------------------------------------------------------------------------- the loss (Eq. 1)

def preference_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor,
                    weights: torch.Tensor | None = None) -> torch.Tensor:
    """Eq. 1: L = -mean log sigma(r(x, y_w) - r(x, y_l)); with `weights`, -mean w log sigma(...), as OCRM has it.

    Shapes: all (n,), one pair an entry; returns a scalar in nats (log 2 = a coin toss).
    Raises ValueError on other shapes. Source: paper Eq. 1; Bradley & Terry 1952.

    logsigmoid, not log(sigmoid(.)): at a margin of -100 float32's sigmoid is 0 and its log -inf, and with it the
    gradient; logsigmoid returns -100 and a gradient of 1.
    """
    if chosen_rewards.dim() != 1 or chosen_rewards.shape != rejected_rewards.shape or not len(chosen_rewards):
        raise ValueError(f"preference_loss needs chosen and rejected rewards of one shape (n,), n >= 1; got "
                         f"{tuple(chosen_rewards.shape)} and {tuple(rejected_rewards.shape)}")
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    if weights is None:
        return losses.mean()
    if weights.shape != losses.shape:
        raise ValueError(f"preference_loss needs weights of the rewards' shape {tuple(losses.shape)}, not {tuple(weights.shape)}")
    return (weights * losses).mean()  # by the number of pairs, not by the sum of the weights: theirs is 1 a pair over all of D


# ---------------------------------------------------------------------------------- one text, one row of token ids

def end_id(tokenizer) -> int:
    """The id that ends a response: EOS, or an encoder's [SEP]."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no EOS (nor SEP) token; a response needs an end")
    return end


def encode(tokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """ids(prompt) and ids(response) + EOS. Training, scoring and the meta set all encode here and nowhere else.

    The two texts are tokenized APART. Together, a token could straddle the seam, and the same prompt would then
    have other ids for every response - and other ids than the policy was given to generate from. What a tokenizer
    puts before a text by itself (BOS, [CLS]) goes before the prompt, once.
    """
    with_special, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    start = next((i for i in range(len(with_special)) if with_special[i:i + len(plain)] == plain), 0)
    prompt_ids = with_special[:start] + tokenizer(prompt, add_special_tokens=False).input_ids
    response_ids = tokenizer(response, add_special_tokens=False).input_ids
    return prompt_ids, response_ids + [end_id(tokenizer)]


def collate(tokenizer, rows: list[tuple[list[int], list[int]]], device="cpu") -> dict[str, torch.Tensor]:
    """Rows of (prompt_ids, response_ids) -> {"input_ids", "attention_mask"}, both (n, longest row).

    Padding goes on the RIGHT: real tokens then sit at the positions 0, 1, 2 ... that the model was trained with,
    and in a causal model no real token can see a pad. (Generation pads on the left, see ppo.py.)
    """
    return pad([prompt_ids + response_ids for prompt_ids, response_ids in rows], tokenizer.pad_token_id, device)


def pad(rows: list[list[int]], pad_id: int, device="cpu", left: bool = False) -> dict[str, torch.Tensor]:
    """Rows of ids -> {"input_ids", "attention_mask"}, both (n, longest row), filled up on the right or the left."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


Group = tuple[tuple[list[int], list[int]], ...]  # encoded rows (prompt_ids, response_ids) that share one prompt

# Decoders for which a cached prompt was checked against plain rows (tests/test_rm.py). Others - encoders, recurrent
# state, attention windows - read every row in full.
SHARE_PROMPTS = {"gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox", "opt"}


def rewards_of(forward: Callable, model, tokenizer, groups: list[Group]) -> torch.Tensor:
    """(n,) rewards, group by group, of groups of rows; `forward` is the model, perhaps called at other parameters.

    The responses of a group answer ONE prompt, so a decoder reads it once and each response on a copy of its cache:
    a pair costs P + 2T tokens instead of 2P + 2T, a prompt of S P + kT instead of kP + kT (HH-RLHF, P = 110, T = 40:
    1.6 times fewer for a pair, 2.4 for k = 5). Gradients flow through the cache; the rewards are the same.
    """
    device = next(model.parameters()).device
    if not shares_prompts(model) or any(not group[0][0] for group in groups):  # (no prompt: nothing to share)
        return forward(**collate(tokenizer, [row for group in groups for row in group], device)).logits[:, 0]
    # Prompts are padded on the left, so that every response starts in one column, right behind its prompt.
    prompts = pad([group[0][0] for group in groups], tokenizer.pad_token_id, device, left=True)
    responses = pad([response_ids for group in groups for _, response_ids in group], tokenizer.pad_token_id, device)
    owner = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=device)
    return read_prompts_once(forward, model, prompts, responses, owner)[1].logits[:, 0]


def shares_prompts(model) -> bool:
    """Whether `read_prompts_once` will do (gradient checkpointing would drop the cache)."""
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return model.config.model_type in SHARE_PROMPTS and not checkpointing


def read_prompts_once(forward: Callable, model, prompts: dict, responses: dict, owner: torch.Tensor, **prompt_kwargs):
    """(output on the prompts, output on the responses): input_ids and attention_mask (m, p), padded on the left, and
    (n, t), on the right; response i answers the prompt owner[i]. With pads in front, the positions must be told."""
    position = (prompts["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    before = forward(**prompts, position_ids=position, use_cache=True, **prompt_kwargs)
    cache = before["cache" if "cache" in before else "past_key_values"]  # its name before transformers 5.2x
    cache.batch_select_indices(owner)  # one copy of its prompt's cache for each response
    mask = torch.cat([prompts["attention_mask"][owner], responses["attention_mask"]], dim=1)
    position = (mask.cumsum(dim=1) - 1)[:, position.shape[1]:]
    takes = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return before, forward(input_ids=responses["input_ids"], attention_mask=mask, position_ids=position, use_cache=True,
                           **{takes: cache})


# ------------------------------------------------------------------------------------------------ loading a model

class Float32Head(torch.nn.Linear):
    """The reward head, computed in float32 (or float64) even inside a bf16 autocast region.

    bf16 keeps 8 bits: around r = 4 its steps are 0.03, so two close responses get EQUAL rewards, |r_i - r_j| is 0,
    and the gradient of the difference loss - which lives on small differences - vanishes.
    """

    def forward(self, hidden):
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), self.weight.to(wide), bias)


def load_reward_model(path: str, seed: int | None = None):
    """(model, tokenizer) from a `save_pretrained` folder or hub name; float32, eval mode, on the CPU.

    `seed=None`: the folder must hold a trained reward head. With a seed, a language model without one gets a new
    head from that seed: the initialisation that RM_0 and every MetaRM round start from (paper, Figure 4).
    Raises ValueError, naming the path and the mend, on anything that is no such model.

    Eval mode is the mode for TRAINING here too: dropout off. The paper's step evaluates the model twice, at theta
    and at theta'; with dropout these would be two different random functions, and climbing the differences
    between responses (J) would climb the noise between two dropout masks.
    """
    from transformers import AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        model, tokenizer, info = load_pretrained(AutoModelForSequenceClassification, path, num_labels=1)
        missing = sorted(info["missing_keys"])
        if missing and seed is None:
            raise ValueError(f"{path}: holds no reward head ({missing[0]} is missing), so it is a language model, not "
                             f"a reward model; train one from it with rm.py")
        # transformers' classification heads read the last token that is NOT the pad id. Were EOS the pad id (as in
        # GPT-2 recipes), the reward would be read before the EOS, or, at a response of EOS alone, in the prompt.
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == end_id(tokenizer):
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    head = [module for module in model.modules() if type(module) is torch.nn.Linear and module.out_features == 1]
    if not head:
        raise ValueError(f"{path}: no linear head with one output found in {type(model).__name__}")
    head[-1].__class__ = Float32Head  # the same parameters under the same names, another forward
    return model.eval(), tokenizer


def load_pretrained(auto_class, path: str, **kwargs):
    """(model, tokenizer, which weights the checkpoint lacks or has too many); shared by RMs and policies.

    Float32 whatever the checkpoint's dtype (master weights: at lr 1e-6 a bf16 weight would not move at all; bf16
    comes in by autocast), safetensors only, no code from the hub.
    """
    from transformers import AutoTokenizer, logging
    logging.set_verbosity_error()  # "newly initialised: score.weight" is said by us, where it matters
    logging.disable_progress_bar()
    if not Path(path).is_dir() and (Path(path).exists() or str(path).count("/") != 1 or str(path)[0] in "./~"):
        raise ValueError(f"{path}: no such model folder (a `save_pretrained` folder is needed, or a hub name like "
                         f"HuggingFaceTB/SmolLM2-135M)")
    what = "tokenizer"
    try:  # (left at its default, trust_remote_code would have transformers ASK whether to run the hub's code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        what = auto_class.__name__
        model, info = auto_class.from_pretrained(path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
                                                 output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except Exception as error:  # a dozen types, from OSError to SafetensorError: all mean the same to the user
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = f"its {what}" if Path(path).is_dir() else f"no such folder here, and on the hub its {what}"
        raise ValueError(f"{path}: {what} cannot be loaded ({first[:300].strip()}); give a whole `save_pretrained` folder: "
                         f"config.json, safetensors and tokenizer, of an architecture that transformers knows") from error
    if odd := sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]):  # (5.x: with shapes)
        raise ValueError(f"{path}: the weight {odd[0]} has not the shape {tuple(model.state_dict()[odd[0]].shape)} that a "
                         f"{type(model).__name__} needs here: give a checkpoint that fits its config.json and, as a reward "
                         f"model, returns one number")
    trunk = [name for name in info["missing_keys"] if name.startswith(f"{model.base_model_prefix}.")
             and "pooler" not in name]
    if trunk:
        raise ValueError(f"{path}: the checkpoint lacks {len(trunk)} weights of its own architecture, e.g. {trunk[0]}; "
                         f"it is incomplete or of another kind of model: give a whole one")
    check_finite(model, path, "start from a sound checkpoint")
    return model, tokenizer, info


def check_finite(model, path, mend: str) -> None:
    """Raises ValueError if a weight is NaN or infinite: neither loaded nor saved without a word."""
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise ValueError(f"{path}: the weight {name} holds NaN or infinity; {mend}")


def save_model(model, tokenizer, folder) -> None:
    """A model folder with its tokenizer beside it, as the whole ecosystem reads it."""
    check_finite(model, f"--out {folder}".removesuffix(".partial"), "training has diverged: lower --lr (or --eta)")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device):
    """bf16 on CUDA (the weights stay float32); nothing on a CPU, where it would only cost precision."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


# -------------------------------------------------------------------------------------------------------- scoring

@torch.no_grad()
def score(model, tokenizer, prompts: list[str], responses: list[str], batch_size: int = 64) -> torch.Tensor:
    """Rewards of n (prompt, response) texts: float32 CPU tensor (n,), in the order given.

    Computed longest first, so that a batch holds rows of like length (little padding, and the batch that needs the
    most memory comes first). In float32 without autocast: the answer must not depend on who else is in the batch.
    Raises ValueError on unequal counts or on a text longer than the model's positions.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"score needs as many prompts as responses; got {len(prompts)} and {len(responses)}")
    rows = encode_rows(model, tokenizer, zip(prompts, responses), f"to be scored by {model.name_or_path}")
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    groups = [same[start:start + batch_size] for same in by_prompt.values() for start in range(0, len(same), batch_size)]
    groups.sort(key=lambda group: -max(len(rows[i][0]) + len(rows[i][1]) for i in group))
    rewards = torch.zeros(len(rows), dtype=torch.float32)
    was_training = model.training
    model.eval()
    while groups:
        batch = [groups.pop(0)]
        while groups and len(groups[0]) + sum(map(len, batch)) <= batch_size:
            batch.append(groups.pop(0))
        index = [i for group in batch for i in group]
        rewards[index] = rewards_of(model, model, tokenizer, [tuple(rows[i] for i in group) for group in batch]).float().cpu()
    model.train(was_training)
    return rewards


def encode_rows(model, tokenizer, texts, source: str, max_length: int = 0) -> list[tuple[list[int], list[int]]]:
    """`encode` for many (prompt, response) texts. With max_length > 0, longer rows are dropped and counted on stderr.

    Raises ValueError naming `source` and the row if one is longer than the model's positions, or none is left.
    """
    rows = [encode(tokenizer, prompt, response) for prompt, response in texts]
    return [row for row, in keep_short(model, [(row,) for row in rows], source, max_length)]


def encode_pairs(model, tokenizer, pairs: list[dict], max_length: int, source: str, as_text: bool = False) -> list:
    """Preference rows -> [(chosen row, rejected row)]; a pair is kept or dropped as one. Raises as `encode_rows`.
    With `as_text`, the pairs themselves, less the same."""
    rows = [(encode(tokenizer, pair["prompt"], pair["chosen"]), encode(tokenizer, pair["prompt"], pair["rejected"]))
            for pair in pairs]
    return keep_short(model, rows, source, max_length, pairs if as_text else rows)


def check_ids(model, ids: list[int], where: str) -> None:
    known = model.get_input_embeddings().num_embeddings
    if max(ids, default=0) >= known:
        raise ValueError(f"{where}: token id {max(ids)}, but {model.name_or_path} knows only {known} tokens: this tokenizer "
                         f"and this model do not belong together; put the model's own tokenizer into its folder")


def keep_short(model, groups: list[tuple], source: str, max_length: int, items: list | None = None) -> list:
    """Groups of encoded rows (or the `items` they stand for), less those with a row longer than max_length (0: none may be)."""
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    lengths = row_lengths(groups)
    for i, (group, length) in enumerate(zip(groups, lengths)):
        check_ids(model, [id for row in group for ids in row for id in ids], f"{source}, row {i + 1}")
        if length > limit and not 0 < max_length <= limit:
            raise ValueError(f"{source}, row {i + 1}: {length} tokens, but the model has only {limit} positions; shorten "
                             f"or drop the row (rm.py, metarm.py and ppo.py do it with --max_length {limit})")
    kept = [item for item, length in zip(items or groups, lengths) if not max_length or length <= max_length]
    if groups and not kept:
        raise ValueError(f"{source}: no row fits into --max_length {max_length}; raise it")
    if len(kept) < len(groups):
        print(f"{source}: {len(groups) - len(kept)} of {len(groups)} rows are longer than {max_length} tokens: dropped",
              file=sys.stderr)
    return kept


def accuracy(model, tokenizer, pairs: list[dict], batch_size: int = 64) -> float:
    """Share of pairs whose chosen response gets the higher reward (a tie counts half)."""
    responses = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    rewards = score(model, tokenizer, [pair["prompt"] for pair in pairs for _ in range(2)], responses, batch_size).view(-1, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean().item()


# ------------------------------------------------------------------------------------------- training and plumbing

def epoch_batches(lengths: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """One epoch of len(lengths) items in a seeded order, batch by batch (a smaller last batch is left out).

    Rows of like length share a batch: shuffle, cut into pools of 16 batches, sort each pool by length, cut it into
    batches, shuffle these. Padding is computed like any token, and this halves it. It is for losses that are means over
    rows; a mean over the tokens of a batch would favour short rows (see ppo.py). Raises ValueError if there are fewer items than one batch.
    """
    if len(lengths) < batch_size:
        raise ValueError(f"{len(lengths)} rows are fewer than one batch of {batch_size}; lower --batch_size")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()[:len(lengths) // batch_size * batch_size]
    pools = [sorted(order[i:i + 16 * batch_size], key=lambda j: lengths[j]) for i in range(0, len(order), 16 * batch_size)]
    batches = [pool[i:i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


def row_lengths(groups: list[tuple]) -> list[int]:
    """Tokens of each group of encoded rows (a pair, or the k responses to a prompt): its longest row."""
    return [max(len(prompt_ids) + len(response_ids) for prompt_ids, response_ids in group) for group in groups]


def resume(work: Path, parts: dict) -> tuple[int, dict]:
    """(steps done, lists kept) of an interrupted run of this very stage, its `parts` (models, optimizer, schedule) and
    random numbers put back to where they were; (0, {}) if there is none."""
    if not (work / "checkpoint.pt").exists():
        return 0, {}
    saved = torch.load(work / "checkpoint.pt", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["rng"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
    print(f"{work}: goes on at step {saved['step']}", file=sys.stderr)
    return saved["step"], saved["kept"]


class Checkpoint:
    """Writes `checkpoint.pt` into a stage's folder every so many minutes: a cut-off then costs no more than these."""

    def __init__(self, work: Path, parts: dict, minutes: float):
        self.path, self.parts, self.minutes, self.last = work / "checkpoint.pt", parts, minutes, time.monotonic()

    def __call__(self, step: int, **kept) -> None:
        if time.monotonic() - self.last < 60 * self.minutes:
            return
        cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        torch.save({name: part.state_dict() for name, part in self.parts.items()}
                   | {"step": step, "kept": kept, "rng": torch.get_rng_state(), "cuda_rng": cuda_rng}, f"{self.path}.tmp")
        os.replace(f"{self.path}.tmp", self.path)
        self.last = time.monotonic()


def checkpoint_gradients(model) -> None:
    """Gradient checkpointing: activations are computed again in the backward pass instead of being kept.

    transformers does so in train mode only. Train mode would switch dropout on, so every dropout is set to 0 first.
    """
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "attn_dropout", "dropout_prob", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # (before 5.2x)
    enable({"use_reentrant": False})
    model.train()


def linear_decay(optimizer, steps: int):
    """Learning rate from its full value down to 0 over `steps` (the paper's schedule)."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


def pair_loss(forward: Callable, model, tokenizer, pairs: list[Group], weights: torch.Tensor | None = None) -> torch.Tensor:
    """Eq. 1 on encoded pairs (chosen row, rejected row); `forward` as in `rewards_of`."""
    rewards = rewards_of(forward, model, tokenizer, pairs).view(-1, 2)
    return preference_loss(rewards[:, 0], rewards[:, 1], weights)


@torch.no_grad()
def pair_weights(pairs: list[dict], policy: str, ref_policy: str, tau: float, batch_size: int = 64) -> torch.Tensor:
    """OCRM's weights (n,) of preference rows, on the CPU: towards what the current policy would say.

        w = exp(tau (log pi(y_w|x)/pi_ref(y_w|x) + log pi(y_l|x)/pi_ref(y_l|x))), divided by its mean over D

    with log-ratios of whole responses. tau = 1 is full importance weighting: unbiased, and in practice the weight of a
    few pairs; OCRM's default is 0.01. Source: Ackermann, Ishida, Sugiyama 2025 (arXiv 2507.15507). ValueError as `encode_pairs`.
    """
    import ppo
    log_ratio = torch.zeros(len(pairs), dtype=torch.float64)
    for name, sign in ((policy, 1), (ref_policy, -1)):
        model, tokenizer = ppo.load_policy(name)
        model.to(pick_device())
        encoded = encode_pairs(model, tokenizer, pairs, 0, f"--weight_by {policy}")
        ppo.refuse_empty([prompt_ids for (prompt_ids, _), _ in encoded], f"--weight_by {policy}")
        by_length = torch.tensor(row_lengths(encoded)).argsort(stable=True).tolist()
        for start in range(0, len(pairs), batch_size):
            chunk = by_length[start:start + batch_size]
            batch = ppo.collate(tokenizer, [row for i in chunk for row in encoded[i]], pick_device())
            with autocast(pick_device()):
                log_probability = ppo.response_logprobs(model, batch).sum(dim=1)
            log_ratio[chunk] += sign * log_probability.double().cpu().view(-1, 2).sum(dim=1)  # both sides of a pair
    weights = len(pairs) * torch.softmax(tau * log_ratio, dim=0)  # = exp / mean of exp, without overflow
    return weights.float()


@dataclass
class RMConfig:
    model: str = field(metadata={"help": "language model to start from (folder or hub name), usually the SFT policy"})
    data: str = field(metadata={"help": "preference pairs D, .jsonl or .jsonl.gz"})
    out: str = field(metadata={"help": "folder to write the reward model to"})
    eval_data: str = field(default="", metadata={"help": "held-out pairs for the accuracy in log.jsonl"})
    lr: float = field(default=5e-6, metadata={"help": "alpha of Eq. 5, AdamW's learning rate, decaying to 0"})
    batch_size: int = field(default=16, metadata={"help": "pairs a step"})
    micro_batch_size: int = field(default=16, metadata={"help": "pairs a forward pass: lower it if memory is short"})
    epochs: int = field(default=1, metadata={"help": "passes over D; the paper's RMs see each pair once"})
    max_length: int = field(default=0, metadata={"help": "drop pairs longer than this many tokens; 0: refuse them"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients longer than this are scaled down to it"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a third more time"})
    checkpoint_minutes: float = field(default=5.0, metadata={"help": "a cut-off costs at most about this much work"})
    weight_by: str = field(default="", metadata={"help": "OCRM: weight pairs by this policy's likelihood over --ref_policy's"})
    ref_policy: str = field(default="", metadata={"help": "OCRM: the policy that D was sampled from (default: --model)"})
    tau: float = field(default=0.01, metadata={"help": "OCRM: power of the likelihood ratio; 1: full importance weighting"})
    log_every: int = field(default=20, metadata={"help": "steps between two looks at the held-out pairs"})
    seed: int = field(default=0, metadata={"help": "of the new head and of the order of D"})


def train(cfg: RMConfig) -> None:
    from tqdm import tqdm
    if cfg.ref_policy and not cfg.weight_by:
        raise ValueError("--ref_policy goes with --weight_by")
    with data.stage("rm.py", cfg, inputs=["model", "data", "eval_data", "weight_by", "ref_policy"]) as work:
        if work is None:
            return
        raw_pairs = data.read_preferences(cfg.data)
        held_out = data.read_preferences(cfg.eval_data) if cfg.eval_data else []
        device = pick_device()
        model, tokenizer = load_reward_model(cfg.model, seed=cfg.seed)
        model.to(device)
        if cfg.gradient_checkpointing:
            checkpoint_gradients(model)
        if cfg.weight_by:  # the weights are read off the texts, of the pairs that stay
            raw_pairs = encode_pairs(model, tokenizer, raw_pairs, cfg.max_length, cfg.data, as_text=True)
        pairs = encode_pairs(model, tokenizer, raw_pairs, cfg.max_length, cfg.data)
        weights = None
        if cfg.weight_by:
            weights = pair_weights(raw_pairs, cfg.weight_by, cfg.ref_policy or cfg.model, cfg.tau).to(device)
            print(f"{cfg.out}: weights of D from {weights.min():.2f} to {weights.max():.2f}, worth "
                  f"{(weights.sum() ** 2 / (weights ** 2).sum()).item():.0f} pairs of {len(weights)}")
        held_out = encode_pairs(model, tokenizer, held_out, cfg.max_length, cfg.eval_data, as_text=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0)
        batches = [batch for epoch in range(cfg.epochs)
                   for batch in epoch_batches(row_lengths(pairs), cfg.batch_size, cfg.seed + epoch)]
        parts = {"model": model, "optimizer": optimizer, "schedule": linear_decay(optimizer, len(batches))}
        done, kept = resume(work, parts)
        log, checkpoint = kept.get("log", []), Checkpoint(work, parts, cfg.checkpoint_minutes)
        with tqdm(batches, desc=f"RM {cfg.out}", mininterval=1) as bar:
            for step, batch in enumerate(bar):
                if step < done:
                    continue
                row = {"step": step, "steps": len(batches)}
                if held_out and step % cfg.log_every == 0:
                    row["accuracy"] = accuracy(model, tokenizer, held_out)
                    bar.set_postfix(accuracy=f"{row['accuracy']:.3f}", refresh=False)
                row["loss"] = 0.0
                for start in range(0, len(batch), cfg.micro_batch_size):
                    indices = batch[start:start + cfg.micro_batch_size]
                    with autocast(device):
                        loss = pair_loss(model, model, tokenizer, [pairs[i] for i in indices],
                                         None if weights is None else weights[indices]) * len(indices) / len(batch)
                    loss.backward()
                    row["loss"] += loss.item()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
                if not math.isfinite(row["loss"]) or not torch.isfinite(norm):
                    raise ValueError(f"--out {cfg.out}: loss {row['loss']}, gradient {norm:.3g} at step {step}; lower --lr")
                optimizer.step()
                optimizer.zero_grad()
                parts["schedule"].step()
                log.append(row)
                checkpoint(step + 1, log=log)
        final = {"step": len(batches), "steps": len(batches)}
        if held_out:
            final["accuracy"] = accuracy(model, tokenizer, held_out)
            print(f"{cfg.out}: {len(pairs)} pairs, {100 * final['accuracy']:.1f} % right on {len(held_out)} held-out pairs")
        save_model(model, tokenizer, work)
        data.write_jsonl(work / "log.jsonl", log + [final])


def main(argv=None) -> int:
    return data.command("rm.py", RMConfig, train, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
