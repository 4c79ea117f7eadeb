"""The policy: SFT, DPO, PPO and sampling.

Concept: iterative RLHF. A policy fine-tuned on demonstrations (SFT) is moved by PPO towards what a reward model
likes, held back by a KL penalty to where it started (`ref_policy`). MetaRM changes the reward model between two
such rounds, not PPO: this file knows nothing of it. What PPO needs to work in practice is named where it happens:
[per-token KL] [reward scaling] [missing-EOS penalty] [advantage whitening] [value head] [clipping] [epochs].

    python ppo.py sft    --model runs/toy/data/model --data runs/toy/data/sft.jsonl --out runs/toy/sft
    python ppo.py dpo    --model runs/toy/sft --data runs/toy/pairs/train.jsonl --out runs/toy/dpo
    python ppo.py ppo    --model runs/toy/sft --ref_policy runs/toy/sft --reward_model runs/toy/rm0 \
                         --prompts runs/toy/data/prompts-ppo.jsonl --out runs/toy/ppo-1/policy
    python ppo.py sample --model runs/toy/sft --prompts runs/toy/data/prompts-meta.jsonl --k 5 --out runs/toy/metarm-1/meta

The first three write a folder that `AutoModelForCausalLM.from_pretrained` reads, with `log.jsonl` (and, for ppo,
`rollouts.jsonl`: what was said and how it was scored, each step); `sample` writes `samples.jsonl`, the meta set S.

Shapes: b responses, t response tokens. Tensors (b, t) hold RESPONSE tokens only, with a `mask` that is 1 up to and
including the EOS. Log-probabilities are in nats.
"""

import inspect
import math
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import data
import rm


# ------------------------------------------------------------------- the mathematics: pure functions of tensors

