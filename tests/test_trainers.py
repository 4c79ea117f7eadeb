"""Every snippet of README.md, run as it stands; all but TRL's must end at the parameters of the plain loop.

The ones for several processes run under torchrun, on two gloo processes: pytest starts this file as that program.
"""

import copy
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
import torch.distributed as dist

import metarm
from rm import preference_loss

README = Path(os.environ.get("METARM_README", ROOT / "README.md"))
SNIPPETS = dict(re.findall(r"<!-- snippet: ([\w-]+) -->\n```python\n(.*?)```\n",
                           README.read_text(encoding="utf-8") if README.exists() else "", re.DOTALL))
PLAIN, TORCHRUN = ["plain-loop", "plain-lookahead", "gradscaler"], ["ddp", "fsdp2"]


def test_readme_has_every_snippet():
    markers = re.findall(r"<!-- snippet: (.*?) -->", README.read_text(encoding="utf-8"))
    assert sorted(markers) == sorted(SNIPPETS) == sorted([*PLAIN, "trl", *TORCHRUN])


def run_snippet(name, folder, eta=None, normalize=None, trap=False):
    """Runs a snippet; returns the parameters that it ends with, as one vector, and its global variables.

    The text is never touched: for another eta or normalize, and for the traps, it meets another `metarm.lookahead` and
    `metarm.metarm_step`. Sharded parameters are gathered just before the snippet leaves its process group.
    """
    lookahead, metarm_step, destroy, seen = metarm.lookahead, metarm.metarm_step, dist.destroy_process_group, {}

    def forced(options):
        return options | ({} if eta is None else {"eta": eta}) | ({} if normalize is None else {"normalize": normalize})

    @contextmanager
    def watched(model, eta, normalize=False):
        seen["model"], options = model, forced({"eta": eta, "normalize": normalize})
        with (set_traps(lookahead, model, options) if trap else lookahead(model, **options)):
            yield

    def watched_step(model, *args, **options):
        seen["model"] = model
        return metarm_step(model, *args, **forced(options))

    def gather():
        parameters = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in seen["model"].parameters())
        return torch.cat([p.detach().flatten() for p in parameters])

    def gather_and_destroy():
        seen["end"] = gather()
        destroy()

    script = Path(folder) / f"{name.replace('-', '_')}.py"
    script.write_text(SNIPPETS[name], encoding="utf-8")
    metarm.lookahead, metarm.metarm_step, dist.destroy_process_group = watched, watched_step, gather_and_destroy
    try:
        variables = runpy.run_path(str(script), run_name="__main__")
    finally:
        metarm.lookahead, metarm.metarm_step, dist.destroy_process_group = lookahead, metarm_step, destroy
    return seen["end"] if "end" in seen else gather(), variables


@contextmanager
def set_traps(lookahead, model, options, x=None):
    """lookahead, but with an exception in a first attempt, and forwards without a backward before and inside."""
    x = torch.ones(3, 6) if x is None else x
    gradients = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(KeyError):
        with lookahead(model, **options):
            model(x)
            raise KeyError
    for p, gradient in zip(model.parameters(), gradients):
        p.grad = gradient
    model(x)
    with lookahead(model, **options):
        model(x)
        yield
        model(x)


# ------------------------------------------------------------------------------------------------ one process

@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", PLAIN)
def test_snippets_in_one_process(name, tmp_path, float64):
    asis, _ = run_snippet(name, tmp_path)
    loop = {normalize: run_snippet("plain-loop", tmp_path, normalize=normalize)[0] for normalize in (False, True)}
    # GradScaler's snippet is the one that climbs by eta / scale, so not normalised ...
    torch.testing.assert_close(asis, loop[name != "gradscaler"], rtol=0, atol=1e-12)
    # ... and "with normalize=True pass eta as it is".
    normalized, _ = run_snippet(name, tmp_path, eta=0.1, normalize=True)
    torch.testing.assert_close(normalized, loop[True], rtol=0, atol=1e-12)
    # These comparisons can fail: the climb leaves traces a million times longer than that.
    no_climb, _ = run_snippet(name, tmp_path, eta=0.0)
    assert min((a - b).abs().max() for a, b in [(loop[True], loop[False]), (loop[False], no_climb)]) > 1e-6


