"""How fast the five files are, and how much memory they take, beside what people would use instead.

Both sides of a comparison run in ONE process and in turn (A B A B ...), from the same weights and
on the same rows. Each turn gives a ratio; the table has their median, and the spread in brackets.
What counts is CPU time of the process, one thread, so that a busy neighbour on another core counts
for little. Our training loops are those of the commands, from the first step to the last; TRL's are
timed by its own callbacks. Set-up and saving count on neither side. No peer is slowed down by a
default that would cost it time on a CPU: TRL's gradient checkpointing and bf16 are off.

    bash run.sh bench                  makes .venv-bench for the peers, then runs this file
    bash run.sh bench --data FILE      with preference rows of HH-RLHF that are here already
    bash run.sh bench --only scoring   measures one part anew

writes the table of README.md and, with the times of every turn, results.json. About ten minutes.
"""

import bisect
import contextlib
import functools
import importlib.metadata
import io
import json
import operator
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data
import metarm
import ppo
import rm

# As in run.sh: glibc keeps the memory of a step for the next one. Both sides are given that.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
}
# TRL's and transformers' own defaults otherwise, fused AdamW among them.
PEER = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none"}
PEER |= {"save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
ETA, MAX_LENGTH, VOCABULARY, SIDES = 0.01, 512, 8000, ("chosen", "rejected")

# --------------------------------------------------------------------------------------- measuring

look_ups: list[tuple[int, bool]] = []  # (ids, gradients taken?) of each embedding: tokens AS RUN


@contextlib.contextmanager
def counted_tokens():
    """Notes every look-up of token ids, whoever runs it; a timed loop clears the list first."""

    def note(module, inputs):
        if isinstance(module, torch.nn.Embedding):
            look_ups.append((inputs[0].numel(), torch.is_grad_enabled()))

    look_ups.clear()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


def in_turn(turns: int, warm_up=True, **sides) -> dict:
    """Returns {"seconds": {side: [of each turn]}, "tokens" and "passes": {side: of one call}}.

    A side is a function. Its CPU time counts, or the float that it returns (of a loop without its
    set-up). warm_up: the first turn is not timed. Tokens are those that the models are given,
    padding included. Passes count them three times where gradients are taken: a backward pass costs
    two forward passes.
    """
    found = {what: {name: [] for name in sides} for what in ("seconds", "tokens", "passes")}
    for turn in range(turns + warm_up):
        for name, side in sides.items():
            with counted_tokens():
                start = time.process_time()
                inner = side()
                taken = inner if isinstance(inner, float) else time.process_time() - start
            if turn >= warm_up:
                found["seconds"][name].append(taken)
            found["tokens"][name] = sum(n for n, _ in look_ups)
            found["passes"][name] = sum(3 * n if gradient else n for n, gradient in look_ups)
    return found


def our_loop(main, arguments: list, module, first: str) -> float:
    """Returns CPU seconds of a command, from the first call of module.first to its save_model."""
    marks, begin, save = [], getattr(module, first), rm.save_model

    def starting(*args, **kwargs):
        if not marks:
            look_ups.clear()
            marks.append(time.process_time())
        return begin(*args, **kwargs)

    def saving(*args):
        marks.append(time.process_time())
        save(*args)

    starts = mock.patch.object(module, first, starting)
    with starts, mock.patch.object(rm, "save_model", saving):
        command(main, arguments)
    return marks[1] - marks[0]


def their_loop(make_trainer) -> float:
    """Returns CPU seconds of a transformers Trainer, from its first step to the end of its last."""
    from transformers import TrainerCallback

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.process_time())

        def on_train_begin(self, *_, **__):
            look_ups.clear()
            marks.append(time.process_time())

    with quiet():
        trainer = make_trainer()
        trainer.add_callback(Clock())
        trainer.train()
    return marks[-1] - marks[0]


def peak_bytes(step) -> int:
    """Returns the most tensor memory that `step` holds beyond what was there, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def command(main, arguments: list) -> None:
    """Runs a command of the five files; its message is an error here."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(heard):
        status = main([str(argument) for argument in arguments])
    if status:
        raise RuntimeError(heard.getvalue())


# ------------------------------------------------------------------------------------ table rows


