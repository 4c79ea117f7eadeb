"""How fast, beside what people would pick instead: TRL's trainers, torchopt's differentiable optimizer, plain rows.

Concept: ratios, not seconds. Both sides of a comparison run in ONE process and in turn (A B A B ...), from the
same weights and on the same rows; a ratio is taken in each turn, and the page gives their median, the smallest and
the largest. CPU time of the process, one thread: a busy neighbour on the other core then counts for little. Our
training loops are the shipped ones (`rm.train`, `ppo.ppo`), timed where they draw their progress bar; TRL's, where
it calls its callbacks; setting up and saving count on neither side. No peer is held back by a default that would
cost it time on a CPU: gradient checkpointing and bf16, both on in TRL, are switched off.

    bash run.sh bench                            # makes an environment for the peers, then runs this file
    python docs/bench/bench.py --data FILE       # the same in an environment of yours (requirements.txt beside it)
    python docs/bench/bench.py --only scoring    # one part, measured anew

writes `README.md` (the table), `results.json` (the times of every turn; finished parts are kept there, so that the
same command goes on where it was cut off) and `cost.png`. About twelve minutes.
"""

import bisect
import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from unittest import mock

# glibc gives the memory of each step back and gets it anew, page by page; both sides are spared that (as in run.sh).
# It reads these when the process starts, hence the second start.
SETTINGS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_MMAP_THRESHOLD_": "1073741824",
            "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "67108864"}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in SETTINGS.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import data  # noqa: E402
import metarm  # noqa: E402
import ppo  # noqa: E402
import rm  # noqa: E402


# ------------------------------------------------------------------------------------------------------ measuring

def in_turn(repetitions: int, sides: dict, warm_up: bool = True) -> dict:
    """{"seconds": {side: [one a turn]}, "tokens" and "passes": {side: of one call}} of functions called in turn, A B A B.

    A function's CPU time counts, or the float that it returns (of a trainer's loop without its set-up). With
    `warm_up`, the first turn is not timed: what is long and starts by loading models can do without. Tokens are
    those that each side's models are given, padding included; passes count them three times where gradients are
    taken, a backward pass costing two forward ones.
    """
    seconds, tokens, passes = {name: [] for name in sides}, {}, {}
    for turn in range(repetitions + warm_up):
        for name, function in sides.items():
            with counted_tokens():
                start = time.process_time()
                inner = function()
                taken = inner if isinstance(inner, float) else time.process_time() - start
            if turn >= warm_up:
                seconds[name].append(taken)
            tokens[name] = sum(n for n, _ in LOOK_UPS)
            passes[name] = sum(3 * n if with_gradient else n for n, with_gradient in LOOK_UPS)
    return {"seconds": seconds, "tokens": tokens, "passes": passes}


LOOK_UPS: list[tuple[int, bool]] = []  # (ids, gradients taken?) of every embedding look-up: the tokens AS RUN


@contextlib.contextmanager
def counted_tokens():
    """Notes every look-up of token ids in LOOK_UPS, whoever runs it; a timed loop clears the list where it starts."""
    def note(module, inputs):
        if isinstance(module, torch.nn.Embedding):
            LOOK_UPS.append((inputs[0].numel(), torch.is_grad_enabled()))

    LOOK_UPS.clear()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


def our_loop(train, config) -> float:
    """CPU seconds of a shipped loop, from its first turn to its last."""
    marks = []

    class Clock(contextlib.nullcontext):  # stands in for the progress bar
        def __init__(self, items, **_):
            self.items = items

        def __enter__(self):
            return self

        def __iter__(self):
            LOOK_UPS.clear()
            for item in self.items:
                marks.append(time.process_time())
                yield item
            marks.append(time.process_time())

        def set_postfix(self, **_):
            pass

    with mock.patch("tqdm.tqdm", Clock), quiet():
        train(config)
    return marks[-1] - marks[0]


def their_loop(trainer) -> float:
    """CPU seconds from the start of a transformers Trainer's first step to the end of its last."""
    from transformers import TrainerCallback
    marks = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(time.process_time())

        on_step_end = on_step_begin

        def on_train_begin(self, *_, **__):
            LOOK_UPS.clear()

    trainer.add_callback(Clock())
    with quiet():
        trainer.train()
    return marks[-1] - marks[0]


