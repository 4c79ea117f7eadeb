"""A stage that is cut off in the middle ends as if it had not been: same weights, same logs."""

import pytest
import torch
from conftest import weights_of

import data
import metarm
import ppo
import rm


@pytest.fixture
def commands(toy, monkeypatch):
    monkeypatch.chdir(toy)
    start = "--model policy --lr 1e-3 --checkpoint_minutes 0"
    fit = f"{start} --data pairs.jsonl --batch_size 4"
    climb = "--meta meta.jsonl --meta_batch_size 4 --eta 0.1 --normalize --log_every 3"
    loop = "--prompts pairs.jsonl --reward_model rm --steps 5 --batch_size 8 --minibatch_size 4"
    loop += " --max_new_tokens 6 --scale_prompts 8"
    return {
        "rm": (rm, f"{fit} --eval_data pairs.jsonl --log_every 3"),
        "metarm": (metarm, f"{fit} {climb}"),
        "sft": (ppo, f"sft {fit}"),
        "dpo": (ppo, f"dpo {fit}"),
        "ppo": (ppo, f"ppo {start} {loop}"),
    }


def cut_off(monkeypatch, module, options, out) -> None:
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
    command = [*options.split(), "--out", f"{cut}"]
    checkpoint = tmp_path / "cut.partial/checkpoint.pt"
    whole_file = checkpoint.read_bytes()
    assert module.main([*command, "--seed", "7"]) == 2 and "cut.partial" in capsys.readouterr().err
    checkpoint.write_bytes(whole_file[:1000])
    assert module.main(command) == 2 and "checkpoint.pt is damaged" in capsys.readouterr().err
    checkpoint.write_bytes(whole_file)
    # As if of a machine with a GPU: its tensors lie on it, and it has a generator of its own.
    saved = torch.load(checkpoint, weights_only=True)
    saved["cuda_rng"] = [torch.zeros(16, dtype=torch.uint8)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(saved, checkpoint)
    torch.manual_seed(99)  # whatever the new process starts with
    assert module.main(command) == 0
    a, b = weights_of(whole), weights_of(cut)
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
    options = {"checkpoint_minutes": 0.0, "reward_model": f"{tmp_path}", "micro_batch_size": 8}
    checkpoint = rm.Checkpoint(tmp_path, options)
    checkpoint.resume()
    rows = [{"step": i, "said": "a\u2028b\x85c\n"} for i in range(3)]
    for step, row in enumerate(rows, 1):
        data.append_jsonl(tmp_path / "log.jsonl", row)
        if step < 3:
            checkpoint.save(step, queue=[step])
    options["micro_batch_size"] = 4  # what a run out of memory is told to do keeps its checkpoint
    assert rm.Checkpoint(tmp_path, options).resume() == (2, {"queue": [2]})
    assert data.read_jsonl(tmp_path / "log.jsonl") == rows[:2]
    (tmp_path / "model.safetensors").write_bytes(b"another reward model")
    with pytest.raises(data.Mistake, match="of other options or data"):
        rm.Checkpoint(tmp_path, options).resume()
