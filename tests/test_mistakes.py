"""Bad input, systematically: each mistake is one line on stderr that names the thing and the mend, a status that is
not 0, no traceback, and nothing left behind. Read MISTAKES from top to bottom: it is the list of what was thought of."""

import contextlib
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import data
import eval as report_card
import metarm
import ppo
import rm
from conftest import make_policy, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"data.py": data, "rm.py": rm, "metarm.py": metarm, "ppo.py": ppo, "eval.py": report_card}

# A sound command of each kind, in the folder `world` below. A mistake is what is added to it: of an option that is
# given twice, the last word counts.
SOUND = {
    "data.py toy": "--hidden_size 16 --sft 60 --pairs 40 --meta 5 --ppo 5 --valid 5 --test 5 --ood_ppo 5 --out x",
    "data.py label": "--samples toy-samples.jsonl --out x",
    "data.py split": "--source pairs.jsonl --out x",
    "rm.py": "--model policy --data pairs.jsonl --batch_size 8 --lr 1e-3 --out x",
    "metarm.py": "--model policy --data pairs.jsonl --meta meta.jsonl --batch_size 8 --meta_batch_size 8 --lr 1e-3 "
                 "--eta 0.1 --normalize --out x",
    "ppo.py sft": "--model policy --data pairs.jsonl --batch_size 8 --lr 1e-3 --out x",
    "ppo.py dpo": "--model policy --data pairs.jsonl --batch_size 8 --lr 1e-3 --out x",
    "ppo.py ppo": "--model policy --reward_model rm --prompts prompts.jsonl --steps 2 --batch_size 8 --scale_prompts 4 "
                  "--max_new_tokens 6 --lr 1e-3 --critic_lr 1e-3 --out x",  # `rm` has another tokenizer: text goes between
    "ppo.py sample": "--model policy --prompts prompts.jsonl --k 2 --max_new_tokens 6 --out x",
    "eval.py": "",
    "eval.py compare": "--judge rm --policies policy,gpt2 --prompts prompts.jsonl --k 2 --max_new_tokens 6 --out x",
}
# (command, what is added to it, a word on what is wrong, a word on how to mend it); a command with "!" is taken bare.
MISTAKES = [
    # --- the command line
    ("rm.py", "--learning_rate 1", "--learning_rate", "--help"),
    ("rm.py", "stray", "stray", "--help"),
    ("rm.py", "--lr fast", "--lr", "float"),
    ("rm.py", "--lr nan", "--lr", "finite"),
    ("rm.py", "--lr -1", "--lr", "at least 0"),
    ("rm.py", "--batch_size 0", "--batch_size", "at least 1"),
    ("rm.py", "--max_grad_norm 0", "--max_grad_norm", "above 0"),
    ("rm.py", "--epochs 1.5", "--epochs", "int"),
    ("rm.py", "--weight_by nowhere", "nowhere", "folder"),
    ("rm.py", "--weight_by policy --tau -1", "--tau", "at least 0"),
    ("rm.py", "--ref_policy policy", "--ref_policy", "--weight_by"),
    ("rm.py", "--seed 99999999999999999999", "--seed", "at most"),
    ("rm.py", "--gradient_checkpointing maybe", "gradient_checkpointing", "yes/no"),
    ("rm.py", "--data=", "--data", "empty"),  # --data=$UNSET
    ("rm.py!", "--data pairs.jsonl", "--model", "required"),
    ("metarm.py", "--eta -0.1", "--eta", "at least 0"),
    ("metarm.py", "--eta inf", "--eta", "finite"),
    ("metarm.py", "--order second", "second", "'exact'"),
    ("metarm.py", "--order exact --gradient_checkpointing", "--gradient_checkpointing", "--order first"),
    ("metarm.py", "--save_adapted x", "--save_adapted", "another folder"),
    ("metarm.py", "--save_adapted x/y", "--save_adapted x/y and --out x", "outside it"),
    ("metarm.py", "--save_adapted y --out y/rm", "--save_adapted y and --out y/rm", "outside it"),
    ("ppo.py!", "simple --model policy --out x", "'simple'", "'sample'"),
    ("ppo.py!", "--model policy --out x", "mode", "required"),
    ("ppo.py!", "ppo --model policy --prompts prompts.jsonl --out x", "ppo needs", "--reward_model"),
    ("ppo.py sample", "--k 0", "--k", "at least 1"),
    ("ppo.py sample", "--kl_coef 0.1", "sample takes no --kl_coef; it is an option of ppo", "leave it out"),
    ("ppo.py sample", "--gradient_checkpointing", "--gradient_checkpointing; it is an option of dpo, ppo, sft", "leave it out"),
    ("ppo.py sft", "--top_p 0.9", "sft takes no --top_p; it is an option of sample", "leave it out"),
    ("ppo.py dpo", "--prompts prompts.jsonl", "dpo takes no --prompts; it is an option of ppo, sample", "leave it out"),
    ("ppo.py sample", "--temperature 0", "--temperature", "above 0"),
    ("ppo.py sample", "--temperature 1e-45", "temperature", "too low"),
    ("ppo.py sample", "--top_p 1.5", "--top_p", "at most 1"),
    ("ppo.py ppo", "--batch_size 2 --rollouts_per_prompt 4", "--batch_size 2", "--rollouts_per_prompt 4: raise it"),
    ("data.py!", "label --out x", "label needs", "--samples"),
    ("data.py toy", "--hidden_size 20", "--hidden_size 20", "multiple of 8"),
    ("data.py toy", "--pairs 100000", "54432 prompts", "fewer"),
    ("data.py toy", "--valid_share 0.2", "toy takes no --valid_share; it is an option of label, split", "leave it out"),
    ("data.py label", "--noise -1", "--noise", "at least 0"),
    ("data.py label", "--valid_share 1", "--valid_share", "[0, 1)"),
    ("eval.py", "", "no flag", "--run"),
    ("eval.py", "--judge rm", "--judge", "--policies"),
    ("eval.py", "--run nowhere", "nowhere", "run.sh"),
    ("eval.py", "--run policy", "policy", "run.sh"),
    ("eval.py", "--run policy --k 1", "--k 1", "at least 2"),
    ("eval.py", "--runs policy,nowhere", "--runs policy: no results.json", "finish that run"),

    # --- two policies, and verdicts on them
    ("eval.py compare", "--policies policy", "--policies policy: two folders", "as A,B"),
    ("eval.py compare", "--policies policy,nowhere", "nowhere: no such model folder", "`save_pretrained` folder is needed"),
    ("eval.py compare", "--policies policy,some/model", "some/model: no such folder here, and on the hub", "give a whole"),
    ("eval.py compare", "--policies policy,rm", "rm: not a causal language model", "a reward model folder, perhaps"),
    ("eval.py compare", "--judge policy", "policy: holds no reward head", "train one"),
    ("eval.py compare", "--judge nowhere", "nowhere: no such model folder", "`save_pretrained` folder is needed"),
    ("eval.py compare", "--judge short-rm", "row 1: ", "only 4 positions; shorten or drop the row"),  # no --max_length here
    ("eval.py compare", "--prompts pears.jsonl", "pears.jsonl", "no such file"),
    ("eval.py compare", "--prompts meta.jsonl --max_new_tokens 500", "128 positions", "lower --max_new_tokens"),
    ("eval.py compare", "--blind", "--judge --blind", "these belong together"),
    ("eval.py compare", "--out notes", "no stage made it, so it was not touched", "another folder"),
    ("eval.py compare", "--out rows.csv/x", "rows.csv/x cannot be written", "another folder"),
    ("eval.py compare", "--out policy/x", "--out policy/x lies in --policies A policy", "outside it"),
    ("eval.py compare", "--out busy", "another process is writing", "let it finish"),
    ("eval.py compare", "--out judged --seed 1", "judged was made with --seed 0, not 1", "another folder, or delete it"),
    ("eval.py compare", "--out judged --policies gpt2,policy", "something else than --policies A gpt2", "another folder"),
    ("eval.py", "--verdicts pears.jsonl --key key.json", "pears.jsonl", "no such file"),
    ("eval.py", "--verdicts sound.jsonl --key meta.jsonl", "--key meta.jsonl: not a key.json", "eval.py --blind"),
    ("eval.py", "--verdicts sound.jsonl --key nowhere", "--key nowhere: not a key.json", "eval.py --blind"),
    ("eval.py", "--verdicts missing.jsonl --key key.json", 'id "2-b" has no verdict', "up to line 1"),
    ("eval.py", "--verdicts doubled.jsonl --key key.json", 'line 3: id "1-a" has a verdict already', "in line 1"),
    ("eval.py", "--verdicts unknown.jsonl --key key.json", 'not "A"', 'needs the verdict "1", "2" or "tie"'),
    ("eval.py", "--verdicts stranger.jsonl --key key.json", 'id "9-z" is not in key.json', "line 1"),

    # --- the model
    ("rm.py", "--model polcy", "polcy: no such model folder", "`save_pretrained` folder is needed"),
    ("rm.py", "--model runs/polcy", "runs/polcy: no such folder here, and on the hub its tokenizer", "give a whole"),
    ("ppo.py ppo", "--reward_model some/model", "some/model: no such folder here, and on the hub", "give a whole"),
    ("rm.py", "--model pairs.jsonl", "pairs.jsonl", "folder is needed"),
    ("rm.py", "--model notes", "notes", "config.json"),
    ("rm.py", "--model cut", "deserializing", "whole"),
    ("rm.py", "--model pickled", "no file named model.safetensors", "safetensors and tokenizer"),
    ("rm.py", "--model no-tokenizer", "its tokenizer cannot be loaded", "tokenizer, of"),
    ("rm.py", "--model no-eos", "no EOS", "needs an end"),
    ("rm.py", "--model broken-config", "config.json", "JSON"),
    ("rm.py", "--model hub-code", "custom code", "that transformers knows"),
    ("rm.py", "--model half", "lacks 9 weights", "whole one"),
    ("rm.py", "--model wrong-shape", "(32, 64)", "config.json"),
    ("rm.py", "--model nan", "embed_tokens.weight holds NaN", "sound checkpoint"),
    ("rm.py", "--model other-tokenizer", "other-tokenizer knows only 60 tokens", "the model's own tokenizer"),
    ("ppo.py sft", "--model rm", "rm: not a causal language model", "a reward model folder, perhaps"),
    ("ppo.py sft", "--model bert", "sees the tokens to come", "a policy must not"),
    ("ppo.py sample", "--model nan", "NaN", "sound checkpoint"),
    ("ppo.py sample", "--model other-tokenizer", "60 tokens", "the model's own tokenizer"),
    ("ppo.py ppo", "--reward_model policy", "policy: holds no reward head", "train one"),
    ("ppo.py ppo", "--reward_model two-labels", "score.weight has not the shape (1, 32)", "one number"),
    ("ppo.py ppo", "--reward_model nan-rm", "nan-rm: the weight score.weight holds NaN", "sound checkpoint"),
    ("ppo.py ppo", "--reward_model prompts.jsonl", "prompts.jsonl", "no such model folder"),
    ("ppo.py ppo", "--ref_policy gpt2", "gpt2 has another vocabulary", "that --model was trained from"),
    ("ppo.py dpo", "--ref_policy other-tokenizer", "other-tokenizer has another vocabulary", "that --model was trained from"),
    ("ppo.py ppo", "--prompts long.jsonl", "row 1: 401 prompt tokens", "shorten the prompt"),
    ("ppo.py sample", "--max_new_tokens 500", "128 positions", "lower --max_new_tokens"),
    ("rm.py", "--data long.jsonl", "128 positions", "shorten or drop the row (rm.py, metarm.py and ppo.py do it with --max_"),
    ("rm.py", "--eval_data long.jsonl", "long.jsonl, row 1", "--max_length 128"),
    ("metarm.py", "--meta long.jsonl", "long.jsonl, row 1", "--max_length 128"),

    # --- the data
    ("rm.py", "--data pears.jsonl", "pears.jsonl", "no such file"),
    ("rm.py", "--data pairs.jsonl/pairs.jsonl", "pairs.jsonl/pairs.jsonl", "no such file"),
    ("rm.py", "--data notes", "notes is a folder", "name the .jsonl file"),
    ("rm.py", "--eval_data pears.jsonl", "pears.jsonl", "no such file"),
    ("rm.py", "--data empty.jsonl", "empty.jsonl", "no row"),
    ("rm.py", "--data equal.jsonl", "equal.jsonl", "no usable pair"),
    ("rm.py", "--data list.json", "list.json, line 1: not JSON", "one object {...} a line"),
    ("rm.py", "--data rows.csv", "rows.csv, line 1: not JSON", "one object {...} a line"),
    ("rm.py", "--data strings.jsonl", "strings.jsonl, line 1", "JSON object"),
    ("rm.py", "--data numbers.jsonl", 'key "chosen"', "text, not int"),
    ("rm.py", "--data no-key.jsonl", 'line 2: key "rejected" is missing', 'the row has "prompt", "chosen"'),
    ("rm.py", "--data meta.jsonl", 'key "chosen" is missing', 'the row has "prompt", "responses"'),
    ("rm.py", "--data latin-1.jsonl", "latin-1.jsonl, line 2: not UTF-8", "iconv"),
    ("rm.py", "--data utf-16.jsonl", "line 1: not UTF-8", "iconv"),
    ("rm.py", "--data cut.jsonl.gz", "cut.jsonl.gz", "get it anew"),
    ("rm.py", "--data damaged.jsonl.gz", "damaged.jsonl.gz", "get it anew"),
    ("rm.py", "--batch_size 99", "24 rows are fewer than one batch of 99", "lower --batch_size"),
    ("rm.py", "--max_length 2", "no row fits into --max_length 2", "raise it"),
    ("metarm.py", "--meta uneven.jsonl", "line 2: key \"responses\" has k = 3", "one --k"),
    ("metarm.py", "--meta single.jsonl", "k = 1", "k >= 2"),
    ("metarm.py", "--meta pairs.jsonl", "pairs.jsonl, line 1", '"responses" must be a list'),
    ("metarm.py", "--meta_batch_size 99", "24 prompts are fewer than one batch of 99", "lower --meta_batch_size"),
    ("ppo.py sft", "--data meta.jsonl", 'key "response" is missing', 'the row has "prompt", "responses"'),
    ("ppo.py sft", "--data no-prompt.jsonl", "no-prompt.jsonl, row 1: the prompt is empty", "drop the row"),
    ("ppo.py dpo", "--data prompts.jsonl", 'key "chosen" is missing', 'the row has "prompt"'),
    ("ppo.py ppo", "--batch_size 200", "20 prompts are left", "give more prompts"),
    ("ppo.py sample", "--prompts no-prompt.jsonl", "the prompt is empty", "drop the row"),
    ("ppo.py sample", "--prompts messages.jsonl", 'key "prompt"', "text, not list"),
    ("ppo.py sample", "--max_length 5", "no prompt + --max_new_tokens 6 fits", "--max_length 5"),
    ("data.py label", "--samples meta.jsonl", "meta.jsonl: gold_reward judges the toy world only", "labels of their own"),
    ("data.py label", "--samples same.jsonl", "the two responses are equal", "hotter"),
    ("data.py split", "--source a/b/train.jsonl", "neither a file here nor to be had from the hub", "give a local file"),
    ("data.py split", "--valid_share 0.9", "24 prompts are too few", "--valid_share 0.9"),
    ("data.py split", "--ood pairs.jsonl", "0 of its prompts are not in pairs.jsonl too", "another domain"),

    # --- numbers that blow up on the way: nothing of it is written
    ("rm.py", "--lr 1e30", "loss nan", "lower --lr"),
    ("metarm.py", "--lr 1e30", "J (meta_loss) at theta is nan", "lower eta"),
    ("metarm.py", "--eta 1e30", "L (vanilla_loss) at theta' is nan", "lower eta"),
    ("ppo.py sft", "--lr 1e30", "the loss is nan", "lower --lr"),
    ("ppo.py dpo", "--lr 1e30", "the loss is nan", "lower --lr"),
    ("ppo.py ppo", "--lr 1e30", "NaN at PPO step 0", "lower --lr"),
    ("ppo.py ppo", "--lr 1e30 --ppo_epochs 1", "probabilities are NaN", "lower --lr"),
    ("ppo.py ppo", "--critic_lr 1e30", "NaN at PPO step 0", "--critic_lr"),

    # --- the output folder
    ("rm.py", "--out notes", "no stage made it, so it was not touched", "another folder"),
    ("rm.py", "--out pairs.jsonl", "pairs.jsonl is there already", "another folder"),
    ("rm.py", "--out rows.csv/x", "rows.csv/x cannot be written", "another folder"),  # as root, even a read-only folder can be
    ("rm.py", "--out policy/rm", "lies in --model policy", "outside it"),
    ("rm.py", "--out busy", "another process is writing", "let it finish"),
    ("rm.py", "--out done --lr 1e-2", "done was made with --lr 0.001, not 0.01", "another folder, or delete it"),
    ("rm.py", "--out done --data other.jsonl", "something else than --data other.jsonl", "another folder, or delete it"),
    ("rm.py", "--out done --model gpt2", "something else than --model gpt2", "another folder, or delete it"),
    ("ppo.py sft", "--out done", "done was made by rm.py", "another folder, or delete it"),
    # the second folder of metarm.py: before the training, not after it (test_before_the_work)
    ("metarm.py", "--save_adapted notes", "notes is there already and no stage made it", "another folder"),
    ("metarm.py", "--save_adapted pairs.jsonl", "pairs.jsonl is there already", "another folder"),
    ("metarm.py", "--save_adapted policy", "policy is there already and no stage made it", "another folder"),  # = --model
    ("metarm.py", "--save_adapted policy/adapted", "--save_adapted policy/adapted lies in --model policy", "outside it"),
    ("metarm.py", "--save_adapted done", "done was made by rm.py", "another folder"),
    ("metarm.py", "--save_adapted rows.csv/x", "rows.csv/x cannot be written", "another folder"),
    ("metarm.py", "--save_adapted busy", "another process is writing", "let it finish"),
]
# Looks like a mistake, but works: (command, what is added, what is said about it)
WORKS = [
    *[(command, "", "") for command in SOUND if command != "eval.py"],
    ("rm.py", "--data bom.jsonl", ""), ("rm.py", "--data crlf.jsonl", ""), ("rm.py", "--data zipped", ""),
    ("rm.py", "--out done", "skipped"),  # the same options, the same inputs
    ("eval.py compare", "--out judged", "skipped"),
    ("eval.py", "--verdicts sound.jsonl --key key.json", "win 50.0 %"),
    ("metarm.py", "--save_adapted empty-folder", ""),
    ("rm.py", "--out empty-folder", ""),
    ("rm.py", "--model rm", ""),  # goes on from its head
    ("rm.py", "--data no-prompt.jsonl", ""),
    ("rm.py", "--data some-long.jsonl --eval_data some-long.jsonl --max_length 100", "1 of 25 rows are longer than 100 tokens"),
    ("metarm.py", "--meta same.jsonl", "50.0% of the responses are identical"),
    ("metarm.py", "--meta no-prompt.jsonl --order exact", ""),
    ("data.py split", "--ood prompts.jsonl --source other.jsonl", ""),
]
FROM_THE_SHELL = ["--model nan", "--meta single.jsonl", "--out busy"]