def peak_bytes(step) -> int:
    """The most tensor memory that `step` holds beyond what was there before, as torch's allocator reports it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ------------------------------------------------------------------------- the parts: what is run beside what
# Each takes the configuration and a folder to work in, and returns numbers for results.json.

def rm_training(cfg, box) -> dict:
    """rm.py's loop and TRL's RewardTrainer: the same ids, batch of 8, AdamW, clipping, float32."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer
    folder, tokenizer, pairs = real(cfg.data, box)
    pairs, batch = pairs[:40], 8
    data.write_jsonl(box / "d.jsonl", pairs)
    encoded = rm.encode_pairs(rm.load_reward_model(folder, seed=0)[0], tokenizer, pairs, MAX_LENGTH, "")
    dataset = Dataset.from_list([{"chosen_ids": sum(chosen, []), "rejected_ids": sum(rejected, [])}
                                 for chosen, rejected in encoded])

    def ours():
        return our_loop(rm.train, rm.RMConfig(model=folder, data=str(box / "d.jsonl"), out=fresh(box),
                                              batch_size=batch, micro_batch_size=batch, max_length=MAX_LENGTH))

    def ours_unsorted():  # rows of any length side by side, as TRL has them
        with mock.patch.object(rm, "row_lengths", lambda groups: [0] * len(groups)):
            return ours()

    def theirs():
        with quiet():
            trainer = RewardTrainer(folder, RewardConfig(
                **PEER, output_dir=fresh(box), per_device_train_batch_size=batch, num_train_epochs=1,
                max_length=MAX_LENGTH, learning_rate=5e-6), train_dataset=dataset, processing_class=tokenizer)
        return their_loop(trainer)

    sides = {"theirs": theirs, "ours": ours, "ours_unsorted": ours_unsorted}
    return in_turn(cfg.repetitions, sides, warm_up=False) | {
        "pairs": len(pairs), "prompt": mean(len(chosen[0]) for chosen, _ in encoded),
        "response": mean(len(row[1]) for pair in encoded for row in pair),
        "least_tokens": sum(len(a[0]) + len(a[1]) + len(b[1]) for a, b in encoded)}


def scoring(cfg, box) -> dict:
    """k = 5 responses to one prompt: `rm.score` as it is, and with every row read in full."""
    folder, tokenizer, pairs = real(cfg.data, box)
    model, _ = rm.load_reward_model(folder, seed=0)
    _, S, texts = batch_of(tokenizer, pairs, 8, prompt=(80, 300), longer=3)
    prompts, responses = [[row["prompt"]] * 5 for row in texts], [row["responses"] for row in texts]

    def one_prompt_a_call():
        return torch.cat([rm.score(model, tokenizer, *text) for text in zip(prompts, responses)])

    def all_at_once():
        return rm.score(model, tokenizer, sum(prompts, []), sum(responses, []))

    def in_full(function):
        with mock.patch.object(rm, "SHARE_PROMPTS", set()):
            return function()

    return in_turn(cfg.repetitions, {
        "theirs": lambda: in_full(one_prompt_a_call), "ours": one_prompt_a_call,
        "theirs_at_once": lambda: in_full(all_at_once), "ours_at_once": all_at_once}) | {
        "rows": 5 * len(S), "prompt": mean(len(group[0][0]) for group in S),
        "response": mean(len(response_ids) for group in S for _, response_ids in group),
        "difference": (one_prompt_a_call() - in_full(one_prompt_a_call)).abs().max().item()}


def meta_step(cfg, box) -> dict:
    """A plain step on D, a MetaRM step of either order on D and S, and the exact one written with torchopt."""
    folder, tokenizer, pairs = real(cfg.data, box)
    model, _ = rm.load_reward_model(folder, seed=0)
    D, S, _ = batch_of(tokenizer, pairs, 16)
    found = {}
    for name, D, S in (("16x5", D, S), ("equal", D[:8], D[:8])):  # equal: the pairs again, as 8 prompts with k = 2
        sides = steps(model, tokenizer, D, S)
        names = ("plain", "first", "exact", "torchopt")
        found[name] = in_turn(cfg.repetitions, {side: sides[side] for side in names})
    exact, _ = metarm.meta_gradient(model, sides["L"], sides["J"], ETA, "exact")
    first, _ = metarm.meta_gradient(model, sides["L"], sides["J"], ETA, "first")
    theirs = torchopt_gradient(model, sides["L"], sides["J"])

    def apart(a):
        return sum((a[name] - g).square().sum() for name, g in exact.items()).sqrt().item()

    norm = sum(g.square().sum() for g in exact.values()).sqrt().item()
    return found | {"difference": apart(theirs) / norm, "difference_first": apart(first) / norm}