def row(what: str, ours: str, other: str, ratio: list[float], arithmetic=None, goal="") -> dict:
    """Returns a row of the table. ratio: of each turn; arithmetic: what it alone would give."""
    names = ("what", "ours", "other", "ratio", "arithmetic", "goal")
    return dict(zip(names, (what, ours, other, ratio, arithmetic, goal), strict=True))


def speed(what: str, n: int, unit: str, found: dict, sides: tuple, peer: str, goal="") -> dict:
    """Returns a row: how many times as many of the n `unit` per second as the other side."""
    seconds, text = found["seconds"], {}
    for side in sides:
        each = found["tokens"][side] / n
        text[side] = f"{n / median(seconds[side]):.1f} {unit}/s, {each:.0f} tokens each"
    ours, theirs = sides
    ratio = over(seconds[theirs], seconds[ours])
    arithmetic = found["passes"][theirs] / found["passes"][ours]
    return row(what, text[ours], f"{peer}: {text[theirs]}", ratio, arithmetic, goal)


def over(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


# ------------------------------------------------------------- the parts: what is run beside what
# Each takes the options and a folder to work in, and returns (rows of the table, what was found).


def rm_training(args, box):
    """`python rm.py` and TRL's RewardTrainer: the same ids, batches of 8, AdamW, clipping."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    folder, tokenizer, pairs = real(args.data, box)
    pairs, batch = pairs[:40], 8
    data.write_jsonl(box / "d.jsonl", pairs)
    model, _ = rm.load_reward_model(folder, seed=0)
    _, D = rm.encode_groups(model, tokenizer, pairs, args.data)
    ids = [{f"{side}_ids": sum(r, []) for side, r in zip(SIDES, g, strict=True)} for g in D]
    options = ["--model", folder, "--data", box / "d.jsonl", "--batch_size", batch, "--out"]
    settings = {"per_device_train_batch_size": batch, "num_train_epochs": 1, "learning_rate": 5e-6}

    def ours():
        return our_loop(rm.main, options + [fresh(box)], rm, "fit")

    def unsorted():  # rows of any length side by side, as TRL has them
        with mock.patch.object(rm, "row_lengths", lambda groups: [0] * len(groups)):
            return ours()

    def trainer():
        config = RewardConfig(**PEER, **settings, output_dir=fresh(box), max_length=MAX_LENGTH)
        dataset = Dataset.from_list(ids)
        return RewardTrainer(folder, config, train_dataset=dataset, processing_class=tokenizer)

    sides = {"trl": lambda: their_loop(trainer), "ours": ours, "unsorted": unsorted}
    found = in_turn(args.turns, warm_up=False, **sides)
    what, measured = "RM training, 6 layers, batch 8", (len(D), "pairs", found)
    return [
        speed(what, *measured, ("ours", "trl"), "TRL RewardTrainer", "≥ 1.6"),
        speed("– without batches of like length", *measured, ("unsorted", "trl"), "the same"),
    ], found


def scoring(args, box):
    """k = 5 responses to one prompt: `rm.score` as it is, and with every row read in full."""
    folder, tokenizer, pairs = real(args.data, box)
    model, _ = rm.load_reward_model(folder, seed=0)
    _, S, texts = batch_of(tokenizer, pairs, 8, prompt=(80, 300), longer=3)
    prompts, responses = [[item["prompt"]] * 5 for item in texts], [x["responses"] for x in texts]

    def one_by_one(shares: bool):  # one prompt per call
        with mock.patch.object(model, "shares_prompts", shares):
            calls = zip(prompts, responses, strict=True)
            return torch.cat([rm.score(model, tokenizer, *texts) for texts in calls])

    def at_once(shares: bool):
        with mock.patch.object(model, "shares_prompts", shares):
            return rm.score(model, tokenizer, sum(prompts, []), sum(responses, []))

    ways = {"one": one_by_one, "all": at_once}
    sides = {f"{n}, {x}": functools.partial(f, x) for n, f in ways.items() for x in (False, True)}
    found = in_turn(args.turns, **sides) | {
        "prompt": mean(len(group[0][0]) for group in S),
        "response": mean(len(ids) for group in S for _, ids in group),
        "difference": (one_by_one(True) - one_by_one(False)).abs().max().item(),
    }
    what = "Scoring 5 responses ({response:.0f} tokens) to one prompt ({prompt:.0f})"
    measured, peer = (5 * len(S), "rows", found), "rows in full"
    return [
        speed(what.format(**found), *measured, ("one, True", "one, False"), peer, "≥ 2"),
        speed("– 8 such prompts in one batch", *measured, ("all, True", "all, False"), peer),
    ], found


def meta_step(args, box):
    """A plain step on D, MetaRM's step of either order on D and S, and torchopt's exact one."""
    folder, tokenizer, pairs = real(args.data, box)
    model, _ = rm.load_reward_model(folder, seed=0)
    D, S, _ = batch_of(tokenizer, pairs, 16)
    cases = {"D and S of equal tokens": (D[:8], D[:8]), "16 pairs + 16 × 5": (D, S)}
    rows, all_found, names = [], {}, ("plain", "first", "exact", "torchopt")
    for case, batches in cases.items():
        sides = steps(model, tokenizer, *batches)
        found = in_turn(args.turns, **{name: sides[name] for name in names})
        all_found[case] = found
        plain, first, exact, torchopt = found["seconds"].values()
        tokens_of_D, tokens = found["tokens"]["plain"], found["tokens"]["first"]
        arithmetic = [t * tokens / tokens_of_D for t in plain]
        mine, theirs = f"{median(exact):.2f} s", f"torchopt MetaSGD: {median(torchopt):.2f} s"
        token_cost = f"its tokens at a plain step's cost: {median(arithmetic):.2f} s"
        what, cost = f"First-order step, {case} ({tokens} tokens)", over(first, arithmetic)
        rows.append(row(what, f"{median(first):.2f} s", token_cost, cost, 1.0, "≤ 1.15"))
        # 3 per token of D (forward, backward), 9 per token of S (and a pass through both of these).
        ideal, goal = 3 - 2 * tokens_of_D / tokens, "≤ 2.2" if batches[0] is batches[1] else ""
        other, ratio = f"first order: {median(first):.2f} s", over(exact, first)
        rows.append(row(f"Exact ÷ first-order step, {case}", mine, other, ratio, ideal, goal))
        rows.append(row("– torchopt ÷ our exact", mine, theirs, over(torchopt, exact), 1.0, "≥ 1"))
    exact, _ = metarm.meta_gradient(model, sides["L"], sides["J"], ETA, "exact")
    theirs = torchopt_gradient(model, sides["L"], sides["J"])
    gap = sum((theirs[name] - g).square().sum() for name, g in exact.items())
    norm = sum(g.square().sum() for g in exact.values())
    return rows, all_found | {"difference": (gap / norm).sqrt().item()}


def memory(args, box):
    """Peak of a step. The model and AdamW's two moments are there before and after, and counted."""
    folder, tokenizer, pairs = real(args.data, box)
    model, _ = rm.load_reward_model(folder, seed=0)
    D, S, _ = batch_of(tokenizer, pairs, 16)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())

    def tokens(loss):
        with counted_tokens(), torch.no_grad():
            loss(model)
        return sum(n for n, _ in look_ups)

    for size in (16, 8, 4, 2, 1):  # the largest micro-batches of S with no more tokens than D
        parts = steps(model, tokenizer, D, S, size)
        if max(map(tokens, parts["J"])) <= tokens(parts["L"][0]):
            break
    whole = steps(model, tokenizer, D, S)
    peak = {}
    for kind, sides, names in (
        ("", parts, ("plain", "first", "exact")),
        (", S whole", whole, ("first", "exact", "torchopt")),
    ):
        sides["plain"]()  # AdamW makes its moments in its first step
        peak |= {n + kind: (3 * parameters + peak_bytes(sides[n])) / 2**20 for n in names}
    budget = peak["plain"] + 2 * parameters / 2**20
    other = f"plain step ({peak['plain']:.0f}) + copy + gradient: {budget:.0f} MiB"
    names = {"first": f"Peak memory, first order, S {size} prompts at a time"}
    names |= {"exact": "– exact, likewise"}
    names |= {f"{n}, S whole": f"– {n}, S whole" for n in ("first", "exact", "torchopt")}
    goals = {"first": "≤ 1.10"}
    return [
        row(what, f"{peak[name]:.0f} MiB", other, [peak[name] / budget], None, goals.get(name, ""))
        for name, what in names.items()
    ], peak


