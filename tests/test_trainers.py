"""README's loops and docs/trainers/: all ways to take the step end where `metarm_step` ends.

torchrun starts this file as the program of two processes, which run the scripts made for it.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_pairs, make_policy, write_rows

import metarm
import rm

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = ROOT / "docs" / "trainers"
SNIPPET = r"<!-- snippet: ([\w-]+) -->\n```python\n(.*?)```\n"
SNIPPETS = dict(re.findall(SNIPPET, (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL))


def vector(tensors):
    tensors = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return torch.cat([t.detach().flatten() for t in tensors])


def run(code, file="README.md", **forced):
    """Runs code as it stands, but with other options of the step; returns its variables."""
    variables = {"__name__": "__main__", "__file__": str(file)}
    lookahead, metarm_step = metarm.lookahead, metarm.metarm_step
    metarm.lookahead = lambda *args, **options: lookahead(*args, **options | forced)
    metarm.metarm_step = lambda *args, **options: metarm_step(*args, **options | forced)
    try:
        exec(compile(code, file, "exec"), variables)
    finally:
        metarm.lookahead, metarm.metarm_step = lookahead, metarm_step
    return variables


def plain_loop(**forced):
    return vector(run(SNIPPETS["plain-loop"], **forced)["model"].parameters())


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_these_comparisons_can_fail(float64):
    ends = [plain_loop(normalize=True), plain_loop(normalize=False), plain_loop(eta=0.0)]
    assert min((a - b).abs().max() for a, b in zip(ends, ends[1:], strict=False)) > 1e-6


@pytest.mark.parametrize("normalize", [False, True])
def test_lookahead_in_the_readme(normalize, float64):
    definitions, _ = SNIPPETS["plain-loop"].split("for step")
    end = run(definitions + SNIPPETS["plain-lookahead"], normalize=normalize)["model"].parameters()
    expected = plain_loop(normalize=normalize)
    torch.testing.assert_close(vector(end), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_grad_scaler(normalize, float64):
    has = run(SNIPPETS["plain-loop"].split("for step")[0])
    model, optimizer, L, J = has["model"], has["optimizer"], has["L"], has["J"]
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        X_t, X_s = torch.randn(8, 2, 6), torch.randn(4, 5, 6)
        optimizer.zero_grad()
        scaler.scale(J(model, X_s)).backward()
        # .grad is scale * grad J: divide eta by the scale, but not that of a normalised step.
        eta = 0.1 if normalize else 0.1 / scaler.get_scale()
        with metarm.lookahead(model, eta, normalize):
            scaler.scale(L(model, X_t)).backward()
        scaler.step(optimizer)
        scaler.update()
    end = vector(model.parameters())
    torch.testing.assert_close(end, plain_loop(normalize=normalize), rtol=0, atol=1e-12)

    # One infinite entry of grad J before the tanh: the loss stays finite, the step is skipped.
    scaler.scale(J(model, X_s)).backward()
    model[0].weight.grad[2, 3] = torch.inf
    with metarm.lookahead(model, eta, normalize):
        scaler.scale(L(model, X_t)).backward()
    scaler.step(optimizer)
    assert torch.equal(vector(model.parameters()), end)


# ---------------------------------------------------------------------------------- two processes


@contextmanager
def lookahead_with_traps(model, x, eta, normalize):
    """lookahead after an exception in a first attempt, with forwards that have no backward."""
    gradients = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(KeyError), metarm.lookahead(model, eta, normalize):
        model(x)
        raise KeyError
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    model(x)
    with metarm.lookahead(model, eta, normalize):
        model(x)
        yield
        model(x)


def gpt2(kind, normalize, rank=0, world=1):
    """Returns where a small GPT-2 ends, by metarm_step or wrapped, with checkpointing and traps."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16}
    dropout = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    config = transformers.GPT2Config(num_labels=1, pad_token_id=0, **sizes, **dropout)
    model = wrapped = transformers.GPT2ForSequenceClassification(config).double()
    if kind:
        model.gradient_checkpointing_enable()
        model.train()
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif kind == "fsdp2":
        for module in [*model.transformer.h, model]:
            dist.fsdp.fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        pairs, samples = torch.randint(1, 40, (4, 2, 9)), torch.randint(1, 40, (4, 3, 9))
        pairs[..., 7:] *= torch.randint(2, (4, 2, 1))  # some rows end in padding
        X_t, X_s = pairs[rank::world].flatten(0, 1), samples[rank::world].flatten(0, 1)

        def L(forward, X_t=X_t):
            return rm.preference_loss(*forward(X_t).logits.view(-1, 2).unbind(1))

        def J(forward, X_s=X_s):
            return metarm.difference_loss(forward(X_s).logits.view(-1, 3))

        if not kind:
            metarm.metarm_step(model, optimizer, L, J, 0.1, normalize=normalize)
            continue
        optimizer.zero_grad()
        J(wrapped).backward()
        with lookahead_with_traps(wrapped, X_t, 0.1, normalize):
            L(wrapped).backward()
        optimizer.step()
    return vector(model.parameters())


