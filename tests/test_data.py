"""data.py: the gold rules, the world, the labels, files in many forms, folders, commands."""

import errno
import gzip
import io
import json
import math
import os
import random
import sys
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from conftest import make_pairs, write_rows

import data
import rm

NAMES = "sft pairs meta ppo valid test ood ood-meta ood-ppo".split()
SIZES = dict.fromkeys(NAMES, 10) | {"sft": 400, "pairs": 300}
PROMPT = "\n\nHuman: Hi. My lamp came broken. I need it for work.\n\nAssistant:"
PLAIN = " We read every message. Our team is on it."  # 9 words that earn and cost nothing
THANKS, SORRY = " Thank you for writing to us.", " I am sorry to hear that."


@pytest.fixture(scope="module")
def world():
    return data.make_world(0, SIZES)


@pytest.fixture(scope="module")
def samples(world):
    rng, prompts = random.Random(3), [row["prompt"] for row in world["prompts-pairs"]]
    answers = [[data.write_response(rng, prompt) for _ in range(5)] for prompt in prompts]
    return [{"prompt": p, "responses": k} for p, k in zip(prompts, answers, strict=True)]


def put(path, *rows, raw=None):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(text.encode() if raw is None else raw)
    return path


GOLD = {  # what follows PLAIN: its points
    "": 0.0,
    " This is about your lamp.": 1.0,  # names the thing
    " I will send a replacement.": 2.0,  # the remedy that fits
    " I will replace it for free. I can send a brand new one.": 2.0,  # counts once
    " I will unlock your account. I can call the courier.": -2.0,  # two others
    " I will send a replacement. I can call the courier.": 1.0,  # hedging costs
    " I will send a replacement tomorrow.": 3.0,  # says when; "row" is no seat here
    " You will hear from us today.": 1.0,
    THANKS + SORRY: 2.0,
    THANKS + SORRY + " We appreciate your trust.": 1.0,  # grovelling
    " Everything will be perfect. We guarantee it.": -3.0,  # empty promises
    " We read every message.": -1.0,  # said before
    " We lamp the the": 0.5,  # broken, yet names it
    (PLAIN * 5)[:-1]: -10.9,  # 54 words, 9 too many, and 10 repeats
}


def test_each_gold_rule():
    assert data.gold_parts(PROMPT, PLAIN).keys() == data.GOLD.keys()
    gold = {response: data.gold_reward(PROMPT, PLAIN + response) for response in GOLD}
    assert gold == pytest.approx(GOLD)
    assert data.gold_reward(PROMPT, " Our team is on it.") == -0.9  # 3 words short
    assert data.gold_reward(PROMPT, "") == -2.4


def test_every_prompt_is_understood_and_every_remedy_told_apart():
    fit = {"remedy that fits": 2.0, "other remedy": 0, "broken sentence": 0}
    wrong = {"remedy that fits": 0, "other remedy": -1.0, "broken sentence": 0}
    for problem, columns in data.PROBLEMS.items():
        prompts = data.all_prompts({problem: columns})
        assert len(set(prompts)) == len(prompts)
        assert {data.read_customer(p) for p in prompts} == {(problem, x) for x in columns[3]}
        for other, (_, _, says, _) in data.PROBLEMS.items():
            for remedy in says + [f"{remedy} today" for remedy in says]:
                parts = data.gold_parts(prompts[0], f" I can {remedy}.")
                assert {rule: parts[rule] for rule in fit} == (fit if other == problem else wrong)
    polite = data.GREETINGS + data.FAREWELLS
    for text in data.NAMING + polite + data.PROMISES + data.FILLERS:
        parts = data.gold_parts(PROMPT, " " + text.format(thing="lamp"))
        assert not any(parts[rule] for rule in (*fit, "time"))
        assert (parts["courtesy"] > 0) == (text in polite)
        assert (parts["empty promise"] < 0) == (text in data.PROMISES)
    for prompt in ("\n\nHuman: How are you?\n\nAssistant:", "My lamp sings.", "My horse is late."):
        with pytest.raises(data.Mistake, match="only prompts of the toy world"):
            data.gold_reward(prompt, " Hi.")