def ppo_toy(args, box):
    """The toy preset's policy, after a short SFT, so that its answers end by themselves."""
    world, sft = box / "toy", box / "sft"
    if not sft.exists():
        command(data.main, ["toy", "--out", world, "--ppo", 64])
        inputs = ["--model", world / "model", "--data", world / "sft.jsonl", "--lr", 5e-3]
        command(ppo.main, ["sft", "--out", sft, *inputs])
    prompts = data.read_prompts(world / "prompts-ppo.jsonl")[:32]
    what = "PPO, toy model, 96 rollouts"
    return ppo_iteration(args, box, what, str(sft), prompts, rollouts=96, minibatch=48, steps=2)


def ppo_six_layers(args, box):
    """The 6-layer model on HH prompts of 80 to 140 tokens: untrained, so hardly an answer ends."""
    folder, tokenizer, pairs = real(args.data, box)
    prompts = [pair["prompt"] for pair in pairs]
    lengths = [len(rm.encode(tokenizer, prompt, "")[0]) for prompt in prompts]
    prompts = [x for x, length in zip(prompts, lengths, strict=True) if 80 <= length <= 140]
    what = "PPO, 6 layers, 16 rollouts"
    return ppo_iteration(args, box, what, folder, prompts[:12], rollouts=16, minibatch=8, steps=1)