def memory(cfg, box) -> dict:
    """Peak of a step, in bytes, beyond the model and AdamW's two moments, which are there before and after."""
    folder, tokenizer, pairs = real(cfg.data, box)
    model, _ = rm.load_reward_model(folder, seed=0)
    D, S, _ = batch_of(tokenizer, pairs, 16)

    def tokens(loss):
        with counted_tokens(), torch.no_grad():
            loss(model)
        return sum(n for n, _ in LOOK_UPS)

    whole = steps(model, tokenizer, D, S)
    whole["plain"]()  # AdamW makes its moments in its first step
    for size in (16, 8, 4, 2, 1):  # the largest micro-batches of S with no more tokens than D
        parts = steps(model, tokenizer, D, S, size)
        if max(map(tokens, parts["J"])) <= tokens(parts["L"][0]):
            break
    parts["plain"]()
    peak = {side: peak_bytes(parts[side]) for side in ("plain", "first", "exact")}
    peak |= {f"{side}, S whole": peak_bytes(whole[side]) for side in ("first", "exact", "torchopt")}
    return {"parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
            "prompts_a_micro_batch": size, "peak": peak}


def ppo_toy(cfg, box) -> dict:
    """The toy preset's policy, after a short SFT, so that its answers end by themselves."""
    world, sft = box / "toy", box / "sft"
    if not sft.exists():
        with quiet():
            data.main(["toy", "--out", str(world), "--ppo", "64"])
            run_ppo("sft", ppo.PPOConfig(model=str(world / "model"), data=str(world / "sft.jsonl"), out=str(sft),
                                         lr=5e-3))
    prompts = data.read_prompts(world / "prompts-ppo.jsonl")
    return ppo_iteration(cfg, box, str(sft), prompts[:32], rollouts=96, minibatch=48, tokens=48, iterations=2)


def ppo_six_layers(cfg, box) -> dict:
    """The 6-layer model on HH prompts of 80 to 140 tokens: untrained, so that (almost) no answer ends early."""
    folder, tokenizer, pairs = real(cfg.data, box)
    prompts = [pair["prompt"] for pair in pairs
               if 80 <= len(rm.encode(tokenizer, pair["prompt"], "")[0]) <= 140]
    return ppo_iteration(cfg, box, folder, prompts[:12], rollouts=16, minibatch=8, tokens=48, iterations=1)


def ppo_iteration(cfg, box, model: str, prompts: list[str], rollouts: int, minibatch: int, tokens: int,
                  iterations: int) -> dict:
    """4 rollouts a prompt, 2 epochs over them. At lr 1e-9 the policy stays what it is, and so do its lengths."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RLOOConfig, RLOOTrainer
    aside, prompts = prompts[:8], prompts[8:]  # ppo.py scales its rewards on the first few
    data.write_jsonl(box / "prompts.jsonl", [{"prompt": prompt} for prompt in aside + prompts])
    reward_model, lengths = f"{model}-rm", {"theirs": [], "ours": []}
    rm.save_model(*rm.load_reward_model(model, seed=0), reward_model)
    tokenizer = rm.load_reward_model(reward_model)[1]

    def ours():
        out = fresh(box)
        seconds = our_loop(functools.partial(run_ppo, "ppo"), ppo.PPOConfig(
            model=model, reward_model=reward_model, prompts=str(box / "prompts.jsonl"), scale_prompts=len(aside),
            out=out, steps=iterations, batch_size=rollouts, rollouts_per_prompt=4, ppo_epochs=2,
            minibatch_size=minibatch, micro_batch_size=minibatch, max_new_tokens=tokens, lr=1e-9, critic_lr=1e-9))
        lengths["ours"] += [row["val/mean_length"] for row in data.read_jsonl(f"{out}/log.jsonl")]
        return seconds

    def ours_without_critic():
        with mock.patch.object(ppo, "Critic", Level):
            return ours()

    def theirs():
        updates = 2 * rollouts // minibatch
        with quiet():
            trainer = RLOOTrainer(
                model, AutoModelForSequenceClassification.from_pretrained(reward_model), RLOOConfig(
                    **PEER, output_dir=fresh(box), per_device_train_batch_size=minibatch, num_generations=4,
                    steps_per_generation=rollouts // minibatch, num_iterations=2, max_steps=iterations * updates,
                    max_completion_length=tokens, learning_rate=1e-9, beta=0.05, logging_steps=updates),
                train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
                processing_class=tokenizer, reward_processing_classes=tokenizer)
        seconds = their_loop(trainer)
        lengths["theirs"] += [row["completions/mean_length"] for row in trainer.state.log_history
                              if "completions/mean_length" in row]
        return seconds

    sides = {"theirs": theirs, "ours": ours, "ours_without_critic": ours_without_critic}
    return in_turn(cfg.repetitions, sides, warm_up=False) | {
        "rollouts": rollouts * iterations, "length": {side: mean(found) for side, found in lengths.items()}}


class Level(torch.nn.Module):
    """In place of ppo.py's critic, to see what that costs: one number, the same in every state."""

    def __init__(self, path: str):
        super().__init__()
        self.level = torch.nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        return self.level.expand(batch["mask"].shape)


