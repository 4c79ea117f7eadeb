"""The evidence: what MetaRM does, over seeds and two tasks, where the truth (the gold reward) is known.

    python docs/study/study.py                        all of it: tune, main, boundary, the page
    python docs/study/study.py --phase tune           choose every arm's knob on the tuning seeds -> settings.json
    python docs/study/study.py --phase main --tasks dialogue --seeds 0,1,2,3,4,5,6,7
    python docs/study/study.py --phase boundary       where does it help? 4 seeds
    python docs/study/study.py --phase page           README.md and pictures again, from study.csv alone

`settings.json`, `study.csv` (task,seed,arm,round,metric,value: all figures that the page takes, and more), `README.md` and pictures land
beside this file, models and samples in --runs. It says what it will cost before it starts and uses every core, a seed on
each. A cell (task, seed, arm, round) that is finished is not run again: interrupted, the same command goes on.

The method is not here: each cell is a few calls of the five files. Two arms have no home there and are below, in
`train_variant`: `random` and `joint`. The rest is measuring, with eval.py's functions; page.py beside this file has the
statistics, the stop rules, the verdicts and the page.

THE RULES, fixed before the main seeds were run
  Tuning    each arm that has a knob gets three settings of it (ARMS below), on the tuning seeds, with the same rounds;
            the highest gold reward on VALIDATION prompts, mean over these rounds, wins. `random` has metarm-first's eta: it is defined by having
            the same length. `ppo` and `ocrm` are what was published: no knob; each has a tuned brother. Tuning seeds are
            never main seeds, and no main seed is dropped.
  Primary   round 3 of every arm. Secondary: the round with the highest gold on validation prompts, of rounds 1 to 3, for
            every RL arm. MetaRM (first order), its controls and PPO have a round 4, for the claim of a decline after it. (Set to save
            time after seeds 0 and 1 had been run and looked at; before it, all arms had four rounds, and the best was of 1 to 4.)
  Interval  mean and 95 % t interval over seeds; two arms are compared seed by seed (paired).
  Verdict   a claim that something is BETTER: yes, if the difference is above 0 with p < 0.05 after Holm's correction over
            all verdicts of the task; no, if the whole interval lies below the margin, which is the least gain worth having;
            else unclear. A claim that something STAYS: yes, if the whole interval lies within the margin on both sides;
            no, if it lies outside; else unclear; of several differences (rounds, settings of eta) the one whose interval
            reaches farthest is asked. Margins: accuracy 2 points, win rate 5 points, spread 0.1 SD.
  Control   does as well, if the difference to MetaRM is not above 0 by its own 95 % interval.
  Tie       a gold gap below 0.25 SD of gold on SFT samples.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

# One thread a process, one process a core; and glibc keeps its memory (as in run.sh). Read when a process starts.
SETTINGS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1",
            "MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "67108864"}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in SETTINGS.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import eval as report_card  # noqa: E402
import metarm  # noqa: E402
import page  # noqa: E402
import ppo  # noqa: E402
import rm  # noqa: E402

# ------------------------------------------------------------------------------------------------- what is compared

ETAS = (0.03, 0.1, 0.3)  # the climb's length, normalised: a third, one and three steps of the optimizer
# arm: (where the RM of a round comes from, the knob that is tuned, its three settings, the setting if there is no tuning)
ARMS = {
    "dpo":          ("none", "beta", (0.03, 0.1, 0.3), 0.1),
    "ppo":          ("rm0", "", (), None),
    "ppo-tuned":    ("rm0", "kl_coef", (0.003, 0.02, 0.1), 0.02),
    "reseeded":     ("plain", "lr", (1.5e-4, 3e-4, 6e-4), 3e-4),
    "random":       ("random", "", (), None),
    "metarm-first": ("first", "eta", ETAS, 0.1),
    "metarm-exact": ("exact", "eta", ETAS, 0.1),
    "adapted":      ("adapted", "eta", ETAS, 0.1),
    "joint":        ("joint", "lam", (0.1, 0.3, 1.0), 0.3),
    "ocrm":         ("ocrm", "", (), None),
    "ocrm-tuned":   ("ocrm", "tau", (0.003, 0.03, 0.1), 0.03),
    "oracle":       ("oracle", "epochs", (1, 2, 4), 2),
}
SUMMARY_ARMS = "dpo ppo reseeded random metarm-first ocrm oracle".split()
LONG_ARMS = ("ppo", "ppo-tuned", "reseeded", "random", "metarm-first", "ocrm")  # --rounds of them; the others end at round 3
OOD_ARMS = [f"{arm}@ood=1" for arm in ("ppo", "reseeded", "random", "metarm-first", "ocrm")]  # S and PPO on OOD prompts
TUNING_SEEDS, TUNING_ROUNDS = (100, 101), 2
PRIMARY, TIE = 3, 0.25
MARGIN = {"accuracy": 2.0, "win": 5.0, "spread": 0.1}
BOUNDARY_SEEDS, BOUNDARY_ROUNDS = 4, 2
# what is moved, and the two arms that are compared under it: "@knob=value" overrides one thing, of both
BOUNDARY = {"as it is": "", "η = 0.01": "eta=0.01", "η = 1": "eta=1", "S stale: of SFT in every round": "stale=1",
            "PPO short: 5 steps": "steps=5", "PPO long: 45 steps": "steps=45", "D small: 750 prompts": "pairs=750",
            "labels clean": "noise=0", "labels noisier": "noise=3"}
ONLY_METARM = ("eta", "stale")  # the control knows nothing of these: it is the one under "as it is"


def toy_flags() -> dict[str, list[str]]:
    """The flags of run.sh's toy preset, read there, so that the study is of the very loop that everybody runs."""
    preset = (HERE.parents[1] / "run.sh").read_text(encoding="utf-8").partition("  toy | smoke)")[2].partition("[ ")[0]
    flags = {name: text.split() for name, text in re.findall(r"(\w+)_flags=\(([^)]*)\)", preset)}
    return {"world": [], **flags}


def value_of(flags: list, name: str) -> float:
    return float(flags[len(flags) - 1 - flags[::-1].index(f"--{name}") + 1])  # the last one counts