def test_world(world):
    files = {name if name == "sft" else f"prompts-{name}": size for name, size in SIZES.items()}
    assert {name: len(rows) for name, rows in world.items()} == files
    prompts = [row["prompt"] for rows in world.values() for row in rows]
    assert len(set(prompts)) == len(prompts)  # no prompt is in two files
    for name, rows in world.items():
        ood = sum(data.read_customer(row["prompt"])[0] in data.OOD_PROBLEMS for row in rows)
        assert ood == (60 if name == "sft" else len(rows) * ("ood" in name))  # 0.15 of 400
    assert data.make_world(0, SIZES) == world != data.make_world(1, SIZES)
    parts = [data.gold_parts(**row) for row in world["sft"]]
    assert not any(part["broken sentence"] for part in parts)
    assert abs(sum(part["remedy that fits"] > 0 for part in parts) / len(parts) - 0.5) < 0.1
    for wrong in ({"ood": 10_000}, {"ppo": 0}):
        with pytest.raises(data.Mistake, match="cannot be shared"):
            data.make_world(0, SIZES | wrong)


def test_tokenizer_gives_every_text_back(world):
    texts = [row[key] for row in world["sft"] for key in row]
    tokenizer = data.train_tokenizer(texts)
    odd = ["", " ", "\n\n\n", "  two  spaces .\t", "café 日 \U0001f600", "Zyzzyva!", "a?\r\n"]
    for text in texts + odd:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt, response = world["sft"][0].values()
    ids = [tokenizer(text).input_ids for text in (prompt, response, prompt + response)]
    assert ids[0] + ids[1] == ids[2] and len(ids[0]) < 30
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = data.make_model(tokenizer, 16, 1, seed=0).config.to_dict()
    assert len(set(ends.values())) == 2 and ends.items() <= config.items()
    assert config["vocab_size"] == len(tokenizer) < 1000


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_label_noise_is_bradley_terry(samples, noise):
    rows, flipped = data.label_pairs(samples, noise, seed=1)
    gold = [[data.gold_reward(x, y) for y in ys] for x, *ys in map(dict.values, rows)]
    gaps = [chosen - rejected for chosen, rejected in gold]
    assert flipped == pytest.approx(sum((gap < 0) + (gap == 0) / 2 for gap in gaps) / len(gaps))
    flip = [1 / (1 + math.exp(abs(gap) / noise)) for gap in gaps]  # sigmoid(-|gap| / noise)
    standard_error = math.sqrt(sum(p * (1 - p) for p in flip)) / len(flip)
    assert abs(flipped - sum(flip) / len(flip)) < 4 * standard_error
    assert data.label_pairs(samples, noise, seed=1) == (rows, flipped)
    assert data.label_pairs(samples, noise, seed=2)[0] != rows


def test_gold_labels_and_pairing():
    good, bad = PLAIN + " I will send a replacement.", PLAIN + " I will swap it."
    row = {"prompt": PROMPT, "responses": [good, bad, bad, good, bad]}  # the fifth has no partner
    same = {"prompt": PROMPT, "responses": [good, good]}  # no pair
    pairs = [{"prompt": PROMPT, "chosen": good, "rejected": bad}] * 2
    for noise in (0, 1e-9):  # no overflow
        assert data.label_pairs([same, row], noise, seed=0) == (pairs, 0)
    tie = {"prompt": PROMPT, "responses": [PLAIN, PLAIN + " I have made a note of it."]}
    assert data.label_pairs([tie], noise=0, seed=0)[1] == 0.5
    tosses = data.label_pairs([tie] * 200, noise=0, seed=0)[0]
    assert 70 < sum(toss["chosen"] == PLAIN for toss in tosses) < 130  # a coin, not the first
    with pytest.raises(data.Mistake, match="equal"):
        data.label_pairs([same], noise=0, seed=0)


def test_jsonl_round_trip_and_encodings(tmp_path):
    rows = [{"prompt": "café \u2028\x85 \U0001f600", "n": 1}, {"prompt": "\n\nHuman: x"}]
    file = tmp_path / "a.jsonl"
    data.write_jsonl(file, rows[:1])
    data.append_jsonl(file, rows[1])
    plain = file.read_bytes()
    for raw in (plain, gzip.compress(plain), b"\xef\xbb\xbf" + plain, plain.rstrip(b"\n")):
        assert data.read_jsonl(put(file, raw=raw)) == rows
    lines = data.read_lines(put(file, raw=b"\n \r\n" + plain.replace(b"\n", b"\r\n")))
    assert lines[1] == (f"{file}, line 4", rows[1])
    with pytest.raises(UnicodeEncodeError):
        data.write_jsonl(file, [{"prompt": "\ud800"}])
    assert len(data.read_jsonl(file)) == 2 and os.listdir(tmp_path) == ["a.jsonl"]  # not half


