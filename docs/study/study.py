"""The evidence: does MetaRM tell new responses apart, and are the policies better?

    python docs/study/study.py            all cells that study.csv does not have, then the tables
    python docs/study/study.py --tables   runs nothing

A cell is (task, seed, arm, head): README.md says what these are. Its figures become rows of
OUT/study.csv as soon as they are measured, and a cell that stands there is not run again:
interrupted, the same command goes on. The primary arms of all worlds come first. After a change of
the code or of OUT/settings.json, name another --runs and --out.
"""

import fcntl
import functools
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import measure
import page
import policies
import summary
from arms import gold_pairs, gold_score, replaced, reward_model, stage
from policies import POLICIES, ROUNDS

import data
import ppo
import rm

# An arm is a kind of arms.py and its knob: "first@0.02" climbs a length of 0.02.
PRIMARY = ["rm0", "plain", page.FIRST, page.STALE]
SECONDARY = ["gold", *(f"{kind}@{page.CLIMB}" for kind in ("scale", "random", "unit", "exact"))]
SECONDARY += ["first@0.02", "literal@5e-6", "ocrm@0.01", "joint@0.1"]
# Seconds of a cell on one core, by its kind, and of what a world needs before its cells.
SECONDS = dict(world=265, rm0=10, plain=48, first=84, stale=84, literal=84, unit=84, exact=140)
SECONDS |= dict(scale=84, random=46, joint=65, ocrm=55, gold=55, adapted=77, dpo=30)
SMALL = dict(data="--sft 320 --pairs 160 --meta 32 --ppo 96 --valid 16 --test 24 --ood_ppo 16")
SMALL |= dict(sft="--epochs 1", ppo="--steps 3 --batch_size 16 --minibatch_size 8")
SMALL["ppo"] += " --scale_prompts 16"
MAKE_WORLD = data.make_world
# One thread per process, and glibc keeps its memory: as in run.sh.
ENVIRONMENT = dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
ENVIRONMENT |= dict(MALLOC_MMAP_THRESHOLD_="1073741824", MALLOC_TRIM_THRESHOLD_="8589934592")
ENVIRONMENT |= dict(MALLOC_TOP_PAD_="67108864", CUDA_VISIBLE_DEVICES="")


def toy_flags(small: bool, chosen: dict) -> dict[str, list[str]]:
    """The options of run.sh's toy preset, so that the study is of the loop that everybody runs."""
    text = Path(__file__).resolve().parents[2].joinpath("run.sh").read_text(encoding="utf-8")
    preset = text.partition("  toy | smoke)")[2].partition("[ ")[0]
    flags = {name: said.split() for name, said in re.findall(r"(\w+)_flags=\(([^)]*)\)", preset)}
    flags["data"] = ["--test", "512"]
    flags["ppo"] += ["--steps", str(chosen["steps"])] if "steps" in chosen else []
    return {name: said + small * SMALL.get(name, "").split() for name, said in flags.items()}


def read_arm(arm: str) -> tuple[str, float]:
    """("first", 3.0) of "first@3". Raises: Mistake on an arm that there is not."""
    kind, _, knob = arm.removeprefix("ppo:").partition("@")
    is_kind = kind in SECONDS.keys() - {"world", "adapted", "dpo"} and arm.startswith(kind)
    if arm not in POLICIES and not (is_kind and (kind in ("rm0", "plain", "gold")) != bool(knob)):
        raise data.Mistake(f"--arms {arm}: there are {', '.join(PRIMARY + POLICIES + SECONDARY)}")
    return kind, float(knob or 0)