def rows_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with everything that the commands above name."""
    world = tmp_path_factory.mktemp("world")
    things = "phone parcel invoice charge refund help".split()
    pairs = [{"prompt": f"Human: my {things[i % 6]} {things[i % 5]} {i}", "chosen": f" thank you, {things[i % 4]}",
              "rejected": f" Sorry {things[i % 3]}"} for i in range(24)]
    meta = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in pairs]
    long = {"prompt": "the parcel is late " * 100, "chosen": " a", "rejected": " b", "responses": [" a", " b"]}
    text, zipped = rows_of(*pairs), gzip.compress(rows_of(*pairs).encode())
    latin = rows_of(*pairs[:1]) + '{"prompt": "caf\u00e9", "chosen": "a", "rejected": "b"}\n'
    for name, content in {
        "pairs.jsonl": text, "meta.jsonl": rows_of(*meta), "other.jsonl": text.replace("my", "our"),
        "prompts.jsonl": rows_of(*({"prompt": row["prompt"]} for row in pairs)),
        "toy-samples.jsonl": rows_of(*({"prompt": prompt, "responses": [" I will trace it today.", " No."]}
                                       for prompt in data.all_prompts(data.SHOP_PROBLEMS)[:6])),
        "empty.jsonl": "\n", "list.json": json.dumps(pairs, indent=1), "rows.csv": "prompt,chosen,rejected\na,b,c\n",
        "strings.jsonl": '"a"\n', "numbers.jsonl": rows_of({"prompt": "a", "chosen": 1, "rejected": 2}),
        "no-key.jsonl": rows_of(pairs[0], {"prompt": "a", "chosen": "b"}),
        "equal.jsonl": rows_of({"prompt": "a", "chosen": "b", "rejected": "b"}),
        "uneven.jsonl": rows_of({"prompt": "a", "responses": ["b", "c"]}, {"prompt": "a", "responses": ["b", "c", "d"]}),
        "single.jsonl": rows_of({"prompt": "a", "responses": ["b"]}),
        "same.jsonl": rows_of(*[{"prompt": data.all_prompts(data.SHOP_PROBLEMS)[0], "responses": ["b", "b"]}] * 8),
        "messages.jsonl": rows_of({"prompt": [{"role": "user", "content": "a"}]}),
        "no-prompt.jsonl": rows_of(*[{**row, **other, "prompt": ""} for row, other in zip(pairs, meta)]),
        "long.jsonl": rows_of(long), "some-long.jsonl": rows_of(*pairs, long),
        "bom.jsonl": "\ufeff" + text, "crlf.jsonl": text.replace("\n", "\r\n"),
        "latin-1.jsonl": latin.encode("latin-1"), "utf-16.jsonl": text.encode("utf-16"), "zipped": zipped,
        "key.json": json.dumps({"policies": ["a", "b"], "prompts": 2, "answer_1": {"1-a": 0, "2-b": 1}}),
        **{f"{name}.jsonl": rows_of(*({"id": id, "verdict": verdict} for id, verdict in verdicts)) for name, verdicts in {
            "sound": [("1-a", "1"), ("2-b", "1")], "missing": [("1-a", "1")], "doubled": [("1-a", 1), ("2-b", 2), ("1-a", 2)],
            "unknown": [("1-a", "1"), ("2-b", "A")], "stranger": [("9-z", "1"), ("1-a", "2")]}.items()},
        "cut.jsonl.gz": zipped[:-50], "damaged.jsonl.gz": zipped[:60] + b"?" + zipped[61:], "notes/a.txt": "mine",
    }.items():
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (world / "empty-folder").mkdir()

    make_policy(world / "policy"), make_policy(world / "gpt2", "gpt2", bos="<bos>", pad=None)
    config = json.loads((world / "policy/config.json").read_text())
    causal, classifier = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        for flags in ("--out done", "--out rm --model gpt2"):
            assert rm.main([*SOUND["rm.py"].split(), *flags.split()]) == 0
        assert report_card.main([*SOUND["eval.py compare"].split(), "--out", "judged"]) == 0

    def copy(name, base="policy"):
        return Path(shutil.copytree(world / base, world / name))

    folder = copy("cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    folder = copy("pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    folder = copy("half")
    save_file({name: x for name, x in load_file(folder / "model.safetensors").items() if "layers.1" not in name},
              folder / "model.safetensors", metadata={"format": "pt"})
    for path in copy("no-tokenizer").glob("tokenizer*"):
        path.unlink()
    (copy("broken-config") / "config.json").write_text('{"model_type": "llama",')
    (copy("wrong-shape") / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    folder = copy("hub-code")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy("no-eos"))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(world / "no-eos")
    for name, base, auto_class in [("nan", "policy", causal), ("nan-rm", "rm", classifier)]:
        model = auto_class.from_pretrained(copy(name, base))
        list(model.parameters())[0 if name == "nan" else -1].data[0, 0] = math.nan
        model.save_pretrained(world / name)
    causal.from_config(transformers.LlamaConfig(**{**config, "vocab_size": 60})).save_pretrained(copy("other-tokenizer"))
    classifier.from_pretrained(world / "policy", num_labels=2).save_pretrained(copy("two-labels"))
    model = classifier.from_pretrained(world / "policy", num_labels=1)
    model.config.max_position_embeddings = 4
    model.save_pretrained(copy("short-rm"))
    tokenizer = make_tokenizer(encoder=True, eos="[SEP]")
    tokenizer.save_pretrained(world / "bert")
    transformers.AutoModelForMaskedLM.from_config(transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64)).save_pretrained(world / "bert")
    with data.locked(f"{world}/busy.lock"):
        yield world


def argv_of(command, added):
    module, *mode = command.rstrip("!").removesuffix(" compare").split()  # that one is a mode in name only
    return module, [*mode, *("" if command.endswith("!") else SOUND[command]).split(), *added.split()]


def everything(world):
    """Each file with what can change of it."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() and path.suffix != ".lock" else None
            for path in world.rglob("*")}