# ---------------------------------------------------------------------------------------------- two processes

def hf_steps(kind, normalize, rank=0, world=1):
    """Three AdamW steps of a small GPT-2 with gradient checkpointing and the traps; `kind` None: by metarm_step."""
    import transformers
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    torch.manual_seed(0)
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(
        vocab_size=40, n_embd=12, n_layer=2, n_head=2, n_positions=16, num_labels=1, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).double()
    wrapped = model
    if kind:
        model.gradient_checkpointing_enable()
        model.train()
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.transformer.h:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def L(forward): return preference_loss(*forward(X_t).logits[:, 0].view(-1, 2).unbind(1))
    def J(forward): return metarm.difference_loss(forward(X_s).logits[:, 0].view(-1, 3))
    for _ in range(3):
        pairs, samples = torch.randint(1, 40, (4, 2, 9)), torch.randint(1, 40, (4, 3, 9))
        pairs[..., 7:] *= torch.randint(2, (4, 2, 1))  # some rows end in padding
        X_t, X_s = pairs[rank::world].flatten(0, 1), samples[rank::world].flatten(0, 1)
        if not kind:
            metarm.metarm_step(model, optimizer, L, J, eta=0.1, normalize=normalize)
            continue
        optimizer.zero_grad()
        J(wrapped).backward()
        with set_traps(metarm.lookahead, wrapped, {"eta": 0.1, "normalize": normalize}, X_t):
            L(wrapped).backward()
        optimizer.step()
    return torch.cat([(p.full_tensor() if kind == "fsdp2" else p).detach().flatten() for p in model.parameters()])