def cost(cfg, box) -> dict:
    """For the picture: a step over the model's width (at k = 5) and over k (at width 256); 4 pairs, 4 prompts."""
    from transformers import LlamaConfig, LlamaForSequenceClassification
    generator, points = torch.Generator().manual_seed(0), []

    def group(responses):  # a prompt of 96 tokens, responses of 32
        prompt, *rest = (torch.randint(1, 500, (n,), generator=generator).tolist() for n in [96] + responses * [32])
        return tuple((prompt, response) for response in rest)

    for width, k in [(64, 5), (128, 5), (256, 5), (384, 5), (256, 2), (256, 3), (256, 4), (256, 6), (256, 8)]:
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(LlamaConfig(
            vocab_size=500, hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=6, num_labels=1,
            num_attention_heads=4, max_position_embeddings=256, pad_token_id=0)).eval()
        D, S = ([group(responses) for _ in range(4)] for responses in (2, k))
        sides = steps(model, SimpleNamespace(pad_token_id=0), D, S)
        weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
        points.append({"width": width, "k": k, "weights": weights} | in_turn(
            min(3, cfg.repetitions), {side: sides[side] for side in ("plain", "first", "exact")}))
    return {"points": points}


PARTS = {"rm": rm_training, "scoring": scoring, "meta": meta_step, "memory": memory, "ppo_toy": ppo_toy,
         "ppo_six_layers": ppo_six_layers, "cost": cost}

# TRL's and transformers' own defaults otherwise, fused AdamW among them.
PEER = dict(bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, lr_scheduler_type="linear", dataloader_pin_memory=False)


# --------------------------------------------------------------------------------------- steps, models and batches

ETA = 0.01


def steps(model, tokenizer, D, S, prompts_a_micro_batch: int = 0) -> dict:
    """Functions that take one whole step - "plain", "first", "exact", "torchopt" - and their losses, "L" and "J"."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=0.0)  # the weights stay what they are

    def loss_L(forward, chunk):
        return rm.pair_loss(forward, model, tokenizer, chunk)

    def loss_J(forward, chunk):
        return metarm.difference_loss(rm.rewards_of(forward, model, tokenizer, chunk).view(len(chunk), -1))

    L = metarm.micro_batches(loss_L, D, range(len(D)), len(D))
    J = metarm.micro_batches(loss_J, S, range(len(S)), prompts_a_micro_batch or len(S))

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def plain():  # as in rm.py
        L[0](model).backward()
        update()

    def with_torchopt():
        for name, gradient in torchopt_gradient(model, L, J).items():
            model.get_parameter(name).grad = gradient
        update()

    def meta(order):
        metarm.metarm_step(model, optimizer, L, J, ETA, order, max_grad_norm=1.0)

    return {"plain": plain, "first": lambda: meta("first"), "exact": lambda: meta("exact"),
            "torchopt": with_torchopt, "L": L, "J": J}


def torchopt_gradient(model, L, J) -> dict[str, torch.Tensor]:
    """The exact meta gradient as torchopt documents it: climb by a differentiable SGD, back-propagate through it."""
    import torchopt
    parameters = dict(model.named_parameters())
    theta = torchopt.extract_state_dict(model, by="reference")
    climb = torchopt.MetaSGD(model, lr=ETA, maximize=True)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        climb.step(sum(loss(model) for loss in J) / len(J))
    loss = L[0](model)
    torchopt.recover_state_dict(model, theta)
    loss.backward()
    gradients = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return gradients


MAX_LENGTH, VOCABULARY, SIDES = 512, 8000, ("chosen", "rejected")


@functools.cache
def real(path: str, box: Path):
    """(folder of an untrained 6-layer Llama of width 256, its tokenizer, those pairs of `path` that fit)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    folder = str(box / "six-layers")
    with quiet():
        pairs = data.read_preferences(data.from_hub(path))[:1400]
    bpe, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer, bpe.decoder = byte_level, decoders.ByteLevel()
    bpe.train_from_iterator((pair["prompt"] + pair["chosen"] for pair in pairs), trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=byte_level.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|eos|>", pad_token="<|pad|>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=640, num_hidden_layers=6,
        num_attention_heads=4, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)

    def length(pair):
        return max(len(sum(rm.encode(tokenizer, pair["prompt"], pair[side]), [])) for side in SIDES)

    return folder, tokenizer, [pair for pair in pairs if length(pair) <= MAX_LENGTH]