class World:
    """One seed of one task: what all its arms share, how an arm gets its RM, and its figures."""

    def __init__(self, home: Path, task: str, seed: int, chosen: dict, small: bool):
        self.home, self.seed, self.chosen, self.flags = home, seed, chosen, toy_flags(small, chosen)
        self.sft, self.D = home / "sft", home / "D"
        data.make_world = functools.partial(MAKE_WORLD, world=summary.WORLDS[task])
        stage(home / "data", data.main, "toy", "--seed", seed, *self.flags["data"])
        argv = ["--model", home / "data/model", "--data", home / "data/sft.jsonl", "--seed", seed]
        stage(self.sft, ppo.main, "sft", *argv, *self.flags["sft"])
        samples = self.sample("pairs-samples", self.sft, "pairs", "--k", 2)
        stage(self.D, data.main, "label", "--samples", samples, "--seed", seed)
        self.rm0 = reward_model("plain", home / "rm0", self.options(), seed)
        # Vanilla PPO against RM₀, round after round; the last policy is frozen.
        self.chain = [self.sft]
        for r in range(1, chosen["rounds"] + 1):
            out = f"ppo:rm0-{chosen['kl_coef']}-{r}"  # policies.py's vanilla PPO, at its weight
            self.chain.append(self.improve(out, self.chain[-1], self.rm0, f"{seed}{r}"))
        # What all reward models are measured on.
        policies = {"sft": self.sft, "shifted": self.chain[-1], "gold": self.gold_policy()}
        policies |= {f"ppo{r}": policy for r, policy in enumerate(self.chain[1:], 1)}
        self.kl = {name: measure.final_kl(policy) for name, policy in policies.items()}
        test, ood = self.prompts("test"), self.prompts("ood")
        sets = {name: measure.answers(some, test, seed + 1) for name, some in policies.items()}
        self.sets = sets | {"ood": measure.answers(self.chain[-1], ood, seed + 1)}
        self.pairs = measure.pair_set(data.read_preferences(self.D / "valid.jsonl"))

    def prompts(self, name: str) -> Path:
        return self.home / "data" / f"prompts-{name}.jsonl"

    def sample(self, out: str, policy: Path, prompts: str, *flags) -> Path:
        """samples.jsonl: responses of a policy."""
        argv = ["--model", policy, "--prompts", self.prompts(prompts), *self.flags["sample"]]
        argv += [*flags, "--seed", self.seed]
        return stage(self.home / out, ppo.main, "sample", *argv) / "samples.jsonl"

    def options(self) -> list:
        """rm.py's options for a training on D: run.sh's, then what was chosen."""
        argv = ["--model", self.sft, "--data", self.D / "train.jsonl", *self.flags["rm"]]
        for name in ("lr", "epochs", "batch_size"):
            argv += [f"--{name}", self.chosen[name]]
        return [*argv, "--micro_batch_size", self.chosen["batch_size"], "--log_every", 60]

    def improve(self, out: str, last: Path, model: Path, seed: str, *flags) -> Path:
        """PPO against `model`, on from `last`, KL to SFT."""
        argv = ["--model", last, "--ref_policy", self.sft, "--reward_model", model]
        argv += ["--prompts", self.prompts("ppo"), *self.flags["ppo"], "--seed", seed]
        argv += ["--kl_coef", self.chosen["kl_coef"], *flags]
        return stage(self.home / out, ppo.main, "ppo", *argv)

    def gold_policy(self) -> Path:
        """PPO on the gold reward, five steps at a time, until it is as far from SFT as the frozen.

        Its samples are shifted as far, but no reward model chose them: no arm's own mistakes are in
        them. It gets twice the steps at the most.
        """
        until, last, tried = measure.final_kl(self.chain[-1]), self.sft, {}
        with replaced(rm, "score", gold_score):
            for part in range(1, 6 * self.chosen["rounds"] + 1):
                how = f"gold-policy-{part}", last, self.rm0, f"{self.seed}{part}", "--steps", 5
                last = self.improve(*how)
                tried[last] = measure.final_kl(last)
                if tried[last] >= until:
                    break
        return min(tried, key=lambda policy: abs(tried[policy] - until))

    def S(self, policy: Path) -> Path:
        """Of a policy: k = 5 unlabelled responses, a little hotter so that they differ."""
        return self.sample(f"S-{policy.name}", policy, "meta", *self.flags["meta_sample"], "--k", 5)

    def reward_model(self, arm: str, head: int, policy: Path | None = None) -> Path:
        """An arm's reward model: arms differ only here. S is the policy's; None: the frozen one."""
        (kind, knob), options = read_arm(arm), self.options()
        policy = self.sft if kind == "stale" else policy or self.chain[-1]
        if kind == "rm0":
            return self.rm0
        out = self.home / f"{arm.replace('stale', 'first')}-{policy.name}-{head}"
        if kind in ("plain", "random"):  # neither sees S
            out = self.home / f"{arm}-{head}"
        if kind == "gold" and not (out / "rm").exists():  # the ceiling: D, and gold labels on S
            rows = data.read_preferences(self.D / "train.jsonl") + gold_pairs(self.S(policy))
            data.write_jsonl(Path(f"{out}.jsonl"), rows)
            options += ["--data", f"{out}.jsonl"]
        source = policy if kind in ("plain", "random", "ocrm") else self.S(policy)
        return reward_model(kind, out / "rm", options, 1000 * (head + 1) + self.seed, knob, source)

    def measure(self, arm: str, folder: Path) -> dict[str, float]:
        """All figures of one cell."""
        model, sets = rm.load_reward_model(str(folder)), self.sets
        if arm != "rm0":  # only RM₀ is measured along the chain
            sets = {name: some for name, some in sets.items() if name[:3] != "ppo"}
        row = measure.of_reward_model(model, sets, self.pairs)
        if arm == "rm0":  # and what the policies are worth
            for name, kl in self.kl.items():
                worth = measure.in_sd(sets[name][2], sets["sft"][2]).mean()
                row |= {f"{name}.kl": kl, f"{name}.worth": worth}
        if folder.with_name("adapted").is_dir():  # θ'
            adapted = rm.load_reward_model(str(folder.with_name("adapted")))
            some = {name: sets[name] for name in ("sft", "shifted")}
            there = measure.of_reward_model(adapted, some, self.pairs)
            row |= {f"adapted.{name}": x for name, x in there.items()}
            log = data.read_jsonl(folder / "log.jsonl")
            row |= measure.of_climb(model, adapted, log, sets["shifted"])
        return row


