"""data.py: the gold rules, the world, the labels, files in many forms, folders, commands."""

import gzip
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import data

ROOT = Path(__file__).resolve().parents[1]
HH = ROOT.parent / "shared" / "data" / "hh-harmless-1400.jsonl.gz"
NAMES = "sft pairs meta ppo valid test ood ood-meta ood-ppo".split()
SIZES = dict(zip(NAMES, (400, 300, 20, 30, 10, 10, 10, 10, 10), strict=True))
PROMPT = "\n\nHuman: Hi. My lamp came broken. I need it for work.\n\nAssistant:"
PLAIN = " We read every message. Our team is on it."  # 9 words that earn and cost nothing


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


# ------------------------------------------------------------------------------- the gold rules

THANKS = " Thank you for writing to us."
SORRY = " I am sorry to hear that."
TRUST = " We appreciate your trust."


@pytest.mark.parametrize(
    "response, points",
    [
        (PLAIN, 0.0),
        (PLAIN + " This is about your lamp.", 1.0),  # names the thing
        (PLAIN + " I will send a replacement.", 2.0),  # the remedy that fits
        (PLAIN + " I will replace it for free. I can send a brand new one.", 2.0),  # counts once
        (PLAIN + " I will unlock your account. I can call the courier.", -2.0),  # two others
        (PLAIN + " I will send a replacement. I can call the courier.", 1.0),  # hedging costs
        (PLAIN + " I will send a replacement tomorrow.", 3.0),  # says when; "row" is no seat here
        (PLAIN + " You will hear from us today.", 1.0),
        (PLAIN + THANKS + SORRY, 2.0),
        (PLAIN + THANKS + SORRY + TRUST, 1.0),  # grovelling
        (PLAIN + " Everything will be perfect. We guarantee it.", -3.0),  # empty promises
        (PLAIN + " We read every message.", -1.0),  # said before
        (PLAIN + " We lamp the the", 0.5),  # broken, yet names it
        (" Our team is on it.", -0.9),  # 3 words short
        ("", -2.4),
        ((PLAIN * 6)[:-1], -10.9),  # 54 words, 9 too many, and 10 repeats
    ],
)
def test_each_gold_rule(response, points):
    assert data.gold_reward(PROMPT, response) == pytest.approx(points)
    assert data.gold_parts(PROMPT, response).keys() == data.GOLD.keys()


def test_gold_refuses_other_worlds():
    for prompt in ("\n\nHuman: How are you?\n\nAssistant:", "My lamp sings.", "My horse is late."):
        with pytest.raises(data.Mistake, match="only prompts of the toy world"):
            data.gold_reward(prompt, " Hi.")


def test_every_prompt_is_understood_and_every_remedy_told_apart():
    fit = {"remedy that fits": 2.0, "other remedy": 0, "broken sentence": 0}
    wrong = {"remedy that fits": 0, "other remedy": -1.0, "broken sentence": 0}
    for problem, (_, _, _, things) in data.PROBLEMS.items():
        prompts = data.all_prompts({problem: data.PROBLEMS[problem]})
        assert len(set(prompts)) == len(prompts)
        assert {data.read_customer(p) for p in prompts} == {(problem, thing) for thing in things}
        for other, (_, _, says, _) in data.PROBLEMS.items():
            for sentence in (
                f" I can {remedy}{when}." for remedy in says for when in ("", " today")
            ):
                parts = data.gold_parts(prompts[0], sentence)
                assert {rule: parts[rule] for rule in fit} == (fit if other == problem else wrong)
    polite = data.GREETINGS + data.FAREWELLS
    for text in data.NAMING + polite + data.PROMISES + data.FILLERS:
        parts = data.gold_parts(PROMPT, " " + text.format(thing="lamp"))
        assert not any(parts[rule] for rule in (*fit, "time"))
        assert (parts["courtesy"] > 0) == (text in polite)
        assert (parts["empty promise"] < 0) == (text in data.PROMISES)


# ------------------------------------------------------------------------------------- the world