def batch_of(tokenizer, pairs: list[dict], n: int, prompt=(80, 140), longer: float = 0.0):
    """(D, S, S as texts): n encoded pairs, and their n prompts with k = 5 responses each, the pair's own and three
    of other rows, as long as its chosen one (the policy's answers would be such). Responses of 20 to 60 tokens and
    prompts within `prompt`, at least `longer` times as long as their responses."""
    pool = sorted((len(rm.encode(tokenizer, "", pair[side])[1]), pair[side]) for pair in pairs for side in SIDES)
    rows = []
    for pair in pairs:
        near = bisect.bisect(pool, (len(rm.encode(tokenizer, "", pair["chosen"])[1]), pair["chosen"]))
        responses = [pair[side] for side in SIDES] + [text for _, text in pool[near:near + 3]]
        group = tuple(rm.encode(tokenizer, pair["prompt"], response) for response in responses)
        P, T = len(group[0][0]), [len(response_ids) for _, response_ids in group]
        if prompt[0] <= P <= prompt[1] and 20 <= min(T) and max(T) <= 60 and P >= longer * mean(T):
            rows.append((group[:2], group, {"prompt": pair["prompt"], "responses": responses}))
    if len(rows) < n:
        raise ValueError(f"--data: {len(rows)} rows of a usual length are too few; give more rows of HH-RLHF")
    return [list(column) for column in zip(*rows[:n])]


def fresh(box: Path) -> str:
    """The name of a new folder."""
    return tempfile.mkdtemp(dir=box) + "/out"


def run_ppo(mode: str, config) -> None:
    config.mode = mode
    ppo.run(config)


# --------------------------------------------------------------------------------------------------------- the page