SMALL = {  # --small: every stage, no result worth reading
    "world": ("--sft 320 --pairs 160 --meta 32 --ppo 64 --valid 8 --test 12 --ood_ppo 48 --hidden_size 32").split(),
    "sft": "--epochs 1".split(), "ppo": "--steps 3 --batch_size 16 --minibatch_size 8 --scale_prompts 16".split(),
}


def split_arm(arm: str) -> tuple[str, dict[str, float]]:
    """"metarm-first@eta=0.3" -> ("metarm-first", {"eta": 0.3})."""
    base, _, override = arm.partition("@")
    if base not in (*ARMS, "sft"):
        raise ValueError(f"--arms {arm}: there are sft, {', '.join(ARMS)}, and any of them with @knob=value")
    try:
        knobs = {name: float(value) for name, value in (part.split("=") for part in override.split("@") if part)}
    except ValueError:
        raise ValueError(f"--arms {arm}: write a changed knob as {base}@eta=0.3") from None
    if odd := knobs.keys() - {"eta", "lam", "tau", "lr", "beta", "kl_coef", "epochs", "ood", "stale", "steps", "pairs", "noise"}:
        raise ValueError(f"--arms {arm}: no arm has a knob {', '.join(odd)}")
    return base, knobs


def knobs_of(arm: str, settings: dict) -> dict[str, float]:
    """What this arm runs with: defaults, over them what tuning chose, over them its own "@" overrides."""
    base, overrides = split_arm(arm)
    chosen = settings.get("chosen", {})
    default = {knob: value for _, knob, _, value in [ARMS.get(base, ("", "", (), None))] if knob}
    if base == "random":
        default = {"eta": ARMS["metarm-first"][3]} | chosen.get("metarm-first", {})
    return {"tau": 0.01, "noise": 1.0} | default | chosen.get(base, {}) | overrides


# -------------------------------------------------------------------------------------------- one cell: an RM and its PPO

def call(main, *argv) -> None:
    """One of the five commands, in this process; it skips what it has finished before."""
    argv = [str(x) for x in argv]
    if main(argv):
        raise ValueError(f"failed: {main.__module__}.py {' '.join(argv)}")


def flag(knobs: dict, *names: str) -> list:
    return [x for name in names if name in knobs for x in (f"--{name}", int(knobs[name]) if name in ("epochs", "steps") else knobs[name])]


def shared(home: Path, task: str, seed: int, flags: dict) -> None:
    """World, SFT policy and samples for D: all arms of a seed stand on these."""
    call(data.main, "toy", "--task", task, "--out", home / "data", "--seed", seed, *flags["world"])
    call(ppo.main, "sft", "--model", home / "data/model", "--data", home / "data/sft.jsonl", *flags["sft"], "--seed", seed,
         "--out", home / "sft")
    call(ppo.main, "sample", "--model", home / "sft", "--prompts", home / "data/prompts-pairs.jsonl", "--k", 2,
         *flags["sample"], "--seed", seed, "--out", home / "pairs-samples")


def preferences(home: Path, knobs: dict, seed: int) -> Path:
    """D of these knobs, labelled once: how noisily, and of how many prompts."""
    few = int(knobs.get("pairs", 0))
    folder, samples = home / f"D-{knobs['noise']:g}-{few or 'all'}", home / "pairs-samples/samples.jsonl"
    if few:
        rows = data.read_jsonl(samples)[:few]
        samples = home / f"samples-{few}.jsonl"
        data.write_jsonl(samples, rows)
    call(data.main, "label", "--samples", samples, "--noise", knobs["noise"], "--seed", seed, "--out", folder)
    return folder


def on_D(home: Path, knobs: dict, seed: int, flags: dict, looks: bool = True) -> list:
    """The flags of a training on D; `looks`: at the held-out pairs meanwhile."""
    D = preferences(home, knobs, seed)
    return ["--model", home / "sft", "--data", D / "train.jsonl", *(["--eval_data", D / "valid.jsonl"] if looks else []),
            *flags["rm"], *flag(knobs, "lr")]


def rm0(home: Path, knobs: dict, seed: int, flags: dict) -> Path:
    knobs = {name: value for name, value in knobs.items() if name != "lr"}
    out = home / f"rm0-{knobs['noise']:g}-{int(knobs.get('pairs', 0)) or 'all'}"
    call(rm.main, *on_D(home, knobs, seed, flags), "--seed", seed, "--out", out)
    return out


def reward_model(home: Path, arm: str, round_: int, last: Path, knobs: dict, seed: int, flags: dict) -> Path:
    """The RM that PPO of this round gets: the ONE thing in which the arms differ. `last`: the arm's last policy."""
    kind, here, domain = ARMS[split_arm(arm)[0]][0], home / f"{arm}-{round_}", "ood-" if knobs.get("ood") else ""
    if kind == "rm0":
        return rm0(home, knobs, seed, flags)
    training = on_D(home, knobs, seed, flags)
    if kind == "plain":  # another head and another order of D
        call(rm.main, *training, "--seed", 1000 * round_ + seed, "--out", here / "rm")
        return here / "rm"
    if kind == "ocrm":
        call(rm.main, *training, "--seed", seed, "--weight_by", last, "--ref_policy", home / "sft", "--tau", knobs["tau"],
             "--out", here / "rm")
        return here / "rm"
    # S: k = 5 unlabelled responses of the last policy, a little hotter so that they differ
    call(ppo.main, "sample", "--model", home / "sft" if knobs.get("stale") else last, "--prompts",
         home / f"data/prompts-{domain}meta.jsonl", "--k", 5, *flags["sample"], *flags["meta_sample"],
         "--seed", f"{seed}{round_}", "--out", here / "meta")
    S = here / "meta/samples.jsonl"
    if kind == "oracle":  # the ceiling: D, and gold labels on the S of all rounds so far (each response in two pairs)
        rows = data.read_preferences(preferences(home, knobs, seed) / "train.jsonl")
        for r in range(1, round_ + 1):
            samples = data.read_meta(home / f"{arm}-{r}" / "meta/samples.jsonl")
            rows += data.label_pairs([{**row, "responses": row["responses"] * 2} for row in samples], 0.0, seed)[0]
        data.write_jsonl(here / "gold.jsonl", rows)
        call(rm.main, *training, "--data", here / "gold.jsonl", *flag(knobs, "epochs"), "--seed", seed, "--out", here / "rm")
        return here / "rm"
    if kind in ("random", "joint"):
        train_variant(Variant(str(here / "rm"), str(home / "sft"), str(training[3]), str(S), kind,
                              knobs["eta" if kind == "random" else "lam"], value_of(training, "lr"),
                              int(value_of(training, "batch_size")), seed))
        return here / "rm"
    # Figure 4 is of the method itself; the others spare themselves its looks at the held-out pairs
    call(metarm.main, *on_D(home, knobs, seed, flags, looks=arm == page.METHOD), "--log_every", 28, "--meta", S, "--order", "exact" if kind == "exact" else "first", "--eta", knobs["eta"],
         "--normalize", "--seed", seed, "--out", here / "rm", "--save_adapted", here / "adapted")
    return here / ("adapted" if kind == "adapted" else "rm")