def under_torchrun(folder):
    """What each of the two processes does."""
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    worst = {}
    for kind in ("ddp", "fsdp2"):
        file = TRAINERS / f"{kind}.py"
        for forced in ({}, {"normalize": False}):
            torch.set_default_dtype(torch.float64)
            end = run(file.read_text(encoding="utf-8"), file, **forced)["model"].parameters()
            worst[f"{kind} {forced}"] = vector(end) - plain_loop(**forced)
            dist.init_process_group = lambda backend: None  # the first script has joined for all
            torch.set_default_dtype(torch.float32)  # transformers makes its own choice
            normalize = forced.get("normalize", True)
            end = gpt2(kind, normalize, dist.get_rank(), 2)
            worst[f"GPT-2 {kind} {normalize}"] = end - gpt2(None, normalize)

    fsdp1 = dist.fsdp.FullyShardedDataParallel(torch.nn.Linear(6, 1), device_id="cpu")
    fsdp1(torch.ones(2, 6)).sum().backward()
    with pytest.raises(ValueError, match="FSDP1"), metarm.lookahead(fsdp1, 0.1, normalize=True):
        pass
    worst = {case: difference.abs().max().item() for case, difference in worst.items()}
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(worst))
    destroy()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_ddp_and_fsdp2(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [__file__, str(tmp_path)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in "01":
        worst = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(worst) == 8 and max(worst.values()) < 1e-9, worst


# ----------------------------------------------------------------------------------- TRL and LoRA


@pytest.fixture
def toy_run(tmp_path, monkeypatch):
    """Stands in a folder with a tiny runs/toy; gives (pairs of D, prompts of S)."""
    pairs = make_pairs(4)
    samples = [x | {"responses": [x["chosen"], x["rejected"], " help me"]} for x in pairs]
    for name, rows in [("pairs/train.jsonl", pairs), ("metarm-1/meta/samples.jsonl", samples)]:
        path = tmp_path / "runs/toy" / name
        path.parent.mkdir(parents=True)
        write_rows(path, rows)
    make_policy(tmp_path / "runs/toy/sft", "gpt2", pad=None)
    monkeypatch.chdir(tmp_path)
    return pairs, samples


def losses_of(model, tokenizer, pairs, samples):
    """Returns (L, J, D, S). L and J take all of D and S, or the groups given."""
    D, S = [rm.encode_groups(model, tokenizer, items, "")[1] for items in (pairs, samples)]

    def L(forward, groups=D):
        return rm.pair_loss(forward, model, tokenizer, groups)

    def J(forward, groups=S):
        rewards = rm.rewards_of(forward, model, tokenizer, groups)
        return metarm.difference_loss(rewards.view(len(groups), -1))

    return L, J, D, S


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl(toy_run, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed; tests/requirements.txt names it")
    monkeypatch.setattr(sys, "path", [str(TRAINERS), *sys.path])
    script = runpy.run_path(str(TRAINERS / "trl.py"), run_name="__main__")
    model, tokenizer = rm.load_reward_model("runs/trl")
    assert rm.score(model, tokenizer, ["Human: order"], [" sorry"]).isfinite().all()

    def trainer(model, normalize, **options):
        options |= {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "optim": "adamw_torch"}
        options |= {"bf16": False, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        config = script["RewardConfig"](
            "runs/trl-2", max_steps=3, per_device_train_batch_size=4, **options
        )
        options = {"args": config, "processing_class": tokenizer, "samples": script["S"]}
        options |= {"train_dataset": script["Dataset"].from_list(script["D"])}
        return script["MetaRewardTrainer"](model, eta=0.1, normalize=normalize, **options)

    # A batch is all of D and all of S, so the order in which they are drawn does not matter.
    for normalize in (False, True):
        theirs, ours = [rm.load_reward_model("runs/toy/sft", seed=0)[0].double() for _ in range(2)]
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, weight_decay=0.0)
        L, J, _, _ = losses_of(ours, tokenizer, *toy_run)
        ready = trainer(theirs, normalize)
        ready.train()
        for _ in range(3):  # TRL, too, clips at 1
            metarm.metarm_step(ours, optimizer, L, J, 0.1, normalize=normalize, max_grad_norm=1.0)
        end = vector(ours.parameters())
        torch.testing.assert_close(vector(theirs.parameters()), end, rtol=0, atol=1e-9)

        # fp16 has a GradScaler, and eta is divided by its scale (but not when normalised).
        ready.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        theirs.zero_grad()
        ready.training_step(theirs, ready.data_collator(script["D"]))
        gradient, _ = metarm.meta_gradient(ours, L, J, 0.1, normalize=normalize)
        found = vector(p.grad for p in theirs.parameters()) / 1024
        torch.testing.assert_close(found, vector(gradient.values()), rtol=0, atol=1e-8)

    with pytest.raises(ValueError, match="set gradient_accumulation_steps=1"):
        trainer(model, True, gradient_accumulation_steps=2)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")
def test_lora(toy_run):
    pytest.importorskip("peft", reason="peft is not installed; tests/requirements.txt names it")
    lora, ends = runpy.run_path(str(TRAINERS / "lora.py")), []
    for checkpointing in (False, True):  # metarm_step, lookahead
        model, tokenizer = lora["load"]("runs/toy/sft")
        theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert model.dtype == torch.bfloat16
        assert {p.dtype for p in theta.values()} == {torch.float32}
        model.double()
        if checkpointing:
            lora["checkpoint_gradients"](model)
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(theta.values(), lr=1e-3)
        L, J, D, S = losses_of(model.get_base_model(), tokenizer, *toy_run)
        X_t, X_s = metarm.micro_batches(L, D, 3), metarm.micro_batches(J, S, 3)
        if checkpointing:
            with pytest.raises(ValueError, match="lookahead"):
                metarm.meta_gradient(model, X_t, X_s, 0.1)
        for _ in range(3):
            lora["turn"](model, optimizer, X_t, X_s, 0.1, checkpointing)
        ends.append(vector(theta.values()))
        stayed = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
        assert stayed == set(before) - set(theta)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)

    for options in ([], ["--gradient_checkpointing", "--micro_batch_size", "3", "--out", "x"]):
        lora["main"](["--batch_size", "4", *options])
    model, tokenizer = rm.load_reward_model("runs/lora/rm")
    assert rm.score(model, tokenizer, ["Human: order"], [" sorry"]).isfinite().all()


def test_memory_table(capsys):
    page = (TRAINERS / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    assert capsys.readouterr().out in page


if __name__ == "__main__":
    under_torchrun(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads, now and then, abort a process whose interpreter ends normally