def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x over the entries where mask is 1 (0 if there are none); x and mask (b, t)."""
    return torch.where(mask.bool(), x, 0.0).sum() / mask.sum().clamp(min=1)


def kl_penalised_rewards(scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor,
                         mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """[per-token KL] r_t = -kl_coef (log pi(y_t) - log pi_ref(y_t)), plus the RM's score at the last token.

    Shapes: scores (b,), the others (b, t); returns (b, t), 0 off the mask. Raises ValueError on other shapes.
    Source: Ziegler et al. 2019; the paper's "token-level KL penalty". Summed over a response, the first term is an
    unbiased estimate of the KL divergence of policy from reference, of which it pays kl_coef a nat.
    """
    check_shapes(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must have shape {tuple(mask.shape[:1])}, one a response; got {tuple(scores.shape)}")
    rewards = torch.where(mask.bool(), -kl_coef * (logprobs - ref_logprobs), 0.0)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
    alive = mask.sum(dim=1) > 0  # a row without a single token has nowhere to put its score
    return rewards + F.one_hot(last, mask.shape[1]) * (scores * alive)[:, None].to(rewards.dtype)


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
        ) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation, backwards over the tokens of each response.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        return_t = A_t + V_t

    Shapes: all (b, t); returns (advantages, returns), 0 off the mask, where V and A count as 0 too (the response has
    ended; what the value head says about padding must not leak in). Raises ValueError on other shapes.
    Source: Schulman et al. 2016, Eq. 16.
    """
    check_shapes(mask, rewards=rewards, values=values)
    values = torch.where(mask.bool(), values, 0.0)
    rewards = torch.where(mask.bool(), rewards, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, (advantages + values) * mask


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[advantage whitening] Mean 0 and SD 1 over the mask, 0 off it: the step size no longer depends on the RM's scale."""
    mean = masked_mean(x, mask)
    return (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8) * mask


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
                clip_range: float) -> torch.Tensor:
    """[clipping] -E min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) with ratio = pi / pi_old, a scalar.

    Shapes: all (b, t); masked mean over response tokens. Raises ValueError on other shapes.
    Source: Schulman et al. 2017, Eq. 7. Written as a max of losses: the pessimistic one of the two, so that a token
    that has moved by more than eps in the direction its advantage asks for gets no further push.
    """
    check_shapes(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = torch.exp(torch.where(mask.bool(), logprobs - old_logprobs, 0.0))
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return masked_mean(torch.max(-advantages * ratio, -advantages * clipped), mask)


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor,
               clip_range: float) -> torch.Tensor:
    """Half the squared error of the value head, the larger of unclipped and clipped, a scalar.

    Shapes: all (b, t); masked mean over response tokens. Raises ValueError on other shapes.
    Source: OpenAI baselines' PPO2; `clip_range` is the paper's "value clip" (0.8).
    """
    check_shapes(mask, values=values, old_values=old_values, returns=returns)
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def dpo_loss(policy_chosen_logps: torch.Tensor, policy_rejected_logps: torch.Tensor, ref_chosen_logps: torch.Tensor,
             ref_rejected_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """-mean log sigma(beta [(log pi/pi_ref)(chosen) - (log pi/pi_ref)(rejected)]), a scalar.

    Shapes: all (n,), log-probabilities of whole responses. Raises ValueError on other shapes.
    Source: Rafailov et al. 2023, Eq. 7: Eq. 1 of our paper with the policy's own log-ratio as the reward.
    """
    tensors = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if any(x.dim() != 1 or x.shape != tensors[0].shape for x in tensors):
        raise ValueError(f"dpo_loss needs four tensors of one shape (n,); got {[tuple(x.shape) for x in tensors]}")
    return -F.logsigmoid(beta * ((policy_chosen_logps - ref_chosen_logps)
                                 - (policy_rejected_logps - ref_rejected_logps))).mean()


def check_shapes(mask: torch.Tensor, **tensors: torch.Tensor) -> None:
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape (b, t); got {tuple(mask.shape)}")
    for name, x in tensors.items():
        if x.shape != mask.shape:
            raise ValueError(f"{name} must have the mask's shape {tuple(mask.shape)}; got {tuple(x.shape)}")


# ------------------------------------------------------------------------------------- what a policy says, and how likely

def load_policy(path: str):
    """(model, tokenizer) from a causal LM folder or hub name: float32, eval mode (no dropout: the log-probabilities
    of a rollout and of its update must come from one and the same function)."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    model, tokenizer, info = rm.load_pretrained(AutoModelForCausalLM, path)
    odd = [*info["missing_keys"], *(name for name in info["unexpected_keys"] if name.startswith(("score", "classifier")))]
    if odd:  # with tied embeddings a reward model would load without complaint; its spare head gives it away
        raise ValueError(f"{path}: not a causal language model ({odd[0]}): a reward model folder, perhaps?")
    with torch.no_grad():
        logits = model(torch.tensor([[0, 0], [0, 1]])).logits[:, 0]
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-5):
        raise ValueError(f"{path}: a {type(model).__name__} sees the tokens to come, as encoders do: a policy must not")
    # Hub configs bring sampling settings of their own (top_k 50, a repetition penalty ...) that `generate` would apply
    # unasked; start from none.
    model.generation_config = GenerationConfig()
    return model.eval(), tokenizer


def load_reference(cfg, policy, tokenizer):
    """The KL's other side. It reads the policy's token ids, so it has to have the policy's vocabulary."""
    ref_policy, other = load_policy(cfg.ref_policy or cfg.model)
    sizes = [model.get_input_embeddings().num_embeddings for model in (policy, ref_policy)]
    if other.get_vocab() != tokenizer.get_vocab() or sizes[0] > sizes[1]:
        raise ValueError(f"--ref_policy {cfg.ref_policy} has another vocabulary than --model {cfg.model}, so there is no KL to "
                         f"measure: give the policy that --model was trained from")
    return ref_policy


def collate(tokenizer, rows: list[tuple[list[int], list[int]]], device="cpu") -> dict[str, torch.Tensor]:
    """(prompt_ids, response_ids) rows -> prompts padded on the LEFT, responses on the RIGHT:

        pad pad Human : hi | Hello . EOS pad        every response starts in the same column, so that one slice
        Human : my phone . | Sorry , no . EOS       [:, -t:] is all the responses: the (b, t) of this file.

    `position_ids` count real tokens only; without them a left-padded row would be read at shifted positions.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else rm.end_id(tokenizer)
    p, t = max(len(prompt) for prompt, _ in rows), max(len(response) for _, response in rows)
    ids = [[pad] * (p - len(a)) + a + b + [pad] * (t - len(b)) for a, b in rows]
    real = torch.tensor([[0] * (p - len(a)) + [1] * (len(a) + len(b)) + [0] * (t - len(b)) for a, b in rows])
    batch = {"input_ids": torch.tensor(ids), "attention_mask": real,
             "position_ids": (real.cumsum(1) - 1).clamp(min=0), "mask": real[:, p:]}
    return {name: x.to(device) for name, x in batch.items()}


def states_of(model, batch: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The output `name` ("logits", "last_hidden_state") at the token BEFORE each response token, which is where that
    token is predicted: (b, t, width). Rows with one prompt - the rollouts of a prompt, DPO's pairs - read it once."""
    t, takes = batch["mask"].shape[1], inspect.signature(model.forward).parameters
    ids, real = batch["input_ids"], batch["attention_mask"]
    prompts, owner = torch.cat([ids[:, :-t], real[:, :-t]], dim=1).unique(dim=0, return_inverse=True)
    if len(prompts) < len(ids) and rm.shares_prompts(model):
        before, after = rm.read_prompts_once(
            model, model, dict(zip(("input_ids", "attention_mask"), prompts.chunk(2, dim=1))),
            {"input_ids": ids[:, -t:], "attention_mask": real[:, -t:]}, owner,
            **({"logits_to_keep": 1} if "logits_to_keep" in takes else {}))
        return torch.cat([before[name][owner, -1:], after[name][:, :-1]], dim=1)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in takes}
    keep = {"logits_to_keep": t + 1} if "logits_to_keep" in takes else {}  # of the prompt, only the last are needed
    return model(**inputs, **keep, use_cache=False)[name][:, -t - 1:-1]


