"""The reward models that the study compares: `reward_model` trains one of any kind.

All of one seed start from the same head and see D in the same order. They differ in the loss:

    plain     Eq. 1 on D                                                      rm.py
    first     MetaRM, first order, climb eta; S of the frozen policy          metarm.py
    stale     the same, S of the SFT policy                                   metarm.py
    exact     MetaRM, exact order, climb eta                                  metarm.py
    literal   MetaRM, first order, climb eta * grad J, not normalised         metarm.py
    unit      first, with J of rewards divided by their SD: multiplying all   below, metarm.py
              rewards does not raise it
    random    a climb of length eta in a random direction                     below
    scale     no climb: rewards are multiplied until J is as after a climb    below
    joint     no climb: L - lam * J                                           below
    ocrm      no climb: Eq. 1 with the weights of Ackermann et al. 2025       below
    gold      as plain, with gold labels of S added to D                      rm.py
"""

import contextlib
import itertools
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch.func import functional_call

import data
import metarm
import ppo
import rm

CLIMB = "0.06"  # MetaRM's length of the climb: settings.json has what was tried on tuning worlds


def stage(out: Path, main, *argv) -> Path:
    """Returns the folder `out`, which one of the commands makes unless it is there."""
    if not out.exists():
        argv = [str(word) for word in (*argv, "--out", out)]
        if main(argv):
            raise data.Mistake(f"failed: {' '.join(argv)}")
    return out


@contextlib.contextmanager
def replaced(module, name: str, function):
    """Inside, the module has another function of this name."""
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


def gold_score(model, tokenizer, prompts, responses, batch_size=64) -> torch.Tensor:
    """The gold reward in rm.score's place: all that PPO asks its reward model."""
    texts = zip(prompts, responses, strict=True)
    return torch.tensor([data.gold_reward(prompt, response) for prompt, response in texts])


def gold_pairs(S: Path) -> list[dict]:
    """Preference pairs of all responses of S to one prompt, labelled by gold; ties are left out."""
    rows = []
    for row in data.read_meta(S):
        gold = {text: data.gold_reward(row["prompt"], text) for text in row["responses"]}
        for rejected, chosen in itertools.combinations(sorted(gold, key=gold.get), 2):
            if gold[chosen] > gold[rejected]:
                rows.append(row | {"chosen": chosen, "rejected": rejected})
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]


def reward_model(kind: str, out: Path, options: list, seed: int, knob=0.0, source=None) -> Path:
    """Returns the folder of an RM, trained unless it is there already; MetaRM's θ' is beside it.

    options: rm.py's, at least --model and --data. seed: of the new head and of the order of D.
    knob: eta, lam or tau of the kind. source: S, a samples.jsonl; for ocrm, a policy.
    """
    options, gradient_step = [*options, "--seed", seed], rm.gradient_step
    if kind in ("plain", "gold"):
        return stage(out, rm.main, *options)
    if kind in LOSSES:
        parser = data.new_parser("rm.py")
        rm.training_options(parser)
        args = parser.parse_args([f"{word}" for word in (*options, "--out", out)])

        def other_step(model, loss_of, *how):  # rm.py's training, with another loss
            _, tokenizer = rm.load_reward_model(args.model, args.seed)
            return gradient_step(model, LOSSES[kind](model, tokenizer, args, knob, source), *how)

        options += ["--checkpoint_minutes", 1e6]  # the noise and S's order would not be kept
        with replaced(rm, "gradient_step", other_step):
            return stage(out, rm.main, *options)
    adapted = out.with_name("adapted")
    if not out.exists():  # else of a run that was killed between the two
        shutil.rmtree(adapted, ignore_errors=True)
    options += ["--meta", source, "--eta", knob, "--save_adapted", adapted]
    options += ["--order", "exact" if kind == "exact" else "first"]
    options += ["--no-normalize" if kind == "literal" else "--normalize"]
    J = unit_difference if kind == "unit" else metarm.difference_loss
    with replaced(metarm, "difference_loss", J):
        return stage(out, metarm.main, *options)


def unit_difference(rewards, J=metarm.difference_loss) -> torch.Tensor:
    """J of a batch's rewards (m, k) divided by their SD."""
    return J(rewards / rewards.std())


def batches_of_S(model, tokenizer, S, seed: int):
    """Yields, for each of MetaRM's batches of S in turn, a function: its rewards (m, k)."""
    _, groups = rm.encode_groups(model, tokenizer, data.read_meta(S), S)
    for number in itertools.count(seed + 1_000_000):  # metarm.py's: a new order for each pass
        for batch in rm.epoch_batches([0] * len(groups), 16, number):
            some = [groups[i] for i in batch]
            yield lambda some=some: rm.rewards_of(model, model, tokenizer, some).view(len(some), -1)