HUMAN, TURN = "\n\nHuman: Why", "\n\nHuman: Why\n\nAssistant:"
WHY, SYSTEM = {"role": "user", "content": "Why"}, {"role": "system", "content": "Be kind."}
SO, NO = ({"role": "assistant", "content": text} for text in ("So.", "No."))

# Split; HH-RLHF transcripts; TRL's message lists. The prompt, again, is taken off.
TURN_SO, TURN_NO = TURN + " So.", TURN + " No."
FORMS = [(TURN, " So.", " No."), (None, TURN_SO, TURN_NO), ([WHY], [SO], [NO])]
FORMS += [(None, [WHY, SO], [WHY, NO]), (TURN, TURN_SO, TURN_NO), ([WHY], [WHY, SO], [WHY, NO])]
FORMS += [(TURN, TURN_SO.strip(), TURN_NO.strip()), (TURN, [WHY, SO], [WHY, NO])]
FORMS += [("Why", [WHY, SO], [WHY, NO]), ("Why", TURN_SO, TURN_NO), (HUMAN, TURN_SO, TURN_NO)]


@pytest.mark.parametrize("prompt, chosen, rejected", FORMS)
def test_preferences_in_all_forms(tmp_path, capsys, prompt, chosen, rejected):
    row = {"chosen": chosen, "rejected": rejected} | ({"prompt": prompt} if prompt else {})
    file = put(tmp_path / "a.jsonl", row)
    assert data.read_preferences(file) == [{"prompt": TURN, "chosen": " So.", "rejected": " No."}]
    sft = [{"prompt": TURN, "response": " So."}]
    assert data.read_sft(file) == sft and capsys.readouterr().err == ""
    row["response"] = row.pop("chosen")
    assert data.read_sft(put(file, row)) == sft


def test_free_text_is_cut_only_where_the_whole_file_repeats_it(tmp_path):
    for a, b, cut in (("Hi", "Hi", True), ("Hi", "So", False)):  # else it may be by chance
        rows = [{"prompt": "Hi", "chosen": f"{x} there", "rejected": f"{x} you"} for x in (a, b)]
        want = [{"prompt": "Hi", "chosen": " there", "rejected": " you"}] * 2 if cut else rows
        assert data.read_preferences(put(tmp_path / "a", *rows)) == want


def test_dropped_rows_are_counted(tmp_path, capsys):
    long, other = TURN + " Yes?" + TURN, TURN.replace("Why", "Who")
    answers = [(long + " So.", long), (TURN + " So.", other + " No."), (TURN + " So.",) * 2]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
    want = [{"prompt": long, "chosen": " So.", "rejected": ""}]  # the last turn may be empty
    assert data.read_preferences(put(tmp_path / "hh.jsonl", *rows)) == want
    assert "dropped 2 rows" in capsys.readouterr().err


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def test_meta_and_prompts(tmp_path, capsys):
    rows = [{"prompt": "p", "responses": ["a", "b", ""]}, {"prompt": "q", "responses": list("acb")}]
    file = tmp_path / "s.jsonl"
    assert data.read_meta(put(file, *(row | {"n": 1} for row in rows))) == rows
    assert data.read_prompts(file) == ["p", "q"] and capsys.readouterr().err == ""
    data.read_meta(put(file, *({"prompt": "p", "responses": list(k)} for k in ("aab", "bbb"))))
    assert "50.0% of the responses are identical" in capsys.readouterr().err  # 3 of 6
    read = data.read_meta(put(file, *[PAIR] * 50))  # preferences: k = 2, without their labels
    assert read == data.read_meta(file)
    assert all(sorted(row["responses"]) == ["a", "b"] for row in read)
    assert 10 < sum(row["responses"] == ["a", "b"] for row in read) < 40