def check_told(module, told, wrong, mend):
    """One line of error, the last one; beside it only progress bars, and notices about a file."""
    *others, error = [line for line in re.split("[\r\n]+", told) if line.strip()]
    assert error.startswith(f"{module}: error: ") and wrong in error and mend in error, error
    assert all("%|" in line or re.search("^[^ ]*: (warning|dropped)", line) for line in others), others
    assert "Traceback" not in told and len(error) < 700


@pytest.mark.parametrize("command, added, wrong, mend", MISTAKES, ids=[f"{m[0]} {m[1]}" for m in MISTAKES])
def test_mistake(world, monkeypatch, capfd, command, added, wrong, mend):
    monkeypatch.chdir(world)
    before = everything(world)
    module, argv = argv_of(command, added)
    assert MODULES[module].main(argv) == 2
    check_told(module, capfd.readouterr().err, wrong, mend)
    assert everything(world) == before


CHEAP = [m for m in MISTAKES if "--save_adapted" in m[1] or m[0] == "rm.py" and m[1] in (
    "--data pears.jsonl", "--out notes", "--out policy/rm", "--out rows.csv/x", "--out busy", "--out done --lr 1e-2")]


@pytest.mark.parametrize("command, added, wrong, mend", CHEAP, ids=[f"{m[0]} {m[1]}" for m in CHEAP])
def test_before_the_work(world, monkeypatch, capfd, command, added, wrong, mend):
    """What can be told at once is told before gigabytes of --model are read or hashed, let alone trained."""
    for name in ("data.fingerprint", "rm.load_pretrained"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("this takes long"))
    test_mistake(world, monkeypatch, capfd, command, added, wrong, mend)