def test_world(world):
    files = {name if name == "sft" else f"prompts-{name}": size for name, size in SIZES.items()}
    assert {name: len(rows) for name, rows in world.items()} == files
    prompts = [row["prompt"] for rows in world.values() for row in rows]
    assert len(set(prompts)) == len(prompts)  # no prompt is in two files
    ood = {
        name: sum(data.read_customer(row["prompt"])[0] in data.OOD_PROBLEMS for row in rows)
        for name, rows in world.items()
    }
    assert ood.pop("sft") == round(data.OOD_SHARE * SIZES["sft"])
    assert all(count == (len(world[name]) if "ood" in name else 0) for name, count in ood.items())
    assert data.make_world(0, SIZES) == world != data.make_world(1, SIZES)
    parts = [data.gold_parts(**row) for row in world["sft"]]
    assert not any(part["broken sentence"] for part in parts)
    fits = sum(part["remedy that fits"] > 0 for part in parts) / len(parts)
    assert abs(fits - 0.5) < 0.1
    for wrong in ({"ood": 10_000}, {"ppo": 0}):
        with pytest.raises(data.Mistake, match="cannot be shared"):
            data.make_world(0, SIZES | wrong)


def test_another_world():
    parts = (lambda n: [f"{n}{i}" for i in range(12)], "a", "b", lambda rng, prompt: prompt.upper())
    world = data.make_world(0, {"sft": 7, "ppo": 5, "ood": 3}, parts)
    assert sorted(row["prompt"][0] for row in world["sft"]) == list("aaaaaab")
    assert {row["prompt"][0] for row in world["prompts-ood"]} == {"b"}
    assert all(row["response"] == row["prompt"].upper() for row in world["sft"])