def under_torchrun(folder):
    """What each of the two processes does."""
    torch.set_num_threads(1)
    rank, worst = int(os.environ["RANK"]), {}
    folder = Path(folder) / str(rank)
    folder.mkdir()

    # Each snippet joins and leaves a process group, in its last one's footsteps: every group needs keys of its own.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, is_master=False)
    join = dist.init_process_group
    def join_afresh(backend):
        join(backend, store=dist.PrefixStore(f"after {len(worst)} cases", store), rank=rank, world_size=2)
    dist.init_process_group = join_afresh

    def compare(found, expected, *case):
        worst[" ".join(map(str, case))] = (found - expected).abs().max().item()

    torch.set_default_dtype(torch.float64)
    alone = {normalize: run_snippet("plain-loop", folder, normalize=normalize)[0] for normalize in (False, True)}
    for name in TORCHRUN:
        for normalize, trap in [(None, False), (False, False), (True, True), (False, True)]:
            found, _ = run_snippet(name, folder, normalize=normalize, trap=trap)
            compare(found, alone[normalize is not False], name, normalize, trap)
    torch.set_default_dtype(torch.float32)  # transformers makes its own choice of dtypes

    dist.init_process_group("gloo")
    for normalize in (False, True):
        expected = hf_steps(None, normalize)
        for kind in TORCHRUN:
            compare(hf_steps(kind, normalize, rank, 2), expected, kind, normalize, "GPT-2")

    fsdp1 = torch.distributed.fsdp.FullyShardedDataParallel(torch.nn.Linear(6, 1), device_id=torch.device("cpu"))
    fsdp1(torch.ones(2, 6)).sum().backward()
    with pytest.raises(ValueError, match="FSDP1"), metarm.lookahead(fsdp1, 0.1, normalize=True):
        pass
    dist.destroy_process_group()
    (folder / "worst.json").write_text(json.dumps(worst))


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
def test_snippets_under_torchrun(tmp_path):
    """Parameters after three AdamW steps on two processes equal one process's, whatever happens on the way."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, __file__, str(tmp_path)], capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in "01":
        worst = json.loads((tmp_path / rank / "worst.json").read_text())
        assert len(worst) == 12
        assert max(worst.values()) < 1e-9, worst


# -------------------------------------------------------------------------------------------------------- TRL

def test_trl_snippet(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed; tests/requirements.txt names it")
    import rm
    from conftest import make_policy
    from datasets import Dataset
    from trl import RewardConfig

    words = ["sorry", "we refund it", "please wait", "a new phone today", "thank you", "no"]
    pairs = [{"prompt": f"Human: order {i}\n\nAssistant:", "chosen": f" {words[i]}", "rejected": f" {words[i - 1]}"}
             for i in range(4)]
    samples = [{"prompt": f"Human: parcel {i}\n\nAssistant:", "responses": [f" {words[(i + j) % 6]}" for j in range(3)]}
               for i in range(4)]
    for path, rows in [("pairs/train.jsonl", pairs), ("metarm-1/meta/samples.jsonl", samples)]:
        path = tmp_path / "runs/toy" / path
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_policy(tmp_path / "runs/toy/sft", "gpt2", pad=None)
    monkeypatch.chdir(tmp_path)

    # As it stands (on a CPU: bf16 autocast, gradient checkpointing; TRL's defaults).
    before = rm.load_reward_model("runs/toy/sft", seed=0)[0].score.weight
    variables = run_snippet("trl", tmp_path)[1]
    model, tokenizer = rm.load_reward_model("runs/trl")
    assert not torch.equal(model.score.weight, before)
    assert rm.score(model, tokenizer, ["Human: order"], [" sorry"]).isfinite().all()

    # Against metarm_step on the same batches: all of D and all of S, whatever their order, in float64.
    def trainer(model, normalize, **options):
        config = RewardConfig("runs/trl-2", max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, bf16=False,
                              lr_scheduler_type="constant", optim="adamw_torch", save_strategy="no", use_cpu=True,
                              disable_tqdm=True, **options)
        return variables["MetaRewardTrainer"](model=model, args=config, processing_class=tokenizer, eta=0.1,
                                              train_dataset=Dataset.from_list(variables["D"]), samples=variables["S"],
                                              normalize=normalize)

    model, tokenizer = rm.load_reward_model("runs/toy/sft", seed=0)
    pair_rows = [rm.encode(tokenizer, row["prompt"], row[key]) for key in ("chosen", "rejected") for row in pairs]
    sample_rows = [row for rows in variables["S"] for row in rows]
    def rewards(forward, rows): return forward(**rm.collate(tokenizer, rows)).logits[:, 0]
    def L(forward): return preference_loss(*rewards(forward, pair_rows).chunk(2))
    def J(forward): return metarm.difference_loss(rewards(forward, sample_rows).view(4, 3))
    def vector(tensors): return torch.cat([t.detach().flatten() for t in tensors])
    for normalize in (False, True):
        theirs, ours = copy.deepcopy(model).double(), copy.deepcopy(model).double()
        ready = trainer(theirs, normalize)
        ready.train()
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, weight_decay=0.0)
        for _ in range(3):
            metarm.metarm_step(ours, optimizer, L, J, eta=0.1, normalize=normalize, max_grad_norm=1.0)  # TRL's, too
        torch.testing.assert_close(vector(theirs.parameters()), vector(ours.parameters()), rtol=0, atol=1e-9)

        # fp16 has a GradScaler, and eta is divided by its scale (but not when the step is normalised).
        ready.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        theirs.zero_grad()
        ready.training_step(theirs, ready.data_collator(variables["D"]))
        expected, _ = metarm.meta_gradient(ours, L, J, eta=0.1, normalize=normalize)
        torch.testing.assert_close(vector(p.grad for p in theirs.parameters()) / 1024, vector(expected.values()),
                                   rtol=0, atol=1e-8)

    with pytest.raises(ValueError, match="set gradient_accumulation_steps=1") as error:
        trainer(copy.deepcopy(model), True, gradient_accumulation_steps=2)
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    under_torchrun(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads hold tensors, and now and then abort a process whose interpreter takes itself apart
