r"""The policy: SFT, DPO, PPO and sampling.

Concept: iterative RLHF. PPO moves a policy towards what a reward model (RM) likes, and a KL penalty
keeps it near a reference (`ref_policy`; in run.sh always the SFT policy). MetaRM changes the RM
between two rounds, not PPO. A tag in brackets marks each thing that PPO needs in practice, at the
code that does it: [per-token KL] [reward scaling] [missing-EOS penalty] [advantage whitening]
[value head] [clipping] [epochs] [float32 logits].

    python ppo.py sft --model runs/toy/data/model --data runs/toy/data/sft.jsonl --out runs/toy/sft
    python ppo.py dpo --model runs/toy/sft --data runs/toy/pairs/train.jsonl --out runs/toy/dpo
    python ppo.py ppo --model runs/toy/sft --reward_model runs/toy/rm0 \
        --prompts runs/toy/data/prompts-ppo.jsonl --out runs/toy/ppo-1/policy
    python ppo.py sample --model runs/toy/sft --prompts runs/toy/data/prompts-meta.jsonl --out S

They write a model folder and `log.jsonl`, ppo `rollouts.jsonl` too; sample writes `samples.jsonl`.

Shapes: b responses of t tokens behind prompts of p tokens (each the longest of its batch). `mask`
(b, t) is 1 up to and including the EOS. Log-probabilities and KL are in nats. In PPO, they are of
the policies at the sampling temperature: it trains the distribution that it samples from.
"""

import copy
import inspect
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import data
import rm