@pytest.mark.parametrize("added", FROM_THE_SHELL)
def test_mistake_from_the_shell(world, added):
    command, added, wrong, mend = next(mistake for mistake in MISTAKES if mistake[1] == added)
    before = everything(world)
    module, argv = argv_of(command, added)
    done = subprocess.run([sys.executable, ROOT / module, *argv], cwd=world, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout == ""
    check_told(module, done.stderr, wrong, mend)
    assert everything(world) == before


@pytest.mark.parametrize("command, added, said", WORKS, ids=[f"{w[0]} {w[1]}" for w in WORKS])
def test_what_works(world, monkeypatch, capfd, command, added, said):
    monkeypatch.chdir(world)
    before = everything(world)
    module, argv = argv_of(command, added)
    out = world / (argv[len(argv) - argv[::-1].index("--out")] if "--out" in argv else "done")
    assert MODULES[module].main(argv) == 0
    told = capfd.readouterr()
    assert said in told.out + told.err and "error" not in told.err
    if added in ("--data bom.jsonl", "--data crlf.jsonl", "--data zipped"):  # the same rows, so the same weights
        assert (out / "model.safetensors").read_bytes() == (world / "done/model.safetensors").read_bytes()
    if out.name not in ("done", "judged"):
        shutil.rmtree(out)
    if "empty-folder" in argv:
        shutil.rmtree(world / "empty-folder", ignore_errors=True)
        (world / "empty-folder").mkdir()
    assert everything(world) == before


def test_out_of_memory_is_told_and_a_bug_keeps_its_traceback(world, monkeypatch, capfd):
    monkeypatch.chdir(world)
    for told, expected in [("CUDA out of memory. Tried to allocate 2 GiB", None), ("shapes do not match", RuntimeError)]:
        def fail(*_):
            raise RuntimeError(told)
        monkeypatch.setattr(rm, "pair_loss", fail)
        with pytest.raises(expected) if expected else contextlib.nullcontext():
            assert rm.main(SOUND["rm.py"].split()) == 2
            check_told("rm.py", capfd.readouterr().err, "out of memory", "lower --micro_batch_size")
        assert not list(world.glob("x*"))