def response_logprobs(model, batch: dict[str, torch.Tensor], temperature: float = 1.0) -> torch.Tensor:
    """log pi(y_t | x, y_<t) of each response token: (b, t), 0 off the mask.

    The logits are divided by the temperature that the responses were sampled with, for policy, old policy and
    reference alike: PPO's ratio is one of probabilities UNDER THE SAMPLER. (This is also why rollouts use neither
    top-p nor a repetition penalty: a truncated sampler gives tokens probability 0 that the update may then need.)
    """
    logits = states_of(model, batch, "logits").float() / temperature
    targets = batch["input_ids"][:, -logits.shape[1]:]
    logprobs = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return torch.where(batch["mask"].bool(), logprobs, 0.0)


@torch.no_grad()
def generate(model, tokenizer, prompt_ids: list[list[int]], max_new_tokens: int, temperature: float,
             top_p: float = 1.0, repetition_penalty: float = 1.0) -> list[list[int]]:
    """One response a prompt: token ids up to and including EOS, or max_new_tokens of them without EOS."""
    device, end = next(model.parameters()).device, rm.end_id(tokenizer)
    batch = collate(tokenizer, [(ids, []) for ids in prompt_ids], device)
    with rm.autocast(device):
        logits = model(torch.tensor(prompt_ids[:1], device=device)).logits[:, -1].float() / temperature
        if logits.softmax(-1).isnan().any():  # on a GPU, drawing from them would end the whole process
            raise ValueError("the policy's probabilities are NaN: its training has diverged (lower --lr), or the temperature "
                             f"of {temperature} is too low")
        out = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True,
                             temperature=temperature, top_k=0, top_p=top_p, repetition_penalty=repetition_penalty,
                             max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=end)
    rows = out[:, batch["input_ids"].shape[1]:].tolist()
    return [row[:row.index(end) + 1] if end in row else row for row in rows]


def decode(tokenizer, response_ids: list[int]) -> str:
    return tokenizer.decode(response_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode_prompts(model, tokenizer, prompts: list[str], max_new_tokens: int, source: str) -> list[list[int]]:
    """Prompt ids; ValueError naming the prompt that leaves no room for max_new_tokens within the model's positions."""
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    rows = [rm.encode(tokenizer, prompt, "")[0] for prompt in prompts]
    refuse_empty(rows, source)
    for i, row in enumerate(rows):
        rm.check_ids(model, row, f"{source}, row {i + 1}")
        if len(row) + max_new_tokens > limit:
            raise ValueError(f"{source}, row {i + 1}: {len(row)} prompt tokens + --max_new_tokens {max_new_tokens} exceed "
                             f"the model's {limit} positions; shorten the prompt or lower --max_new_tokens")
    return rows


def refuse_empty(prompt_ids: list[list[int]], source: str) -> None:
    for i, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"{source}, row {i + 1}: the prompt is empty; a policy needs something to answer, so drop the row")


