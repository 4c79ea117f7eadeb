"""A stage that is cut off in the middle ends as if it had not been: same weights, same log, to the last bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import metarm
import ppo
import rm
from conftest import make_policy

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    words = "phone parcel invoice charge refund help".split()
    rows = [{"prompt": f"Human: my {words[i % 6]} {words[i % 5]} {i}", "chosen": f" thank you, {words[i % 4]}",
             "rejected": f" Sorry {words[i % 3]}"} for i in range(40)]
    data.write_jsonl(root / "pairs.jsonl", rows)
    data.write_jsonl(root / "meta.jsonl", [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], " no"]}
                                           for row in rows])
    make_policy(root / "policy")
    assert rm.main(["--model", f"{root}/policy", "--data", f"{root}/pairs.jsonl", "--out", f"{root}/rm", "--lr", "1e-3",
                    "--batch_size", "8"]) == 0
    return root


def commands(w):
    common = ["--model", f"{w}/policy", "--lr", "1e-3", "--checkpoint_minutes", "0"]
    pairs = ["--data", f"{w}/pairs.jsonl", "--batch_size", "4"]
    meta = ["--meta", f"{w}/meta.jsonl", "--meta_batch_size", "4", "--eta", "0.1", "--normalize", "--log_every", "3"]
    loop = ["--prompts", f"{w}/pairs.jsonl", "--reward_model",
            f"{w}/rm", "--steps", "4", "--batch_size", "8", "--minibatch_size", "4", "--max_new_tokens", "6",
            "--scale_prompts", "8"]
    return {"rm": (rm, [*common, *pairs, "--eval_data", f"{w}/pairs.jsonl", "--log_every", "3"]),
            "metarm": (metarm, [*common, *pairs, *meta]),
            "metarm-checkpointing": (metarm, [*common, *pairs, *meta, "--gradient_checkpointing"]),
            "sft": (ppo, ["sft", *common, *pairs]), "dpo": (ppo, ["dpo", *common, *pairs]),
            "ppo": (ppo, ["ppo", *common, *loop]),
            "ppo-checkpointing": (ppo, ["ppo", *common, *loop, "--gradient_checkpointing"])}


@pytest.mark.parametrize("name", ["rm", "metarm", "metarm-checkpointing", "sft", "dpo", "ppo", "ppo-checkpointing"])
def test_interrupted_and_resumed_equals_uninterrupted(world, name, monkeypatch):
    module, argv = commands(world)[name]
    assert module.main([*argv, "--out", f"{world}/{name}-whole"]) == 0

    class Interrupted(rm.Checkpoint):
        def __call__(self, step, **kept):
            super().__call__(step, **kept)
            if step == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rm, "Checkpoint", Interrupted)
        assert module.main([*argv, "--out", f"{world}/{name}-cut"]) == 130
    assert not (world / f"{name}-cut").exists() and (world / f"{name}-cut.partial/checkpoint.pt").exists()
    torch.manual_seed(99)  # whatever the new process starts with
    assert module.main([*argv, "--out", f"{world}/{name}-cut"]) == 0
    load = ppo.load_policy if module is ppo else rm.load_reward_model
    whole, cut = (load(f"{world}/{name}-{kind}")[0].state_dict() for kind in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert (world / f"{name}-whole/log.jsonl").read_bytes() == (world / f"{name}-cut/log.jsonl").read_bytes()
    assert not (world / f"{name}-cut/checkpoint.pt").exists() and not (world / f"{name}-cut.partial").exists()


@pytest.mark.filterwarnings("error::FutureWarning")  # transformers 5.24 renames how it is switched on
@pytest.mark.parametrize("name", ["rm", "sft", "metarm"])
def test_gradient_checkpointing_changes_memory_not_results(world, name):
    """metarm goes another way with it (lookahead in place): same first-order step."""
    module, argv = commands(world)[name]
    for kind, flag in (("plain", []), ("checkpointing", ["--gradient_checkpointing"])):
        assert module.main([*argv, *flag, "--out", f"{world}/gc-{name}-{kind}"]) == 0
    load = ppo.load_policy if module is ppo else rm.load_reward_model
    a, b = (load(f"{world}/gc-{name}-{kind}")[0].state_dict() for kind in ("plain", "checkpointing"))
    assert all(torch.allclose(a[key], b[key], atol=2e-4) for key in a)


def test_sigkill_leaves_nothing_half_written_and_the_same_command_goes_on(world):
    argv = [sys.executable, "rm.py", *commands(world)["rm"][1], "--epochs", "40", "--out", f"{world}/killed"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    partial = world / "killed.partial/checkpoint.pt"
    while not partial.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (world / "killed").exists()
    module, flags = commands(world)["rm"]
    assert module.main([*flags, "--epochs", "40", "--out", f"{world}/killed"]) == 0
    assert module.main([*flags, "--epochs", "40", "--out", f"{world}/whole-40"]) == 0
    a, b = (rm.load_reward_model(f"{world}/{kind}")[0].state_dict() for kind in ("killed", "whole-40"))
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)
