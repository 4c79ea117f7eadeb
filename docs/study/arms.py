"""The reward models that the study compares: `reward_model` trains one of any kind.

All kinds of one seed start from the same head and see D in the same order, with rm.py's options.
They differ in the step they take:

    plain     Eq. 1 on D                                             rm.py
    first     MetaRM, first order, climb eta                         metarm.py
    exact     MetaRM, exact order, climb eta                         metarm.py
    adapted   as first, but theta' of the trained model is kept      metarm.py --save_adapted
    random    a climb of length eta in a random direction            below
    joint     minimises L - lam * J: no climb                        below
    ocrm      Eq. 1 with the weights of Ackermann et al. 2025        below

    python docs/study/arms.py --kind joint --knob 0.3 --model SFT --data D --meta S --out RM
"""

import contextlib
import itertools
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

import data
import metarm
import ppo
import rm


def stage(out: Path, main, *argv) -> Path:
    """Returns the folder `out`, which one of the commands makes unless it is there."""
    if not out.exists():
        argv = [str(word) for word in (*argv, "--out", out)]
        if main(argv):
            raise data.Mistake(f"failed: {' '.join(argv)}")
    return out


def reward_model(
    kind: str, out: Path, options: list, seed: int, knob: float = 0.0, S=None, policy=None
) -> Path:
    """Returns the folder of an RM, trained unless it is there already.

    options: rm.py's, at least --model and --data (for first, exact and adapted also metarm.py's).
    seed: of the new head and of the order of D. knob: eta (normalised), lam or tau of the kind.
    S: the samples.jsonl of a policy; plain and ocrm need none. policy: ocrm weighs D by how likely
    it is under this one, against --model.
    """
    options = [*options, "--seed", seed]
    if kind == "plain":
        return stage(out, rm.main, *options)
    if kind in ("first", "exact", "adapted"):
        adapted = out.with_name("adapted")
        if not out.exists():  # else of a run that was killed between the two
            shutil.rmtree(adapted, ignore_errors=True)
        order = "exact" if kind == "exact" else "first"
        options += ["--meta", S, "--eta", knob, "--normalize", "--order", order]
        stage(out, metarm.main, *options, "--save_adapted", adapted)
        return adapted if kind == "adapted" else out
    source = ["--policy", policy] if kind == "ocrm" else ["--meta", S]
    return stage(out, main, *options, "--kind", kind, "--knob", knob, *source)


def random_step(args, model, tokenizer, pairs, D):
    """The step of `random`: MetaRM's, with noise in place of grad J."""
    noise = torch.Generator().manual_seed(args.seed)

    def step(optimizer, batch, number):
        for p in model.parameters():  # lookahead takes what is in p.grad for grad J
            p.grad = torch.randn(p.shape, generator=noise)
        with metarm.lookahead(model, args.knob, normalize=True):
            loss = rm.pair_loss(model, model, tokenizer, batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item()}

    return step


def joint_step(args, model, tokenizer, pairs, D):
    """The step of `joint`: one gradient of L - knob * J, with MetaRM's batches of S."""
    _, S = rm.encode_groups(model, tokenizer, data.read_meta(args.meta), args.meta)
    passes = itertools.count(args.seed + 1_000_000)  # metarm.py's seeds: a new order for each pass
    batches = itertools.chain.from_iterable(rm.epoch_batches([0] * len(S), 16, n) for n in passes)
    descend = rm.gradient_step(
        model, lambda part: rm.pair_loss(model, model, tokenizer, part), args
    )

    def step(optimizer, batch, number):
        groups = [S[i] for i in next(batches)]
        rewards = rm.rewards_of(model, model, tokenizer, groups).view(len(groups), -1)
        (-args.knob * metarm.difference_loss(rewards)).backward()
        return descend(optimizer, batch, number)  # adds the gradient of L, and takes the step

    return step