# ----------------------------------------------------- the mathematics: pure functions of tensors
def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of x (b, t) over the entries where mask (b, t) is 1; 0 if there are none."""
    # Not x * mask: off the mask, x may be infinite, and 0 times infinity is NaN.
    return torch.where(mask.bool(), x, 0.0).sum() / mask.sum().clamp(min=1)


def kl_penalised_rewards(scores, logprobs, ref_logprobs, mask, kl_coef: float) -> Tensor:
    """Returns r_t = -kl_coef (log pi(y_t) - log pi_ref(y_t)), plus the score at the last token.

    Shapes: scores (b,), the others (b, t), or ValueError. Source: Ziegler et al. 2019.
    """
    check_shapes(mask, logprobs, ref_logprobs)
    check_shapes(mask[:, :1], scores[..., None])
    # [per-token KL] The mean of log pi - log pi_ref over samples of pi is the KL divergence. So the
    # sum over a response is an unbiased estimate of it, and each token pays for its own part.
    rewards = torch.where(mask.bool(), -kl_coef * (logprobs - ref_logprobs), 0.0)  # (b, t)
    # The RM judges the whole response, so its score comes at the last token: where mask times
    # (1, 2 ... t) is largest. A response of no tokens has none, and gets no score.
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)  # (b,)
    return rewards + F.one_hot(last, mask.shape[1]) * mask * scores[:, None].to(rewards.dtype)


def gae(rewards, values, mask, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Returns (advantages, returns): generalised advantage estimation along each response.

        delta_t = r_t + gamma V_{t+1} - V_t    A_t = delta_t + gamma lam A_{t+1}    R_t = A_t + V_t

    Shapes: all (b, t), or ValueError; 0 off the mask. Source: Schulman et al. 2016, Eq. 16.
    """
    check_shapes(mask, rewards, values)
    # After the EOS, V and A count as 0: values at padding must not leak into the advantages.
    values = torch.where(mask.bool(), values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (b,): V_{t+1}, A_{t+1}
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # After a row's EOS, A stays 0: the row's recursion starts at its own last token.
        next_advantage = torch.where(mask[:, t].bool(), delta + gamma * lam * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values  # the returns are what V is fitted to


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Returns x (b, t) with mean 0 and SD 1 over the mask, 0 off it. [advantage whitening]"""
    # The size of a step then does not depend on the scale of the rewards. And the tokens that are
    # better than the batch's mean become likelier, the others less likely.
    mean = masked_mean(x, mask)
    return (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8) * mask


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_range: float) -> Tensor:
    """Returns -E min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), with ratio = pi / pi_old.

    Shapes: all (b, t), or ValueError. Source: Schulman et al. 2017, Eq. 7.
    """
    check_shapes(mask, logprobs, old_logprobs, advantages)
    ratio = torch.exp(torch.where(mask.bool(), logprobs - old_logprobs, 0.0))  # 1 off the mask
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    # [clipping] The larger of two losses: a token that has moved by more than eps in the direction
    # that its advantage asks for gets no further push.
    return masked_mean(torch.max(-advantages * ratio, -advantages * clipped), mask)


def value_loss(values, old_values, returns, mask, clip_range: float) -> Tensor:
    """Returns half the squared error of the value head, the larger of unclipped and clipped.

    Shapes: all (b, t), or ValueError. Source: OpenAI baselines' PPO2; the paper's "value clip".
    """
    check_shapes(mask, values, old_values, returns)
    # The larger of two losses again: beyond clip_range, a value gets no push further that way.
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def dpo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: float
) -> Tensor:
    """Returns -mean log sigma(beta [(log pi/pi_ref)(chosen) - (log pi/pi_ref)(rejected)]).

    Shapes: all (n,), of whole responses, or ValueError. Source: Rafailov et al. 2023, Eq. 7.
    """
    others = (policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    check_shapes(policy_chosen_logps[..., None], *(x[..., None] for x in others))
    # Eq. 1 of MetaRM, with beta times the log-ratio of policy and reference as the reward.
    chosen = policy_chosen_logps - ref_chosen_logps
    rejected = policy_rejected_logps - ref_rejected_logps
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def check_shapes(*tensors: Tensor) -> None:
    """Raises ValueError unless all have one shape of two dimensions; they must not broadcast."""
    shapes = [tuple(x.shape) for x in tensors]
    if len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise ValueError(f"tensors of one shape (b, t) are needed; got {shapes}")


# ------------------------------------------------ how likely a response is, and what a policy says
def load_policy(path: str, vocabulary: dict | None = None):
    """Returns (model, tokenizer) from a causal LM's folder or hub name: float32, on the GPU if any.

    In eval mode, for training too: with dropout, rollout and update would see two policies.
    Raises: Mistake, naming the path and the fix, on other models (or another vocabulary, if given).
    """
    model, tokenizer, new = rm.load_pretrained(AutoModelForCausalLM, path)
    for name in new:  # weights that transformers made up, since the checkpoint has none
        raise data.Mistake(f"{path}: {name} is missing; give a causal language model")
    # The reference reads the policy's own ids, so these must mean the same words to it.
    if vocabulary not in (None, tokenizer.get_vocab()):
        raise data.Mistake(f"{path} has another vocabulary; give what --model was trained from")
    # [float32 logits] Near 20, bf16 has steps of 0.125, and PPO exponentiates differences of them.
    if type(model.get_output_embeddings()) is torch.nn.Linear:
        model.get_output_embeddings().__class__ = rm.Float32Head

    def logprobs_of(groups):
        batch = policy_batch(tokenizer, sum(groups, []), model.device)
        return response_logprobs(model, batch).sum(dim=1)  # (n,): of whole responses

    rm.try_out(model, tokenizer, path, logprobs_of)
    model.to(rm.pick_device())
    # Two rows that differ in their second token only: at the first, a decoder sees no difference.
    with torch.no_grad():
        one, other = model(torch.tensor([[0, 1], [0, 2]], device=model.device)).logits[:, 0]
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
        raise data.Mistake(f"{path}: sees the tokens to come, as encoders do; a policy must not")
    # These settings are saved with the model, so that transformers' `generate` stops at our EOS.
    ends = end_ids(model, tokenizer)
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    try:
        model.generation_config.validate(strict=True)  # as `save_pretrained` will, at the end
    except ValueError as error:
        raise data.Mistake(f"{path}/generation_config.json: {error!r:.200}; correct it") from error
    return model, tokenizer


def policy_batch(tokenizer, rows: list[rm.Row], device="cpu") -> dict[str, Tensor]:
    """Returns rows as a batch: prompts padded on the LEFT, responses on the RIGHT.

        pad pad Human : hi | Hello . EOS pad        every response starts in the same column: the
        Human : my phone . | Sorry , no . EOS       slice [:, -t:] is the (b, t) of this file

    Shapes: input_ids, attention_mask, position_ids (b, p + t); mask (b, t).
    """
    pad_id = rm.end_id(tokenizer)  # any will do: the attention mask hides it
    prompts = rm.pad([prompt_ids for prompt_ids, _ in rows], pad_id, device, left=True)  # (b, p)
    responses = rm.pad([response_ids for _, response_ids in rows], pad_id, device)  # (b, t)
    batch = {name: torch.cat([prompts[name], responses[name]], dim=1) for name in prompts}
    # Positions count real tokens only: otherwise left padding would shift a row's positions.
    batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    batch["mask"] = responses["attention_mask"]
    return batch


def states_of(model, batch: dict, name: str) -> Tensor:
    """Returns output `name` at the token BEFORE each response token: (b, t, width).

    name: "logits", where the model predicts that token (width: the vocabulary), or
    "last_hidden_state", from which the critic reads V before that token.
    """
    t = batch["mask"].shape[1]
    p = batch["input_ids"].shape[1] - t
    takes = inspect.signature(model.forward).parameters
    # A prompt of several rows (rollouts, pairs of DPO) is read once, if the model can do that. Not
    # on a GPU: there, launching a second pass takes as long as some 20,000 tokens (computed).
    if p > 1 and model.device.type == "cpu" and rm.shares_prompts(model):
        # Prompts are the same if their ids and their padding are.
        both = torch.cat([batch["input_ids"][:, :p], batch["attention_mask"][:, :p]], dim=1)
        prompts, owner = both.unique(dim=0, return_inverse=True)  # (m, 2p), (b,)
        if len(prompts) < len(both):
            # The prompt's last token is read with the response, whose first token it predicts.
            prompts = {"input_ids": prompts[:, : p - 1], "attention_mask": prompts[:, p:-1]}
            responses = {key: batch[key][:, p - 1 : -1] for key in prompts}  # (b, t)
            keep = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
            return rm.read_prompts_once(model, model, prompts, responses, owner, **keep)[1][name]
    # Compute the logits of the last t + 1 tokens only: those of a whole prompt can be gigabytes.
    inputs = {key: x for key, x in (batch | {"logits_to_keep": t + 1}).items() if key in takes}
    return model(**inputs, use_cache=False)[name][:, -t - 1 : -1]


def response_logprobs(model, batch: dict, temperature: float = 1.0) -> Tensor:
    """Returns log pi(y_t | x, y_<t) of each response token: (b, t), 0 off the mask.

    temperature: that of sampling, since PPO's ratio needs the probabilities with which tokens were
    drawn. (For the same reason rollouts use neither top-p nor a repetition penalty.)
    """
    # Logits in float32 take 1.6 GB for 64 responses of 128 tokens and 49,152 words. Two tensors of
    # this size live here (these and their log-softmax), three in the backward pass.
    logits = states_of(model, batch, "logits").float() / temperature  # (b, t, vocabulary)
    targets = batch["input_ids"][:, -logits.shape[1] :]  # (b, t)
    # Cross-entropy is -log softmax(logits)[target], and never takes the log of a rounded 0.
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return torch.where(batch["mask"].bool(), -losses.view(targets.shape), 0.0)


def end_ids(model, tokenizer) -> list[int]:
    """Returns all ids that end a response: our EOS first, then the model's own (chat models)."""
    own = model.generation_config.eos_token_id  # an id, a list of ids or None
    own = own if isinstance(own, list) else [own]
    return [end for end in dict.fromkeys([rm.end_id(tokenizer), *own]) if end is not None]


def penalised(logits: Tensor, read: Tensor, mask: Tensor, penalty: float) -> Tensor:
    """Returns logits (b, vocabulary), those of the tokens read so far (b, p + t) made less likely.

    Source: Keskar et al. 2019, as in transformers: the prompt counts, padding does not.
    """
    # How often each word was read: (b, vocabulary).
    said = torch.zeros_like(logits).scatter_add(1, read, mask.to(logits.dtype)) > 0
    # A logit of either sign must go down: divided where positive, multiplied where negative.
    return torch.where(said, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample_tokens(logits: Tensor, top_p: float = 1.0) -> Tensor:
    """Returns one token id per row (b, 1), drawn by its probability; logits (b, vocabulary).

    A row of NaN gives -1: `generate` sees it when it reads the ids. A check would wait for the GPU.
    """
    probabilities = logits.softmax(dim=-1)  # (b, vocabulary), as all below
    if top_p < 1:  # the likeliest tokens only, up to the one that brings their sum to top_p
        probabilities, ids = probabilities.sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = torch.where(before < top_p, probabilities, 0.0)
    # Invert the distribution function: the first token at which the sum exceeds `coin`, uniform in
    # [0, total). This takes one random number per row; torch.multinomial takes one per word. In
    # float64: added to a sum near 1, probabilities below 6e-8 would be lost in float32.
    cumulative = probabilities.double().cumsum(dim=-1)
    total = cumulative[:, -1:]  # (b, 1): about 1, less with top_p, NaN if a logit is NaN
    coin = torch.rand_like(total) * total
    token = torch.searchsorted(cumulative, coin, right=True).clamp(max=logits.shape[1] - 1)
    if top_p < 1:
        token = ids.gather(1, token)  # from a rank back to an id
    return torch.where(total > 0, token, -1)


@torch.no_grad()
def generate(
    model, tokenizer, prompt_ids, max_new_tokens, temperature, top_p=1.0, repetition_penalty=1.0
) -> list[list[int]]:
    """Returns one response per prompt (lists of ids), up to and including its end if it has one.

    prompt_ids: b lists of ids, not padded; max_new_tokens: the most ids of a response.
    Samples as transformers' `generate` does with these settings. Written out so that a prompt given
    many times is read once, finished responses leave the batch, and drawing a token is quick.
    Raises: Mistake on NaN in the logits.
    """
    ends = end_ids(model, tokenizer)
    takes = inspect.signature(model.forward).parameters
    can_cache = getattr(model, "can_cache", False)  # load_policy tries it out
    # The first pass reads the m different prompts; `keep` then copies a prompt's row once for each
    # of its responses. `read` holds all ids so far, `mask` is 1 at those that are not padding.
    place = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, prompt_ids)))}
    keep = [place[tuple(ids)] for ids in prompt_ids]
    read, mask = rm.pad(list(place), ends[0], model.device, left=True).values()  # (m, p)
    responses = [[] for _ in prompt_ids]
    unfinished = range(len(prompt_ids))  # row j of the batch goes on with response unfinished[j]
    cache = {}
    # Autocast around the whole loop casts the weights to bf16 once, not once per token.
    with rm.autocast(model.device, bf16=True):
        for _ in range(max_new_tokens):
            unread = 1 if cache else read.shape[1]  # tokens that the cache does not hold
            position = (mask.cumsum(dim=1) - 1).clamp(min=0)  # real tokens only, as in policy_batch
            inputs = {"input_ids": read[:, -unread:], "position_ids": position[:, -unread:]}
            inputs |= {"attention_mask": mask, "logits_to_keep": 1} | cache
            out = model(**{k: x for k, x in inputs.items() if k in takes}, use_cache=can_cache)
            logits = out.logits[:, -1].float()  # (rows, vocabulary)
            if can_cache:
                name = rm.name_of_cache(out)
                cache = {name: out[name]}
            # After the first pass: one row per response. Later: drop the rows that have ended.
            if len(keep) != len(logits):
                rows = torch.tensor(keep, device=model.device)
                read, mask, logits = read[rows], mask[rows], logits[rows]
                if cache:  # rows of keys and values, in place
                    cache[name].reorder_cache(rows)
            if repetition_penalty != 1:
                logits = penalised(logits, read, mask, repetition_penalty)
            token = sample_tokens(logits / temperature, top_p)  # (rows, 1)
            new_ids = token[:, 0].tolist()  # the one wait for the GPU per token
            if min(new_ids) < 0:
                raise data.Mistake("NaN in the policy's logits; lower the --lr that made it")
            for i, new_id in zip(unfinished, new_ids, strict=True):
                responses[i].append(new_id)
            keep = [j for j, new_id in enumerate(new_ids) if new_id not in ends]
            unfinished = [unfinished[j] for j in keep]
            if not keep:  # all have ended
                break
            read, mask = torch.cat([read, token], dim=1), F.pad(mask, (0, 1), value=1)
    return responses