def ppo_iteration(args, box, what, model, prompts, rollouts, minibatch, steps):
    """4 rollouts per prompt, 2 epochs. At lr 1e-9 the policy stays as it is, and so do lengths."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import RLOOConfig, RLOOTrainer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    aside, prompts = 8, [{"prompt": prompt} for prompt in prompts]  # `aside`: scale the rewards
    data.write_jsonl(box / "prompts.jsonl", prompts)
    reward_model = f"{model}-rm"
    rm.save_model(*rm.load_reward_model(model, seed=0), reward_model)
    tokenizer = rm.load_reward_model(reward_model)[1]
    tokenizer.padding_side = "left"
    options = {"reward_model": reward_model, "prompts": box / "prompts.jsonl", "steps": steps}
    options |= {"scale_prompts": aside, "batch_size": rollouts, "rollouts_per_prompt": 4}
    options |= {"minibatch_size": minibatch, "micro_batch_size": minibatch, "ppo_epochs": 2}
    options |= {"model": model, "max_new_tokens": 48, "lr": 1e-9, "critic_lr": 1e-9}
    common = PEER | {"learning_rate": 1e-9, "missing_eos_penalty": 1.0, "output_dir": fresh(box)}

    def ours():
        options["out"] = fresh(box)
        flags = sum(([f"--{name}", value] for name, value in options.items()), [])
        return our_loop(ppo.main, ["ppo", *flags], ppo, "rollout")

    def number_of(path):
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)

    def ppo_trainer():
        config = PPOConfig(
            **common,
            per_device_train_batch_size=rollouts,
            num_mini_batches=rollouts // minibatch,
            local_rollout_forward_batch_size=rollouts,
            total_episodes=rollouts * steps,
            num_ppo_epochs=2,
            response_length=48,
            temperature=1.0,
            stop_token="eos",
            num_sample_generations=0,
        )
        ids = [{"input_ids": rm.encode(tokenizer, x["prompt"], "")[0]} for x in prompts[aside:]]
        policy, reference = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
        models = {"model": policy, "ref_model": reference, "value_model": number_of(model)}
        models |= {"reward_model": number_of(reward_model), "processing_class": tokenizer}
        dataset = Dataset.from_list([x for x in ids for _ in range(4)])
        return PPOTrainer(config, **models, train_dataset=dataset)

    def rloo_trainer():
        updates = 2 * rollouts // minibatch
        rest = {name: value for name, value in common.items() if name != "missing_eos_penalty"}
        config = RLOOConfig(
            **rest,
            per_device_train_batch_size=minibatch,
            num_generations=4,
            steps_per_generation=rollouts // minibatch,
            num_iterations=2,
            max_steps=steps * updates,
            max_completion_length=48,
            logging_steps=updates,
        )
        judge = {"reward_processing_classes": tokenizer, "processing_class": tokenizer}
        dataset = Dataset.from_list(prompts[aside:])
        return RLOOTrainer(model, number_of(reward_model), config, train_dataset=dataset, **judge)

    sides = {"ppo": lambda: their_loop(ppo_trainer), "ours": ours}
    sides["rloo"] = lambda: their_loop(rloo_trainer)
    found = in_turn(args.turns, warm_up=False, **sides)
    measured, without = (rollouts * steps, "samples", found), "– beside RLOO, which has no critic"
    return [
        speed(what, *measured, ("ours", "ppo"), "TRL PPOTrainer", "≥ 2"),
        speed(without, *measured, ("ours", "rloo"), "TRL RLOOTrainer"),
    ], found


PARTS = {"rm": rm_training, "scoring": scoring, "meta": meta_step, "memory": memory}
PARTS |= {"ppo_toy": ppo_toy, "ppo_six_layers": ppo_six_layers}

# ---------------------------------------------------------------------- steps, models and batches


def steps(model, tokenizer, D, S, prompts_per_micro_batch: int = 0) -> dict:
    """Returns functions of one whole step, and their losses "L" and "J" as metarm.py has them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=0.0)

    def loss_L(forward, part):
        return rm.pair_loss(forward, model, tokenizer, part)

    def loss_J(forward, part):
        rewards = rm.rewards_of(forward, model, tokenizer, part)
        return metarm.difference_loss(rewards.view(len(part), -1))

    L = metarm.micro_batches(loss_L, D, len(D))
    J = metarm.micro_batches(loss_J, S, prompts_per_micro_batch or len(S))

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def plain():  # as in rm.py
        L[0](model).backward()
        update()

    def torchopt():
        for name, gradient in torchopt_gradient(model, L, J).items():
            model.get_parameter(name).grad = gradient
        update()

    def meta(order):
        metarm.metarm_step(model, optimizer, L, J, ETA, order, max_grad_norm=1.0)

    orders = {order: functools.partial(meta, order) for order in ("first", "exact")}
    return {"plain": plain, "torchopt": torchopt, "L": L, "J": J} | orders