def test_message_lists_are_read_alike(tmp_path):
    prompt, said = [SYSTEM, WHY], [[SO], [SO | {"content": ""}]]
    pairs = put(tmp_path / "d.jsonl", {"prompt": prompt, "chosen": said[0], "rejected": said[1]})
    [pair] = data.read_preferences(pairs)
    assert pair["prompt"] == "\n\nSystem: Be kind.\n\nHuman: Why\n\nAssistant:"
    assert data.read_prompts(pairs) == [pair["prompt"]]
    file = put(tmp_path / "s.jsonl", {"prompt": prompt, "responses": said})
    assert data.read_meta(file) == [{"prompt": pair["prompt"], "responses": [" So.", ""]}]
    whole = [[*prompt, *turns] for turns in said]  # the conversation beside its prompt
    [read] = data.read_meta(put(file, {"prompt": prompt, "responses": whole}))
    assert read["responses"][0] == " So."
    texts = put(file, {"prompt": prompt, "responses": [" a", " b"]})
    assert data.read_meta(texts) == [{"prompt": pair["prompt"], "responses": [" a", " b"]}]
    for bad in ([], [{"role": "tool", "content": "x"}], [3]):
        with pytest.raises(data.Mistake, match='line 1: key "prompt"'):
            data.read_prompts(put(file, {"prompt": bad}))


def test_every_reader_takes_a_file_on_the_hub(tmp_path, monkeypatch):
    def download(*asked, repo_type):
        assert (*asked, repo_type) == ("a/b", "c/d.jsonl", "dataset")
        return str(put(tmp_path / "cached", PAIR))

    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.Mistake, match="^a/b/c/d.jsonl: found neither here nor on the hub"):
        data.read_jsonl("a/b/c/d.jsonl")  # the tests are offline
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for read in (data.read_preferences, data.read_meta, data.read_sft, data.read_prompts):
        assert read("a/b/c/d.jsonl") == read(tmp_path / "cached")
    (tmp_path / "a").mkdir()  # then it is a path
    for path in ("a/b/c/d.jsonl", f"{tmp_path}/b/c/d.jsonl", "./b/c.jsonl", "b/c.jsonl", "a"):
        with pytest.raises(data.Mistake, match=f"^{path}: .*(No such file|directory)"):
            data.read_prompts(path)


EVERY = json.dumps(PAIR | {"response": "a", "responses": ["a", "b"]}).encode() + b"\n"
PREFERENCES, META, SFT = data.read_preferences, data.read_meta, data.read_sft


