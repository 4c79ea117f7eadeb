"""How fast the five files are, and how much memory they take, beside what people would use instead.

Both sides of a comparison run in ONE process and in turn (A B A B ...), from the same weights and
on the same rows. Each turn gives a ratio; the table has their median, and the spread in brackets.
What counts is CPU time of one thread, from the first step to the last. Set-up and saving do not.

    bash run.sh bench                  makes .venv-bench for the peers, then runs this file
    bash run.sh bench --data FILE      with preference rows of HH-RLHF that are here already
    bash run.sh bench --only meta      measures one part anew

writes the table of README.md and, with the times of every turn, results.json. About ten minutes.
"""

import importlib.metadata
import io
import json
import os
import random
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import transformers
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from trl import RewardConfig, RewardTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data
import metarm
import ppo
import rm

SETTINGS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SETTINGS |= {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
SETTINGS |= {"MALLOC_TOP_PAD_": "67108864", "TRL_EXPERIMENTAL_SILENCE": "1"}
# TRL's own defaults otherwise. These two would cost it time on a CPU: checkpointing and bf16.
PEER = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none"}
PEER |= {"save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
ETA, MAX_LENGTH, VOCABULARY, SIDES = 0.01, 512, 8000, ("chosen", "rejected")

# --------------------------------------------------------------------------------------- measuring
look_ups: list[tuple[int, bool]] = []  # (ids, gradients taken?) of every embedding: tokens AS RUN
marks: list[tuple[float, int]] = []  # (CPU seconds, look-ups so far)


def note(module, inputs) -> None:
    """Hooked to all modules: notes the look-ups of token ids, whoever runs them."""
    if isinstance(module, torch.nn.Embedding):
        look_ups.append((inputs[0].numel(), torch.is_grad_enabled()))


def mark(*_, **__) -> None:
    marks.append((time.process_time(), len(look_ups)))


def in_turn(turns: int, warm_up=True, **sides) -> dict:
    """Returns {"seconds": {side: [of each turn]}, "passes": {side: of one call}}.

    A side is a function that is timed as a whole or, if it leaves marks, from its first to its
    last. warm_up: the first turn does not count. Passes: one per token that a model is given,
    padding included, and three where gradients are taken, since a backward pass costs two.
    """
    found = {"seconds": {name: [] for name in sides}, "passes": {}}
    for turn in range(turns + warm_up):
        for name, side in sides.items():
            look_ups.clear()
            marks.clear()
            mark()
            side()
            mark()
            inner = marks[1:-1] or marks
            (begin, first), (end, last) = inner[0], inner[-1]
            if turn >= warm_up:
                found["seconds"][name].append(end - begin)
            ids = look_ups[first:last]
            found["passes"][name] = sum(3 * n if gradient else n for n, gradient in ids)
    return found


def our_loop(main, arguments: list, module, first: str) -> None:
    """Runs a command with marks at each call of module.first, and where it saves its model."""

    def noted(*_, **__):
        mark()
        return mock.DEFAULT  # go on with the function itself

    begin = {"wraps": getattr(module, first), "side_effect": noted}
    end = {"wraps": rm.save_model, "side_effect": noted}
    with mock.patch.object(module, first, **begin), mock.patch.object(rm, "save_model", **end):
        command(main, arguments)


def their_loop(make_trainer) -> None:
    """Runs a transformers Trainer with marks where it begins to train, and after each step."""
    clock = transformers.TrainerCallback()
    clock.on_train_begin = clock.on_step_end = mark
    trainer = make_trainer()
    trainer.add_callback(clock)
    trainer.train()


def command(main, arguments: list) -> None:
    """Runs a command of the five files."""
    with quiet() as heard:
        assert main([str(argument) for argument in arguments]) == 0, heard.getvalue()


@contextmanager
def quiet():
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as heard:
        yield heard


def row(what, ours: str, other: str, above: list, below: list, arithmetic=None, goal="") -> dict:
    """Returns a row of the table. Its ratios are above / below; arithmetic: what it alone gives."""
    ratio = [a / b for a, b in zip(above, below, strict=True)]
    texts = {"what": what, "ours": ours, "other": other, "goal": goal}
    return texts | {"ratio": ratio, "arithmetic": arithmetic}


def speed(what, n: int, unit: str, found: dict, ours: str, theirs: str, peer: str, goal="") -> dict:
    """Returns a row: how many times as many of the n `unit` per second as the other side."""
    seconds, passes = found["seconds"], found["passes"]
    text = {side: f"{n / median(times):.1f} {unit}/s" for side, times in seconds.items()}
    times, other = (seconds[theirs], seconds[ours]), f"{peer}: {text[theirs]}"
    return row(what, text[ours], other, *times, passes[theirs] / passes[ours], goal)


# ------------------------------------------------------------- the parts: what is run beside what
# Each takes the options and a folder to work in; returns (rows of the table, what was found).
def rm_training(args, box):
    """`python rm.py` and TRL's RewardTrainer: the same ids, batches of 8, AdamW, clipping."""
    model, tokenizer, pairs = real(args.data, box)
    pairs, batch = pairs[:128], 8  # 16 batches, a pool of `rm.epoch_batches`
    data.write_jsonl(box / "d.jsonl", pairs)
    _, D = rm.encode_groups(model, tokenizer, pairs, args.data)
    ids = [{f"{side}_ids": sum(r, []) for side, r in zip(SIDES, g, strict=True)} for g in D]
    options = ["--model", box / "six", "--data", box / "d.jsonl", "--batch_size", batch]
    settings = {"per_device_train_batch_size": batch, "num_train_epochs": 1, "learning_rate": 5e-6}
    settings |= {"max_length": MAX_LENGTH, "output_dir": str(box / "trl")}

    def ours():
        our_loop(rm.main, [*options, "--out", tempfile.mkdtemp(dir=box)], rm, "fit")

    def trainer():
        rows = {"train_dataset": Dataset.from_list(ids), "processing_class": tokenizer}
        return RewardTrainer(str(box / "six"), RewardConfig(**PEER, **settings), **rows)

    found = in_turn(args.turns, warm_up=False, ours=ours, trl=lambda: their_loop(trainer))
    what, measured = "RM training, 6 layers, batches of 8", (len(D), "pairs", found)
    return [speed(what, *measured, "ours", "trl", "TRL RewardTrainer", "≥ 2")], found


def meta_step(args, box):
    """A plain step on D, and MetaRM's step of either order on D and S."""
    model, tokenizer, pairs = real(args.data, box)
    D, S = batch_of(tokenizer, pairs, 16)
    rows, all_found = [], {}
    for case, X_t, X_s in (("D, S of equal tokens", D[:8], D[:8]), ("16 pairs + 16 × 5", D, S)):
        all_found[case] = found = in_turn(args.turns, **steps(model, tokenizer, X_t, X_s))
        plain, first, exact = found["seconds"].values()
        at = {name: f"{median(seconds):.2f} s" for name, seconds in found["seconds"].items()}
        tokens_of_D, tokens = (found["passes"][name] // 3 for name in ("plain", "first"))
        cost = [seconds * tokens / tokens_of_D for seconds in plain]
        # Per token of D 3 passes; per token of S 3 or, to differentiate through these, 9.
        least, goal = 3 - 2 * tokens_of_D / tokens, "≤ 2.2" if X_t is not D else ""
        what = f"First-order step, {case} ({tokens} tokens)"
        other = f"its tokens in plain steps: {median(cost):.2f} s"
        rows.append(row(what, at["first"], other, first, cost, 1.0, "≤ 1.15"))
        what, other = f"Exact ÷ first order, {case}", f"first order: {at['first']}"
        rows.append(row(what, at["exact"], other, exact, first, least, goal))
    return rows, all_found


def ppo_toy(args, box):
    """The toy preset's policy, after a short SFT, so that its answers end by themselves."""
    world, sft = box / "toy", box / "sft"
    command(data.main, ["toy", "--out", world, "--ppo", 64])
    inputs = ["--model", world / "model", "--data", world / "sft.jsonl", "--lr", 5e-3]
    command(ppo.main, ["sft", "--out", sft, *inputs])
    prompts = data.read_prompts(world / "prompts-ppo.jsonl")[:32]
    return ppo_iteration(args, box, "toy model, 96 rollouts", sft, prompts, 96, 48, steps=2)


def ppo_six_layers(args, box):
    """The 6-layer model on HH prompts of 80 to 140 tokens: untrained, so hardly an answer ends."""
    _, tokenizer, pairs = real(args.data, box)
    lengths = {pair["prompt"]: len(tokenizer(pair["prompt"]).input_ids) for pair in pairs}
    prompts = [prompt for prompt, length in lengths.items() if 80 <= length <= 140][:12]
    return ppo_iteration(args, box, "6 layers, 16 rollouts", box / "six", prompts, 16, 8, steps=1)


def ppo_iteration(args, box, what, model, prompts, rollouts, minibatch, steps):
    """4 rollouts per prompt, 2 epochs. At lr 1e-9 the policy stays as it is, and so do lengths."""
    aside = 8  # of the prompts, on which ppo.py scales its rewards: set-up
    data.write_jsonl(box / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    rm.save_model(*rm.load_reward_model(str(model), seed=0), box / "rm")
    _, tokenizer = rm.load_reward_model(str(box / "rm"))
    tokenizer.padding_side = "left"
    options = {"model": model, "reward_model": box / "rm", "prompts": box / "prompts.jsonl"}
    options |= {"scale_prompts": aside, "batch_size": rollouts, "rollouts_per_prompt": 4}
    options |= {"minibatch_size": minibatch, "micro_batch_size": minibatch, "ppo_epochs": 2}
    options |= {"steps": steps, "max_new_tokens": 48, "lr": 1e-9, "critic_lr": 1e-9}
    common = PEER | {"learning_rate": 1e-9, "temperature": 1.0, "output_dir": str(box / "trl")}

    def ours():
        flags = [text for name, value in options.items() for text in (f"--{name}", value)]
        our_loop(ppo.main, ["ppo", *flags, "--out", tempfile.mkdtemp(dir=box)], ppo, "rollout")

    reader = transformers.AutoModelForSequenceClassification.from_pretrained

    def ppo_trainer():  # one batch of rollouts is generated at a time, as in ppo.py
        settings = {"per_device_train_batch_size": rollouts, "total_episodes": rollouts * steps}
        settings |= {"num_mini_batches": rollouts // minibatch, "num_ppo_epochs": 2}
        settings |= {"local_rollout_forward_batch_size": rollouts, "num_sample_generations": 0}
        settings |= {"response_length": 48, "stop_token": "eos", "missing_eos_penalty": 1.0}
        load = transformers.AutoModelForCausalLM.from_pretrained
        models = {"model": load(model), "ref_model": load(model), "value_model": reader(box / "rm")}
        ids = [{"input_ids": tokenizer(x).input_ids} for x in prompts[aside:] for _ in range(4)]
        models |= {"reward_model": reader(box / "rm"), "train_dataset": Dataset.from_list(ids)}
        return PPOTrainer(PPOConfig(**common, **settings), tokenizer, **models)

    found = in_turn(args.turns, ours=ours, ppo=lambda: their_loop(ppo_trainer))
    measured = (rollouts * steps, "samples", found, "ours")
    return [speed(f"PPO, {what}", *measured, "ppo", "TRL PPOTrainer", "≥ 2")], found


PARTS = {"rm": rm_training, "meta": meta_step}
PARTS |= {"ppo_toy": ppo_toy, "ppo_six_layers": ppo_six_layers}


# ---------------------------------------------------------------------- steps, models and batches
def steps(model, tokenizer, D, S) -> dict:
    """Returns {name: function of one whole step}, with the losses as metarm.py has them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=0.0)

    def loss_J(forward, part):
        rewards = rm.rewards_of(forward, model, tokenizer, part)
        return metarm.difference_loss(rewards.view(len(part), -1))

    def L(forward):
        return rm.pair_loss(forward, model, tokenizer, D)

    J = metarm.micro_batches(loss_J, S, len(S))

    def step(backward):  # as in rm.py
        backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def meta(order):
        metarm.metarm_step(model, optimizer, L, J, ETA, order, max_grad_norm=1.0)

    sides = {"plain": lambda: step(lambda: L(model).backward()), "first": lambda: meta("first")}
    return sides | {"exact": lambda: meta("exact")}


def real(path: str, box: Path):
    """Returns (reward model of 6 layers and width 256, its tokenizer, pairs); an LM in box/six."""
    pairs = data.read_preferences(path)[:1400]
    bpe = ByteLevelBPETokenizer()
    texts = [pair["prompt"] + pair["chosen"] for pair in pairs]
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    ends = {"eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    ends |= {"tokenizer_object": Tokenizer.from_str(bpe.to_str())}
    tokenizer = transformers.PreTrainedTokenizerFast(**ends)
    policy = data.make_model(tokenizer, hidden_size=256, layers=6, seed=0)
    policy.config.max_position_embeddings = MAX_LENGTH
    rm.save_model(policy, tokenizer, box / "six")
    model, _ = rm.load_reward_model(str(box / "six"), seed=0)
    pairs, _ = rm.encode_groups(model, tokenizer, pairs, path, MAX_LENGTH)
    return model, tokenizer, pairs


def batch_of(tokenizer, pairs: list[dict], n: int):
    """Returns (D, S): n encoded pairs, and their n prompts with k = 5 responses each.

    These are the pair's own, and the words of the chosen one in three other orders. Responses have
    20 to 60 tokens, prompts 80 to 140.
    """
    found, rng = [], random.Random(0)
    for pair in pairs:
        words = pair["chosen"].split()
        others = [" " + " ".join(rng.sample(words, len(words))) for _ in range(3)]
        texts = [pair[side] for side in SIDES] + others
        group = [rm.encode(tokenizer, pair["prompt"], text) for text in texts]
        P, T = len(group[0][0]), [len(response_ids) for _, response_ids in group]
        if 80 <= P <= 140 and 20 <= min(T) <= max(T) <= 60:
            found.append((group[:2], group))
    if len(found) < n:
        raise data.Mistake(f"--data: {len(found)} rows of a usual length are too few; give more")
    return [list(column) for column in zip(*found[:n], strict=True)]


# ----------------------------------------------------------------------------------------- the page
def line(item: dict) -> str:
    """Returns a row as a line of the page's table."""
    ratio, arithmetic, goal, met = item["ratio"], item["arithmetic"], item["goal"], ""
    middle, spread = median(ratio), f" ({min(ratio):.2f}..{max(ratio):.2f})"
    if goal:
        sign, bound = goal.split()
        short = round(middle, 2) - float(bound)
        met = "met" if (short >= 0 if sign == "≥" else short <= 0) else "**not met**"
    cells = [item["what"], item["ours"], item["other"]]
    cells += [f"**{middle:.2f}**{spread if len(ratio) > 1 else ''}"]
    cells += ["" if arithmetic is None else f"{arithmetic:.2f}", goal, met]
    return "| " + " | ".join(cells) + " |"


def run(args) -> None:
    """Measures, and puts the table between the markers of README.md, whose text is by hand."""
    torch.nn.modules.module.register_module_forward_pre_hook(note)
    page = Path(__file__).resolve().with_name("README.md")
    store = page.with_name("results.json")
    parts = json.loads(store.read_text(encoding="utf-8")) if args.only else {}
    for name in args.only or PARTS:
        with tempfile.TemporaryDirectory() as box, quiet():
            rows, found = PARTS[name](args, Path(box))
        parts[name] = {"rows": rows, "found": found}
        data.write_text(store, json.dumps(parts, indent=1, ensure_ascii=False) + "\n")
        print(f"{name}:", *map(line, rows), sep="\n", flush=True)
    rows = [item for name in PARTS if name in parts for item in parts[name]["rows"]]
    head = "| what | ours | the other | ratio | arithmetic alone | goal |  |\n" + "|---" * 7 + "|\n"
    packages = ("torch", "transformers", "trl")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    table = head + "\n".join(map(line, rows)) + f"\n\n{versions}\n"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    data.write_text(page, f"{before}<!-- table -->\n{table}{rest[rest.index('<!-- end -->') :]}")


def main(argv=None) -> int:
    parser, rows = data.new_parser("bench.py", __doc__), "harmless-base/train.jsonl.gz"
    add = parser.add_argument
    add("--data", default=f"Anthropic/hh-rlhf/{rows}", help="HH-RLHF: a file here or on the hub")
    add("--only", nargs="*", choices=list(PARTS), help="measure these parts anew, and no other")
    add("--turns", type=int, default=5, help="turns of each comparison")
    return data.command(parser, run, argv)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)
    sys.exit(main())