def rows_of(parts: dict, toy_minutes: list[float]) -> list[list[str]]:
    """The table's rows."""
    rows = []

    def ratios(above, below):
        return [a / b for a, b in zip(above, below)]

    def row(what, ours, other, ratio, goal="–", met=None, ideal=None):
        """`met`: what the median ratio has to fulfil; `ideal`: (share of the ideal) as a function of it."""
        middle, low, high = median(ratio), min(ratio), max(ratio)
        spread = f" ({low:.2f}..{high:.2f})" if low < high else ""
        share = f"{100 * ideal(middle):.0f} %" if ideal else "–"
        rows.append([what, ours, other, f"**{middle:.2f}**{spread}", share, goal,
                     "–" if met is None else "met" if met(middle) else "**not met**"])

    if part := parts.get("rm"):
        s, tokens, n = part["seconds"], part["tokens"], part["pairs"]
        rate = {side: f"{n / median(s[side]):.1f} pairs/s, {tokens[side] / n:.0f} tokens each" for side in s}
        best = tokens["theirs"] / part["least_tokens"]
        row("RM training, 6 layers, batch 8", rate["ours"], f"TRL RewardTrainer: {rate['theirs']}",
            ratios(s["theirs"], s["ours"]), "≥ 1.6", lambda x: x >= 1.6, lambda x: x / best)
        row("– without batches of like length", rate["ours_unsorted"], "the same",
            ratios(s["theirs"], s["ours_unsorted"]), ideal=lambda x: x / best)
    if part := parts.get("scoring"):
        s, n, P, T = part["seconds"], part["rows"], part["prompt"], part["response"]
        for end, what, goal in (("", f"Scoring 5 responses ({T:.0f} tokens) to one prompt ({P:.0f})", "≥ 2"),
                                ("_at_once", "– 8 such prompts in one batch", "–")):
            ours, theirs = s["ours" + end], s["theirs" + end]
            row(what, f"{n / median(ours):.0f} rows/s", f"rows in full: {n / median(theirs):.0f} rows/s",
                ratios(theirs, ours), goal, (lambda x: x >= 2) if goal != "–" else None,
                lambda x: x / (5 * (P + T) / (P + 5 * T)))
    if part := parts.get("meta"):
        cases = {"equal": "D and S of equal tokens", "16x5": "16 pairs + 16 × 5"}
        for case, name in cases.items():
            s, tokens = part[case]["seconds"], part[case]["tokens"]
            arithmetic = [t * tokens["first"] / tokens["plain"] for t in s["plain"]]
            row(f"First-order step, {name} ({tokens['first']} tokens)", f"{median(s['first']):.2f} s",
                f"its tokens at a plain step's cost: {median(arithmetic):.2f} s", ratios(s["first"], arithmetic),
                "≤ 1.15", lambda x: x <= 1.15, lambda x: 1 / x)
        for case, name in cases.items():
            s, tokens = part[case]["seconds"], part[case]["tokens"]
            share_of_D = tokens["plain"] / tokens["first"]
            least = (3 * share_of_D + 9 * (1 - share_of_D)) / 3  # the factors: see below the table
            row(f"Exact ÷ first-order step, {name}", f"exact: {median(s['exact']):.2f} s",
                f"first order: {median(s['first']):.2f} s", ratios(s["exact"], s["first"]),
                "≤ 2.2" if case == "equal" else "–", (lambda x: x <= 2.2) if case == "equal" else None,
                lambda x: least / x)
            row(f"– torchopt ÷ our exact step, {name}", f"exact: {median(s['exact']):.2f} s",
                f"torchopt MetaSGD: {median(s['torchopt']):.2f} s", ratios(s["torchopt"], s["exact"]), "≥ 1",
                lambda x: round(x, 2) >= 1)
    if part := parts.get("memory"):
        held = 3 * part["parameters"]  # the parameters and AdamW's two moments
        peak = {side: (held + extra) / 2**20 for side, extra in part["peak"].items()}
        budget = peak["plain"] + 2 * part["parameters"] / 2**20
        for side, what in (("first", f"Peak memory, first order, S {part['prompts_a_micro_batch']} prompts at a time"),
                           ("exact", "– exact, likewise"), ("exact, S whole", "– exact, S whole"),
                           ("torchopt, S whole", "– torchopt, S whole")):
            is_goal = side == "first"
            row(what, f"{peak[side]:.0f} MiB", f"plain step ({peak['plain']:.0f}) + copy + gradient: {budget:.0f} MiB",
                [peak[side] / budget], "≤ 1.10" if is_goal else "–", (lambda x: x <= 1.1) if is_goal else None,
                (lambda x: 1 / x) if is_goal else None)
    for name, what in (("ppo_toy", "PPO iteration, toy model, 96 rollouts"),
                       ("ppo_six_layers", "PPO iteration, 6 layers, 16 rollouts")):
        if part := parts.get(name):
            s, tokens = part["seconds"], part["length"]
            rate = {side: f"{part['rollouts'] / median(s[side]):.1f} samples/s" for side in s}
            ideals = ideals_of(part["passes"])
            row(f"{what} ({tokens['ours']:.1f} tokens each, TRL {tokens['theirs']:.1f})", rate["ours"],
                f"TRL RLOOTrainer, which has no critic: {rate['theirs']}", ratios(s["theirs"], s["ours"]), "≥ 2",
                lambda x: x >= 2, lambda x: x / ideals["ideal"])
            row("– like for like: our critic left out", rate["ours_without_critic"], "the same",
                ratios(s["theirs"], s["ours_without_critic"]), ideal=lambda x: x / ideals["alone"])
    if toy_minutes:
        row(f"`bash run.sh`, toy, whole loop, 2 cores, {len(toy_minutes)} runs", f"{median(toy_minutes):.1f} min", "6 min",
            [minutes / 6 for minutes in toy_minutes], "≤ 1", lambda x: x <= 1)
    return rows


def ideals_of(passes: dict[str, int]) -> dict[str, float]:
    """How many times TRL's speed the tokens alone would allow a PPO iteration: as it is, without the critic, and were
    all but the updates free. The critic reads each token 7 times: once for its values, 3 times in each of 2 epochs."""
    critic = passes["ours"] - passes["ours_without_critic"]
    costs = {"ideal": passes["ours"], "alone": passes["ours_without_critic"], "update": 2 * 6 / 7 * critic}
    return {what: passes["theirs"] / cost for what, cost in costs.items()}