@pytest.mark.parametrize(
    "read, content, complaint",
    [
        (PREFERENCES, b"", "empty"),
        (PREFERENCES, EVERY + b'\n{"a": \n', "line 3: .* give .* one JSON object"),
        (PREFERENCES, EVERY + b'{"a": "\xff"}\n', "line 2: .*UTF-8"),
        (PREFERENCES, b"[" * 100_000, "line 1: .* give .* one JSON object"),
        (PREFERENCES, gzip.compress(os.urandom(999))[:-20], "give a whole"),
        (PREFERENCES, PAIR | {"chosen": 7}, 'line 2: key "chosen" .* not text .*7'),
        (PREFERENCES, PAIR | {"chosen": "a\ud800"}, 'line 2: key "chosen" .* Unicode'),
        (PREFERENCES, {"chosen": "a", "rejected": "b"}, 'line 2: key "chosen" must end with'),
        (PREFERENCES, {"chosen": [WHY, SO], "rejected": []}, 'key "rejected" must end with'),
        (PREFERENCES, {"chosen": [WHY | {"role": "tool"}, SO], "rejected": []}, "needs messages"),
        (PREFERENCES, {"chosen": [WHY, SO | {"content": ["b"]}], "rejected": []}, "not text"),
        (PREFERENCES, {"prompt": "Who", "chosen": [WHY, SO], "rejected": [WHY, NO]}, "not hold"),
        (PREFERENCES, {"prompt": "Why", "chosen": [SO], "rejected": [NO]}, "after a prompt"),
        (PREFERENCES, {"prompt": [SYSTEM, WHY], "chosen": [WHY, SO], "rejected": []}, "must end"),
        (META, b'{"prompt": "p", "responses": 5}', "line 1: .* k >= 2"),
        (META, {"prompt": "p", "responses": ["a", 2]}, 'line 2: key "responses" .* not text'),
        (META, {"responses": ["a", "b"]}, 'line 2: key "prompt" is missing'),
        (SFT, {"response": "p"}, 'line 2: key "response" must end with an answer of Assistant'),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, read, content, complaint):
    raw = content if isinstance(content, bytes) else EVERY + json.dumps(content).encode()
    file = put(tmp_path / "bad.jsonl", raw=raw)
    with pytest.raises(data.Mistake, match=complaint) as error:
        read(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_output_folder_is_whole_or_absent(tmp_path):
    out = tmp_path / "runs" / "rm"
    with pytest.raises(KeyboardInterrupt), data.output_folder(out):
        raise KeyboardInterrupt
    assert os.listdir(out.parent) == []  # nothing to go on from
    with pytest.raises(ZeroDivisionError), data.output_folder(out) as work:
        put(work / "checkpoint.pt", raw=b"half way")
        raise ZeroDivisionError
    assert os.listdir(out.parent) == ["rm.partial"]
    out.mkdir()  # an empty folder does not count
    with data.output_folder(f"{out}/") as work:
        assert (work / "checkpoint.pt").read_bytes() == b"half way"
        put(work / "log.jsonl", {"step": 1})
        put(work / "checkpoint.pt.tmp", raw=b"killed while writing this")
    assert os.listdir(out.parent) == ["rm"] and os.listdir(out) == ["log.jsonl"]


def test_a_mount_point_is_refused_and_the_checkpoint_outlives_the_renaming(tmp_path, monkeypatch):
    busy = mock.Mock(side_effect=OSError(errno.EBUSY, "Device or resource busy"))
    out = tmp_path / "out"
    with pytest.raises(OSError), data.output_folder(out) as work:
        put(work / "checkpoint.pt", raw=b"the last step")
        monkeypatch.setattr(Path, "replace", busy)
    assert os.listdir(work) == ["checkpoint.pt"]
    out.mkdir()
    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(data.Mistake, match=f"out cannot .* busy.*; name another, or {out}/x"):
        data.output_folder(out).__enter__()
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's disk that is full")
@pytest.mark.parametrize("file", ["checkpoint.pt.tmp", "tokenizer.json"])
def test_a_full_disk_is_told_in_one_line_and_costs_nothing(tmp_path, policy_folder, capsys, file):
    pairs, out = write_rows(tmp_path / "d.jsonl", make_pairs(24)), tmp_path / "rm"
    argv = f"--model {policy_folder} --data {pairs} --out {out} --batch_size 4".split()
    (tmp_path / "rm.partial").mkdir()
    (tmp_path / "rm.partial" / file).symlink_to("/dev/full")
    assert rm.main([*argv, "--checkpoint_minutes", "0"]) == 2  # an error of torch, of tokenizers
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"rm.py: error: the disk of {out} is full") and "same command" in told
    (tmp_path / "rm.partial" / file).unlink()
    # It goes on, with smaller micro-batches, too: these belong to no checkpoint.
    assert rm.main([*argv, "--micro_batch_size", "2"]) == 0
    assert [row["step"] for row in data.read_jsonl(out / "log.jsonl")] == list(range(6))
    assert not (out / "checkpoint.pt").exists()


def test_the_device_can_be_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, device in (("cpu", "cpu"), ("cuda:1", "cuda:1"), ("", "cuda")):
        monkeypatch.setenv("METARM_DEVICE", name)
        assert rm.pick_device() == torch.device(device)


def test_command(capsys):
    parser = data.new_parser("x.py", "What it does:\n  5 % of it.")
    add = data.modes(parser, "sft dpo")
    add("sft dpo", "--out", required=True, help="a folder")
    add("dpo", "--beta", type=float, default=0.1, help="a number")
    add("dpo", "--seed", type=int, default=2**63 - 1, help="a number")

    def call(argv, error=None):
        def run(args):
            seen.append(vars(args))
            if error:
                raise error

        return data.command(parser, run, argv.split()), *capsys.readouterr()

    seen = []
    status, out, err = call("dpo --out o --beta 2")
    assert (status, out) == (0, "") and " s, " in err and " GB" in err
    assert call("dpo --out o --beta -2")[0] == 2 and call("dpo --out o --beta nan")[0] == 2
    for seed in (-1, 2**63, 2**64):
        told = f"--seed {seed}: it must be 0 or above 0, and below {2**63}\n"
        assert call(f"dpo --out o --seed {seed}") == (2, "", f"x.py: error: {told}")
    assert seen == [{"mode": "dpo", "out": "o", "beta": 2.0, "seed": 2**63 - 1}]
    assert "What it does:\n  5 % of it." in call("--help")[1]
    for argv in ("fly", "sft", "sft --out o --beta 1", "dpo --out o --be 1", "dpo --beta x"):
        status, out, told = call(argv)
        assert status == 2 and out == "" and ": error: " in told
    assert call("sft --out o", data.Mistake("one\n  two")) == (2, "", "x.py: error: one two\n")
    assert call("sft --out o", KeyboardInterrupt())[0] == 130
    full = OSError(28, "No space left", "/d/f")
    assert "disk of o is full ([Errno 28] No space left: '/d/f'" in call("sft --out o", full)[2]
    for bug in (ValueError(), OSError(2, "No such file", "/d/f")):  # a bug keeps its traceback
        with pytest.raises(type(bug)):
            call("sft --out o", bug)


def test_a_terminal_that_is_not_utf_8(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert data.command(data.new_parser("x.py"), lambda args: print("5 ± 2 \ud800"), []) == 0
    shown.flush()
    assert shown.buffer.getvalue() == b"5 ? 2 ?\n"


def run(tmp_path, name, command, **options):
    options = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    return data.main([command, "--out", str(tmp_path / name), *options])


def check_refused(tmp_path, capsys, command, sound, **wrong):
    before = sorted(os.listdir(tmp_path))
    for name, value in wrong.items():
        capsys.readouterr()
        assert run(tmp_path, "x", command, **sound | {name: value}) == 2
        told = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
        assert len(told) == 1 and told[0].startswith("data.py: error: "), told
    assert sorted(os.listdir(tmp_path)) == before


def test_toy(tmp_path, capsys):
    small = {"sft": 60, "pairs": 40, "meta": 5, "ppo": 5, "valid": 5, "test": 5, "ood_ppo": 5}
    for name, seed in ("a0", "b0", "c1"):
        assert run(tmp_path, name, "toy", seed=seed, **small) == 0
    sets = [f"prompts-{name}.jsonl" for name in NAMES[1:]]
    assert sorted(os.listdir(tmp_path / "a")) == sorted(["model", "sft.jsonl", *sets])
    for file in ("sft.jsonl", *sets, "model/tokenizer.json", "model/model.safetensors"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b and (a != c or file == "model/tokenizer.json")
    check_refused(tmp_path, capsys, "toy", small, pairs=0, sft=100_000)


def test_label(samples, tmp_path, capsys):
    sound = {"samples": put(tmp_path / "samples.jsonl", *samples), "valid_share": 0.2}
    assert run(tmp_path, "pairs", "label", **sound) == 0
    train, valid = (data.read_jsonl(tmp_path / f"pairs/{x}.jsonl") for x in ("train", "valid"))
    assert f"{len(train) + len(valid)} pairs" in capsys.readouterr().out
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in valid}
    assert len({row["prompt"] for row in valid}) == 60  # a fifth of 300
    assert all(list(row) == ["prompt", "chosen", "rejected"] for row in train + valid)  # no gold
    check_refused(tmp_path, capsys, "label", sound, noise=-1, valid_share=1, samples="none")


def test_split_with_another_domain(tmp_path, capsys):
    """--ood, as prompts or as pairs: prompts that D lacks, for the test, for S and for PPO."""
    pairs = [PAIR | {"prompt": f"p{i}"} for i in range(40)]
    asked = [{"prompt": f"q{i}"} for i in range(40)]
    sound = {"source": put(tmp_path / "d.jsonl", *pairs), "ood": tmp_path / "ood.jsonl", "test": 8}
    sizes = {"train": 16, "valid": 4, "judge": 10, "prompts-meta": 3, "prompts-ppo": 7}
    sizes |= {"prompts-ood": 8, "prompts-ood-meta": 10, "prompts-ood-ppo": 22}
    for out, other in (("prompts", asked), ("both", [PAIR | row for row in asked])):
        put(sound["ood"], *other, other[0] | {"prompt": "p1"})  # D has p1 too
        assert run(tmp_path, out, "split", **sound) == 0
        read = {name: data.read_prompts(tmp_path / out / f"{name}.jsonl") for name in sizes}
        assert {name: len(some) for name, some in read.items()} == sizes
        prompts = [row["prompt"] for row in pairs + asked]
        assert sorted(sum(read.values(), [])) == sorted(prompts)  # each in one file
        assert all(prompt[0] == "pq"["ood" in name] for name in read for prompt in read[name])
        assert data.read_prompts(tmp_path / out / "prompts-test.jsonl") == read["valid"]
        chosen = [{"prompt": prompt, "response": "a"} for prompt in read["train"]]
        assert data.read_jsonl(tmp_path / out / "sft.jsonl") == chosen
    check_refused(tmp_path, capsys, "split", sound, valid_share=-0.1, ood=sound["source"])