def response_texts(model, tokenizer, prompt_ids, response_ids) -> list[str]:
    """Returns the b responses as texts, without their ends; prompt_ids, response_ids: b lists."""
    clean = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    # Some tokenizers (Llama 2's) decode " a" to "a". Then decode prompt + response, and cut it off.
    apart = tokenizer.decode(tokenizer(" a", add_special_tokens=False).input_ids, **clean) == " a"
    ends = end_ids(model, tokenizer)
    texts = []
    for prompt, response in zip(prompt_ids, response_ids, strict=True):
        before = [] if apart else prompt
        said = before + [token for token in response if token not in ends]
        texts.append(tokenizer.decode(said, **clean)[len(tokenizer.decode(before, **clean)) :])
    return texts


def encode_prompts(readers, prompts: list[str], max_new_tokens: int, source: str, max_length=0):
    """Returns [(prompt, its ids)] of the prompts that leave room for a response in every reader.

    readers: [(model, tokenizer)] of all models that will read prompt and response, the policy
    first. Raises: Mistake naming the row of `source`.
    """
    limits = [rm.positions(model) for model, _ in readers]
    new = max_new_tokens + 1  # a response that was cut off gets an EOS when it is read as a text
    kept = []
    for number, prompt in enumerate(prompts, 1):
        rows = [rm.encode(tokenizer, prompt, "")[0] for _, tokenizer in readers]
        if not rows[0]:
            raise data.Mistake(f"{source}, row {number}: the prompt is empty; drop the row")
        if max_length and max(map(len, rows)) + new > max_length:
            continue
        for row, limit in zip(rows, limits, strict=True):
            if len(row) + new > limit:
                why = f"{len(row)} + --max_new_tokens + EOS > {limit} positions"
                raise data.Mistake(f"{source}, row {number}: {why}; try --max_length {min(limits)}")
        kept.append((prompt, rows[0]))
    if max_length:
        print(f"{source}: {len(kept)} of {len(prompts)} prompts fit --max_length", file=sys.stderr)
    return kept