PAGE = """# Fast: measured beside what people would pick instead

Written by `bench.py`; made again by `bash run.sh bench`. {machine}.

{table}

Ratio: the median over {turns} turns, A B A B in one process, with the smallest and the largest in brackets: how many
times as fast, or, where the goal is a "≤", how many times the cost. CPU time of the process, one thread on both sides,
float32, the same weights and rows. Share of the ideal: how near this is to what the arithmetic alone would allow.
{warnings}
## What was compared

- **RM training.** {pairs} pairs of HH-RLHF harmless-base of up to 512 tokens (prompts of {prompt:.0f} tokens, responses
  of {response:.0f} on average), a BPE tokenizer of 8000 trained on such rows, a Llama of 6 layers and width 256 made
  from its config. Our side is `rm.train` itself; TRL's `RewardTrainer` gets the very same ids. Both take AdamW steps
  (TRL its default, the fused one), clip and log. Two things make the difference: a pair's prompt is read once
  (P + 2T tokens instead of 2P + 2T), and rows of like length share a batch (less padding). The ideal is TRL's tokens
  as run, padding included, over P + 2T without any padding.
- **Scoring.** `rm.score` against itself with sharing off: the same rows in the same batches, read in full. The ideal
  is 5 (P + T) over P + 5 T. The rewards differ by {difference_scoring:.0e} at most.
- **First-order step.** `metarm.metarm_step` on D and S as `metarm.py` builds them, without diagnostics, against
  (tokens of D + tokens of S) × the cost per token of a plain RM step on the same D. Tokens as run, which is what the
  embedding is given: a shared prompt once, padding included.
- **Exact step.** A matrix product costs 1 forward and 2 backward; to differentiate through that takes 4 more for the
  backward pass and 2 for the forward pass: 3 for D, 9 for S. With as many tokens in D as in S this is
  (3 + 9) / (3 + 3) = 2.0 times the first-order step, with more in S up to 3: the ideal of these rows. torchopt's is
  the way it documents, `MetaSGD.step(J)` and back-propagation of L through it. Both find the same gradient: they
  differ by {difference:.0e} of its norm (the first-order one by {difference_first:.0e}).
- **Peak memory.** Tensor memory, summed over every allocation that torch's allocator reports to its profiler (neither
  glibc nor the interpreter blurs it), with the model and AdamW's moments counted on both sides; 16 pairs and 16 × 5
  responses. It is the same in every run, hence no spread. The budget: a plain step on D, a copy of the parameters, a
  gradient.
- **PPO iteration.** Rollout, scoring, log-probabilities of policy and reference, 2 epochs of updates. TRL 1.16 has no
  `PPOTrainer` any more; **`RLOOTrainer` stands in**, at equal rollouts (4 a prompt), lengths, minibatches and epochs.
  It has no critic; ours has one, as large as the policy, and so twice its forward and backward passes in an update.
  "Like for like" is our loop with a constant in the critic's place. The ideal is TRL's tokens over ours, as run and
  counted three times where gradients are taken: {ideal_toy:.2f} on the toy and {ideal_six_layers:.2f} on 6 layers, without the
  critic {alone_toy:.2f} and {alone_six_layers:.2f}. **The goal of 2 is out of reach with such a critic**: were all but the updates of
  policy and critic free, prompts read once, it would be {update_toy:.2f} and {update_six_layers:.2f}. (Above 100 %, something else than
  tokens is saved.) Tried and left out: a prefill inside `generate` that the rollouts of a prompt share; it took a fifth
  off generation on 6 layers, 4 % of the iteration, and 3 % off generation on the toy.
  The toy's policy had 250 steps of SFT, so that its answers end by themselves; the 6-layer one is untrained and runs
  up to the limit of 48 tokens.

Both sides run with glibc told to keep freed memory (`MALLOC_MMAP_THRESHOLD_=1073741824
MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=67108864`), as `run.sh` has it. In TRL, gradient checkpointing and
bf16, on by default, are off: on a CPU they would cost it time.

## Cost against size

![seconds a step over width and over k](cost.png)

6 layers, 4 pairs, and 4 prompts of S; prompts of 96 tokens, responses of 32. The lines are arithmetic alone: 6 FLOPs a
weight and token (18 for those of S in the exact step), at the rate that a plain step reaches at width 384, {rate:.0f}
GFLOP/s. Where a point lies above its line, something else than the weights' matrix products takes the time.
"""


def write_page(out: Path, results: dict, turns: int, key: str) -> None:
    parts = {name: entry["found"] for name, entry in results["parts"].items()}
    head = ["what", "ours", "the other", "ratio", "share of ideal", "goal", ""]
    lines = [head, ["---"] * len(head), *rows_of(parts, results.get("toy_minutes", []))]
    missing = [name for name in PARTS if name not in parts]
    stale = [name for name, entry in results["parts"].items() if entry["key"] != key]
    warnings = [f"\n**Not measured yet: {', '.join(missing)}.**\n"] if missing else []
    warnings += [f"\n**Measured with other code than there is now: {', '.join(stale)}.**\n"] if stale else []
    numbers = {name: parts.get("rm", {}).get(name, 0) for name in ("pairs", "prompt", "response")}
    numbers |= {name: parts.get("meta", {}).get(name, 0) for name in ("difference", "difference_first")}
    numbers["difference_scoring"] = parts.get("scoring", {}).get("difference", 0)
    for name in ("toy", "six_layers"):
        part = parts.get(f"ppo_{name}")
        ideals = ideals_of(part["passes"]) if part else dict.fromkeys(("ideal", "alone", "update"), 0)
        numbers |= {f"{what}_{name}": ideal for what, ideal in ideals.items()}
    numbers["rate"] = draw(parts["cost"]["points"], out / "cost.png") if "cost" in parts else 0
    data.write_text(out / "README.md", PAGE.format(
        table="\n".join("| " + " | ".join(line) + " |" for line in lines), machine=results["machine"], turns=turns,
        warnings="".join(warnings), **numbers))