# Each function below returns loss_of(pairs of D).
def random_climb(model, tokenizer, args, eta, source):
    """MetaRM's loss, with noise in place of grad J."""
    noise, theta = torch.Generator().manual_seed(args.seed), dict(model.named_parameters())

    def loss_of(pairs):
        direction = {name: torch.randn(p.shape, generator=noise) for name, p in theta.items()}
        scale = metarm.step_scale(direction.values(), eta, normalize=True)
        there = metarm.climb(theta, direction, scale)  # theta' passes its gradient on to theta

        def forward(**inputs):
            return functional_call(model, there, (), inputs)

        return rm.pair_loss(forward, model, tokenizer, pairs)

    return loss_of


def scaled(model, tokenizer, args, eta, S):
    """L of rewards that are all multiplied by one factor: by `factor_of`, on MetaRM's batch of S.

    What MetaRM does beyond it is due to the climb's direction.
    """
    batches = batches_of_S(model, tokenizer, S, args.seed)

    def loss_of(pairs):
        factor = factor_of(model, next(batches), eta)
        rewards = rm.rewards_of(model, model, tokenizer, pairs).view(-1, 2)
        return rm.preference_loss(*(factor * rewards).unbind(dim=1))

    return loss_of


def factor_of(model, rewards_of, eta: float) -> float:
    """The factor that lifts J of these rewards as much as a climb of eta would: 1/1000 to 1000."""
    rewards = rewards_of()
    metarm.difference_loss(rewards).backward()
    with metarm.lookahead(model, eta, normalize=True), torch.no_grad():
        J = metarm.difference_loss(rewards_of())
    low, high = 1e-3, 1e3
    for _ in range(40):  # J grows with the factor
        middle = (low * high) ** 0.5
        reached = metarm.difference_loss(middle * rewards.detach()) >= J
        low, high = (low, middle) if reached else (middle, high)
    return middle


def joint(model, tokenizer, args, lam, S):
    """L - lam * J, with MetaRM's batches of S."""
    batches = batches_of_S(model, tokenizer, S, args.seed)

    def loss_of(pairs):
        J = metarm.difference_loss(next(batches)())
        return rm.pair_loss(model, model, tokenizer, pairs) - lam * J

    return loss_of


def weighted(model, tokenizer, args, tau, policy):
    """L with OCRM's weight for each pair."""
    pairs = data.read_preferences(args.data)
    _, D = rm.encode_groups(model, tokenizer, pairs, args.data)
    weight_of = dict(zip(map(str, D), pair_weights(pairs, policy, args.model, tau), strict=True))

    def loss_of(pairs):
        rewards = rm.rewards_of(model, model, tokenizer, pairs).view(-1, 2)
        weights = torch.stack([weight_of[str(pair)] for pair in pairs])
        return rm.preference_loss(*rewards.unbind(dim=1), weights)

    return loss_of


@torch.no_grad()
def pair_weights(pairs: list[dict], policy: str, ref_policy: str, tau: float) -> torch.Tensor:
    """Returns OCRM's weights (n,) of preference pairs: towards what the current policy would say.

        w = exp(tau (log pi(y_w)/pi_ref(y_w) + log pi(y_l)/pi_ref(y_l))), divided by its mean over D

    with log-ratios of whole responses; tau = 1: full importance weighting. OCRM's default is 0.01.
    Source: Ackermann, Ishida, Sugiyama 2025 (arXiv 2507.15507).
    """
    log_ratio = torch.zeros(len(pairs), dtype=torch.float64)
    for name, sign in ((policy, 1), (ref_policy, -1)):
        model, tokenizer = ppo.load_policy(str(name))
        _, groups = rm.encode_groups(model, tokenizer, pairs, f"pairs weighed by {name}")
        by_length = torch.tensor(rm.row_lengths(groups)).argsort(stable=True)
        for some in by_length.split(64):
            batch = ppo.policy_batch(tokenizer, [row for i in some for row in groups[i]])
            logprobs = ppo.response_logprobs(model, batch).sum(dim=1)
            log_ratio[some] += sign * logprobs.double().view(-1, 2).sum(dim=1)
    return (len(pairs) * torch.softmax(tau * log_ratio, dim=0)).float()  # exp without overflow


LOSSES = {"random": random_climb, "scale": scaled, "joint": joint, "ocrm": weighted}
