"""The evidence: what MetaRM does, over seeds and two worlds where the truth (gold) is known.

    python docs/study/study.py                     all cells that study.csv does not have
    python docs/study/study.py --tasks dialogue --seeds 0,1 --arms dpo,metarm-first,joint@lam=1
    python docs/study/study.py --pictures FOLDER   the same; draws pictures at the end

A cell is a (task, seed, arm, round). Its figures become rows of OUT/study.csv (task,seed,arm,round,
metric,value) as soon as it is measured, and a cell that stands there is not run again: interrupted,
the same command goes on. Models and samples are kept in --runs. OUT/settings.json has the knobs
chosen on the tuning seeds 100 and 101; "arm@knob=value" changes one thing of an arm. After a change
of the code or the settings, name another --runs and --out.

arms.py trains the reward models, measure.py measures, page.py judges, summary.py is the second
world.
"""

import contextlib
import fcntl
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import measure
import page
import summary
from arms import gold_as_reward, reward_model, stage

import data
import ppo
import rm

# arm: (the kind of its reward model, its knob, the knob's value if settings.json has none)
ARMS = {
    "sft": ("none", "", None),
    "dpo": ("none", "beta", 0.1),
    "ppo": ("rm0", "", None),
    "ppo-tuned": ("rm0", "kl_coef", 0.02),
    "reseeded": ("plain", "lr", 3e-4),
    "random": ("random", "eta", 0.1),
    "metarm-first": ("first", "eta", 0.1),
    "metarm-exact": ("exact", "eta", 0.1),
    "adapted": ("adapted", "eta", 0.1),
    "joint": ("joint", "lam", 0.3),
    "ocrm": ("ocrm", "tau", 0.01),
    "ocrm-tuned": ("ocrm", "tau", 0.03),
    "oracle": ("oracle", "epochs", 2),
}
KNOBS = "beta kl_coef lr eta lam tau epochs steps ood stale".split()
SUMMARY_ARMS = "sft dpo ppo reseeded random metarm-first ocrm oracle".split()
LONG_ARMS = "ppo ppo-tuned reseeded random metarm-first ocrm".split()  # the others end at round 3
SIZES = dict(sft=8000, pairs=6000, meta=256, ppo=1024, valid=128, test=128)
SIZES |= {"ood": 128, "ood-meta": 256, "ood-ppo": 256}
SMALL_SIZES = dict(sft=320, pairs=160, meta=32, ppo=64, valid=8, test=12)
SMALL_SIZES |= {"ood": 12, "ood-meta": 32, "ood-ppo": 48}
SMALL_PPO = "--steps 3 --batch_size 16 --minibatch_size 8 --scale_prompts 16".split()
# Seconds of a cell on one core, by its kind, and of what a seed needs before its cells.
SECONDS = dict(seed=200, none=10, rm0=44, plain=44, ocrm=56, random=49, joint=67, oracle=98)
SECONDS |= dict(first=63, exact=98, adapted=63)
# One thread per process, and glibc keeps its memory: as in run.sh.
ENVIRONMENT = dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
ENVIRONMENT |= dict(MALLOC_MMAP_THRESHOLD_="1073741824", MALLOC_TRIM_THRESHOLD_="8589934592")


def toy_flags(small: bool) -> dict[str, list[str]]:
    """The options of run.sh's toy preset, so that the study is of the loop that everybody runs."""
    text = Path(__file__).resolve().parents[2].joinpath("run.sh").read_text(encoding="utf-8")
    preset = text.partition("  toy | smoke)")[2].partition("[ ")[0]
    flags = {name: said.split() for name, said in re.findall(r"(\w+)_flags=\(([^)]*)\)", preset)}
    if small:
        flags["sft"] += ["--epochs", "1"]
        flags["ppo"] += SMALL_PPO
    return flags


