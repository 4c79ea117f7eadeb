"""Mistakes that people make: one line on stderr that names the thing and the fix, status 2."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import change_weights, make_pairs, write_rows

import data
import metarm
import ppo
import rm

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"rm.py": rm, "metarm.py": metarm, "ppo.py": ppo}

# A sound command of each kind. A mistake is what is added to it: the last word counts.
TRAIN = "--model policy --data pairs.jsonl --batch_size 8 --lr 1e-3"
SOUND = {
    "rm.py": TRAIN,
    "metarm.py": f"{TRAIN} --meta meta.jsonl --meta_batch_size 8 --eta 0.1 --normalize",
    "ppo.py sft": TRAIN,
    "ppo.py dpo": TRAIN,
    "ppo.py ppo": "--model policy --reward_model rm --prompts pairs.jsonl --steps 2 --batch_size 8"
    " --scale_prompts 4 --max_new_tokens 6 --lr 1e-3 --critic_lr 1e-3",
    "ppo.py sample": "--model policy --prompts pairs.jsonl --k 2 --max_new_tokens 6",
}
MISTAKES = [  # (command, what is added to it, what the line must say)
    ("metarm.py", "--order second", "second"),
    ("metarm.py", "--eta -0.1", "eta"),
    ("rm.py", "--data pears.jsonl", "pears.jsonl"),
    ("rm.py", "--data no-key.jsonl", 'no-key.jsonl, line 2.*"rejected"'),
    ("metarm.py", "--meta one.jsonl", "one.jsonl, line 1.*k >= 2"),
    ("rm.py", "--batch_size 99", "40 rows.*--batch_size"),
    ("metarm.py", "--meta_batch_size 99", "40 .*--meta_batch_size"),
    ("rm.py", "--data long.jsonl", "long.jsonl, row 2: .* 128 positions.*--max_length"),
    ("ppo.py sample", "--max_new_tokens 500", "--max_new_tokens.* 128.* positions"),
    ("rm.py", "--model polcy", "polcy: no such folder"),
    ("ppo.py sft", "--model gpt3", "gpt3: no such folder.* openai-community/gpt2"),
    ("rm.py", "--model bnb", "bnb: .*quantised.*docs/trainers/lora.py"),
    ("ppo.py sft", "--model gptq", "gptq: .*quantised.*docs/trainers/lora.py"),
    ("rm.py", "--model notes", "notes: not a whole"),
    ("rm.py", "--model adapter", "adapter.*merge"),
    ("rm.py", "--model nan", "nan: .*NaN"),
    ("ppo.py sft", "--model rm", "rm: .*score.weight"),
    ("ppo.py ppo", "--reward_model policy", "policy: .*no reward head"),
    ("ppo.py dpo", "--ref_policy base", "base.*vocabulary"),
    ("ppo.py ppo", "--scale_prompts 0", "--scale_prompts 0"),
    ("ppo.py ppo", "--batch_size 200", "--scale_prompts 4 leaves 36"),
    ("ppo.py sample", "--k 0", "--k 0"),
    ("ppo.py sample", "--max_length 9", "--k 2 x 0 prompts"),
    ("ppo.py sample", "--prompts empty.jsonl", "empty.jsonl, row 2"),
    ("ppo.py sft", "--data empty.jsonl --batch_size 1", "empty.jsonl, row 2"),
    ("ppo.py ppo", "--batch_size 30", "size 30 .*--rollouts_per_prompt 4; .*--batch_size 28"),
    ("ppo.py ppo", "--batch_size 2", "--batch_size 2 .*--rollouts_per_prompt 4; .*--batch_size 4"),
    ("rm.py", "--lr 1e30", "/x: .*nan.*lower --lr"),
    ("metarm.py", "--lr 1e30", "/x: .*nan.*lower"),
    ("ppo.py sft", "--lr 1e30", "/x: .*nan.*lower --lr"),
    ("ppo.py ppo", "--lr 1e30", "NaN.*lower --lr"),
    ("rm.py", "--out notes", "notes exists.*delete it"),
    ("metarm.py", "--save_adapted notes", "notes exists.*delete it"),
    ("rm.py", "--out one.jsonl/x", "one.jsonl/x cannot be written"),
]


@pytest.fixture(scope="module")
def world(toy, tmp_path_factory):
    w, pairs = shutil.copytree(toy, tmp_path_factory.mktemp("mistakes") / "world"), make_pairs(24)
    long = {"prompt": "Human: the parcel is late " * 100, "chosen": " a", "rejected": " b"}
    for name, rows in {
        "no-key": [pairs[0], {"prompt": "a", "chosen": "b"}],
        "empty": [{"prompt": x, "response": "a"} for x in ("Human:", "")],
        "one": [{"prompt": "a", "responses": ["b"]}],
        "long": [pairs[0], long, *pairs[1:]],
    }.items():
        write_rows(w / f"{name}.jsonl", rows)
    (w / "notes").mkdir()
    (w / "notes/a.txt").write_text("mine")
    nan = {"model.norm.weight": torch.full((32,), math.nan)}
    change_weights(shutil.copytree(w / "policy", w / "nan"), lambda weights: weights | nan)
    bits = {"bnb": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    bits["gptq"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    for name, how in bits.items():
        config = shutil.copytree(w / "policy", w / name) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": how}))
    peft = pytest.importorskip("peft")
    model, tokenizer = ppo.load_policy(f"{w}/policy")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(model, lora).save_pretrained(w / "adapter")
    tokenizer.save_pretrained(w / "adapter")
    return w


def argv_of(command, added, out):
    module, *mode = command.split()
    return module, [*mode, *SOUND[command].split(), "--out", f"{out}/x", *added.split()]


def everything(world):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in world.rglob("*")}


def check_told(module, told, words):
    """One line of error, the last; beside it only progress bars and argparse's usage."""
    *others, error = [line for line in re.split("[\r\n]+", told) if line.strip()]
    assert error.startswith(f"{module}") and ": error: " in error and len(error) < 700
    assert re.search(words, error), error
    for line in others:
        assert "%|" in line or re.match("usage: | +|[^ ]*: (warning|dropped|0 of 40)", line), line


@pytest.mark.parametrize("command, added, words", MISTAKES, ids=[" ".join(m[:2]) for m in MISTAKES])
def test_mistake(world, tmp_path, monkeypatch, capfd, command, added, words):
    monkeypatch.chdir(world)
    before = everything(world)
    module, argv = argv_of(command, added, tmp_path)
    assert MODULES[module].main(argv) == 2
    check_told(module, capfd.readouterr().err, words)
    assert everything(world) == before
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ["x.partial"] * ("nan.*lower" in words)  # of a run that blew up, its log
    assert not left or data.read_jsonl(tmp_path / "x.partial/log.jsonl")[0]["step"] == 0


def test_frozen_weights_are_refused(world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(world)
    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_and_freeze(*arguments, **options):
        model, info = load(*arguments, **options)
        model.model.norm.requires_grad_(False)
        return model, info

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_and_freeze)
    module, argv = argv_of("ppo.py sft", "", tmp_path)
    assert ppo.main(argv) == 2
    check_told(module, capfd.readouterr().err, "policy: model.norm.* frozen .*docs/trainers/lora")


def test_from_the_shell(world, tmp_path):
    module, argv = argv_of("rm.py", "--model nan", tmp_path)
    command = [sys.executable, ROOT / module, *argv]
    done = subprocess.run(command, cwd=world, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    check_told(module, done.stderr, "nan: .*NaN")