def torchopt_gradient(model, L, J) -> dict[str, torch.Tensor]:
    """Returns the exact gradient as torchopt documents it: L's, through a differentiable SGD step."""
    import torchopt

    theta = torchopt.extract_state_dict(model, by="reference")
    parameters = dict(model.named_parameters())
    climb = torchopt.MetaSGD(model, lr=ETA, maximize=True)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        climb.step(sum(loss(model) for loss in J) / len(J))
    loss = L[0](model)
    torchopt.recover_state_dict(model, theta)
    loss.backward()
    gradients = {name: p.grad for name, p in parameters.items()}
    model.zero_grad()
    return gradients


@functools.cache
def real(path: str, box: Path):
    """Returns (folder of an untrained Llama, 6 layers of width 256, its tokenizer, pairs)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, pairs = str(box / "six-layers"), data.read_preferences(data.from_hub(path))[:1400]
    bpe, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer, bpe.decoder = byte_level, decoders.ByteLevel()
    alphabet = {"initial_alphabet": byte_level.alphabet(), "vocab_size": VOCABULARY}
    trainer = trainers.BpeTrainer(**alphabet, show_progress=False)
    bpe.train_from_iterator((pair["prompt"] + pair["chosen"] for pair in pairs), trainer)
    special = {"eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": MAX_LENGTH}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ends |= {"bos_token_id": None, "tie_word_embeddings": True, "vocab_size": len(tokenizer)}
    rm.save_model(LlamaForCausalLM(LlamaConfig(**shape, **ends)), tokenizer, folder)

    def length(pair):
        return max(len(sum(rm.encode(tokenizer, pair["prompt"], pair[x]), [])) for x in SIDES)

    return folder, tokenizer, [pair for pair in pairs if length(pair) <= MAX_LENGTH]


def batch_of(tokenizer, pairs: list[dict], n: int, prompt=(80, 140), longer=0.0):
    """Returns (D, S, S as texts): n encoded pairs, and their n prompts with k = 5 responses each.

    These are the pair's own and three of other rows, as long as its chosen one. Responses have 20
    to 60 tokens; prompts lie within `prompt`, at least `longer` times as long as their responses.
    """
    pool = [(len(rm.encode(tokenizer, "", pair[x])[1]), pair[x]) for pair in pairs for x in SIDES]
    pool.sort()
    found = []
    for pair in pairs:
        own = len(rm.encode(tokenizer, "", pair["chosen"])[1]), pair["chosen"]
        near = pool[bisect.bisect(pool, own) :][:3]
        responses = [pair[side] for side in SIDES] + [text for _, text in near]
        group = [rm.encode(tokenizer, pair["prompt"], response) for response in responses]
        P, T = len(group[0][0]), [len(response_ids) for _, response_ids in group]
        if prompt[0] <= P <= prompt[1] and 20 <= min(T) <= max(T) <= 60 and P >= longer * mean(T):
            found.append((group[:2], group, {"prompt": pair["prompt"], "responses": responses}))
    if len(found) < n:
        raise data.Mistake(f"--data: {len(found)} rows of a usual length are too few; give more")
    return [list(column) for column in zip(*found[:n], strict=True)]


def fresh(box: Path) -> str:
    """Returns the name of a new folder."""
    return tempfile.mkdtemp(dir=box) + "/out"


# ----------------------------------------------------------------------------------------- the page


def line(item: dict) -> str:
    """Returns a row as a line of the page's table."""
    ratio, arithmetic, goal = item["ratio"], item["arithmetic"], item["goal"]
    middle, low, high = median(ratio), min(ratio), max(ratio)
    spread = f"**{middle:.2f}**" + (f" ({low:.2f}..{high:.2f})" if len(ratio) > 1 else "")
    met = ""
    if goal:
        sign, bound = goal.split()
        fulfils = operator.ge if sign == "≥" else operator.le
        met = "met" if fulfils(round(middle, 2), float(bound)) else "**not met**"
    allowed = "" if arithmetic is None else f"{arithmetic:.2f}"
    cells = [item["what"], item["ours"], item["other"], spread, allowed, goal, met]
    return "| " + " | ".join(cells) + " |"


