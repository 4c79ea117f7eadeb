"""A stage that is cut off in the middle ends as if it had not been: same weights, same logs."""

import pytest
import torch
from conftest import make_pairs, make_policy, write_rows
from safetensors.torch import load_file

import data
import metarm
import ppo
import rm


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """{name: (module, options)}, each of five steps or more."""
    w, rows = tmp_path_factory.mktemp("resume"), make_pairs(40)
    pairs = write_rows(w / "pairs.jsonl", rows)
    S = [{"prompt": x["prompt"], "responses": [x["chosen"], x["rejected"], " no"]} for x in rows]
    meta = write_rows(w / "meta.jsonl", S)
    policy = make_policy(w / "policy")
    start = f"--model {policy} --lr 1e-3 --checkpoint_minutes 0"
    assert rm.main(f"--model {policy} --data {pairs} --out {w}/rm --batch_size 8".split()) == 0
    fit = f"{start} --data {pairs} --batch_size 4"
    climb = f"--meta {meta} --meta_batch_size 4 --eta 0.1 --normalize --log_every 3"
    loop = f"--prompts {pairs} --reward_model {w}/rm --steps 5 --batch_size 8 --minibatch_size 4"
    loop += " --max_new_tokens 6 --scale_prompts 8"
    return {
        "rm": (rm, f"{fit} --eval_data {pairs} --log_every 3"),
        "metarm": (metarm, f"{fit} {climb}"),
        "sft": (ppo, f"sft {fit}"),
        "dpo": (ppo, f"dpo {fit}"),
        "ppo": (ppo, f"ppo {start} {loop}"),
    }


def cut_off(monkeypatch, module, options, out) -> None:
    """Runs a command that is interrupted in its fourth step; its last checkpoint is two old."""
    save = rm.Checkpoint.save

    def save_and_interrupt(self, step, **kept):
        if step == 4:
            raise KeyboardInterrupt
        if step <= 2:
            save(self, step, **kept)

    with monkeypatch.context() as patch:
        patch.setattr(rm.Checkpoint, "save", save_and_interrupt)
        assert module.main([*options.split(), "--out", f"{out}"]) == 130
    assert not out.exists()
    assert len(data.read_jsonl(f"{out}.partial/log.jsonl")) == 4


@pytest.mark.parametrize("name", ["rm", "metarm", "sft", "dpo", "ppo"])
def test_cut_off_and_resumed_equals_whole(commands, name, tmp_path, monkeypatch, capsys):
    module, options = commands[name]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert module.main([*options.split(), "--out", f"{whole}"]) == 0
    cut_off(monkeypatch, module, options, cut)

    # Other options do not go on from there, and do not harm it.
    other = [*options.split(), "--seed", "7", "--out", f"{cut}"]
    assert module.main(other) == 2 and f"{cut.name}.partial" in capsys.readouterr().err

    # As if of a machine with a GPU: its tensors lie on it, and it has a generator of its own.
    checkpoint = tmp_path / "cut.partial/checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True)
    saved["cuda_rng"] = [torch.zeros(16, dtype=torch.uint8)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(saved, checkpoint)

    torch.manual_seed(99)  # whatever the new process starts with
    assert module.main([*options.split(), "--out", f"{cut}"]) == 0
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(a[key], b[key]) for key in a)
    for log in ["log.jsonl"] + ["rollouts.jsonl"] * (name == "ppo"):
        assert data.read_jsonl(whole / log) == data.read_jsonl(cut / log)
    names = [sorted(path.name for path in folder.iterdir()) for folder in (whole, cut)]
    assert names[0] == names[1] and "checkpoint.pt" not in names[0]
    assert not (tmp_path / "cut.partial").exists()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["rm", "metarm", "ppo"])
def test_on_a_gpu_it_goes_on_as_it_had_gone_on(commands, name, tmp_path, monkeypatch):
    """Its first step repeats one of the run that was cut off. Later ones need not: on CUDA the
    gradients of two equal steps may differ in the last digit."""
    module, options = commands[name]
    cut_off(monkeypatch, module, options, tmp_path / "cut")
    logs = ["log"] + ["rollouts"] * (name == "ppo")
    old = [data.read_jsonl(tmp_path / f"cut.partial/{log}.jsonl")[2] for log in logs]
    torch.cuda.manual_seed(99)
    assert module.main([*options.split(), "--out", f"{tmp_path}/cut"]) == 0
    new = [data.read_jsonl(tmp_path / f"cut/{log}.jsonl")[2] for log in logs]
    assert new[0] == pytest.approx(old[0], rel=1e-3, abs=1e-5)
    assert name != "ppo" or new[1]["responses"] == old[1]["responses"]


def test_logs_are_cut_back_by_lines_of_the_file(tmp_path):
    """A response may hold what Unicode calls a line break. It is none in a .jsonl file."""
    options = {"checkpoint_minutes": 0.0, "lr": 1.0, "micro_batch_size": 8}
    checkpoint = rm.Checkpoint(tmp_path, options)
    checkpoint.resume()
    rows = [{"step": i, "said": "a\u2028b\x85c\n"} for i in range(3)]
    for step, row in enumerate(rows, 1):
        checkpoint.log(row)
        if step < 3:
            checkpoint.save(step, queue=[step])
    options["micro_batch_size"] = 4  # what a run out of memory is told to do keeps its checkpoint
    assert rm.Checkpoint(tmp_path, options).resume() == (2, {"queue": [2]})
    assert data.read_jsonl(tmp_path / "log.jsonl") == rows[:2]


@pytest.mark.parametrize("name", ["rm", "metarm", "sft", "dpo"])
def test_a_diverged_run_leaves_its_log(commands, name, tmp_path, capsys):
    module, options = commands[name]
    assert module.main([*options.split(), "--out", f"{tmp_path}/x", "--lr", "1e30"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "nan" in error.lower() and "lower" in error and f"{tmp_path}/x" in error
    assert not (tmp_path / "x").exists()
    assert data.read_jsonl(tmp_path / "x.partial/log.jsonl")[0]["step"] == 0