def knobs_of(arm: str, chosen: dict) -> dict[str, float]:
    """What an arm runs with: the default of its knob, then what was chosen, then what "@" says."""
    base, *changes = arm.split("@")
    if base not in ARMS:
        raise data.Mistake(f"--arms {arm}: there are {', '.join(ARMS)}")
    _, knob, default = ARMS[base]
    knobs = ({knob: default} if knob else {}) | chosen.get(base, {})
    if base == "random":  # a climb as long as MetaRM's
        knobs |= chosen.get("metarm-first", {})
    for change in changes:
        name, _, value = change.partition("=")
        if name not in KNOBS or not re.fullmatch(r"[\d.e-]+", value):
            raise data.Mistake(f"--arms {arm}: write a changed knob as {base}@eta=0.3; {KNOBS}")
        knobs[name] = float(value)
    return knobs


def rounds_of(arm: str, most: int) -> list[int]:
    """The rounds of an arm: what has none (SFT, DPO) has one cell, "round 0"."""
    base, *changes = arm.split("@")
    last = 2 if "ood=1" in changes else 4 if base in LONG_ARMS and not changes else page.PRIMARY
    return [0] if ARMS[base][0] == "none" else list(range(1, min(last, most) + 1))


class World:
    """One seed of one task: what all its arms share, and how each arm goes on from there."""

    def __init__(self, home: Path, task: str, seed: int, chosen: dict, small: bool):
        self.home, self.seed, self.chosen, self.flags = home, seed, chosen, toy_flags(small)
        self.sft, self.D, self.rm0 = home / "sft", home / "D", home / "rm0"
        self.policies, self.models = {("sft", 0): self.sft}, {}
        if not (home / "data").exists():
            with data.output_folder(home / "data") as work:
                sizes = SMALL_SIZES if small else SIZES
                rows = data.make_world(seed, sizes, summary.WORLDS[task])
                for name, some in rows.items():
                    data.write_jsonl(work / f"{name}.jsonl", some)
                texts = ["".join(row.values()) for some in rows.values() for row in some]
                tokenizer = data.train_tokenizer(texts)
                model = data.make_model(tokenizer, 32 if small else 64, 2, seed)
                rm.save_model(model, tokenizer, work / "model")
        argv = ["--model", home / "data/model", "--data", home / "data/sft.jsonl", "--seed", seed]
        stage(self.sft, ppo.main, "sft", *argv, *self.flags["sft"])
        samples = self.sample("pairs-samples", self.sft, "pairs", seed, "--k", 2)
        stage(self.D, data.main, "label", "--samples", samples, "--seed", seed)
        reward_model("plain", self.rm0, self.options({}), seed)

    def prompts(self, name: str) -> Path:
        return self.home / "data" / f"prompts-{name}.jsonl"

    def sample(self, out: str, policy: Path, prompts: str, seed, *flags) -> Path:
        """samples.jsonl: responses of a policy."""
        argv = ["--model", policy, "--prompts", self.prompts(prompts), *self.flags["sample"]]
        argv += [*flags, "--seed", seed]
        return stage(self.home / out, ppo.main, "sample", *argv) / "samples.jsonl"

    def options(self, knobs: dict, looks: bool = True) -> list:
        """rm.py's options for a training on D; `looks`: at held-out pairs meanwhile."""
        argv = ["--model", self.sft, "--data", self.D / "train.jsonl", *self.flags["rm"]]
        argv += ["--eval_data", self.D / "valid.jsonl"] if looks else []
        return argv + (["--lr", knobs["lr"]] if "lr" in knobs else [])

    def round_of(self, arm: str, r: int, last: Path) -> Path:
        """The reward model of the arm's round r, after the policy `last`: arms differ only here."""
        (kind, knob, _), knobs = ARMS[arm.split("@")[0]], knobs_of(arm, self.chosen)
        out, options, seed = self.home / f"{arm}-{r}" / "rm", self.options(knobs), self.seed
        if kind == "rm0":
            return self.rm0
        if kind == "plain":  # another head and another order of D
            return reward_model(kind, out, options, 1000 * r + seed)
        if kind == "ocrm":
            return reward_model(kind, out, options, seed, knobs[knob], policy=last)
        # S: k = 5 unlabelled responses of the last policy, a little hotter so that they differ
        source, prompts = last, "ood-meta" if "ood" in knobs else "meta"
        if "stale" in knobs:
            source = self.sft
        flags = [*self.flags["meta_sample"], "--k", 5]
        S = self.sample(f"{arm}-{r}/meta", source, prompts, f"{seed}{r}", *flags)
        if kind == "oracle":  # the ceiling: D, and gold labels on the S of all rounds so far
            rows = data.read_preferences(self.D / "train.jsonl")
            for earlier in range(1, r + 1):
                samples = data.read_meta(self.home / f"{arm}-{earlier}/meta/samples.jsonl")
                twice = [row | {"responses": 2 * row["responses"]} for row in samples]
                rows += data.label_pairs(twice, 0.0, seed)[0]  # each response is in two pairs
            data.write_jsonl(out.with_name("gold.jsonl"), rows)
            options += ["--data", out.with_name("gold.jsonl"), "--epochs", int(knobs[knob])]
            return reward_model("plain", out, options, seed)
        if kind != "first":  # Figure 4 is of the method itself; the others save the looks
            options = self.options(knobs, looks=False)
        if kind in ("first", "exact", "adapted"):
            options += ["--log_every", 28]
        return reward_model(kind, out, options, seed, knobs[knob], S)

    def improve(self, out: str, last: Path, model: Path, seed: str, knobs: dict) -> Path:
        """PPO against `model`, on from `last`, KL to SFT: the same for every arm."""
        prompts = self.prompts("ood-ppo" if "ood" in knobs else "ppo")
        argv = ["--model", last, "--ref_policy", self.sft, "--reward_model", model]
        argv += ["--prompts", prompts, *self.flags["ppo"], "--seed", seed]
        argv += ["--steps", int(knobs["steps"])] if "steps" in knobs else []
        argv += ["--kl_coef", knobs["kl_coef"]] if "kl_coef" in knobs else []
        return stage(self.home / out, ppo.main, "ppo", *argv)

    def walk(self, arm: str, rounds: list[int]):
        """Trains an arm, round after round; yields each when its policy is there."""
        base, knobs = arm.split("@")[0], knobs_of(arm, self.chosen)
        if base == "dpo":
            argv = ["--model", self.sft, "--data", self.D / "train.jsonl", *self.flags["dpo"]]
            argv += ["--seed", self.seed, "--beta", knobs["beta"]]
            self.policies[arm, 0] = stage(self.home / arm, ppo.main, "dpo", *argv)
        for r in rounds:
            if r == 1 and ARMS[base][0] == "ocrm" and knobs.keys() == {"tau"}:
                # Before the policy moves all weights are 1: this round is vanilla PPO's.
                self.models[arm, 1], self.policies[arm, 1] = self.rm0, self.policies["ppo", 1]
            elif r > 0:
                last = self.policies.get((arm, r - 1), self.sft)
                self.models[arm, r] = model = self.round_of(arm, r, last)
                how = f"{arm}-{r}/policy", last, model, f"{self.seed}{r}", knobs
                self.policies[arm, r] = self.improve(*how)
            yield r

    def gold_policy(self, until: float, most: int) -> Path:
        """PPO on the gold reward, a third of a round at a time, until it is `until` nats from SFT.

        For 2 * most rounds at the longest. Its samples are shifted as far as vanilla PPO's, but no
        reward model chose them: no arm's own mistakes are in them.
        """
        flags, last, tried = self.flags["ppo"], self.sft, {}
        steps = int(flags[len(flags) - flags[::-1].index("--steps")])  # the last one counts
        with gold_as_reward():
            for part in range(1, 6 * most + 1):
                how = f"gold-{part}/policy", last, self.rm0, f"{self.seed}{part}"
                last = self.improve(*how, {"steps": max(1, steps // 3)})
                tried[last] = measure.final_kl(last)
                if tried[last] >= until:
                    break
        return min(tried, key=lambda policy: abs(tried[policy] - until))


class Bench:
    """What all cells of a world are measured on: answer sets of SFT, vanilla PPO and gold's PPO."""

    def __init__(self, world: World, rounds: list[int]):
        self.world, parts = world, ("test", "valid", "ood")
        self.prompts = {name: data.read_prompts(world.prompts(name)) for name in parts}
        for arm, some in (("ppo", rounds), ("dpo", [0])):  # the rivals of every policy
            list(world.walk(arm, some))
        vanilla = world.policies["ppo", rounds[-1]]
        self.gold_policy = world.gold_policy(measure.final_kl(vanilla), rounds[-1])
        self.sft, self.vanilla = self.answers(world.sft), self.answers(vanilla)
        self.gold = self.answers(self.gold_policy)
        self.pairs = data.read_preferences(world.D / "valid.jsonl")

    def answers(self, policy: Path) -> dict[str, tuple]:
        return measure.answers(policy, self.prompts, self.world.seed)

    def judge(self, folder: Path, sets: dict) -> tuple[dict, dict]:
        model = rm.load_reward_model(str(folder))
        return measure.of_reward_model(model, sets, self.sft["test"], self.pairs)

    def measure(self, arm: str, r: int) -> dict[str, float]:
        """All figures of one cell."""
        policies, models = self.world.policies, self.world.models
        policy, model = policies[arm, r], models.get((arm, r))
        rivals = {"sft": policies["sft", 0], "dpo": policies["dpo", 0]}
        rival = ("ppo@ood=1" if "@ood" in arm else "ppo"), r
        rivals |= {"ppo": policies[rival]} if rival in policies else {}
        rivals = {name: self.answers(path) for name, path in rivals.items() if path != policy}
        own = self.answers(policy)
        row = measure.of_policy(own, self.sft, rivals)
        if arm == "sft":  # how far the second shifted set is from SFT, beside the first
            gold = measure.in_sd(self.gold["test"][2], self.sft["test"][2]).mean()
            return row | {"by_gold.kl": measure.final_kl(self.gold_policy), "by_gold.gold": gold}
        if model is None:
            return row
        shifted = {"shifted": self.vanilla["test"], "gold": self.gold["test"]}
        sets = shifted | {"own": own["test"], "ood": self.vanilla["ood"]}
        figures, rewards = self.judge(model, sets)
        row |= figures | measure.of_rollouts(policy, rewards["sft"], self.sft["test"][2])
        row |= {"rm": measure.in_sd(rewards["own"], rewards["sft"]).mean()}
        row |= {"kl": measure.final_kl(policy)} | measure.of_training(model / "log.jsonl")
        previous = models.get((arm, r - 1), self.world.rm0)
        if previous != model:
            theirs = measure.rewards_on(rm.load_reward_model(str(previous)), *own["test"][:2])
            row["own.disagree"] = measure.disagreement(rewards["own"], theirs)
        if (model.parent / "adapted").is_dir():  # θ and θ', whichever of them PPO got
            _, at = self.judge(model.parent / "rm", shifted)
            figures, beyond = self.judge(model.parent / "adapted", shifted)
            row |= {f"adapted.{name}": value for name, value in figures.items()}
            row |= measure.of_mechanism(model.parent / "rm", at, beyond)
        return row


def run_seed(args, task: str, seed: int, arms: list[str], chosen: dict) -> None:
    """The cells of one seed that study.csv does not have."""
    home, csv = Path(args.runs).resolve() / f"{task}-{seed}", Path(args.out) / "study.csv"
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / ".lock", f"{home} is in use by another process"):
        world = World(home, task, seed, chosen, args.small)
        most = max(args.rounds, 1 if args.small else page.PRIMARY)
        bench = Bench(world, rounds_of("ppo", most))
        arms += ["ppo@ood=1"] if any("@ood" in arm for arm in arms) else []  # their rival
        for arm in sorted(set(arms), key=lambda arm: not arm.startswith("ppo")):  # rivals first
            for r in world.walk(arm, rounds_of(arm, args.rounds)):
                cell = (task, seed, arm, r)
                if cell not in page.cells(csv):
                    figures = bench.measure(arm, r)
                    with locked(home.with_name("csv.lock")):  # other seeds write there, too
                        page.append_rows(csv, [(*cell, *figure) for figure in figures.items()])
                    gold = f"gold {figures['gold']:+.2f} SD above SFT"
                    print(f"{task}, seed {seed}: {arm}, round {r}: {gold}", flush=True)


@contextlib.contextmanager
def locked(path: Path, complaint: str = ""):
    """Holds a lock file, as no killed process does; with a complaint, does not wait for it."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if complaint else 0))
        except BlockingIOError:
            raise data.Mistake(complaint) from None
        yield


def study(args) -> None:
    """Runs what study.csv does not have, each seed in a process of its own; prints the tables."""
    out, jobs, seconds = Path(args.out), [], 0
    out.mkdir(parents=True, exist_ok=True)
    settings, known = page.read_settings(out), page.cells(out / "study.csv")
    for task in args.tasks.split(","):
        if task not in summary.WORLDS:
            raise data.Mistake(f"--tasks {task}: there are {', '.join(summary.WORLDS)}")
        chosen = settings.get("chosen", {}).get(task, {})
        default = ARMS if task == "dialogue" else SUMMARY_ARMS
        arms = args.arms.split(",") if args.arms else list(default)
        for seed in map(int, args.seeds.split(",")):
            todo = []
            for arm in arms:
                knobs_of(arm, chosen)  # refuses a name that is none
                rounds = rounds_of(arm, args.rounds)
                if not {(task, seed, arm, r) for r in rounds} <= known:
                    todo.append(arm)
                    seconds += len(rounds) * SECONDS[ARMS[arm.split("@")[0]][0]]
            if args.here:
                return run_seed(args, task, seed, todo, chosen)
            if todo:
                jobs.append(["--tasks", task, "--seeds", str(seed), "--arms", ",".join(todo)])
                seconds += SECONDS["seed"]
    workers = min(args.workers or os.cpu_count(), len(jobs) or 1)
    print(f"study.py: {len(jobs)} seeds, {workers} at a time: {seconds / 3600 / workers:.1f} hours")

    def run(job):
        argv = ["--rounds", str(args.rounds), "--runs", args.runs, "--out", args.out, "--here"]
        argv = [sys.executable, __file__, *job, *argv] + (["--small"] if args.small else [])
        return subprocess.run(argv, env=os.environ | ENVIRONMENT).returncode

    pool = ThreadPoolExecutor(workers)
    try:  # a seed that fails does not stop the others, but Ctrl-C does
        failed = [job for job, status in zip(jobs, pool.map(run, jobs), strict=True) if status]
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise data.Mistake(f"{len(failed)} of {len(jobs)} seeds failed: {failed[0][:4]} ...")
    print(page.tables(out))
    for task in args.tasks.split(",") if args.pictures else []:
        Path(args.pictures).mkdir(parents=True, exist_ok=True)
        page.pictures(page.Table(page.read_rows(out / "study.csv"), task), Path(args.pictures))


def main(argv: list[str] | None = None) -> int:
    parser = data.new_parser("study.py", __doc__)
    add = parser.add_argument
    add("--tasks", default="dialogue,summary", help="A,B")
    add("--arms", default="", help="A,B; empty: all of the task's")
    add("--seeds", default="0,1,2,3,4,5,6,7", help="A,B")
    add("--rounds", type=int, default=4, help="of RM and PPO, at most")
    add("--runs", default="runs/study", help="folder for models and samples")
    add("--out", default=str(Path(__file__).parent), help="folder of settings.json and study.csv")
    add("--pictures", default="", help="folder to draw pictures into")
    add("--workers", type=int, default=0, help="seeds at a time; 0: one per core")
    add("--small", action="store_true", help="tiny sizes, to see whether all of it runs")
    add("--here", action="store_true", help="run the one seed in this process")
    return data.command(parser, study, argv)


if __name__ == "__main__":
    sys.exit(main())