def write_page(page: Path, results: dict) -> None:
    """Puts the table between the two markers of README.md, whose text is written by hand."""
    rows = [r for name in PARTS if name in results["parts"] for r in results["parts"][name]["rows"]]
    head = "| what | ours | the other | ratio | arithmetic alone | goal |  |\n" + "|---" * 7 + "|\n"
    missing = ", ".join(name for name in PARTS if name not in results["parts"])
    table = head + "\n".join(map(line, rows)) + f"\n\n{results['machine']}.\n"
    table += f"\n**Not measured yet: {missing}.**\n" if missing else ""
    start, end = "<!-- table -->\n", "<!-- end of table -->"
    before, after = page.read_text(encoding="utf-8").split(start)
    data.write_text(page, before + start + table + end + after.split(end)[1])


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [x.split(":")[1].strip() for x in info.splitlines() if x.startswith("model name")]
    packages = ("torch", "transformers", "trl", "torchopt")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"One thread of {names[0] if names else 'a CPU'}; {versions}"


def run(args) -> None:
    torch.set_num_threads(1)
    here = Path(__file__).resolve().parent
    store = here / "results.json"
    results = json.loads(store.read_text(encoding="utf-8")) if args.only else {"parts": {}}
    with tempfile.TemporaryDirectory() as box:
        for name in args.only or PARTS:
            start = time.monotonic()
            rows, found = PARTS[name](args, Path(box))
            results["parts"][name] = {"rows": rows, "found": found}
            results["machine"] = machine()
            data.write_text(store, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
            print(*map(line, rows), sep="\n", flush=True)
    write_page(here / "README.md", results)


def main(argv=None) -> int:
    parser, source = data.new_parser("bench.py", __doc__), "Anthropic/hh-rlhf/harmless-base"
    add = parser.add_argument
    add("--data", default=f"{source}/train.jsonl.gz", help="HH-RLHF: a file here or on the hub")
    add("--only", nargs="*", choices=list(PARTS), help="measure these parts anew, and no other")
    add("--turns", type=int, default=5, help="turns of each comparison")
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)
    return data.command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