def draw(points: list[dict], path: Path) -> float:
    """The picture; returns the rate behind its lines, in GFLOP/s."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def seconds(point, side):
        return median(point["seconds"][side])

    def flops(point, side):
        D, S = point["tokens"]["plain"], point["tokens"]["first"] - point["tokens"]["plain"]
        return 6 * point["weights"] * (D + {"plain": 0, "first": 1, "exact": 3}[side] * S)

    widest = max(points, key=lambda point: point["width"])
    rate = flops(widest, "plain") / seconds(widest, "plain")
    figure, (over_width, over_k) = plt.subplots(1, 2, figsize=(10, 4))
    for panel, axis, at in ((over_width, "width", [point for point in points if point["k"] == 5]),
                            (over_k, "k", [point for point in points if point["width"] == 256])):
        at.sort(key=lambda point: point[axis])
        for color, side, label in (("tab:red", "exact", "MetaRM, exact"), ("tab:blue", "first", "MetaRM, first order"),
                                   ("tab:gray", "plain", "plain RM step, without S")):
            x = [point[axis] for point in at]
            panel.plot(x, [seconds(point, side) for point in at], "o", color=color, label=label)
            panel.plot(x, [flops(point, side) / rate for point in at], "-", color=color, lw=1)
        panel.set_ylabel("CPU seconds a step")
        panel.grid(alpha=0.3)
    over_width.set(xlabel="width of the model (k = 5)", xscale="log", yscale="log")
    over_width.set_xticks([64, 128, 256, 384], ["64", "128", "256", "384"])
    over_width.minorticks_off()
    over_k.set(xlabel="k, responses to a prompt of S (width 256)")
    over_k.set_ylim(bottom=0)
    over_width.plot([], [], "-k", lw=1, label="arithmetic alone")
    over_width.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return rate / 1e9


# ----------------------------------------------------------------------------------------------------------- plumbing

@dataclass
class BenchConfig:
    data: str = field(default="Anthropic/hh-rlhf/harmless-base/train.jsonl.gz", metadata={
        "help": "preference rows of HH-RLHF, a file here or on the hub"})
    out: str = field(default=str(HERE), metadata={"help": "folder to write to"})
    only: str = field(default="", metadata={"help": f"measure this part anew, and no other: {', '.join(PARTS)}"})
    repetitions: int = field(default=5, metadata={"help": "turns of each comparison"})
    toy_minutes: list[float] = field(default_factory=list, metadata={
        "help": "what the whole toy loop took, run by run, for the table"})


def run(cfg: BenchConfig) -> None:
    if cfg.only and cfg.only not in PARTS:
        raise ValueError(f"--only {cfg.only}: there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    results = data.read_json(out / "results.json") or {"parts": {}}
    results |= {"machine": machine()} | ({"toy_minutes": cfg.toy_minutes} if cfg.toy_minutes else {})
    rows = data.fingerprint(data.from_hub(cfg.data))
    key = key_of(rows, cfg.repetitions)
    with tempfile.TemporaryDirectory() as box:
        for name, part in PARTS.items():
            if cfg.only and name != cfg.only:
                continue
            if not cfg.only and results["parts"].get(name, {}).get("key") == key:
                print(f"{name}: measured before, with this code on this machine (anew: --only {name})")
                continue
            start = time.monotonic()
            results["parts"][name] = {"found": part(cfg, Path(box)), "key": key}
            data.write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    data.write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_page(out, results, cfg.repetitions, key)
    print(f"{out}: README.md, results.json, cost.png")


def machine() -> str:
    from importlib.metadata import version
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")] or ["a CPU"]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "torchopt"))
    return f"One thread of {names[0]}; {packages}"


def key_of(rows: str, repetitions: int) -> str:
    """What the numbers come from: the code that is measured, the code above that measures, the rows, the machine."""
    above = inspect.getsource(sys.modules[__name__]).split(" the page\n")[0]
    code = [inspect.getsource(module) for module in (rm, metarm, ppo)]
    return hashlib.sha256("\0".join([above, *code, rows, machine(), str(repetitions)]).encode()).hexdigest()[:16]


def main(argv=None) -> int:
    return data.command("bench.py", BenchConfig, run, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