def test_tokenizer_gives_every_text_back(world, tmp_path):
    from transformers import AutoTokenizer

    data.train_tokenizer(["".join(row.values()) for row in world["sft"]]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [row[key] for row in world["sft"] for key in row]
    odd = [
        "",
        " ",
        "\n\n\n",
        "  two  spaces .\t",
        "caf\u00e9 \u65e5 \U0001f600",
        "Zyzzyva!",
        "a?\r\n",
    ]
    for text in texts + odd:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    row = world["sft"][0]
    ids = [tokenizer(text).input_ids for text in row.values()]
    assert tokenizer("".join(row.values())).input_ids == ids[0] + ids[1]
    assert max(len(tokenizer(row["prompt"]).input_ids) for row in world["sft"]) < 30
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|eos|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id and len(tokenizer) < 1000


# --------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_label_noise_is_bradley_terry(samples, noise):
    rows, flipped = data.label_pairs(samples, noise, seed=1)
    gold = [
        [data.gold_reward(row["prompt"], row[key]) for row in rows] for key in list(rows[0])[1:]
    ]
    gaps = [chosen - rejected for chosen, rejected in zip(*gold, strict=True)]
    assert flipped == pytest.approx(sum((gap < 0) + (gap == 0) / 2 for gap in gaps) / len(gaps))
    flip = [1 / (1 + math.exp(abs(gap) / noise)) for gap in gaps]  # sigmoid(-|gap| / noise)
    standard_error = math.sqrt(sum(p * (1 - p) for p in flip)) / len(flip)
    assert abs(flipped - sum(flip) / len(flip)) < 4 * standard_error
    assert data.label_pairs(samples, noise, seed=1) == (rows, flipped)
    assert data.label_pairs(samples, noise, seed=2)[0] != rows


def test_gold_labels_and_pairing():
    good, bad = PLAIN + " I will send a replacement.", PLAIN + " I will swap it."
    row = {"prompt": PROMPT, "responses": [good, bad, bad, good, bad]}  # the fifth has no partner
    rows, flipped = data.label_pairs([row], noise=0, seed=0)
    assert rows == [{"prompt": PROMPT, "chosen": good, "rejected": bad}] * 2 and flipped == 0
    assert data.label_pairs([row], noise=1e-9, seed=0) == (rows, 0)  # no overflow
    tie = {"prompt": PROMPT, "responses": [PLAIN, PLAIN + " I have made a note of it."]}
    assert data.label_pairs([tie], noise=0, seed=0)[1] == 0.5
    tosses = [data.label_pairs([tie], noise=0, seed=seed)[0][0] for seed in range(200)]
    assert 70 < sum(toss["chosen"] == PLAIN for toss in tosses) < 130  # a coin, not the first
    same = {"prompt": PROMPT, "responses": [good, good]}
    assert len(data.label_pairs([same, row], noise=0, seed=0)[0]) == 2
    for rows, noise in (([same], 0), ([row], -1.0), ([row], math.nan), ([row], math.inf)):
        with pytest.raises(data.Mistake, match="equal|noise"):
            data.label_pairs(rows, noise, seed=0)


# -------------------------------------------------------------------------------------- readers


def test_jsonl_round_trip_and_encodings(tmp_path):
    rows = [{"prompt": "caf\u00e9 \u2028\x85 \U0001f600", "n": 1}, {"prompt": "\n\nHuman: x"}]
    file = tmp_path / "a.jsonl"
    data.write_jsonl(file, rows[:1])
    data.append_jsonl(file, rows[1])
    plain = file.read_bytes()
    for raw in (plain, gzip.compress(plain), b"\xef\xbb\xbf" + plain, plain.rstrip(b"\n")):
        assert data.read_jsonl(put(file, raw=raw)) == rows
    assert data.read_lines(put(file, raw=b"\n \r\n" + plain.replace(b"\n", b"\r\n")))[1][0] == 4
    with pytest.raises(UnicodeEncodeError):
        data.write_jsonl(file, [{"prompt": "\ud800"}])
    assert len(data.read_jsonl(file)) == 2 and os.listdir(tmp_path) == ["a.jsonl"]  # not half


HUMAN, TURN = "\n\nHuman: Why", "\n\nHuman: Why\n\nAssistant:"
WHY, SO, NO = ({"role": r, "content": c} for r, c in (("user", "Why"), *2 * [("assistant", "")]))
SO, NO = SO | {"content": "So."}, NO | {"content": "No."}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        (TURN, " So.", " No."),
        (None, TURN + " So.", TURN + " No."),  # HH-RLHF transcripts
        ([WHY], [SO], [NO]),  # TRL's message lists
        (None, [WHY, SO], [WHY, NO]),
        (TURN, TURN + " So.", TURN + " No."),  # the prompt, again: taken off
        (TURN, TURN + " So.", " No."),
        (TURN, TURN.strip() + " So.", TURN.strip() + " No."),
        ([WHY], [WHY, SO], [WHY, NO]),
        ("Why", [WHY, SO], [WHY, NO]),  # as UltraFeedback has it
        (TURN, [WHY, SO], [WHY, NO]),
        ("Why", TURN + " So.", TURN + " No."),
        (HUMAN, TURN + " So.", TURN + " No."),
    ],
)
def test_preferences_in_all_forms(tmp_path, capsys, prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    file = put(tmp_path / "a.jsonl", {k: v for k, v in row.items() if v is not None})
    assert data.read_preferences(file) == [{"prompt": TURN, "chosen": " So.", "rejected": " No."}]
    assert data.read_sft(file) == [{"prompt": TURN, "response": " So."}]
    assert capsys.readouterr().err == ""


def test_free_text_is_cut_only_where_the_whole_file_repeats_it(tmp_path):
    rows = [{"prompt": f"Q{i}?", "chosen": f"Q{i}? So.", "rejected": f"Q{i}? No."} for i in "12"]
    read = data.read_preferences(put(tmp_path / "a", *rows))
    assert [list(pair.values()) for pair in read] == [[f"Q{i}?", " So.", " No."] for i in "12"]
    plain = [{"prompt": "Hi", "chosen": "So.", "rejected": "No."}]
    quotes = {"prompt": "Hi", "chosen": "Hi there.", "rejected": "Hi you."}
    rows = [quotes, *plain]  # a greeting that is parroted by chance
    assert data.read_preferences(put(tmp_path / "a", *rows)) == rows
    assert data.read_sft(put(tmp_path / "a", {"prompt": TURN, "response": TURN + " So."})) == [
        {"prompt": TURN, "response": " So."}
    ]


def test_dropped_rows_are_counted(tmp_path, capsys):
    long, other = TURN + " Yes?" + TURN, TURN.replace("Why", "Who")
    answers = [(long + " So.", long), (TURN + " So.", other + " No."), (TURN + " So.",) * 2]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
    want = [{"prompt": long, "chosen": " So.", "rejected": ""}]  # the last turn may be empty
    assert data.read_preferences(put(tmp_path / "hh.jsonl", *rows)) == want
    assert "dropped 2 rows" in capsys.readouterr().err


@pytest.mark.skipif(not HH.exists(), reason="needs 1,400 rows of HH-RLHF beside the project")
def test_real_rows():
    raw = [json.loads(line) for line in gzip.open(HH, "rt", encoding="utf-8")]
    heads = [[row[key].rpartition(data.ANSWER)[0] for key in row] for row in raw]
    want = [list(row.values()) for row, (a, b) in zip(raw, heads, strict=True) if a == b]
    pairs = data.read_preferences(HH)
    assert [[pair["prompt"] + pair[key] for key in list(pair)[1:]] for pair in pairs] == want
    assert not any(data.ANSWER in pair["chosen"] + pair["rejected"] for pair in pairs)


def test_meta_prompts_and_the_hub(tmp_path, capsys):
    rows = [{"prompt": "p", "responses": ["a", "b", ""]}, {"prompt": "q", "responses": list("acb")}]
    file = tmp_path / "s.jsonl"
    assert data.read_meta(put(file, *(row | {"n": 1} for row in rows))) == rows
    assert data.read_prompts(file) == ["p", "q"] and capsys.readouterr().err == ""
    data.read_meta(put(file, *({"prompt": "p", "responses": list(k)} for k in ("aab", "bbb"))))
    assert "50.0% of the responses are identical" in capsys.readouterr().err  # 3 of 6
    put(file, *({"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(50)))
    read = data.read_meta(file)  # preferences: k = 2, without their labels
    assert read == data.read_meta(file) and all(
        sorted(row["responses"]) == ["a", "b"] for row in read
    )
    assert 10 < sum(row["responses"] == ["a", "b"] for row in read) < 40
    assert data.from_hub(None) is None and data.from_hub(str(file)) == str(file)
    with pytest.raises(data.Mistake, match="a/b/c.jsonl: not here"):
        data.from_hub("a/b/c.jsonl")


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
EVERY = json.dumps(PAIR | {"response": "a", "responses": ["a", "b"]}).encode() + b"\n"
GOOD = json.dumps(PAIR).encode() + b"\n"
PREFERENCES, META, SFT = data.read_preferences, data.read_meta, data.read_sft


@pytest.mark.parametrize(
    "read, content, complaint",
    [
        (PREFERENCES, b"", "empty"),
        (PREFERENCES, GOOD + b'\n{"a": \n', "line 3: give one JSON object"),
        (PREFERENCES, GOOD + b"[1]\n", "line 2: give one JSON object"),
        (PREFERENCES, GOOD + b'{"a": "\xff"}\n', "line 2: .*UTF-8"),
        (PREFERENCES, b"[" * 100_000, "line 1: give one JSON object"),
        (PREFERENCES, gzip.compress(os.urandom(999))[:-20], "name a whole"),
        (PREFERENCES, {"prompt": "p", "chosen": "a"}, 'line 2: key "rejected" is missing'),
        (PREFERENCES, PAIR | {"chosen": 7}, 'line 2: key "chosen" .* not text .*7'),
        (PREFERENCES, PAIR | {"prompt": 7}, 'line 2: key "prompt" .* not text'),
        (PREFERENCES, PAIR | {"chosen": "a\ud800"}, 'line 2: key "chosen" .* Unicode'),
        (PREFERENCES, {"chosen": "a", "rejected": "b"}, 'line 2: key "chosen" must end with'),
        (PREFERENCES, {"chosen": [WHY], "rejected": [WHY]}, "must end with an answer"),
        (PREFERENCES, {"chosen": [SO], "rejected": [NO]}, "must end with an answer"),
        (PREFERENCES, {"chosen": ["a"], "rejected": ["b"]}, "needs messages"),
        (PREFERENCES, {"chosen": [WHY | {"role": "tool"}, SO], "rejected": []}, "needs messages"),
        (PREFERENCES, {"chosen": [WHY, SO | {"content": ["b"]}], "rejected": []}, "not text"),
        # forms that do not go together
        (PREFERENCES, {"prompt": "Who", "chosen": [WHY, SO], "rejected": [WHY, NO]}, "not hold"),
        (PREFERENCES, {"prompt": "x", "chosen": TURN + " a", "rejected": TURN + " b"}, "not hold"),
        (PREFERENCES, {"prompt": [WHY], "chosen": TURN + " a", "rejected": "b"}, "not text"),
        (PREFERENCES, {"prompt": "Why", "chosen": [SO], "rejected": [NO]}, "after a prompt"),
        (PREFERENCES, {"prompt": [SYSTEM, WHY], "chosen": [WHY, SO], "rejected": []}, "must end"),
        (META, {"prompt": "p", "responses": ["a"]}, "line 2: .* k >= 2"),
        (META, {"prompt": "p", "responses": list("abc")}, "line 2: .* the same k"),
        (META, {"prompt": "p", "responses": "ab"}, "line 2: .* k >= 2"),
        (META, {"prompt": "p", "responses": ["a", 2]}, 'line 2: key "responses" .* not text'),
        (META, {"responses": ["a", "b"]}, 'line 2: key "prompt" is missing'),
        (SFT, {"prompt": "p"}, 'line 2: key "response" is missing'),
        (SFT, {"prompt": "p", "response": ["a"]}, 'line 2: key "response" .* not text'),
        (data.read_prompts, {"question": "p"}, 'line 2: key "prompt" is missing'),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, read, content, complaint):
    raw = content if isinstance(content, bytes) else EVERY + json.dumps(content).encode()
    file = put(tmp_path / "bad.jsonl", raw=raw)
    with pytest.raises(data.Mistake, match=complaint) as error:
        read(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    for path, why in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "directory")):
        with pytest.raises(data.Mistake, match=f"{path}: .*{why}"):
            read(path)


# ---------------------------------------------------------------------------- folders, commands


def test_output_folder_is_whole_or_absent(tmp_path):
    out, partial = tmp_path / "runs" / "rm", tmp_path / "runs" / "rm.partial"
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), data.output_folder(out) as work:
            assert work == partial
            raise error
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
    for taken, why in ((out, "exists"), (out / "log.jsonl/x", "cannot be written")):
        with pytest.raises(data.Mistake, match=f"{taken} {why}"), data.output_folder(taken):
            raise AssertionError("must not be entered")


def test_a_kill_leaves_no_output_folder(tmp_path):
    code = (
        "import os, sys, data\nwith data.output_folder(sys.argv[1]) as work:\n"
        "    data.write_text(work / 'checkpoint.pt', 'half way')\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "rm"], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and os.listdir(tmp_path) == ["rm.partial"]
    with data.output_folder(tmp_path / "rm") as work:
        assert (work / "checkpoint.pt").read_text() == "half way"


def test_command(capsys):
    def call(run, *argv):
        parser = data.new_parser("x.py", "What it does:\n  5 % of it.")
        add = data.modes(parser, "sft dpo")
        add("sft dpo", "--out", required=True, help="a folder")
        add("dpo", "--beta", type=float, default=0.1, help="a number")
        return data.command(parser, run, argv), capsys.readouterr()

    def fail(error):
        def run(args):
            raise error

        return run

    seen = []
    assert call(seen.append, "dpo", "--out", "o", "--beta", "2")[0] == 0
    assert vars(seen[0]) == {"mode": "dpo", "out": "o", "beta": 2.0}
    assert "What it does:\n  5 % of it." in call(print, "--help")[1].out
    assert "a number (default: 0.1)" in call(print, "dpo", "--help")[1].out
    bad = ["fly", "sft", "sft --out", "sft --out o --beta 1", "dpo --out o --be 1", "dpo --beta x"]
    for argv in bad:
        status, told = call(print, *argv.split())
        assert status == 2 and told.out == "" and ": error: " in told.err
    status, told = call(fail(data.Mistake("one\n  two")), "sft", "--out", "o")
    assert status == 2 and told.err == "x.py: error: one two\n"
    assert call(fail(KeyboardInterrupt()), "sft", "--out", "o")[0] == 130
    for bug in (ValueError, OSError):  # a bug keeps its traceback
        with pytest.raises(bug):
            call(fail(bug()), "sft", "--out", "o")


SMALL = (
    "--hidden_size 16 --sft 60 --pairs 40 --meta 5 --ppo 5 --valid 5 --test 5 --ood_ppo 5".split()
)


def test_toy(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, seed in ("a0", "b0", "c1"):
        assert data.main(["toy", "--out", str(tmp_path / name), "--seed", seed, *SMALL]) == 0
    assert "60 rows of SFT text" in capsys.readouterr().out
    sets = [f"prompts-{name}.jsonl" for name in NAMES[1:]]
    assert sorted(os.listdir(tmp_path / "a")) == sorted(["model", "sft.jsonl", *sets])
    for file in ("sft.jsonl", *sets, "model/tokenizer.json", "model/model.safetensors"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b and (a != c or file == "model/tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    capsys.readouterr()
    for option in ("--hidden_size 20", "--layers 0", "--pairs 0", "--pairs 100000"):
        assert data.main(["toy", "--out", str(tmp_path / "d"), *SMALL, *option.split()]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_label(samples, tmp_path, capsys):
    file = tmp_path / "samples.jsonl"
    data.write_jsonl(file, samples)
    label = ["label", "--samples", str(file), "--out", str(tmp_path / "pairs")]
    assert data.main([*label, "--valid_share", "0.2"]) == 0
    train, valid = (
        data.read_jsonl(tmp_path / f"pairs/{name}.jsonl") for name in ("train", "valid")
    )
    assert f"{len(train) + len(valid)} pairs" in capsys.readouterr().out
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in valid}
    assert len({row["prompt"] for row in valid}) == 60  # a fifth of 300
    assert all(list(row) == ["prompt", "chosen", "rejected"] for row in train + valid)  # no gold
    for wrong in ("", "--noise -1", "--valid_share 1", "--valid_share -0.1", "--samples none"):
        out = [] if not wrong else ["--out", str(tmp_path / "x")]
        assert data.main([*label, *out, *wrong.split()]) == 2
        told = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
        assert len(told) == 1 and told[0].startswith("data.py: error: "), told
    assert sorted(os.listdir(tmp_path)) == ["pairs", "samples.jsonl"]


def test_split_with_another_domain(tmp_path):
    """--ood, as prompts or as pairs: prompts that D lacks, for the test, for S and for PPO."""
    pairs = [PAIR | {"prompt": f"p{i}"} for i in range(40)]
    asked = [{"prompt": f"q{i}"} for i in range(40)]
    source = put(tmp_path / "pairs.jsonl", *pairs)
    for name, other in (("prompts", asked), ("both", [PAIR | row for row in asked])):
        ood = put(tmp_path / "ood.jsonl", *other, other[0] | {"prompt": "p1"})  # D has p1 too
        out, flags = tmp_path / name, ["--source", str(source), "--ood", str(ood), "--test", "8"]
        assert data.main(["split", *flags, "--out", str(out)]) == 0
        ood = [
            data.read_prompts(out / f"prompts-ood{part}.jsonl") for part in ("", "-meta", "-ppo")
        ]
        assert [len(some) for some in ood] == [8, 10, 22]
        assert sorted(sum(ood, [])) == sorted(f"q{i}" for i in range(40))
        parts = "judge valid train prompts-meta prompts-ppo prompts-test".split()
        read = {part: data.read_prompts(out / f"{part}.jsonl") for part in parts}
        assert [len(part) for part in read.values()] == [10, 4, 16, 3, 7, 4]
        assert read.pop("prompts-test") == read["valid"]
        assert sorted(sum(read.values(), [])) == sorted(pair["prompt"] for pair in pairs)
        chosen = [{"prompt": prompt, "response": "a"} for prompt in read["train"]]
        assert data.read_sft(out / "sft.jsonl") == chosen
