"""README's loops and docs/trainers/: all ways to take the step end where `metarm_step` ends.

torchrun starts this file as the program of two processes, which run the scripts made for it.
"""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ARCHITECTURES, make_pairs, make_policy, vector, write_rows

import metarm
import rm

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = ROOT / "docs" / "trainers"
SNIPPET = r"<!-- snippet: ([\w-]+) -->\n```python\n(.*?)```\n"
SNIPPETS = dict(re.findall(SNIPPET, (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL))


def run(code, file="README.md", **forced):
    variables = {"__name__": "__main__", "__file__": str(file)}
    lookahead, metarm_step = metarm.lookahead, metarm.metarm_step
    metarm.lookahead = lambda *args, **options: lookahead(*args, **options | forced)
    metarm.metarm_step = lambda *args, **options: metarm_step(*args, **options | forced)
    torch.set_default_dtype(torch.float64)
    try:
        exec(compile(code, file, "exec"), variables)
    finally:
        torch.set_default_dtype(torch.float32)
        metarm.lookahead, metarm.metarm_step = lookahead, metarm_step
    return variables


def plain_loop(**forced):
    return vector(run(SNIPPETS["plain-loop"], **forced)["model"].parameters())


def test_all_examples_take_the_default_climb():
    told = [metarm.__doc__, metarm.lookahead.__doc__, *SNIPPETS.values()]
    told += [file.read_text(encoding="utf-8") for file in TRAINERS.glob("*.py")]
    climbs = re.findall(r"eta=([\d.]+),\s+normalize=(\w+)", "".join(told))
    assert len(climbs) == 7 and set(climbs) == {(str(metarm.DEFAULT_LENGTH), "True")}


def test_lookahead_in_the_readme():
    definitions, _ = SNIPPETS["plain-loop"].split("for step")
    for normalize in (False, True):
        has = run(definitions + SNIPPETS["plain-lookahead"], normalize=normalize)
        end, expected = vector(has["model"].parameters()), plain_loop(normalize=normalize)
        torch.testing.assert_close(end, expected, rtol=0, atol=1e-12)


def gpt2(kind, normalize, rank=0, world=1):
    import transformers

    torch.manual_seed(0)
    config = ARCHITECTURES["gpt2"](40)
    config.num_labels, config.pad_token_id = 1, 0
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = wrapped = transformers.GPT2ForSequenceClassification(config).double()
    if kind:
        model.gradient_checkpointing_enable()
        model.train()
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif kind == "fsdp2":
        for module in [*model.transformer.h, model]:
            dist.fsdp.fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    if kind:  # called at other parameters, it would not average: the processes would drift apart
        for net in (wrapped, torch.nn.Sequential(wrapped), torch.compile(wrapped)):
            with pytest.raises(ValueError, match="one set of parameters; use metarm.lookahead"):
                metarm.adapted_parameters(net, lambda forward: forward(torch.ones(1, 9)), 0.1)
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
        gradients = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(KeyError), metarm.lookahead(wrapped, 0.1, normalize):
            wrapped(X_t)
            raise KeyError  # a first attempt that fails
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        wrapped(X_t)  # forwards without a backward, at theta and at theta'
        with metarm.lookahead(wrapped, 0.1, normalize):
            wrapped(X_t)
            L(wrapped).backward()
            wrapped(X_t)
        optimizer.step()
    return vector(model.parameters())


def under_torchrun(folder):
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    worst = {}
    for kind in ("ddp", "fsdp2"):
        file = TRAINERS / f"{kind}.py"
        for normalize in (True, False):
            how = {"eta": 0.1, "normalize": normalize}
            has = run(file.read_text(encoding="utf-8"), file, **how)
            end, expected = vector(has["model"].parameters()), plain_loop(**how)
            worst[f"{kind} {normalize}"] = end - expected
            dist.init_process_group = lambda backend: None  # the first script has joined for all
            end, expected = gpt2(kind, normalize, dist.get_rank(), 2), gpt2(None, normalize)
            worst[f"GPT-2 {kind} {normalize}"] = end - expected
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


@pytest.fixture
def toy_run(tmp_path, monkeypatch):
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
        options |= {"max_steps": 3, "per_device_train_batch_size": 4}
        of_S = {"eta": 0.1, "normalize": normalize, "samples": script["S"]}
        config, D = script["RewardConfig"]("x", **options), script["Dataset"].from_list(script["D"])
        trl = script["MetaRewardTrainer"]
        return trl(model, args=config, train_dataset=D, processing_class=tokenizer, **of_S)

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
        # An overflow in grad J is left to the scaler, which finds NaN in grad L.
        theirs.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr(ready.accelerator.scaler, "scale", lambda loss: loss * math.inf)
            ready.training_step(theirs, ready.data_collator(script["D"]))
        assert not vector(p.grad for p in theirs.parameters()).isfinite().all()
    with pytest.raises(ValueError, match="set gradient_accumulation_steps=1"):
        trainer(model, True, gradient_accumulation_steps=2)
    Path("runs/toy/pairs/train.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match=r"^trl.py: error: .*train.jsonl"):
        runpy.run_path(str(TRAINERS / "trl.py"), run_name="__main__")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")
def test_lora(toy_run, monkeypatch):
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
    monkeypatch.setattr(sys, "argv", ["lora.py", "--data", "missing.jsonl"])
    with pytest.raises(SystemExit, match=r"^lora.py: error: .*missing.jsonl"):
        runpy.run_path(str(TRAINERS / "lora.py"), run_name="__main__")

    model, _ = lora["load"](make_policy("llama", "llama"))  # RoPE: a buffer stays what it was
    buffers = dict(model.named_buffers())
    rope = [name for name in buffers if "inv_freq" in name]
    assert rope and all(buffers[name].dtype == torch.float32 for name in rope)
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert torch.bfloat16 in frozen


def test_memory_table(capsys):
    page = (TRAINERS / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    assert capsys.readouterr().out in page


if __name__ == "__main__":
    under_torchrun(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads, now and then, abort a process whose interpreter ends normally