def sample_responses(
    model,
    tokenizer,
    prompts: list[str],
    k: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 256,
    source: str = "prompts",
) -> list[list[str]]:
    """Returns k responses (texts) to each prompt, from one seed. Raises: Mistake on k < 1."""
    if k < 1 or not prompts:
        raise data.Mistake(f"{source}: --k {k} x {len(prompts)} prompts are no responses; raise it")
    torch.manual_seed(seed)
    ids = [row for _, row in encode_prompts([(model, tokenizer)], prompts, max_new_tokens, source)]
    # Response i answers prompt i // k. Prompts of like length share a batch: little padding.
    order = sorted(range(k * len(ids)), key=lambda i: -len(ids[i // k]))
    texts = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        rows = [ids[i // k] for i in chunk]
        how = (max_new_tokens, temperature, top_p, repetition_penalty)
        responses = generate(model, tokenizer, rows, *how)
        texts |= zip(chunk, response_texts(model, tokenizer, rows, responses), strict=True)
    return [[texts[i + j] for j in range(k)] for i in range(0, len(texts), k)]


# -------------------------------------------------------------------------------------------- PPO
class Critic(torch.nn.Module):
    """[value head] V(x, y_<t): a copy of the policy's trunk, then one number, 0 at the start.

    critic(batch) returns the values (b, t) of a `policy_batch`, in SDs of the reward. V_t is
    computed before y_t is read: it predicts the rewards from t on.
    """

    def __init__(self, policy):
        super().__init__()
        # A copy: in shared weights, the gradients of value and policy loss would interfere.
        self.trunk = copy.deepcopy(policy.base_model)
        # The same trunk, so load_policy's trial of it holds here, too.
        self.trunk.shares_prompts = getattr(policy, "shares_prompts", False)
        self.head = rm.Float32Head(policy.get_output_embeddings().weight.shape[1], 1)
        for weight in self.head.parameters():
            torch.nn.init.zeros_(weight)

    def forward(self, batch: dict) -> Tensor:
        return self.head(states_of(self.trunk, batch, "last_hidden_state")).float()[..., 0]


def rollout(policy, ref_policy, critic, tokenizer, reward_of, shift, scale, asked, settings):
    """Returns (batch for `update`, stats, texts, raw scores) of one answer to each of b prompts.

    reward_of: (prompts, texts) -> raw scores (b,), on the CPU. PPO maximises (raw - shift) / scale.
    asked: b pairs (prompt, its ids). settings: an object that has the numbers max_new_tokens,
    temperature, micro_batch_size, missing_eos_penalty, kl_coef, gamma, lam (main() explains them).
    The batch is a `policy_batch` with old_logprobs, old_values, advantages, returns, all (b, t).
    Raises: Mistake on NaN in the policy's logits.
    """
    prompts, prompt_ids = zip(*asked, strict=True)
    # The policy answers. The RM reads its answers as text, since its tokenizer may be another.
    temperature = settings.temperature
    responses = generate(policy, tokenizer, prompt_ids, settings.max_new_tokens, temperature)
    texts = response_texts(policy, tokenizer, prompt_ids, responses)
    raw_scores = reward_of(prompts, texts)  # (b,)
    # Policy, reference and critic read the sampled tokens. The policy's log-probabilities come from
    # the same function as in `update`, so the first ratio there is 1, up to rounding.
    device = policy.device
    batch = policy_batch(tokenizer, list(zip(prompt_ids, responses, strict=True)), device)
    pieces = torch.arange(len(texts), device=device).split(settings.micro_batch_size)
    parts = [{name: x[rows] for name, x in batch.items()} for rows in pieces]
    with torch.no_grad(), rm.autocast(device, bf16=True):
        # (b, t) each: log pi, log pi_ref and V, at the policy that sampled
        old_logprobs = torch.cat([response_logprobs(policy, x, temperature) for x in parts])
        ref_logprobs = torch.cat([response_logprobs(ref_policy, x, temperature) for x in parts])
        old_values = torch.cat([critic(x) for x in parts])
    # [missing-EOS penalty] For a response that was cut off at max_new_tokens. The RM reads it with
    # an EOS at its end, as if it were finished; without the penalty, the policy learns to ramble.
    ends = end_ids(policy, tokenizer)
    ended = torch.tensor([row[-1] in ends for row in responses], device=device)  # (b,)
    scores = (raw_scores.to(device) - shift) / scale - settings.missing_eos_penalty * (~ended)
    # One reward per token (b, t), and its advantage: how much better than V expected it was.
    mask = batch["mask"]
    rewards = kl_penalised_rewards(scores, old_logprobs, ref_logprobs, mask, settings.kl_coef)
    advantages, returns = gae(rewards, old_values, mask, settings.gamma, settings.lam)
    stats = {  # of whole responses, means over the b
        "objective/kl": (old_logprobs - ref_logprobs).sum(1).mean().item(),
        "objective/scores": scores.mean().item(),
        "objective/raw_scores": raw_scores.mean().item(),
        "objective/rlhf_reward": rewards.sum(1).mean().item(),
        "objective/entropy": -old_logprobs.sum(1).mean().item(),
        "val/mean_length": mask.sum(1).float().mean().item(),
        "val/ended": ended.float().mean().item(),
    }
    batch |= {"old_logprobs": old_logprobs, "old_values": old_values, "returns": returns}
    batch["advantages"] = whiten(advantages, mask)  # after `returns`, which keep the rewards' scale
    return batch, stats, texts, raw_scores


def update(policy, critic, optimizer, batch: dict, settings) -> dict[str, float]:
    """Takes the optimizer steps of one batch of rollouts; returns the mean of each stat.

    batch: what `rollout` returns, b rows. settings: an object that has the numbers ppo_epochs,
    rollouts_per_prompt, minibatch_size, micro_batch_size, temperature, clip_range, value_clip,
    max_grad_norm. Raises: Mistake, before a step that would be taken on NaN or infinity.
    """
    stats = []  # of each optimizer step: (5,), as named below
    # [epochs] Several passes over the same rollouts; clipping limits how far they move the policy.
    # On a CPU, shuffle by prompt: a prompt's rollouts stay together, so that it is read once. On a
    # GPU (see `states_of`) shuffle rollouts: more prompts in a minibatch make less noise.
    together = settings.rollouts_per_prompt if policy.device.type == "cpu" else 1
    blocks = torch.arange(len(batch["mask"])).view(-1, together)
    for _ in range(settings.ppo_epochs):
        order = blocks[torch.randperm(len(blocks))].flatten().to(policy.device)  # (b,)
        for rows in order.split(settings.minibatch_size):
            stats.append(0)
            for piece in rows.split(settings.micro_batch_size):
                part = {name: x[piece] for name, x in batch.items()}
                # Weighted by tokens, the micro-batches add up to the minibatch's masked mean.
                share = part["mask"].sum() / batch["mask"][rows].sum()
                stats[-1] += share * add_gradients(policy, critic, part, share, settings)
            clip = torch.nn.utils.clip_grad_norm_
            norms = [clip(x.parameters(), settings.max_grad_norm).item() for x in (policy, critic)]
            # Before the step, which would carry NaN from one weight into all. A finite loss does
            # not tell: where exp(log-ratio) overflows, the clipped loss is finite, but its gradient
            # is 0 times infinity.
            if not sum(norms) < torch.inf:
                raise data.Mistake(f"NaN ahead, gradient norms {norms}; lower --lr or --critic_lr")
            optimizer.step()
            optimizer.zero_grad()
    keys = "loss/policy_avg loss/value_avg policy/approxkl_avg policy/clipfrac_avg val/clipfrac_avg"
    return dict(zip(keys.split(), torch.stack(stats).mean(dim=0).tolist(), strict=True))


def add_gradients(policy, critic, part: dict, share: Tensor, settings) -> Tensor:
    """Adds `share` of the gradients on n rollouts to both models; returns five stats (5,)."""
    mask = part["mask"]  # (n, t)
    with rm.autocast(policy.device, bf16=True):
        logprobs = response_logprobs(policy, part, settings.temperature)
    pg = policy_loss(logprobs, part["old_logprobs"], part["advantages"], mask, settings.clip_range)
    # Policy and critic share no parameter and are clipped apart, so V's loss needs no weight. Two
    # backward passes, one after the other: memory then holds the activations of one model.
    (pg * share).backward()
    with rm.autocast(policy.device, bf16=True):
        values = critic(part)
    vf = value_loss(values, part["old_values"], part["returns"], mask, settings.value_clip)
    (vf * share).backward()
    # How far the policy has moved: an approximate KL, and the shares of tokens outside the clips.
    log_ratio = logprobs - part["old_logprobs"]  # 0 before the first step
    clipped = (log_ratio.exp() - 1).abs() > settings.clip_range
    value_clipped = (values - part["old_values"]).abs() > settings.value_clip
    moved = [masked_mean(x, mask) for x in (0.5 * log_ratio**2, clipped, value_clipped)]
    return torch.stack([pg, vf, *moved]).detach()  # stays on the GPU: nobody waits for it here


def ppo(args, work: Path) -> None:
    """The command: each step is a rollout and an update."""
    g = args.rollouts_per_prompt
    per_step = args.batch_size // g  # prompts
    if args.batch_size % g:
        why = f"--batch_size {args.batch_size} is no multiple of --rollouts_per_prompt {g}"
        raise data.Mistake(f"{why}; try --batch_size {max(1, per_step) * g}")
    policy, tokenizer = load_policy(args.model)
    ref_policy, _ = load_policy(args.ref_policy or args.model, tokenizer.get_vocab())
    reward_model, rm_tokenizer = rm.load_reward_model(args.reward_model)
    reward_model.to(policy.device)
    critic = Critic(policy).to(policy.device)
    readers = [(policy, tokenizer), (ref_policy, tokenizer), (reward_model, rm_tokenizer)]
    prompts = data.read_prompts(args.prompts)
    items = encode_prompts(readers, prompts, args.max_new_tokens, args.prompts, args.max_length)
    # The first prompts set the scale of the rewards, and are not trained on.
    n = args.scale_prompts
    aside, items = [prompt for prompt, _ in items[:n]], items[n:]
    if per_step > len(items):
        why = f"{per_step} prompts per step, but --scale_prompts {n} leaves {len(items)}"
        raise data.Mistake(f"--batch_size {args.batch_size}: {why}; lower either, or add prompts")
    limit = rm.positions(reward_model)

    def reward_of(prompts, texts):
        texts = list(texts)
        # As text, a response can have more tokens for the RM than were sampled. Cut it to fit.
        for i, prompt in enumerate(prompts):
            while sum(map(len, rm.encode(rm_tokenizer, prompt, texts[i]))) > limit:
                texts[i] = texts[i][:-1]
        return rm.score(reward_model, rm_tokenizer, prompts, texts)

    # [reward scaling] Eq. 1 leaves an RM's offset free for each prompt, and RMs differ in scale. So
    # shift and scale rewards ONCE, by mean and SD over samples of the reference (all prompts
    # together): RMs then push about equally hard at the start. Each batch's own SD, also common,
    # would hide that an RM stops telling responses apart.
    options = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    texts = sum(sample_responses(ref_policy, tokenizer, aside, 4, **options), [])
    sft_scores = reward_of([prompt for prompt in aside for _ in range(4)], texts)
    shift, scale = sft_scores.mean().item(), sft_scores.std().item()
    if scale <= 1e-6 * (1 + abs(shift)):  # float32's rounding: nothing to divide by
        why = f"all {len(texts)} samples of the reference get one reward, {shift:.6g}"
        raise data.Mistake(f"--scale_prompts {n}: {why}; raise it or --temperature")
    # Policy and critic have learning rates of their own, as in the paper. fused: one quick kernel.
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, weight_decay=0.0, fused=True)
    optimizer.add_param_group({"params": critic.parameters(), "lr": args.critic_lr})
    torch.manual_seed(args.seed)
    checkpoint = rm.Checkpoint(work, vars(args), items)
    done, kept = checkpoint.resume(policy=policy, critic=critic, optimizer=optimizer)
    queue = kept.get("queue", [])
    for step in tqdm(range(done, args.steps), desc=args.out, mininterval=1):
        # Prompts come in a random order, each at most once per pass over them.
        if len(queue) < per_step:
            queue = torch.randperm(len(items)).tolist()
        drawn, queue = queue[:per_step], queue[per_step:]
        asked = [items[i] for i in drawn for _ in range(g)]  # a prompt's rollouts side by side
        batch, stats, texts, raw_scores = rollout(
            policy, ref_policy, critic, tokenizer, reward_of, shift, scale, asked, args
        )
        stats |= update(policy, critic, optimizer, batch, args)
        # Log the step and its rollouts, and save what a resumed run needs.
        said = {"step": step, "kl": stats["objective/kl"], "prompts": [items[i][0] for i in drawn]}
        said["responses"] = [texts[i : i + g] for i in range(0, len(texts), g)]
        said["scores"] = raw_scores.view(-1, g).tolist()
        data.append_jsonl(work / "log.jsonl", {"step": step} | stats)
        data.append_jsonl(work / "rollouts.jsonl", said)
        checkpoint.save(step + 1, queue=queue)
    rm.save_model(policy, tokenizer, work)
    print(f"{args.out}: at the end {data.read_jsonl(work / 'log.jsonl')[-1]}")


# ----------------------------------------------------------------------------- SFT, DPO, sampling
def sft(args, work: Path) -> None:
    """The command: maximum likelihood of the responses (prompts get no loss)."""
    policy, tokenizer = load_policy(args.model)

    def loss_of(part):
        batch = policy_batch(tokenizer, [row for [row] in part], policy.device)
        return -masked_mean(response_logprobs(policy, batch), batch["mask"])

    def tokens_of(part):
        return sum(len(response_ids) for [(_, response_ids)] in part)

    # sort=False: each batch counts alike, so in a batch of short rows a token would weigh more.
    train_policy(args, work, [policy], tokenizer, data.read_sft, loss_of, tokens_of, sort=False)


def dpo(args, work: Path) -> None:
    """The command: learns from preferences without an RM or rollouts; a baseline of the paper."""
    policy, tokenizer = load_policy(args.model)
    ref_policy, _ = load_policy(args.ref_policy or args.model, tokenizer.get_vocab())

    def loss_of(part):
        rows = [chosen for chosen, _ in part] + [rejected for _, rejected in part]
        batch = policy_batch(tokenizer, rows, policy.device)
        with torch.no_grad():
            ref = response_logprobs(ref_policy, batch).sum(dim=1)
        logps = response_logprobs(policy, batch).sum(dim=1)
        return dpo_loss(*logps.chunk(2), *ref.chunk(2), args.beta)

    train_policy(args, work, [policy, ref_policy], tokenizer, data.read_preferences, loss_of, len)


def train_policy(args, work, readers, tokenizer, read, loss_of, weight_of, sort=True) -> None:
    """Trains the first of the readers on read(args.data), by the loop that reward models share."""
    policy = readers[0]
    items = read(args.data)
    shortest = min(readers, key=rm.positions)
    kept, groups = rm.encode_groups(shortest, tokenizer, items, args.data, args.max_length)
    for item, [(prompt_ids, _), *_] in zip(kept, groups, strict=True):
        if not prompt_ids:  # nothing to predict the first token from
            raise data.Mistake(f"{args.data}, row {items.index(item) + 1}: empty prompt; drop it")
    limits = (args.micro_batch_size, args.max_grad_norm)
    step = rm.gradient_step(policy, loss_of, *limits, weight_of, bf16=True)
    how = (args.lr, args.batch_size, args.epochs, args.seed)  # of rm.fit
    log = rm.fit(policy, groups, step, rm.Checkpoint(work, vars(args), groups), *how, sort=sort)
    rm.save_model(policy, tokenizer, work)
    print(f"{args.out}: loss {log[0]['loss']:.3f} -> {log[-1]['loss']:.3f} nats")


def sample(args, work: Path) -> None:
    """The command: k responses to each prompt, without labels: the meta set S of this policy."""
    loaded = load_policy(args.model)  # (policy, tokenizer)
    prompts = data.read_prompts(args.prompts)
    items = encode_prompts([loaded], prompts, args.max_new_tokens, args.prompts, args.max_length)
    prompts = [prompt for prompt, _ in items]
    how = (args.k, args.temperature, args.top_p, args.repetition_penalty, args.max_new_tokens)
    responses = sample_responses(*loaded, prompts, *how, args.seed, args.batch_size)
    rows = [{"prompt": x, "responses": ys} for x, ys in zip(prompts, responses, strict=True)]
    data.write_jsonl(work / "samples.jsonl", rows)
    print(f"{args.out}: {args.k} responses to each of {len(prompts)} prompts")


def main(argv: list[str] | None = None) -> int:
    parser = data.new_parser("ppo.py", __doc__)
    add = data.modes(parser, "sft dpo ppo sample")
    # What is read and written.
    add("sft dpo ppo sample", "--model", required=True, help="folder or hub name to start from")
    add("sft dpo ppo sample", "--out", required=True, help="folder to write to")
    add("sft dpo", "--data", required=True, help="prompt and response (sft), or pairs (sft, dpo)")
    add("ppo sample", "--prompts", required=True, help=".jsonl with a `prompt` in each row")
    add("ppo", "--reward_model", required=True, help="reward model folder")
    add("dpo ppo", "--ref_policy", default="", help="the KL is taken to it; empty: --model")
    # How it is trained.
    add("sft dpo ppo sample", "--seed", type=int, default=0, help="of data order and sampling")
    add("sft", "--lr", type=float, default=2e-5, help="AdamW's learning rate, decaying to 0")
    add("dpo ppo", "--lr", type=float, default=5e-7, help="AdamW's (ppo: constant)")
    add("ppo", "--critic_lr", type=float, default=1.5e-6, help="the critic's, constant")
    add("sft dpo ppo sample", "--batch_size", type=int, default=32, help="rows (rollouts) per step")
    add("sft dpo ppo", "--micro_batch_size", type=int, default=32, help="rows per pass: memory")
    add("sft dpo", "--epochs", type=int, default=1, help="passes over the data")
    add("sft dpo ppo sample", "--max_length", type=int, default=0, help="drop longer; 0: refuse")
    add("sft dpo ppo", "--max_grad_norm", type=float, default=1.0, help="clips longer gradients")
    add("sft dpo ppo", "--checkpoint_minutes", type=float, default=5.0, help="lost by a kill")
    add("dpo", "--beta", type=float, default=0.1, help="strength of the pull to the reference")
    # PPO's own. The `settings` of `rollout` and `update` are the parsed options.
    add("ppo", "--steps", type=int, default=100, help="rounds of rollout and update")
    add("ppo", "--rollouts_per_prompt", type=int, default=4, help="in each step (paper: 16)")
    add("ppo", "--minibatch_size", type=int, default=32, help="rollouts per optimizer step")
    add("ppo", "--ppo_epochs", type=int, default=2, help="passes over each step's rollouts")
    add("ppo", "--kl_coef", type=float, default=0.05, help="reward that one nat of KL costs")
    add("ppo", "--clip_range", type=float, default=0.2, help="eps of the policy's ratio")
    add("ppo", "--value_clip", type=float, default=0.8, help="eps of the value head")
    add("ppo", "--gamma", type=float, default=1.0, help="discount per token")
    add("ppo", "--lam", type=float, default=0.95, help="lambda of GAE")
    add("ppo", "--missing_eos_penalty", type=float, default=1.0, help="in SDs of the reward")
    add("ppo", "--scale_prompts", type=int, default=64, help="first prompts, to scale rewards")
    # How responses are sampled. PPO has no top_p: see response_logprobs.
    add("sample", "--k", type=int, default=5, help="responses per prompt")
    add("ppo sample", "--temperature", type=float, default=1.0, help="divides the logits")
    add("sample", "--top_p", type=float, default=1.0, help="nucleus (paper: 0.9); 1 = off")
    add("sample", "--repetition_penalty", type=float, default=1.0, help="(paper: 1.1); 1 = off")
    add("ppo sample", "--max_new_tokens", type=int, default=64, help="longest response, in tokens")

    def run(args):
        with data.output_folder(args.out) as work:
            {"sft": sft, "dpo": dpo, "ppo": ppo, "sample": sample}[args.mode](args, work)

    return data.command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