def short_prompts(tokenizer, prompts: list[str], max_length: int, max_new_tokens: int, source: str) -> list[str]:
    """The prompts that leave room for max_new_tokens within max_length tokens (0: all); the rest is counted on stderr."""
    kept = [x for x in prompts if not max_length or len(rm.encode(tokenizer, x, "")[0]) + max_new_tokens <= max_length]
    if not kept:
        raise ValueError(f"{source}: no prompt + --max_new_tokens {max_new_tokens} fits into --max_length {max_length}")
    if len(kept) < len(prompts):
        print(f"{source}: {len(prompts) - len(kept)} of {len(prompts)} prompts are too long for --max_length {max_length}: "
              f"dropped", file=sys.stderr)
    return kept


def sample_responses(model, tokenizer, prompts: list[str], k: int, temperature: float = 1.0, top_p: float = 1.0,
                     repetition_penalty: float = 1.0, max_new_tokens: int = 64, seed: int = 0,
                     batch_size: int = 256, source: str = "prompts") -> list[list[str]]:
    """k responses to each prompt (texts), from one seed, in the order given. Raises ValueError on k < 1."""
    if k < 1:
        raise ValueError(f"--k {k}: at least one response a prompt is needed")
    torch.manual_seed(seed)
    ids = encode_prompts(model, tokenizer, prompts, max_new_tokens, source)
    order = sorted(range(len(ids) * k), key=lambda i: -len(ids[i // k]))  # like lengths side by side
    texts = [""] * len(order)
    for start in range(0, len(order), batch_size):
        chunk = order[start:start + batch_size]
        rows = generate(model, tokenizer, [ids[i // k] for i in chunk], max_new_tokens, temperature, top_p,
                        repetition_penalty)
        for i, row in zip(chunk, rows):
            texts[i] = decode(tokenizer, row)
    return [texts[i * k:(i + 1) * k] for i in range(len(prompts))]


# ------------------------------------------------------------------------------------------------------ the PPO loop

class Critic(torch.nn.Module):
    """[value head] V(x, y_<t): a copy of the policy's trunk with one number out, 0 before the first update.

    Apart from the policy (as in the paper, which gives it a learning rate of its own): its regression would
    otherwise fight over the trunk with the policy's own gradient.
    """

    def __init__(self, path: str):
        super().__init__()
        from transformers import AutoModel
        self.trunk = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        width = getattr(self.trunk.config, "word_embed_proj_dim", self.trunk.config.hidden_size)  # OPT projects out
        self.head = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Values (b, t), each read one token BEFORE the response token it is the state of, as the logits are."""
        return self.head(states_of(self.trunk, batch, "last_hidden_state")).float()[..., 0]


@dataclass
class PPOConfig:
    model: str = field(metadata={"help": "policy to start from (folder or hub name)"})
    out: str = field(metadata={"help": "folder to write to"})
    data: str = field(default="", metadata={"help": "sft: prompt/response rows (or pairs: their chosen); dpo: pairs"})
    prompts: str = field(default="", metadata={"help": "ppo, sample: .jsonl with a `prompt` a row"})
    ref_policy: str = field(default="", metadata={"help": "ppo, dpo: the policy that the KL is taken to (default: --model)"})
    reward_model: str = field(default="", metadata={"help": "ppo: reward model folder"})
    seed: int = field(default=0, metadata={"help": "of data order and sampling"})
    lr: float = field(default=0.0, metadata={"help": "sft, dpo, ppo: AdamW's; 0: the paper's (2e-5, 5e-7, 5e-7)"})
    critic_lr: float = field(default=1.5e-6, metadata={"help": "ppo: learning rate of the critic"})
    batch_size: int = field(default=32, metadata={"help": "sft, dpo: rows a step; ppo: rollouts a step; sample: rows at once"})
    micro_batch_size: int = field(default=32, metadata={"help": "sft, dpo, ppo: rows a pass: lower it if memory is short"})
    epochs: int = field(default=1, metadata={"help": "sft, dpo: passes over the data"})
    max_length: int = field(default=0, metadata={"help": "drop rows (ppo, sample: prompt + max_new_tokens) longer than this; 0: refuse"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "sft, dpo, ppo: gradients longer than this are scaled down"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "sft, dpo, ppo: less memory, a third more time"})
    checkpoint_minutes: float = field(default=5.0, metadata={"help": "sft, dpo, ppo: a cut-off costs about this much work"})
    beta: float = field(default=0.1, metadata={"help": "dpo: strength of the pull to the reference"})
    steps: int = field(default=100, metadata={"help": "ppo: rounds of rollout and update"})
    rollouts_per_prompt: int = field(default=4, metadata={"help": "ppo: responses to each prompt of a step (paper: 16)"})
    minibatch_size: int = field(default=32, metadata={"help": "ppo: rollouts an optimizer step"})
    ppo_epochs: int = field(default=2, metadata={"help": "ppo: passes over each step's rollouts"})
    kl_coef: float = field(default=0.05, metadata={"help": "ppo: reward units a nat of KL costs"})
    clip_range: float = field(default=0.2, metadata={"help": "ppo: eps of the policy's ratio"})
    value_clip: float = field(default=0.8, metadata={"help": "ppo: eps of the value head"})
    gamma: float = field(default=1.0, metadata={"help": "ppo: discount a token"})
    lam: float = field(default=0.95, metadata={"help": "ppo: lambda of GAE"})
    missing_eos_penalty: float = field(default=1.0, metadata={"help": "ppo: reward SDs taken from a response cut off"})
    scale_prompts: int = field(default=64, metadata={"help": "ppo: first rows of --prompts set aside to scale rewards on"})
    k: int = field(default=5, metadata={"help": "sample: responses a prompt"})
    temperature: float = field(default=1.0, metadata={"help": "ppo, sample: divides the logits"})
    top_p: float = field(default=1.0, metadata={"help": "sample: nucleus (paper: 0.9); rollouts are never truncated"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "sample: as it says (paper: 1.1)"})
    max_new_tokens: int = field(default=64, metadata={"help": "ppo, sample: longest response, in tokens"})


def ppo(cfg: PPOConfig, work) -> None:
    device, per_step = rm.pick_device(), cfg.batch_size // cfg.rollouts_per_prompt
    if not per_step:
        raise ValueError(f"--batch_size {cfg.batch_size} is less than --rollouts_per_prompt {cfg.rollouts_per_prompt}: raise it")
    policy, tokenizer = load_policy(cfg.model)
    ref_policy = load_reference(cfg, policy, tokenizer)
    reward_model, rm_tokenizer = rm.load_reward_model(cfg.reward_model)
    critic = Critic(cfg.model)
    for model in (policy, ref_policy, reward_model, critic):
        model.to(device)
    prompts = short_prompts(tokenizer, data.read_prompts(cfg.prompts), cfg.max_length, cfg.max_new_tokens, cfg.prompts)
    prompt_ids = encode_prompts(policy, tokenizer, prompts, cfg.max_new_tokens, cfg.prompts)[cfg.scale_prompts:]
    aside, prompts = prompts[:cfg.scale_prompts], prompts[cfg.scale_prompts:]
    if len(prompts) < per_step:
        raise ValueError(f"{cfg.prompts}: {len(prompts)} prompts are left after --scale_prompts {cfg.scale_prompts}; one step "
                         f"takes {per_step}: give more prompts or lower --batch_size")

    # [reward scaling] Each RM has a scale and an offset of its own (Eq. 1 fixes neither). Shift and scale ONCE, by mean
    # and SD on samples of the reference policy: all RMs then push equally hard at the start. Not per batch, as is also
    # common: a batch SD that shrinks while the RM stops telling responses apart would hide just that.
    texts = sample_responses(ref_policy, tokenizer, aside, 4, cfg.temperature, max_new_tokens=cfg.max_new_tokens, seed=0)
    sft_scores = rm.score(reward_model, rm_tokenizer, [x for x in aside for _ in range(4)], sum(texts, []))
    shift, scale = sft_scores.mean().item(), max(sft_scores.std().item(), 1e-6)

    optimizer = torch.optim.AdamW([{"params": policy.parameters(), "lr": cfg.lr or 5e-7},
                                   {"params": critic.parameters(), "lr": cfg.critic_lr}], weight_decay=0.0)
    torch.manual_seed(cfg.seed)
    parts = {"policy": policy, "critic": critic, "optimizer": optimizer}
    done, kept = rm.resume(work, parts)
    queue, log, rollouts = (kept.get(name, []) for name in ("queue", "log", "rollouts"))
    checkpoint = rm.Checkpoint(work, parts, cfg.checkpoint_minutes)
    if cfg.gradient_checkpointing:
        rm.checkpoint_gradients(policy), rm.checkpoint_gradients(critic.trunk)
    with progress(range(done, cfg.steps), f"PPO {cfg.out}") as bar:
        for step in bar:
            policy.eval(), critic.eval()
            # --- rollout: the current policy answers, the RM scores, the reference says how far we have strayed
            if len(queue) < per_step:
                queue = torch.randperm(len(prompts)).tolist()
            chosen_prompts, queue = queue[:per_step], queue[per_step:]
            index = [i for i in chosen_prompts for _ in range(cfg.rollouts_per_prompt)]
            responses = generate(policy, tokenizer, [prompt_ids[i] for i in index], cfg.max_new_tokens, cfg.temperature)
            texts = [decode(tokenizer, row) for row in responses]
            raw_scores = rm.score(reward_model, rm_tokenizer, [prompts[i] for i in index], texts)
            batch = collate(tokenizer, list(zip([prompt_ids[i] for i in index], responses)), device)
            mask = batch["mask"]
            with torch.no_grad(), rm.autocast(device):
                old_logprobs = in_chunks(lambda b: response_logprobs(policy, b, cfg.temperature), batch, cfg)
                ref_logprobs = in_chunks(lambda b: response_logprobs(ref_policy, b, cfg.temperature), batch, cfg)
                old_values = in_chunks(critic, batch, cfg)
            # [missing-EOS penalty] A response cut off at the limit was never finished; without the penalty a policy learns
            # to ramble on, since the RM has rarely seen an unfinished text and cannot be trusted on it.
            ended = torch.tensor([row[-1] == rm.end_id(tokenizer) for row in responses], device=device)
            scores = (raw_scores.to(device) - shift) / scale - cfg.missing_eos_penalty * (~ended)
            rewards = kl_penalised_rewards(scores, old_logprobs, ref_logprobs, mask, cfg.kl_coef)
            advantages, returns = gae(rewards, old_values, mask, cfg.gamma, cfg.lam)
            advantages = whiten(advantages, mask)

            # --- update: several passes [epochs] over the same rollouts; the clipping keeps that honest
            stats = []
            policy.train(cfg.gradient_checkpointing), critic.train(cfg.gradient_checkpointing)
            for _ in range(cfg.ppo_epochs):
                by_prompt = torch.arange(len(index)).view(per_step, -1)[torch.randperm(per_step)]  # read once if together
                for rows in by_prompt.flatten().split(cfg.minibatch_size):
                    tokens = mask[rows.to(device)].sum()
                    for part in rows.split(cfg.micro_batch_size):
                        part = part.to(device)
                        mini = {name: x[part] for name, x in batch.items()}
                        share = mini["mask"].sum() / tokens  # weight by tokens: the sum is the minibatch's masked mean
                        with rm.autocast(device):
                            logprobs, values = response_logprobs(policy, mini, cfg.temperature), critic(mini)
                        pg = policy_loss(logprobs, old_logprobs[part], advantages[part], mini["mask"], cfg.clip_range)
                        vf = value_loss(values, old_values[part], returns[part], mini["mask"], cfg.value_clip)
                        ((pg + vf) * share).backward()  # no parameter is shared: a weight on vf would change nothing
                        with torch.no_grad():
                            log_ratio = logprobs - old_logprobs[part]
                            stats.append(torch.stack([
                                pg, vf, 0.5 * masked_mean(log_ratio ** 2, mini["mask"]),
                                masked_mean(((log_ratio.exp() - 1).abs() > cfg.clip_range).float(), mini["mask"]),
                                masked_mean(((values - old_values[part]).abs() > cfg.value_clip).float(), mini["mask"])]))
                    torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
                    torch.nn.utils.clip_grad_norm_(critic.parameters(), cfg.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()

            kl = (old_logprobs - ref_logprobs).sum(1)
            names = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/clipfrac_avg")
            row = {"step": step, "objective/kl": kl.mean().item(), "objective/scores": scores.mean().item(),
                   "objective/raw_scores": raw_scores.mean().item(), "objective/rlhf_reward": rewards.sum(1).mean().item(),
                   "objective/entropy": -old_logprobs.sum(1).mean().item(), "val/mean_length": mask.sum(1).float().mean().item(),
                   "val/ended": ended.float().mean().item(), **dict(zip(names, torch.stack(stats).mean(0).tolist()))}
            if not all(map(math.isfinite, row.values())):
                raise ValueError(f"--out {cfg.out}: NaN at PPO step {step}; lower --lr or --critic_lr, or raise --kl_coef")
            log.append(row)
            g = cfg.rollouts_per_prompt
            rollouts.append({"step": step, "kl": row["objective/kl"], "prompts": [prompts[i] for i in chosen_prompts],
                             "responses": [texts[i:i + g] for i in range(0, len(texts), g)],
                             "scores": raw_scores.view(-1, g).tolist()})
            checkpoint(step + 1, queue=queue, log=log, rollouts=rollouts)
            bar.set_postfix(score=f"{row['objective/scores']:.2f}", kl=f"{row['objective/kl']:.1f}",
                            len=f"{row['val/mean_length']:.0f}", refresh=False)
    print(f"{cfg.out}: score {log[0]['objective/scores']:+.2f} -> {log[-1]['objective/scores']:+.2f} SD of the reward on SFT "
          f"samples, KL {log[-1]['objective/kl']:.1f} nats, {log[-1]['val/mean_length']:.0f} tokens a response")
    rm.save_model(policy, tokenizer, work)
    data.write_jsonl(work / "log.jsonl", log)
    data.write_jsonl(work / "rollouts.jsonl", rollouts)


def in_chunks(function, batch: dict[str, torch.Tensor], cfg: PPOConfig) -> torch.Tensor:
    """function(batch), computed micro_batch_size rows at a time."""
    size = cfg.micro_batch_size
    return torch.cat([function({name: x[i:i + size] for name, x in batch.items()})
                      for i in range(0, len(batch["mask"]), size)])


# -------------------------------------------------------------------------------------------- SFT and DPO, and plumbing

def sft(cfg: PPOConfig, work) -> None:
    """Maximum likelihood of the demonstrated responses (the prompt is read, not learnt)."""
    device = rm.pick_device()
    policy, tokenizer = load_policy(cfg.model)
    policy.to(device)
    examples = [(row["prompt"], row["response"]) for row in data.read_sft(cfg.data)]
    rows = [(row,) for row in rm.encode_rows(policy, tokenizer, examples, cfg.data, cfg.max_length)]
    refuse_empty([prompt_ids for (prompt_ids, _), in rows], cfg.data)

    def loss_of(part):
        batch = collate(tokenizer, [row for row, in part], device)
        return -masked_mean(response_logprobs(policy, batch), batch["mask"])

    log = fit(cfg, work, policy, rows, loss_of, cfg.lr or 2e-5, device)
    print(f"{cfg.out}: {len(rows)} responses, loss {log[0]['loss']:.2f} -> {log[-1]['loss']:.2f} nats a token")
    rm.save_model(policy, tokenizer, work)
    data.write_jsonl(work / "log.jsonl", log)


def dpo(cfg: PPOConfig, work) -> None:
    """Preferences without a reward model or rollouts: the paper's other baseline."""
    device = rm.pick_device()
    policy, tokenizer = load_policy(cfg.model)
    ref_policy = load_reference(cfg, policy, tokenizer)
    policy.to(device), ref_policy.to(device)
    pairs = rm.encode_pairs(policy, tokenizer, data.read_preferences(cfg.data), cfg.max_length, cfg.data)
    refuse_empty([prompt_ids for (prompt_ids, _), _ in pairs], cfg.data)

    def loss_of(part):
        batch = collate(tokenizer, [chosen for chosen, _ in part] + [rejected for _, rejected in part], device)
        with torch.no_grad():
            ref = response_logprobs(ref_policy, batch).sum(1)
        logps = response_logprobs(policy, batch).sum(1)
        n = len(part)
        return dpo_loss(logps[:n], logps[n:], ref[:n], ref[n:], cfg.beta)

    log = fit(cfg, work, policy, pairs, loss_of, cfg.lr or 5e-7, device)
    print(f"{cfg.out}: {len(pairs)} pairs, loss {log[0]['loss']:.3f} -> {log[-1]['loss']:.3f} nats (log 2 = untrained)")
    rm.save_model(policy, tokenizer, work)
    data.write_jsonl(work / "log.jsonl", log)


def fit(cfg: PPOConfig, work, policy, rows: list, loss_of, lr: float, device) -> list[dict]:
    """The supervised loop that SFT and DPO share: AdamW, linear decay, micro-batches. Returns the log."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    # DPO's loss is a mean over pairs, so that batches of like length are just faster. SFT's is a mean over the TOKENS of a
    # batch: sorted by length, tokens of short rows would weigh more than those of long ones, and teach brevity.
    lengths = rm.row_lengths(rows) if cfg.mode == "dpo" else [0] * len(rows)
    batches = [batch for epoch in range(cfg.epochs)
               for batch in rm.epoch_batches(lengths, cfg.batch_size, cfg.seed + epoch)]
    parts = {"policy": policy, "optimizer": optimizer, "schedule": rm.linear_decay(optimizer, len(batches))}
    done, kept = rm.resume(work, parts)
    log, checkpoint = kept.get("log", []), rm.Checkpoint(work, parts, cfg.checkpoint_minutes)
    if cfg.gradient_checkpointing:
        rm.checkpoint_gradients(policy)
    with progress(batches, f"{cfg.mode.upper()} {cfg.out}") as bar:
        for step, batch in enumerate(bar):
            if step < done:
                continue
            loss = 0.0
            for start in range(0, len(batch), cfg.micro_batch_size):
                part = [rows[i] for i in batch[start:start + cfg.micro_batch_size]]
                with rm.autocast(device):
                    part_loss = loss_of(part) * len(part) / len(batch)
                part_loss.backward()
                loss += part_loss.item()
            if not math.isfinite(loss):
                raise ValueError(f"--out {cfg.out}: the loss is {loss} at step {step}; lower --lr")
            torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            parts["schedule"].step()
            log.append({"step": step, "loss": loss})
            checkpoint(step + 1, log=log)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return log


def sample(cfg: PPOConfig, work) -> None:
    """k responses to each prompt, without labels: the meta set S when the policy is the current one."""
    policy, tokenizer = load_policy(cfg.model)
    policy.to(rm.pick_device())
    prompts = short_prompts(tokenizer, data.read_prompts(cfg.prompts), cfg.max_length, cfg.max_new_tokens, cfg.prompts)
    responses = sample_responses(policy, tokenizer, prompts, cfg.k, cfg.temperature, cfg.top_p, cfg.repetition_penalty,
                                 cfg.max_new_tokens, cfg.seed, max(cfg.batch_size, cfg.k), cfg.prompts)
    data.write_jsonl(work / "samples.jsonl", [{"prompt": x, "responses": ys} for x, ys in zip(prompts, responses)])
    distinct = sum(len(set(ys)) for ys in responses) / sum(map(len, responses))
    print(f"{cfg.out}: {cfg.k} responses to each of {len(prompts)} prompts, {100 * distinct:.0f} % distinct within their prompt")


def progress(items, label: str):
    from tqdm import tqdm
    return tqdm(items, desc=label, mininterval=1)


NEEDS = {"sft": ["data"], "dpo": ["data"], "ppo": ["prompts", "reward_model"], "sample": ["prompts"]}


def run(cfg: PPOConfig) -> None:
    for name in NEEDS[cfg.mode]:
        if not getattr(cfg, name):
            raise ValueError(f"ppo.py {cfg.mode} needs --{name}")
    with data.stage(f"ppo.py {cfg.mode}", cfg, inputs=["model", "data", "prompts", "ref_policy", "reward_model"]) as work:
        if work is not None:
            {"sft": sft, "dpo": dpo, "ppo": ppo, "sample": sample}[cfg.mode](cfg, work)


def main(argv=None) -> int:
    return data.command("ppo.py", PPOConfig, run, argv, __doc__, modes=tuple(NEEDS))


if __name__ == "__main__":
    sys.exit(main())