def heads_of(args, arm: str) -> range:
    """The heads of an arm. A policy has rounds in their place: 1, 2, 3."""
    if arm in POLICIES:
        return range(1, 2 if arm == "dpo" else ROUNDS + 1)
    return range(1 if arm == "rm0" else args.heads if arm in PRIMARY else args.more)


def missing(args, task: str, seed: int, arms: list[str]) -> list[tuple]:
    """The cells of some arms that study.csv does not have, head after head."""
    known = page.cells(args.out)
    cells = [(task, seed, arm, head) for arm in arms for head in heads_of(args, arm)]
    return sorted((cell for cell in cells if cell not in known), key=lambda cell: cell[3])


def run_world(args, task: str, seed: int, arms: list[str]) -> None:
    """Runs and writes the missing cells of one world."""
    home, chosen = Path(args.runs).resolve() / f"{task}-{seed}", page.read_settings(args.out)
    home.mkdir(parents=True, exist_ok=True)
    with open(home / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a process that is in this world
        start = time.monotonic()
        world = World(home, task, seed, chosen["chosen"][task], args.small)
        for cell in missing(args, task, seed, arms):
            if cell[2] in POLICIES:
                figures = policies.figures(world, *cell[2:])
            else:
                figures = world.measure(cell[2], world.reward_model(*cell[2:]))
            page.append_rows(args.out, [(*cell, *figure) for figure in figures.items()])
            print(*cell, f"{time.monotonic() - start:.0f} s", flush=True)
            start = time.monotonic()


def study(args) -> None:
    """Runs what study.csv does not have, each world in a process of its own; prints the tables."""
    chosen, jobs, seconds = page.read_settings(args.out).get("chosen", {}), [], 0
    arms = args.arms.split(",") if args.arms else PRIMARY + POLICIES + SECONDARY
    rest = [arm for arm in arms if arm not in PRIMARY + POLICIES]
    for part in (PRIMARY, POLICIES, rest):  # the primary arms of all worlds come first
        some = [arm for arm in arms if arm in part]
        for task in args.tasks.split(","):
            if task not in chosen:
                raise data.Mistake(f"--tasks {task}: {args.out}/settings.json has only {chosen}")
            if part is POLICIES and "policy_kl" not in chosen[task]:
                continue  # reward models only
            for seed in map(int, args.seeds.split(",")):
                kinds = [read_arm(arm)[0] for _, _, arm, _ in missing(args, task, seed, some)]
                if kinds:
                    jobs.append((args, task, seed, some))
                    seconds += sum(map(SECONDS.get, kinds)) + SECONDS["world"] * ("rm0" in some)
    print(f"study.py: {len(jobs)} jobs, {seconds / 3600 / args.workers:.1f} hours")
    if not args.tables:
        run(args.workers, jobs)
    print(page.tables(args.out))
    page.pictures(args.out, args.out)


def run(workers: int, jobs: list[tuple]) -> None:
    """Runs the jobs in their order; one that fails does not stop the others."""
    os.environ |= ENVIRONMENT  # of the new processes
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        errors = [future.exception() for future in [pool.submit(run_world, *job) for job in jobs]]
    finally:  # Ctrl-C stops the jobs that wait, too
        pool.shutdown(cancel_futures=True)
    failed = [f"{job[1]} {job[2]}: {e!r}" for job, e in zip(jobs, errors, strict=True) if e]
    if failed:
        raise data.Mistake(f"{len(failed)} of {len(jobs)} jobs failed: {failed[0]}")


def main(argv: list[str] | None = None) -> int:
    parser = data.new_parser("study.py", __doc__)
    add = parser.add_argument
    add("--tasks", default="dialogue", help="A,B")
    add("--arms", default="", help="A,B; empty: all")
    add("--seeds", default=",".join(map(str, range(300, 316))), help="A,B: the worlds")
    add("--heads", type=int, default=2, help="heads of each primary arm")
    add("--more", type=int, default=1, help="heads of each secondary arm")
    add("--runs", default="runs/study", help="folder for models and samples")
    add("--out", type=Path, default=Path(__file__).parent, help="of settings.json, study.csv")
    add("--workers", type=int, default=os.cpu_count(), help="worlds at a time")
    add("--tables", action="store_true", help="run nothing, print the tables of what is there")
    add("--small", action="store_true", help="tiny sizes, to see whether all of it runs")
    return data.command(parser, study, argv)


if __name__ == "__main__":
    sys.exit(main())