@dataclass
class Variant:
    out: str
    model: str
    data: str
    meta: str
    kind: str    # random: a climb of length `knob` in a random direction.  joint: minimise L - knob * J, without a climb
    knob: float
    lr: float
    batch_size: int
    seed: int


def train_variant(cfg: Variant) -> None:
    """metarm.train with the same head and the same orders of D and S; what differs is marked."""
    with data.stage("study.py", cfg, inputs=["model", "data", "meta"]) as work:
        if work is None:
            return
        model, tokenizer = rm.load_reward_model(cfg.model, cfg.seed)
        pairs = rm.encode_pairs(model, tokenizer, data.read_preferences(cfg.data), 0, cfg.data)
        samples = [tuple(rm.encode(tokenizer, row["prompt"], response) for response in row["responses"])
                   for row in data.read_meta(cfg.meta)]
        batches = list(rm.epoch_batches(rm.row_lengths(pairs), cfg.batch_size, cfg.seed))
        order_of_S = metarm.cycle(len(samples), min(16, len(samples)), cfg.seed + 1_000_000)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0)
        schedule, noise = rm.linear_decay(optimizer, len(batches)), torch.Generator().manual_seed(cfg.seed)
        for batch, prompts in zip(batches, order_of_S):
            if cfg.kind == "random":  # lookahead takes what is in p.grad for the gradient of J: give it noise
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=noise)
                climb = metarm.lookahead(model, cfg.knob, normalize=True)
            else:
                climb = contextlib.nullcontext()
                group = [samples[i] for i in prompts]
                rewards = rm.rewards_of(model, model, tokenizer, group).view(len(group), -1)
                (-cfg.knob * metarm.difference_loss(rewards)).backward()
            with climb:
                rm.pair_loss(model, model, tokenizer, [pairs[i] for i in batch]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        rm.save_model(model, tokenizer, work)


def improve(home: Path, arm: str, round_: int, last: Path, model: Path, knobs: dict, seed: int, flags: dict, out: Path) -> Path:
    """PPO against `model`, on from the arm's last policy, KL to SFT; the same steps and scaling for every arm."""
    prompts = home / f"data/prompts-{'ood-' if knobs.get('ood') else ''}ppo.jsonl"
    call(ppo.main, "ppo", "--model", last, "--ref_policy", home / "sft", "--reward_model", model, "--prompts", prompts,
         *flags["ppo"], *flag(knobs, "steps", "kl_coef"), "--seed", f"{seed}{round_}", "--out", out)
    return out


@contextlib.contextmanager
def gold_as_reward():
    """Inside, whatever scores with a reward model gets the gold reward instead. PPO asks `rm.score`, and nothing else."""
    original = rm.score

    def gold(model, tokenizer, prompts, responses, batch_size=64):
        return torch.tensor([data.gold_reward(x, y) for x, y in zip(prompts, responses)])

    rm.score = gold
    try:
        yield
    finally:
        rm.score = original


def gold_policy(home: Path, until: float, most: int, model: Path, seed: int, flags: dict) -> Path:
    """PPO on the gold reward, a third of a round at a time, until it is as far from SFT as vanilla PPO: `until` nats;
    for twice as many rounds as that had, at most. Its samples are shifted as far, but no RM chose them: no arm's own mistakes are in them."""
    last, tried = home / "sft", {}
    with gold_as_reward():
        for part in range(1, 6 * most + 1):
            last = improve(home, "gold", part, last, model, {"steps": max(1, int(value_of(flags["ppo"], "steps")) // 3)}, seed, flags,
                           home / f"gold-{part}/policy")
            tried[last] = final_kl(last)
            if tried[last] >= until:
                break
    return min(tried, key=lambda path: abs(tried[path] - until))


def final_kl(policy: Path) -> float:
    return float(np.mean([row["objective/kl"] for row in data.read_jsonl(policy / "log.jsonl")[-5:]]))


# ------------------------------------------------------------------------------------------------------- measuring

def answers(home: Path, policy: Path, seed: int) -> dict[str, list]:
    """Responses of a policy to the test, validation and OOD prompts: {part: (prompts, groups, gold (m, k))}; eval.py's
    defaults, k = 5 at temperature 1, are the sampler of every measure. What was sampled once is kept."""
    parts = {part: data.read_prompts(home / f"data/prompts-{part}.jsonl") for part in ("test", "valid", "ood")}
    (home / "eval").mkdir(exist_ok=True)
    groups = iter(report_card.sampled(report_card.EvalConfig(seed=seed), str(policy), sum(parts.values(), []), home / "eval"))
    found = {}
    for part, prompts in parts.items():
        texts = [next(groups) for _ in prompts]
        found[part] = prompts, texts, np.array([[data.gold_reward(x, y) for y in ys] for x, ys in zip(prompts, texts)])
    return found


def in_sd(x: np.ndarray, of: np.ndarray) -> np.ndarray:
    """How many SDs of `of` (SFT's) above its mean."""
    return (np.asarray(x) - of.mean()) / (of.std() or 1.0)


@torch.no_grad()
def embedding_cosine(embedder: str, groups: list[list[str]]) -> float:
    """Mean cosine of two responses to one prompt: mean-pooled last hidden states of the SFT policy, or of --embedder."""
    from transformers import AutoModel
    model, tokenizer, _ = rm.load_pretrained(AutoModel, embedder)
    texts, states = sum(groups, []), []
    for start in range(0, len(texts), 256):
        rows = [tokenizer(text).input_ids or [rm.end_id(tokenizer)] for text in texts[start:start + 256]]
        batch = rm.pad(rows, tokenizer.pad_token_id or 0)
        hidden, mask = model.eval()(**batch).last_hidden_state, batch["attention_mask"][..., None]
        states.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    states = torch.cat(states).view(len(groups), -1, states[0].shape[1])
    k = states.shape[1]
    return float(((states @ states.transpose(1, 2)).sum((1, 2)) - k).mean() / (k * (k - 1)))


def measure_policy(home: Path, policy: Path, own: dict, rivals: dict, sft: dict, embedder: str) -> dict[str, float]:
    """What a policy is worth, by gold. `rivals`: {name: its answers}."""
    gold = {part: in_sd(own[part][2], sft[part][2]) for part in own}
    row = {"gold": gold["test"].mean(), "gold.valid": gold["valid"].mean(), "gold.ood": gold["ood"].mean(),
           "words": report_card.mean_words(own["test"][1]), "distinct": report_card.distinct_share(own["test"][1]),
           "bleu": report_card.self_bleu(own["test"][1]), "cosine": embedding_cosine(embedder, own["test"][1])}
    for name, other in rivals.items():
        for part, label in (("test", name), ("ood", f"{name}.ood")):
            if part == "ood" and name == "dpo":
                continue
            against = report_card.win_tie_lose(gold[part], in_sd(other[part][2], sft[part][2]), TIE)
            row |= {f"win.{label}": against["win"], f"lose.{label}": against["lose"]}
    if (policy / "rollouts.jsonl").exists():
        row["kl"] = final_kl(policy)
    return row


def curve(policy: Path, reward_on_sft: np.ndarray, gold_on_sft: np.ndarray, parts: int = 3) -> dict[str, float]:
    """Gold and promised reward over KL during PPO, SD above SFT: what Gao et al. (2022) plot, in a few points a round;
    and the variance of the difference of two rollouts to one prompt, SD^2: the paper's Figure 1."""
    steps, row = data.read_jsonl(policy / "rollouts.jsonl"), {}
    for i, some in enumerate(np.array_split(np.arange(len(steps)), min(parts, len(steps)))):
        some = [steps[j] for j in some]
        gold = [[data.gold_reward(x, y) for y in ys] for step in some for x, ys in zip(step["prompts"], step["responses"])]
        row[f"curve{i}.kl"] = np.mean([step["kl"] for step in some])
        for name, rewards, on_sft in (("gold", gold, gold_on_sft), ("rm", sum((step["scores"] for step in some), []), reward_on_sft)):
            rewards = in_sd(rewards, on_sft)
            row |= {f"curve{i}.{name}": rewards.mean(), f"curve{i}.{name}_variance": report_card.spread(rewards)["variance"]}
    return row


def rewards_on(model: tuple, prompts: list[str], groups: list[list[str]]) -> np.ndarray:
    return report_card.scored(report_card.EvalConfig(), model, prompts, groups)


def measure_rm(model: tuple, sets: dict, sft: tuple, pairs: list[dict], full: bool) -> tuple[dict[str, float], dict]:
    """What an RM is worth: (figures, rewards). `sets`: {name: (prompts, groups, gold)}, from policies that are NOT in S.

    Accuracy in % with ties of gold out, raw and at the same gold gap as on SFT samples (matched_accuracy); rank
    correlation; J, margin, variance, raw and in SDs of this RM's rewards on SFT samples: they can rise by scale alone."""
    on_sft, gold_sft = rewards_on(model, *sft[:2]), sft[2]
    truth = np.array([data.gold_reward(p["prompt"], p["chosen"]) - data.gold_reward(p["prompt"], p["rejected"]) for p in pairs])
    margins = rewards_on(model, [p["prompt"] for p in pairs], [[p["chosen"], p["rejected"]] for p in pairs]) @ [1, -1]
    right = report_card.agreement(margins, truth)[truth != 0]
    row = {"D.noisy": 100 * report_card.agreement(margins, 1).mean(), "D.gold": 100 * right.mean()}
    rewards, sd = {"sft": on_sft, "D": margins, "D.truth": truth}, on_sft.std() or 1.0
    for name, (prompts, groups, gold) in ({"sft": sft} | sets).items():
        rewards[name] = x = on_sft if name == "sft" else rewards_on(model, prompts, groups)
        scaled = in_sd(on_sft, on_sft), in_sd(gold_sft, gold_sft)
        pair = in_sd(x, on_sft), in_sd(gold, gold_sft)
        matched = report_card.matched_accuracy(scaled, pair, report_card.GAP_EDGES)["second"]
        plain, ours = report_card.spread(x), report_card.spread(x, sd)
        every = {"acc": 100 * report_card.pair_accuracy(*pair, TIE)[0], "matched": 100 * matched,
                 "rho": report_card.rank_correlation(*pair)[0], "J": plain["J"], "J_sd": ours["J"], "margin": plain["margin"],
                 "margin_sd": ours["margin"], "variance": plain["variance"], "variance_sd": ours["variance"]}
        wanted = {"shifted": tuple(every) if full else ("matched", "J", "J_sd", "margin_sd"),
                  "gold": tuple(every) if full else ("matched", "J", "J_sd", "margin_sd"),
                  "own": ("acc", "matched", "rho", "J", "J_sd", "variance_sd"), "ood": ("acc", "matched", "margin_sd"),
                  "sft": ("acc", "J", "J_sd", "variance_sd")}[name]
        row |= {f"{name}.{key}": every[key] for key in wanted if full or name in ("shifted", "gold")}
        if full and name in ("own", "sft"):
            row[f"{name}.gold_variance"] = report_card.spread(pair[1])["variance"]
        if full and name == "shifted":
            gaps = np.abs(report_card.reward_gaps(pair[0], pair[0])[0])
            row |= {f"shifted.gap{q}": np.quantile(gaps, q / 100) for q in (10, 25, 50, 75, 90)}
    return row, rewards


def mechanism(folder: Path, at: dict, beyond: dict) -> dict[str, float]:
    """What the paper leaves open: do grad L and grad J agree, and which pairs of D get more weight at θ'?

    A pair's weight in Eq. 4 is 1 - σ(margin). `at`, `beyond`: rewards by θ and by θ', on held-out pairs of D."""
    log = [row for row in data.read_jsonl(folder / "log.jsonl") if "cosine" in row]
    mean = lambda name, rows=log: float(np.mean([row[name] for row in rows]))
    third = max(1, len(log) // 3)
    more = 1 / (1 + np.exp(beyond["D"])) - 1 / (1 + np.exp(at["D"]))  # the weight's change
    flipped = at["D.truth"] < 0
    return {"cos.early": mean("cosine", log[:third]), "cos.late": mean("cosine", log[-third:]),
            "climb.L": float(np.mean([row["vanilla_loss_adapted"] - row["vanilla_loss"] for row in log])),
            "climb.L_taylor": mean("first_order_gain"),
            "climb.J": float(np.mean([row["difference_adapted"] - row["difference"] for row in log])),
            "weight.mean": more.mean(), "weight.rho_gap": report_card.rank_correlation([more], [np.abs(at["D.truth"])])[0],
            "weight.flipped": more[flipped].mean() - more[~flipped].mean() if flipped.any() and (~flipped).any() else np.nan}


def measure_cell(home: Path, arm: str, round_: int, policy: Path, model: Path | None, place: dict, previous: Path | None) -> dict:
    """All figures of one cell. `place`: what the whole seed shares (SFT's answers, the two shifted sets, the rivals)."""
    own, D = answers(home, policy, place["seed"]), place["pairs"]
    rivals = {name: answers(home, path, place["seed"]) for name, path in place["rivals"].items() if path != policy}
    row = measure_policy(home, policy, own, rivals, place["sft"], place["embedder"])
    if model is None:
        return row
    judge = rm.load_reward_model(str(model))
    sets = {"shifted": place["shifted"]["test"], "gold": place["gold"]["test"], "own": own["test"], "ood": place["shifted"]["ood"]}
    figures, rewards = measure_rm(judge, sets, place["sft"]["test"], D, True)
    row |= {**figures, "rm": in_sd(rewards["own"], rewards["sft"]).mean()}
    row |= curve(policy, rewards["sft"], place["sft"]["test"][2])
    if previous and previous != model:  # what a user without labels could look at: do successive RMs agree on fresh samples?
        other = rewards_on(rm.load_reward_model(str(previous)), *own["test"][:2])
        apart = report_card.agreement(*report_card.reward_gaps(rewards["own"], other))
        row["own.disagree"] = 100 * (1 - apart.mean())
    accuracy = [step["accuracy"] for step in data.read_jsonl(model / "log.jsonl") if "accuracy" in step] \
        if (model / "log.jsonl").exists() else []
    row |= {f"epoch{4 * i}": 100 * accuracy[round(i * (len(accuracy) - 1) / 4)] for i in range(5) if accuracy}
    if (model.parent / "adapted").is_dir():  # θ and θ', whichever of them PPO got
        theta, beyond = (rm.load_reward_model(str(model.parent / name)) for name in ("rm", "adapted"))
        at = rewards if model.name == "rm" else measure_rm(theta, {}, place["sft"]["test"], D, False)[1]
        adapted, further = measure_rm(beyond, {name: sets[name] for name in ("shifted", "gold")}, place["sft"]["test"], D, False)
        row |= {f"adapted.{name}": value for name, value in adapted.items()} | mechanism(model.parent / "rm", at, further)
    return row


# --------------------------------------------------------------------------------------------- a seed: all of its cells

def cell_file(home: Path, arm: str, round_: int) -> Path:
    return home / "cells" / f"{arm}-{round_}.json"


def job(task: str, seed: int, arms: dict[str, int], config: "Config", settings: dict, there: frozenset) -> str:
    """Every cell of one seed, {arm: rounds}. Vanilla PPO and the gold policy come first: all RMs are measured on their
    samples. What a finished stage made is not made again; what a finished cell measured is not measured again. `there`:
    the (arm, round)s that study.csv has, of which this machine need not have the models."""
    watch_parent()
    flags, home = flags_of(config), Path(config.runs).resolve() / f"{task}-{seed}"
    home.mkdir(parents=True, exist_ok=True)
    rounds, plain = max(config.rounds, PRIMARY if not config.small else 1), knobs_of("ppo", {})
    with open(f"{home}.log", "a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        say = lambda text: print(text, file=sys.__stdout__, flush=True)
        start = time.monotonic()
        shared(home, task, seed, flags)
        base = rm0(home, plain, seed, flags)
        policies, models = {("sft", 0): home / "sft"}, {}

        def walk(arm, upto):  # train an arm's rounds, one after the other
            knobs, last = knobs_of(arm, settings), home / "sft"
            for r in range(1, upto + 1):
                if r == 1 and ARMS[split_arm(arm)[0]][0] == "ocrm" and split_arm(arm)[1].keys() <= {"tau"}:
                    # before the policy moves all weights are 1: this round is vanilla PPO's, to the bit
                    policies[arm, 1], models[arm, 1] = last, model = policies["ppo", 1], base
                    yield 1
                    continue
                model = reward_model(home, arm, r, last, knobs, seed, flags)
                last = improve(home, arm, r, last, model, knobs, seed, flags, home / f"{arm}-{r}" / "policy")
                policies[arm, r], models[arm, r] = last, model
                yield r

        for _ in walk("ppo", rounds):
            pass
        vanilla = policies["ppo", rounds]
        gold = gold_policy(home, final_kl(vanilla), rounds, base, seed, flags)
        dpo = [arm for arm in arms if split_arm(arm)[0] == "dpo"]
        for arm in {"dpo": 0, **dict.fromkeys(dpo)}:  # the one that others are held against, whatever else was asked for
            D = preferences(home, plain, seed)
            call(ppo.main, "dpo", "--model", home / "sft", "--data", D / "train.jsonl", *flags["dpo"], "--seed", seed,
                 *flag(knobs_of(arm, settings), "beta"), "--out", home / arm)
            policies[arm, 0] = home / arm
        place = {"seed": seed, "sft": answers(home, home / "sft", seed), "shifted": answers(home, vanilla, seed),
                 "gold": answers(home, gold, seed), "embedder": config.embedder or str(home / "sft"),
                 "rivals": {}, "pairs": []}

        elsewhere = lambda arm, r: (arm, r) in there and not cell_file(home, arm, r).exists()

        def measure(arm, r):
            nonlocal start
            if elsewhere(arm, r):
                return
            knobs = knobs_of(arm, settings)
            rival = ("ppo@ood=1" if knobs.get("ood") and ("ppo@ood=1", r) in policies else "ppo", r)
            place["rivals"] = {"sft": home / "sft", "dpo": policies["dpo", 0],
                               **({"ppo": policies[rival]} if rival in policies else {})}
            D = preferences(home, knobs, seed)
            place["pairs"] = data.read_preferences(D / "valid.jsonl")
            model, previous = models.get((arm, r)), models.get((arm, r - 1), base)
            parts = [policies[arm, r], model, previous, vanilla, gold, D, *place["rivals"].values()]
            made_from = [MEASURES, arm, r, place["embedder"] == str(home / "sft") or config.embedder,
                         *(data.fingerprint(str(path)) for path in parts if path)]
            file = cell_file(home, arm, r)
            file.parent.mkdir(exist_ok=True)
            if (data.read_json(file) or {}).get("made_from") != made_from:
                found = measure_cell(home, arm, r, policies[arm, r], model, place, previous if model else None)
                if arm == "sft":  # how far the second shifted set is from SFT, beside the first
                    found |= {"by_gold.kl": final_kl(gold), "by_gold.gold": in_sd(place["gold"]["test"][2], place["sft"]["test"][2]).mean()}
                seconds, start = time.monotonic() - start, time.monotonic()
                found = {name: float(f"{value:.4g}") for name, value in found.items() if value == value
                         and not (arm != "ppo" and name.startswith("curve") and name.endswith("variance"))}
                data.write_text(file, json.dumps({"made_from": made_from, "seconds": round(seconds, 1), "figures": found}))
                say(f"{task}, seed {seed}: {arm}, round {r}: gold {found['gold']:+.2f} SD above SFT, KL {found.get('kl', 0):.1f} "
                    f"nats ({seconds:.0f} s)")

        for arm, r in [("sft", 0), *((arm, 0) for arm in dpo), *(("ppo", r) for r in range(1, rounds + 1))]:
            if arm in arms or arm == "sft":
                measure(arm, r)
        others = [arm for arm in arms if arm not in ("sft", "ppo", *dpo) and (  # the OOD rival is needed, measured or not
            arm == OOD_ARMS[0] or not all(elsewhere(arm, r) for r in rounds_to(arms[arm])))]
        for arm in sorted(others, key=lambda arm: not arm.startswith("ppo@")):  # rivals first
            start = time.monotonic()
            for r in walk(arm, arms[arm]):
                measure(arm, r)
    return f"{task}, seed {seed}: done"


MEASURES = 1  # raise it when a measure, or the gold reward, changes: cells are then measured anew, not trained anew


def flags_of(config: "Config") -> dict:
    return {name: flags + (SMALL.get(name, []) if config.small else []) for name, flags in toy_flags().items()}


def watch_parent() -> None:
    """A worker whose parent was killed must not go on: the next run would find its folders locked."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_jobs(jobs: list[tuple], config: "Config", after_each=lambda: None) -> None:
    """One process a core; a seed that fails does not stop the others, but the command ends with its error."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context
    tell_cost(jobs, config)
    failed = []
    with ProcessPoolExecutor(config.workers or os.cpu_count(), get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {pool.submit(job, *each): each[:2] for each in jobs}
        for future in as_completed(waiting):
            try:
                print(future.result(), flush=True)
                after_each()
            except Exception as error:
                failed.append(f"{waiting[future][0]}, seed {waiting[future][1]}: {error or type(error).__name__}")
                print(failed[-1], file=sys.stderr, flush=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} seeds failed; {failed[0]} (the rest of it: --runs, *.log)")


def rounds_to(last: int):
    """The rounds of an arm: 1 .. last; what has none (SFT, DPO) has round 0."""
    return range(1, last + 1) or [0]


# Seconds of a cell with its measuring, one core; and of what a seed needs before its cells. Measured cells say better.
SECONDS = {"shared": 145, "gold": 25, "none": 10, "rm0": 20, "plain": 44, "ocrm": 56, "random": 49, "joint": 67, "oracle": 98, "first": 63,
           "exact": 98, "adapted": 63}


def cost_of(jobs: list[tuple], config: "Config") -> tuple[int, int, float]:
    """(cells to do, cells in all, hours on this machine)."""
    todo, every, busy = 0, 0, []
    for task, seed, arms, _, _, there in jobs:
        home, seconds = Path(config.runs) / f"{task}-{seed}", 0.0
        if not (home / "cells").exists():
            seconds += SECONDS["shared"] + SECONDS["gold"] * config.rounds / 2 + SECONDS["rm0"] * config.rounds * ("ppo" not in arms)
        known = {path.stem: (data.read_json(path) or {}).get("seconds", 0) for path in
                 itertools.chain(*(other.glob("*.json") for other in Path(config.runs).glob(f"{task}-*/cells")))}
        for arm, rounds in arms.items():
            base, knobs = split_arm(arm)
            for r in rounds_to(rounds):
                every += 1
                if (arm, r) not in there and not cell_file(home, arm, r).exists():
                    todo += 1
                    guess = SECONDS[ARMS[base][0]] + 10 * (knobs.get("steps", 15) / 15 - 1) if base in ARMS else 5
                    seconds += known.get(f"{arm}-{r}", guess) if ARMS.get(base, ("rm0",))[0] != "rm0" or "@" in arm else guess
        busy.append(seconds)
    workers = config.workers or os.cpu_count()
    return todo, every, max(sum(busy) / workers, max(busy, default=0)) / 3600 * (0.02 if config.small else 1)


def tell_cost(jobs: list[tuple], config: "Config") -> None:
    todo, every, hours = cost_of(jobs, config)
    print(f"study.py: {todo} of {every} cells to do, {len(jobs)} seeds on {config.workers or os.cpu_count()} cores: about "
          f"{hours:.1f} hours on cores like those it was measured on", flush=True)


# ------------------------------------------------------------------------------------------------------- the phases

@dataclass
class Config:
    phase: str = field(default="all", metadata={"help": "tune, main, boundary, page, or all of them in this order"})
    tasks: str = field(default="dialogue,summary", metadata={"help": "A,B"})
    arms: str = field(default="", metadata={"help": "A,B; default: all of the task's; A@eta=0.3 changes a knob"})
    seeds: str = field(default="0,1,2,3,4,5,6,7", metadata={"help": "of main and boundary (its first four)"})
    rounds: int = field(default=4, metadata={"help": "of RM and PPO; what is no baseline, control or first-order MetaRM ends at round 3"})
    runs: str = field(default="runs/study", metadata={"help": "folder for models and samples"})
    out: str = field(default="docs/study", metadata={"help": "folder for settings.json, study.csv, README.md, pictures"})
    embedder: str = field(default="", metadata={"help": "model folder for the embedding cosine (default: the SFT policy)"})
    workers: int = field(default=0, metadata={"help": "processes; 0: one a core"})
    small: bool = field(default=False, metadata={"help": "tiny sizes: does every stage run? No result worth reading"})


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def tune(config: Config, settings: dict) -> None:
    """Three settings of every knob on the tuning seeds; then thresholds of the stop rules. -> settings.json"""
    asked, all_seeds = names(config.arms), TUNING_SEEDS[:1] if config.small else TUNING_SEEDS
    tasks = {task: [arm for arm in (asked or (ARMS if task == "dialogue" else SUMMARY_ARMS)) if ARMS.get(arm, ("", ""))[1]]
             for task in names(config.tasks)}
    tried = {task: {f"{arm}@{ARMS[arm][1]}={value:g}": (0 if arm == "dpo" else min(TUNING_ROUNDS, config.rounds))
                    for arm in arms for value in ARMS[arm][2]} for task, arms in tasks.items()}
    run_jobs([(task, seed, {"ppo": config.rounds} | arms, config, {}, frozenset()) for task, arms in tried.items() for seed in all_seeds], config)
    table = page.table_of(collect(config, [(task, seed) for task in tasks for seed in all_seeds]))
    for task, arms in tasks.items():
        chosen, trials = settings.setdefault("chosen", {}).setdefault(task, {}), settings.setdefault("trials", {}).setdefault(task, {})
        for arm in arms:
            knob, at = ARMS[arm][1], tried[task]
            worth = {f"{value:g}": float(np.mean([x for r in rounds_to(at[label])
                                                  for x in table[task, label, r, "gold.valid"].values()]))
                     for value in ARMS[arm][2] for label in [f"{arm}@{knob}={value:g}"]}
            best = max(worth, key=worth.get)
            chosen[arm] = {knob: float(best)}
            trials[arm] = {"knob": knob, "gold": {value: round(x, 3) for value, x in worth.items()}, "chosen": float(best)}
        eta = chosen.get("metarm-first", {}).get("eta", ARMS["metarm-first"][3])
        settings.setdefault("etas", {})[task] = [float(f"{eta * x:g}") for x in (0.2, 2)]  # the paper's 1e-6 and 1e-5 beside 5e-6
    # thresholds of the stop rules: the chosen setting, for all rounds
    final = {task: f"metarm-first@eta={settings['chosen'][task]['metarm-first']['eta']:g}" for task in tasks if "metarm-first" in tasks[task]}
    run_jobs([(task, seed, {"ppo": config.rounds, arm: config.rounds}, config, {}, frozenset()) for task, arm in final.items() for seed in all_seeds], config)
    table = page.table_of(collect(config, [(task, seed) for task in tasks for seed in all_seeds]))
    for task, arm in final.items():
        gold, found = page.by_round(table, task, arm, "gold"), settings.setdefault("thresholds", {}).setdefault(task, {})
        for rule, what in page.STOP_RULES.items():
            if what:
                signals = page.by_round(table, task, arm, what[0])
                both = [seed for seed in sorted(gold) if len(signals.get(seed, [])) == len(gold[seed])]
                found[rule] = page.best_threshold([signals[s] for s in both], [gold[s] for s in both], what[1])
    settings |= {"tuning seeds": list(all_seeds), "tuning rounds": min(TUNING_ROUNDS, config.rounds), "small": config.small}
    data.write_text(Path(config.out) / "settings.json", json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    print(f"study.py: {config.out}/settings.json: commit it before the main seeds are run", flush=True)


def main_arms(task: str, config: Config, settings: dict) -> dict[str, int]:
    """{arm: rounds} of the main phase: all arms, or --arms; three η (two beside the chosen one), and OOD."""
    every = ["sft", *(ARMS if task == "dialogue" else SUMMARY_ARMS)]
    if task == "dialogue":
        every += [*(f"{page.METHOD}@eta={eta:g}" for eta in settings["etas"][task]), *OOD_ARMS]

    def rounds(arm):
        base, knobs = split_arm(arm)
        most = 0 if base in ("sft", "dpo") else 2 if knobs.get("ood") else PRIMARY if knobs or base not in LONG_ARMS else config.rounds
        return min(most, config.rounds)

    return {arm: rounds(arm) for arm in names(config.arms) or every}


def boundary_arms(config: Config) -> dict[str, int]:
    few, arms = min(BOUNDARY_ROUNDS, config.rounds), {"metarm-first": config.rounds, "reseeded": config.rounds}
    for knobs in BOUNDARY.values():
        if knobs:
            arms |= {f"metarm-first@{knobs}": few}
            arms |= {f"reseeded@{knobs}": few} if knobs.split("=")[0] not in ONLY_METARM else {}
    return {"ppo": config.rounds} | arms


def collect(config: Config, jobs: list[tuple]) -> list[tuple]:
    """Rows of all finished cells of these (task, seed)s."""
    rows = []
    for task, seed in jobs:
        for file in sorted((Path(config.runs) / f"{task}-{seed}" / "cells").glob("*.json")):
            arm, _, round_ = file.stem.rpartition("-")
            rows += [(task, seed, arm, int(round_), name, value) for name, value in data.read_json(file)["figures"].items()]
    return sorted(rows)


# No table asks these of an arm with a changed knob; with them, study.csv would be a quarter larger.
NO_VARIANT = ("curve", "epoch", "shifted.gap", "cos", "climb", "weight", "own.", "sft.", "adapted.", "bleu", "distinct", "words",
              *(f"{on}.{what}" for on in ("shifted", "gold", "ood") for what in ("J", "margin", "variance", "rho")))


def write_csv(config: Config, jobs: list[tuple]) -> None:
    """study.csv anew: finished cells of --runs, and of earlier rows those whose cells are not there (another machine's)."""
    new, path = collect(config, jobs), Path(config.out) / "study.csv"
    cells = {row[:4] for row in new}
    every = new + [row for row in page.read_rows(path) if row[:4] not in cells]
    rows = sorted(row for row in every if "@" not in row[2] or not row[4].startswith(NO_VARIANT))
    if rows:
        data.write_text(path, ",".join(page.COLUMNS) + "\n" + "".join(f"{','.join(map(str, row[:5]))},{row[5]:.4g}\n" for row in rows))


def rules() -> str:
    return __doc__[__doc__.index("  Tuning"):].rstrip()


def page_of(folder: Path) -> tuple[str, dict]:
    """(README.md, table) from study.csv and settings.json alone."""
    table, settings = page.table_of(page.read_rows(folder / "study.csv")), data.read_json(folder / "settings.json") or {}
    return page.page(table, settings, rules(), PRIMARY, MARGIN, BOUNDARY, ONLY_METARM), table


MARKS = "<!-- what we found, from docs/study/study.csv -->", "<!-- /what we found -->"


def quoted(table: dict) -> str:
    """What the project's README says under "What we found": made here, so that it says what study.csv says."""
    settings = data.read_json(HERE / "settings.json") or {}
    return f"{MARKS[0]}\n{page.findings(table, settings, PRIMARY, MARGIN)}{MARKS[1]}"


def write_page(config: Config) -> None:
    folder = Path(config.out)
    if not (folder / "study.csv").exists():
        raise ValueError(f"{folder / 'study.csv'}: no such file; run --phase main first")
    text, table = page_of(folder)
    for task in sorted({key[0] for key in table}):
        page.pictures(table, task, folder, PRIMARY, BOUNDARY, ONLY_METARM)
    data.write_text(folder / "README.md", text)
    front = HERE.parents[1] / "README.md"  # quotes the first lines, between two marks
    if folder.resolve() == HERE and MARKS[0] in front.read_text(encoding="utf-8"):
        before, _, after = front.read_text(encoding="utf-8").partition(MARKS[0])
        data.write_text(front, before + quoted(table) + after.partition(MARKS[1])[2])
    print(f"study.py: {folder / 'README.md'}: written from {len(table)} figures", flush=True)


def study(config: Config) -> None:
    phases = ["tune", "main", "boundary", "page"] if config.phase == "all" else names(config.phase)
    if odd := set(phases) - {"tune", "main", "boundary", "page"}:
        raise ValueError(f"--phase {', '.join(sorted(odd))}: there are tune, main, boundary, page and all")
    if odd := set(names(config.tasks)) - set(data.TASKS):
        raise ValueError(f"--tasks {', '.join(sorted(odd))}: there are {', '.join(data.TASKS)}")
    for arm in names(config.arms):
        split_arm(arm)
    try:
        seeds = [int(seed) for seed in names(config.seeds)]
    except ValueError:
        raise ValueError(f"--seeds {config.seeds}: numbers are needed, as 0,1,2") from None
    if set(seeds) & set(TUNING_SEEDS):
        raise ValueError(f"--seeds {config.seeds}: {TUNING_SEEDS} are the tuning seeds, and must not be judged on")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    file = Path(config.out) / "settings.json"
    for phase in phases:
        settings = data.read_json(file) or {}
        if phase == "tune":
            todo = [task for task in names(config.tasks) if task not in settings.get("chosen", {})]
            if settings.get("small", config.small) != config.small or not todo and config.phase != "all":
                raise ValueError(f"{file} is there already: what was chosen is not chosen again; to begin anew, delete it and {config.runs}")
            if todo:
                tune(replace(config, tasks=",".join(todo)), settings)
        elif phase == "page":
            write_page(config)
        else:
            if any(task not in settings.get("chosen", {}) for task in names(config.tasks)) or settings.get("small", False) != config.small:
                raise ValueError(f"{file}: {config.tasks} not tuned yet at this size; run --phase tune, and commit what it chose, before the main seeds")
            jobs = []
            for task in names(config.tasks):
                own = {"chosen": settings["chosen"][task], "etas": settings["etas"]}
                arms = main_arms(task, config, own) if phase == "main" else boundary_arms(config)
                if phase == "main" or task == "dialogue":
                    jobs += [(task, seed, arms, config, own) for seed in (seeds if phase == "main" else seeds[:BOUNDARY_SEEDS])]
            keep = functools.partial(write_csv, config, [(task, seed) for task in names(config.tasks) for seed in seeds])
            there = {row[:4] for row in page.read_rows(Path(config.out) / "study.csv")}
            jobs = [(*each, frozenset((arm, r) for task, seed, arm, r in there if (task, seed) == each[:2])) for each in jobs]
            todo = [each for each in jobs if (Path(config.runs) / "-".join(map(str, each[:2])) / "cells").exists() or not each[5] >= {
                (arm, r) for arm, last in each[2].items() for r in rounds_to(last)}]
            if len(todo) < len(jobs):  # made elsewhere, or the models were deleted
                print(f"study.py: {len(jobs) - len(todo)} seeds are whole in {config.out}/study.csv: skipped", flush=True)
            try:
                run_jobs(todo, config, keep)
            finally:  # what is finished counts
                keep()


def main(argv: list[str] | None = None) -> int:
    return data.command("study.py", Config, study, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