def weighted_step(args, model, tokenizer, pairs, D):
    """The step of `ocrm`: Eq. 1 with a weight for each pair."""
    weights = pair_weights(pairs, args.policy, args.model, args.knob)
    print(f"{args.out}: weights of D from {weights.min():.2f} to {weights.max():.2f}")
    weight_of = {id(pair): weight for pair, weight in zip(D, weights, strict=True)}

    def loss_of(part):
        chosen, rejected = rm.rewards_of(model, model, tokenizer, part).view(-1, 2).unbind(1)
        some = torch.stack([weight_of[id(pair)] for pair in part])
        return rm.preference_loss(chosen, rejected, some.to(model.device))

    return rm.gradient_step(model, loss_of, args)


@torch.no_grad()
def pair_weights(
    pairs: list[dict], policy: str, ref_policy: str, tau: float, batch_size: int = 64
) -> torch.Tensor:
    """Returns OCRM's weights (n,) of preference pairs: towards what the current policy would say.

        w = exp(tau (log pi(y_w)/pi_ref(y_w) + log pi(y_l)/pi_ref(y_l))), divided by its mean over D

    with log-ratios of whole responses. tau = 1 is full importance weighting: unbiased, but a few
    pairs then have all the weight. OCRM's default is 0.01.
    Source: Ackermann, Ishida, Sugiyama 2025 (arXiv 2507.15507).
    """
    log_ratio = torch.zeros(len(pairs), dtype=torch.float64)
    for name, sign in ((policy, 1), (ref_policy, -1)):
        model, tokenizer = ppo.load_policy(name)
        model.to(rm.pick_device())
        _, groups = rm.encode_groups(model, tokenizer, pairs, f"pairs weighed by {name}")
        by_length = torch.tensor(rm.row_lengths(groups)).argsort(stable=True).tolist()
        for start in range(0, len(pairs), batch_size):
            some = by_length[start : start + batch_size]
            batch = ppo.collate(tokenizer, [row for i in some for row in groups[i]], model.device)
            with rm.autocast(model.device):
                logprobs = ppo.response_logprobs(model, batch).sum(dim=1)
            log_ratio[some] += sign * logprobs.double().cpu().view(-1, 2).sum(dim=1)
    return (len(pairs) * torch.softmax(tau * log_ratio, dim=0)).float()  # exp without overflow


STEPS = {"random": random_step, "joint": joint_step, "ocrm": weighted_step}


def train(args) -> None:
    """The command: rm.py's training with another step."""
    with data.output_folder(args.out) as work:
        model, tokenizer = rm.load_reward_model(args.model, args.seed)
        model.to(rm.pick_device())
        pairs = data.read_preferences(args.data)
        pairs, D = rm.encode_groups(model, tokenizer, pairs, args.data, args.max_length)
        step = STEPS[args.kind](args, model, tokenizer, pairs, D)
        rm.fit(args, work, model, D, step, rm.look_at(args, model, tokenizer))
        rm.save_model(model, tokenizer, work)


def main(argv: list[str] | None = None) -> int:
    parser = data.new_parser("arms.py", __doc__)
    rm.training_options(parser)
    parser.set_defaults(checkpoint_minutes=float("inf"))  # the noise and S's order are not kept
    parser.add_argument("--kind", required=True, choices=STEPS, help="which step to take")
    parser.add_argument("--knob", type=float, default=0.0, help="eta, lam or tau")
    parser.add_argument("--meta", default="", help="joint: S, .jsonl")
    parser.add_argument("--policy", default="", help="ocrm: the policy that weighs D")
    return data.command(parser, train, argv)


@contextlib.contextmanager
def gold_as_reward():
    """Inside, PPO gets the gold reward in place of its reward model's: it asks rm.score alone."""
    original = rm.score

    def gold(model, tokenizer, prompts, responses, batch_size=64):
        texts = zip(prompts, responses, strict=True)
        return torch.tensor([data.gold_reward(prompt, response) for prompt, response in texts])

    rm.score = gold
    try:
        yield
    finally:
        rm.score = original


if __name__ == "__main__":
    sys.exit(main())
