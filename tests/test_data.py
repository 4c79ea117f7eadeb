"""data.py: the gold rules one by one, the splits, the tokenizer, the label noise, the quirks of files,
and stages that are skipped, refused, killed and resumed."""
import dataclasses
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

HH = ROOT.parent / "shared" / "data" / "hh-harmless-1400.jsonl.gz"
SIZES = {"sft": 400, "pairs": 300, "meta": 20, "ppo": 30, "valid": 10, "test": 10, "ood": 10, "ood-meta": 10,
         "ood-ppo": 10}
PROMPT = "\n\nHuman: Hi. My lamp came broken. I need it for work.\n\nAssistant:"


@pytest.fixture(scope="module")
def world():
    return data.make_world(0, SIZES)


@pytest.fixture(scope="module")
def samples(world):
    rng = random.Random(3)
    prompts = [row["prompt"] for row in world["prompts-pairs"]]
    return [{"prompt": p, "responses": [data.write_response(rng, p) for _ in range(5)]} for p in prompts]


# ------------------------------------------------------------------------------------------------------------
# The truth

PLAIN = " We read every message. Our team is on it."                # 9 words that earn and cost nothing


@pytest.mark.parametrize("response, points", [
    (PLAIN, 0.0),
    (PLAIN + " This is about your lamp.", 1.0),                                      # names the thing
    (PLAIN + " This is about your drill.", 0.0),                                     # another thing
    (PLAIN + " I will send a replacement.", 2.0),                                    # the remedy that fits
    (PLAIN + " I will replace it for free. I can send a brand new one.", 2.0),       # counts once
    (PLAIN + " I will unlock your account.", -1.0),                                  # another remedy
    (PLAIN + " I will unlock your account. I can call the courier.", -2.0),          # two others
    (PLAIN + " I will send a replacement. I can call the courier.", 1.0),            # hedging costs
    (PLAIN + " I will send a replacement by Friday.", 3.0),                          # says when
    (PLAIN + " I will send a replacement tomorrow.", 3.0),                           # "row" is no seat here
    (PLAIN + " You will hear from us today.", 1.0),
    (PLAIN + " Thank you for writing to us.", 1.5),
    (PLAIN + " Thank you for writing to us. I am sorry to hear that.", 2.0),
    (PLAIN + " Thank you for writing to us. I am sorry to hear that. We appreciate your trust.", 1.0),
    (PLAIN + " Thank you for writing to us. I am sorry to hear that. We appreciate your trust."
     " It is a pleasure to help you. Please write again at any time.", -1.0),    # grovelling: 1.5 + 0.5 - 3 x 1
    (PLAIN + " Everything will be perfect. We guarantee it.", -3.0),                 # empty promises
    (PLAIN + " We read every message.", -1.0),                                       # said before
    (PLAIN + " We lamp the the", 0.5),                                               # broken, yet names it
    (PLAIN + " Thank.", 1.0),                                                        # broken, courteous
    (" Our team is on it.", -0.9),                                                   # 3 words short
    ("", -2.4),
    ((PLAIN * 6)[:-1], -10.9),           # 54 words, 9 too many, and 10 repeats; no full stop at the end
])
def test_each_gold_rule(response, points):
    assert data.gold_reward(PROMPT, response) == pytest.approx(points)


def test_gold_refuses_other_worlds():
    for prompt in ("\n\nHuman: How are you?\n\nAssistant:", "", "My lamp sings.", "My horse came broken."):
        with pytest.raises(ValueError, match="not of it"):
            data.gold_reward(prompt, " Hi.")


def test_every_prompt_is_understood_and_every_remedy_told_apart():
    for problem, (_, things, wordings) in data.PROBLEMS.items():
        prompts = data.all_prompts({problem: data.PROBLEMS[problem]})
        assert len(set(prompts)) == len(prompts)
        assert {data.read_customer(prompt) for prompt in prompts} == {(problem, thing) for thing in things}
        assert data.gold_parts(prompts[0], "")["remedy that fits"] == 0
    remedies = [remedy for remedy, _, _ in data.PROBLEMS.values()]
    assert sorted(remedies) == sorted(data.REMEDIES)                          # one remedy a problem
    said = [(remedy, wording) for remedy, (_, wordings) in data.REMEDIES.items() for wording in wordings]
    for problem, (fits, things, wordings) in data.PROBLEMS.items():
        prompt = "\n\nHuman: " + wordings[0].format(thing=things[0]) + "\n\nAssistant:"
        for remedy, wording in said:
            for when in [""] + [f" {time}" for time in data.TIMES]:
                parts = data.gold_parts(prompt, f" I can {wording}{when}.")
                found = (parts["remedy that fits"], parts["other remedy"], parts["broken sentence"])
                assert found == ((data.GOLD["remedy that fits"], 0, 0) if remedy == fits else (0, data.GOLD["other remedy"], 0)), (problem, wording, when)
    for text in data.NAMING + data.GREETINGS + data.FAREWELLS + data.PROMISES + data.FILLERS:
        parts = data.gold_parts(PROMPT, " " + text.format(thing="lamp"))
        assert not any(parts[r] for r in ("other remedy", "remedy that fits", "broken sentence", "time"))
        assert (parts["courtesy"] == data.GOLD["courtesy"][0]) == (text in data.GREETINGS + data.FAREWELLS)
        assert (parts["empty promise"] == data.GOLD["empty promise"]) == (text in data.PROMISES)


def test_world(world):
    assert {name: len(rows) for name, rows in world.items()} == \
        {("sft" if name == "sft" else f"prompts-{name}"): size for name, size in SIZES.items()}
    prompts = [row["prompt"] for rows in world.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    ood = {name: sum(data.read_customer(row["prompt"])[0] in data.OOD_PROBLEMS for row in rows)
           for name, rows in world.items()}
    assert ood.pop("sft") == round(data.OOD_SHARE * SIZES["sft"])
    assert all(count == (len(world[name]) if "ood" in name else 0) for name, count in ood.items())
    assert data.make_world(0, SIZES) == world and data.make_world(1, SIZES) != world
    with pytest.raises(ValueError, match="ask for fewer"):
        data.make_world(0, SIZES | {"ood": 10_000})
    parts = [data.gold_parts(**row) for row in world["sft"]]
    assert not any(part["broken sentence"] for part in parts)
    share = sum(part["remedy that fits"] > 0 for part in parts) / len(parts)
    assert abs(share - data.REMEDY_MIX["fits"] - data.REMEDY_MIX["fits, and another"]) < 0.1


# ------------------------------------------------------------------------------------------------------------
# The other task

NOTE = ("\n\nHuman: Sum up this note: Anna went round on a foggy day. The saw in the cellar runs hot. It has to run by Friday."
        "\n\nAssistant:")
FACTS = " The saw needs help. It runs hot. Go to the cellar."               # three of the four, 11 words


@pytest.mark.parametrize("response, points", [
    (" Here is the gist. That is the note.", 0.0),
    (FACTS, 3.0),
    (FACTS + " Do it by Friday.", 4.0),                                              # all four
    (FACTS + " Do it by Monday.", 1.5),                                              # invented
    (FACTS + " Ask Anna. It was foggy.", 2.5),                                       # true trifles
    (FACTS + " Ask Boris. It was sunny.", 0.0),                                      # invented ones
    (FACTS + " This is urgent.", 4.0),                                               # one warning
    (FACTS + " This is urgent. Please hurry. Do not wait.", 2.0),                    # two too many
    (FACTS + " Go to the cellar.", 2.0),                                             # said before
    (FACTS + " Go cellar the.", 2.5),                                                # nobody writes so
    (FACTS + " It is about the pilot.", 1.5),                                        # out of another domain
    (" Friday.", 1.0 - 0.5 - 4 * 0.3),                                               # broken, 4 words short
    (FACTS + " word" * 20, 3.0 - 0.5 - 5 * 0.2),                                     # broken, 5 words too many
    ("", -1.5),
])
def test_each_rule_of_the_summary(response, points):
    assert data.gold_reward(NOTE, response) == pytest.approx(points)
    assert data.gold_parts(NOTE, response).keys() == data.SUMMARY_GOLD.keys()


def test_every_note_is_understood_and_every_value_told_apart():
    for domain in (data.WORKS, data.CLINIC):
        notes = data.all_notes(domain)
        assert len(set(notes)) == len(notes)
        rng = random.Random(0)
        for note in rng.sample(notes, 500):
            read = data.read_note(note)
            assert all(read[name] in [value.lower() for value in domain[name]] for name in data.SAYS)
    for name, wordings in data.SAYS.items():                                   # each value is found as itself, in its field only
        for value in data.VALUES[name]:
            for wording in wordings:
                found = {other: re.findall(pattern, wording.format(**{name: value}).lower())
                         for other, pattern in data.ANY_VALUE.items()}
                assert found == {other: [value.lower()] * (other == name) for other in data.SAYS}
                assert data.summary_parts(NOTE, " " + wording.format(**{name: value}))["broken sentence"] == 0
    for wrong in (PROMPT, NOTE.replace("saw", "cow"), NOTE.replace("Friday", "Friday or Monday")):
        with pytest.raises(ValueError, match="not of it"):
            data.read_note(wrong)


def test_world_of_the_summary(world):
    notes = data.make_world(0, SIZES, "summary")
    assert {name: len(rows) for name, rows in notes.items()} == {name: len(rows) for name, rows in world.items()}
    prompts = [row["prompt"] for rows in notes.values() for row in rows]
    assert len(set(prompts)) == len(prompts) and data.make_world(0, SIZES, "summary") == notes
    ood = {name: sum(data.read_note(row["prompt"])["thing"] in data.CLINIC["thing"] for row in rows) for name, rows in notes.items()}
    assert ood.pop("sft") == round(data.OOD_SHARE * SIZES["sft"])
    assert all(count == (len(notes[name]) if "ood" in name else 0) for name, count in ood.items())
    gold = [data.gold_reward(**row) for row in notes["sft"]]
    words = [len(row["response"].split()) for row in notes["sft"]]
    assert not any(data.gold_parts(**row)["broken sentence"] for row in notes["sft"])
    assert min(gold) < 0 < sum(gold) / len(gold) < 4 < max(gold)               # of mixed quality
    assert sum(w > data.SUMMARY_LONGEST for w in words) < 0.3 * len(words)     # in most of it, more is better
    with pytest.raises(ValueError, match="ask for fewer"):
        data.make_world(0, SIZES | {"ood": 100_000}, "summary")


def test_the_dialogue_is_what_it_was_before_there_was_another_task(world):
    """Byte for byte: whoever cites figures of a seed can make them again."""
    told = json.dumps(data.make_world(7, SIZES), sort_keys=True).encode()
    assert hashlib.sha256(told).hexdigest() == "81fd83a4085b4a4ed6d3e56a4303fa2e70e45df0e235c47b36a26da5b96adf5f"


def test_tokenizer_gives_every_text_back(world, tmp_path):
    from transformers import AutoTokenizer
    tokenizer = data.train_tokenizer(["".join(row.values()) for row in world["sft"]])
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [row[key] for row in world["sft"] for key in row]
    texts += ["", " ", "\n\n\n", "  two  spaces .\t", "caf\u00e9 \u65e5 \U0001f600", "Zyzzyva!", " lamp?\r\n"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    row = world["sft"][0]
    assert tokenizer(row["prompt"] + row["response"]).input_ids == \
        tokenizer(row["prompt"]).input_ids + tokenizer(row["response"]).input_ids
    assert max(len(tokenizer(row["prompt"]).input_ids) for row in world["sft"]) < 30
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|eos|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.pad_token_id) == "<|pad|>"
    assert len(tokenizer) < 1000


# ------------------------------------------------------------------------------------------------------------
# Labels

@pytest.mark.parametrize("noise", [0.5, 1.5, 4.0])
def test_label_noise_is_bradley_terry(samples, noise):
    rows, flipped = data.label_pairs(samples, noise, seed=1)
    gaps = [data.gold_reward(row["prompt"], row["chosen"]) - data.gold_reward(row["prompt"], row["rejected"])
            for row in rows]
    counted = sum(1.0 if gap < 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)
    assert flipped == pytest.approx(counted)                                  # 1 - share = accuracy of gold
    flip = [1 / (1 + math.exp(abs(gap) / noise)) for gap in gaps]             # sigmoid(-|gap| / noise)
    standard_error = math.sqrt(sum(p * (1 - p) for p in flip)) / len(flip)
    assert abs(flipped - sum(flip) / len(flip)) < 4 * standard_error
    assert data.label_pairs(samples, noise, seed=1) == (rows, flipped)
    assert data.label_pairs(samples, noise, seed=2)[0] != rows


def test_gold_labels_and_pairing():
    good, bad = PLAIN + " I will send a replacement.", PLAIN + " I will swap it."
    row = {"prompt": PROMPT, "responses": [good, bad, bad, good, bad]}        # the fifth has no partner
    rows, flipped = data.label_pairs([row], noise=0, seed=0)
    assert rows == [{"prompt": PROMPT, "chosen": good, "rejected": bad}] * 2 and flipped == 0
    assert data.label_pairs([row], noise=1e-9, seed=0) == (rows, 0)           # no overflow
    tie = {"prompt": PROMPT, "responses": [PLAIN, PLAIN + " I have made a note of it."]}
    assert data.label_pairs([tie], noise=0, seed=0)[1] == 0.5
    first = [data.label_pairs([tie], noise=0, seed=seed)[0][0]["chosen"] == PLAIN for seed in range(200)]
    assert 70 < sum(first) < 130                                              # a coin toss, not the first
    same = {"prompt": PROMPT, "responses": [good, good]}
    assert len(data.label_pairs([same, row], noise=0, seed=0)[0]) == 2
    with pytest.raises(ValueError, match="equal"):
        data.label_pairs([same], noise=0, seed=0)
    for noise in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise"):
            data.label_pairs([row], noise, seed=0)


# ------------------------------------------------------------------------------------------------------------
# Readers

def put(path, *rows, raw=None):
    path.write_bytes(raw if raw is not None else "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def test_jsonl_round_trip_and_encodings(tmp_path):
    rows = [{"prompt": "caf\u00e9 \u2028\x85 \U0001f600", "n": 1}, {"prompt": "\n\nHuman: x"}]
    file = tmp_path / "a.jsonl"
    data.write_jsonl(file, rows)
    assert data.read_jsonl(file) == data.read_jsonl(str(file)) == rows
    plain = file.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    assert data.read_jsonl(tmp_path / "a.jsonl.gz") == rows
    for raw in (b"\xef\xbb\xbf" + plain, plain.replace(b"\n", b"\r\n"), b"\n  \n" + plain + b"\r\n\n",
                plain[:-1]):
        assert data.read_jsonl(put(file, raw=raw)) == rows
    with pytest.raises(UnicodeEncodeError):
        data.write_jsonl(file, [{"prompt": "\ud800"}])
    assert data.read_jsonl(file) == rows and sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.jsonl.gz"]


@pytest.mark.parametrize("raw, complaint", [
    (b"", "empty"), (b"\n \n", "empty"),
    (b'{"a": 1}\n\n{"a": \n', "line 3: not JSON"),
    (b'{"a": 1}\n[1]\n', "line 2: a row must be a JSON object"), (b"null\n", "line 1: a row must be"),
    (b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not UTF-8"), ('{"a": 1}\n'.encode("utf-16"), "line 1: not UTF-8"),
    (b"[" * 100_000, "line 1: not JSON"),
    (gzip.compress(b'{"a": 1}\n' * 1000)[:-20], "cut-off gzip"),
    (gzip.compress(b'{"a": 1}\n')[:-1] + b"\x99\x00", "gzip"),
])
def test_bad_files_get_one_clear_line(tmp_path, raw, complaint):
    file = put(tmp_path / "bad.jsonl", raw=raw)
    with pytest.raises(ValueError, match=complaint) as error:
        data.read_jsonl(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        data.read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        data.read_jsonl(tmp_path)


TURN = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant:"


def test_preferences_of_hh_transcripts(tmp_path, capsys):
    pairs = data.read_preferences(put(
        tmp_path / "hh.jsonl",
        {"chosen": TURN + " So.", "rejected": TURN + " No."},
        {"chosen": TURN, "rejected": TURN + " No."},                          # an empty last turn
        {"chosen": TURN + " So.", "rejected": TURN.replace("Why", "Who") + " No."},
        {"chosen": TURN + " So.", "rejected": TURN + " So."}))
    assert pairs == [{"prompt": TURN, "chosen": " So.", "rejected": " No."},
                     {"prompt": TURN, "chosen": "", "rejected": " No."}]
    told = capsys.readouterr().err
    assert "dropped 1 rows" in told and "and 1 whose" in told and "2 stay" in told


def test_preferences_of_strings_and_message_lists(tmp_path, capsys):
    user, answer, why = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                         {"role": "user", "content": "Why"})
    so, no, nothing = ({"role": "assistant", "content": text} for text in ("So.", "No.", ""))
    want = {"prompt": TURN, "chosen": " So.", "rejected": " No."}
    rows = [{"prompt": TURN, "chosen": " So.", "rejected": " No."},
            {"prompt": [user, answer, why], "chosen": [so], "rejected": [no]},
            {"chosen": [user, answer, why, so], "rejected": [user, answer, why, no]},
            {"prompt": "Hi", "chosen": [user, answer, why, so], "rejected": [user, answer, why, no]}]
    assert data.read_preferences(put(tmp_path / "a.jsonl", *rows)) == [want] * 4
    assert capsys.readouterr().err == ""
    row = {"prompt": [{"role": "system", "content": "Be kind."}, why], "chosen": [nothing], "rejected": [no]}
    assert data.read_preferences(put(tmp_path / "b.jsonl", row)) == [
        {"prompt": "\n\nSystem: Be kind.\n\nHuman: Why\n\nAssistant:", "chosen": "", "rejected": " No."}]


@pytest.mark.parametrize("row, complaint", [
    ({"prompt": "p", "chosen": "a"}, 'line 3: key "rejected" is missing'),
    ({"prompt": "p", "chosen": None, "rejected": "b"}, 'line 3: key "chosen" must hold text, not NoneType'),
    ({"prompt": 7, "chosen": "a", "rejected": "b"}, 'line 3: key "prompt" must hold text, not int'),
    ({"prompt": "p", "chosen": "a\ud800", "rejected": "b"}, 'line 3: key "chosen" holds half a surrogate'),
    ({"chosen": "a", "rejected": "b"}, 'line 3: key "chosen" has no'),
    ({"chosen": [], "rejected": []}, 'line 3: key "chosen" must end with a message of the assistant'),
    ({"prompt": "p", "chosen": [{"role": "assistant", "content": "a"}], "rejected": []}, "list of messages"),
    ({"chosen": [{"role": "user", "content": "a"}], "rejected": []}, "end with a message of the assistant"),
    ({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ["b"]}], "rejected": []},
     'line 3: key "chosen" must hold text, not list'),
    ({"chosen": [{"role": "tool", "content": "a"}], "rejected": []}, 'key "chosen" holds a message without'),
    ({"chosen": ["a"], "rejected": ["b"]}, 'line 3: key "chosen" holds a message without a role'),
])
def test_bad_preference_rows(tmp_path, row, complaint):
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    with pytest.raises(ValueError, match=complaint):
        data.read_preferences(put(tmp_path / "bad.jsonl", raw=f"\n{good}\n{json.dumps(row)}".encode()))


def test_no_usable_pair(tmp_path):
    with pytest.raises(ValueError, match="empty, it has no usable pair"):
        data.read_preferences(put(tmp_path / "same.jsonl", {"prompt": "p", "chosen": "a", "rejected": "a"}))


@pytest.mark.skipif(not HH.exists(), reason="the real rows of HH-RLHF (../shared/data) are not here")
def test_real_rows(capsys):
    raw = [json.loads(line) for line in gzip.open(HH, "rt", encoding="utf-8")]
    pairs = data.read_preferences(HH)
    want = []
    for row in raw:
        heads = [row[key].split("\n\nAssistant:")[:-1] for key in ("chosen", "rejected")]
        if heads[0] == heads[1]:
            want.append((row["chosen"], row["rejected"]))
    assert [(pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"]) for pair in pairs] == want
    assert all(pair["prompt"].endswith("\n\nAssistant:") for pair in pairs)
    assert not any("\n\nAssistant:" in pair["chosen"] + pair["rejected"] for pair in pairs)
    assert sum(not pair["chosen"].strip() for pair in pairs) > 0              # empty last turns are kept
    dropped = len(raw) - len(pairs)
    assert dropped > 0 and f"dropped {dropped} rows" in capsys.readouterr().err


def test_meta(tmp_path, capsys):
    rows = [{"prompt": "p", "responses": ["a", "b", ""], "n": 1}, {"prompt": "q", "responses": list("acb")}]
    assert data.read_meta(put(tmp_path / "s.jsonl", *rows)) == [
        {"prompt": "p", "responses": ["a", "b", ""]}, {"prompt": "q", "responses": ["a", "c", "b"]}]
    assert capsys.readouterr().err == ""
    data.read_meta(put(tmp_path / "s.jsonl", {"prompt": "p", "responses": list("aab")},
                       {"prompt": "p", "responses": list("bbb")}))
    assert "50.0% of the responses are identical" in capsys.readouterr().err   # 3 of 6
    for row, complaint in [({"prompt": "p"}, 'key "responses" must be a list'),
                           ({"responses": ["a", "b"]}, 'key "prompt" is missing'),
                           ({"prompt": "p", "responses": ["a"]}, "k = 1"),
                           ({"prompt": "p", "responses": []}, "k = 0"),
                           ({"prompt": "p", "responses": ["a", 2]}, "must hold text, not int"),
                           ({"prompt": "p", "responses": "ab"}, "must be a list")]:
        with pytest.raises(ValueError, match=f"line 1: .*{complaint}"):
            data.read_meta(put(tmp_path / "s.jsonl", row))
    with pytest.raises(ValueError, match="line 2: .* k = 2, rows before it have 3"):
        data.read_meta(put(tmp_path / "s.jsonl", rows[0], {"prompt": "p", "responses": ["a", "b"]}))


def test_prompts_and_sft(tmp_path):
    file = put(tmp_path / "p.jsonl", {"prompt": "p", "n": 1}, {"prompt": "q", "response": "r"})
    assert data.read_prompts(file) == ["p", "q"]
    with pytest.raises(ValueError, match='line 1: key "response" is missing'):
        data.read_sft(file)
    row = {"prompt": "p", "response": "r"}
    assert data.read_sft(put(file, row | {"n": 1})) == [row]
    assert data.read_sft(put(file, {"chosen": TURN + " So.", "rejected": TURN + " No."})) == \
        [{"prompt": TURN, "response": " So."}]


# ------------------------------------------------------------------------------------------------------------
# Stages

@dataclass
class Options:
    out: str = field(metadata={"help": "folder to write"})
    model: str = field(default="gpt2", metadata={"help": "a model"})
    rows: str | None = field(default=None, metadata={"help": "a file"})
    eta: float = field(default=0.1, metadata={"help": "a number"})
    copy: str | None = field(default=None, metadata={"help": "another folder to write"})


def stage(config):
    return data.stage("rm.py", config, inputs=["model", "rows"], ignore=("out", "copy"))


def finish(config, text="done"):
    """Runs a stage; tells whether it had anything to do."""
    with stage(config) as work:
        if work is None:
            return False
        (work / "result.txt").write_text(text)
    return True


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model").mkdir()
    put(tmp_path / "model" / "weights", raw=b"w" * 1000)
    put(tmp_path / "rows.jsonl", {"prompt": "p"})
    return Options(out=str(tmp_path / "runs" / "a" / "rm0"), model=str(tmp_path / "model"),
                   rows=str(tmp_path / "rows.jsonl"))


def test_stage_appears_whole_and_is_skipped_after(config, capsys):
    out = Path(config.out)
    with stage(config) as work:
        assert work == Path(config.out + ".partial") and not out.exists()
        (work / "result.txt").write_text("done")
    assert sorted(os.listdir(out)) == ["result.txt", "stage.json"] and os.listdir(out.parent) == ["rm0"]
    made = json.loads((out / "stage.json").read_text())
    assert (made["command"], made["mode"], made["options"]) == ("rm.py", None, {"eta": 0.1})
    assert all(value.startswith("sha256:") for value in made["inputs"].values())
    assert str(out.parent) not in json.dumps(made)
    assert not finish(config, "again") and (out / "result.txt").read_text() == "done"
    assert "rm.py: " in (told := capsys.readouterr().out) and "skipped" in told and told.count("\n") == 1
    assert not finish(dataclasses.replace(config, copy="elsewhere"))


def test_stage_notices_changed_options_and_inputs(config, tmp_path):
    finish(config)
    with pytest.raises(ValueError, match="made with --eta 0.1, not 0.2: choose another folder, or delete it"):
        finish(dataclasses.replace(config, eta=0.2))
    with pytest.raises(ValueError, match="than --rows None"):
        finish(dataclasses.replace(config, rows=None))
    put(tmp_path / "rows.jsonl", {"prompt": "q"})
    with pytest.raises(ValueError, match=r"than --rows .*rows.jsonl holds now"):
        finish(config)
    put(tmp_path / "rows.jsonl", {"prompt": "p"})
    put(tmp_path / "model" / "weights", raw=b"w" * 999 + b"v")
    with pytest.raises(ValueError, match="than --model"):
        finish(config)
    put(tmp_path / "model" / "weights", raw=b"w" * 1000)
    assert not finish(config)
    with pytest.raises(ValueError, match="was made by rm.py"):
        with data.stage("ppo.py", config, inputs=["model", "rows"], ignore=("out", "copy")):
            pass
    assert (Path(config.out) / "result.txt").read_text() == "done"


def test_moved_run_is_recognised(config, tmp_path, monkeypatch):
    finish(config)
    (tmp_path / "there").mkdir()
    for name in ("model", "rows.jsonl", "runs"):
        shutil.move(tmp_path / name, tmp_path / "there" / name)
    monkeypatch.chdir(tmp_path / "there")
    assert not finish(Options(out="runs/a/rm0/", model="model", rows="rows.jsonl"))


def test_foreign_folders_are_not_touched(config, tmp_path):
    out = Path(config.out)
    out.mkdir(parents=True)
    assert finish(config)                                                     # an empty one is free to use
    (out / "stage.json").write_text("{")
    for name in (out, tmp_path / "model", tmp_path / "rows.jsonl", tmp_path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="no stage made it, so it was not touched"):
            finish(dataclasses.replace(config, out=str(name)))
        assert sorted(tmp_path.rglob("*")) == before


def test_exception_keeps_what_can_be_resumed_and_no_litter(config):
    out, work = Path(config.out), Path(config.out + ".partial")
    with pytest.raises(ZeroDivisionError):
        with stage(config):
            1 / 0
    assert not out.exists() and os.listdir(out.parent) == []
    with pytest.raises(ZeroDivisionError):
        with stage(config) as work:
            (work / "checkpoint").write_text("half way")
            1 / 0
    assert not out.exists() and os.listdir(out.parent) == ["rm0.partial"]
    with stage(config) as work:
        assert (work / "checkpoint").read_text() == "half way"                # goes on
        (work / "checkpoint.pt.tmp").write_text("killed while writing this")
    assert (out / "checkpoint").exists() and not (out / "checkpoint.pt.tmp").exists()
    shutil.move(out, work)
    with stage(dataclasses.replace(config, eta=0.2)) as work:
        assert os.listdir(work) == ["stage.json"]                             # made with other options: wiped


def test_kill_leaves_nothing_half_written(config):
    code = ("import os, signal, sys; sys.path[:0] = sys.argv[1:3]; import test_data\n"
            "with test_data.stage(test_data.Options(*sys.argv[3:])) as work:\n"
            "    (work / 'checkpoint').write_text('half way'); os.kill(os.getpid(), signal.SIGKILL)\n")
    args = [str(ROOT), str(ROOT / "tests"), config.out, config.model, config.rows]
    assert subprocess.run([sys.executable, "-c", code, *args]).returncode == -signal.SIGKILL
    assert not Path(config.out).exists() and Path(config.out + ".lock").exists()
    with stage(config) as work:                                               # the dead hold no lock
        assert (work / "checkpoint").read_text() == "half way"
    assert os.listdir(Path(config.out).parent) == ["rm0"]


def test_two_processes_in_one_out(config):
    with stage(config) as work:
        with pytest.raises(ValueError, match="another process is writing"):
            finish(config)
        assert (work / "stage.json").exists()
    assert not finish(config)


def test_fingerprint_is_of_the_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        put(tmp_path / name / "sub" / "x", raw=b"1")
        put(tmp_path / name / "stage.json", raw=name.encode())                # how it was made does not count
    same = data.fingerprint(str(tmp_path / "a"))
    assert same == data.fingerprint(str(tmp_path / "b"))
    (tmp_path / "b" / "sub" / "x").rename(tmp_path / "b" / "x")
    assert data.fingerprint(str(tmp_path / "b")) != same
    assert data.fingerprint("some/hub-name") == "some/hub-name" and data.fingerprint(None) is None


# ------------------------------------------------------------------------------------------------------------
# Commands

def run_command(body, *argv, modes=()):
    return data.command("rm.py", Options, body, list(argv), "What it does: 5 % of it.", modes)


def test_command(capsys):
    seen = []
    assert run_command(seen.append, "--out", "x", "--eta", "2") == 0 and seen == [Options("x", eta=2.0)]
    assert run_command(seen.append, "dpo", "--out", "x", modes=("sft", "dpo")) == 0 and seen[1].mode == "dpo"
    assert run_command(seen.append, "--help") == 0
    told = capsys.readouterr().out
    assert "What it does: 5 % of it." in told and "--eta" in told and "a number" in told


def fails(error):
    def body(config):
        raise error
    return body


@pytest.mark.parametrize("argv, body, complaint", [
    ((), print, "--out"), (("--out", "x", "--etta", "1"), print, "unknown option: --etta 1"),
    (("--out", "x", "--et", "1"), print, "unknown option: --et 1"),
    (("--out", "x", "--eta", "much"), print, "--eta"), (("--out",), print, "--out"),
    (("--out", "x"), fails(ValueError("one\n  two")), "one two"),
    (("--out", "x"), fails(FileNotFoundError(2, "No such file", "y")), "y"),
])
def test_a_mistake_is_one_line_and_status_2(capsys, argv, body, complaint):
    assert run_command(body, *argv) == 2
    told = capsys.readouterr()
    assert told.err.startswith("rm.py: error: ") and complaint in told.err and told.err.count("\n") == 1
    assert told.out == ""


def test_modes_interrupts_and_bugs(capsys):
    assert run_command(print, "fly", "--out", "x", modes=("sft", "dpo")) == 2
    assert run_command(print, "--out", "x", modes=("sft", "dpo")) == 2
    assert run_command(fails(KeyboardInterrupt()), "--out", "x") == 130
    assert "interrupted" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):                                    # a bug keeps its traceback
        run_command(fails(ZeroDivisionError()), "--out", "x")


SMALL = ("--hidden_size 16 --sft 60 --pairs 40 --meta 5 --ppo 5 --valid 5 --test 5 --ood_ppo 5").split()


def test_toy(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert data.main(["toy", "--out", str(tmp_path / name), "--seed", seed, *SMALL]) == 0
    told = capsys.readouterr().out
    assert "60 rows of SFT text" in told and told.count("\n") == 3
    files = {name: {str(file.relative_to(tmp_path / name)): file.read_bytes()
                    for file in (tmp_path / name).rglob("*") if file.is_file()} for name in "abc"}
    assert files["a"] == files["b"]
    assert all(files["a"][name] != files["c"][name] for name in ("sft.jsonl", "model/model.safetensors"))
    sets = ("pairs", "meta", "ppo", "valid", "test", "ood", "ood-meta", "ood-ppo")
    assert {"sft.jsonl", "stage.json", *(f"prompts-{name}.jsonl" for name in sets)} <= set(files["a"])
    assert len(data.read_sft(tmp_path / "a" / "sft.jsonl")) == 60
    assert len(data.read_prompts(tmp_path / "a" / "prompts-pairs.jsonl")) == 40
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    assert model.config.vocab_size == len(tokenizer) and model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    for wrong in (["--hidden_size", "20"], ["--task", "poem"], ["--layers", "0"], ["--pairs", "0"], ["--pairs", "100000"]):
        assert data.main(["toy", "--out", str(tmp_path / "d"), *SMALL, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_label(samples, tmp_path, capsys):
    file = tmp_path / "samples.jsonl"
    data.write_jsonl(file, samples)
    label = ["label", "--samples", str(file), "--out", str(tmp_path / "pairs")]
    assert data.main([*label, "--valid_share", "0.2"]) == 0
    told = capsys.readouterr().out
    made = json.loads((tmp_path / "pairs" / "label.json").read_text())
    assert f"{made['pairs']} pairs" in told and f"{made['flipped']:.1%} of the labels flipped" in told
    train, valid = (data.read_jsonl(tmp_path / "pairs" / f"{name}.jsonl") for name in ("train", "valid"))
    assert (len(train), len(valid)) == (made["train"], made["valid"])
    assert made["pairs"] == len(train) + len(valid)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in valid}
    assert len({row["prompt"] for row in valid}) == 60                        # a fifth of 300
    assert all(row.keys() == {"prompt", "chosen", "rejected"} for row in train + valid)      # no gold reward
    capsys.readouterr()
    put(tmp_path / "f", {"prompt": "p", "responses": ["a", "b"]})             # not of the toy world
    new = ["label", "--samples", str(file), "--out", str(tmp_path / "x")]
    for wrong in ([*label, "--noise", "1.0"], [*label, "--valid_share", "1"], [*new, "--noise", "-1"],
                  [*new, "--valid_share", "0.9999"], [*new, "--samples", str(tmp_path / "no.jsonl")],
                  [*new, "--samples", str(tmp_path / "f")], ["label", *new[3:]]):
        assert data.main(wrong) == 2
        told = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
        assert len(told) == 1 and told[0].startswith("data.py: error: "), told
    assert sorted(os.listdir(tmp_path)) == ["f", "pairs", "samples.jsonl"]


def test_split_with_another_domain(tmp_path):
    """--ood: prompts of a domain that D does not speak of, for the test, for S and for PPO; as pairs or as prompts."""
    pairs = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    data.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    for name, other in (("prompts", [{"prompt": f"q{i}"} for i in range(40)]),
                        ("pairs", [{**pair, "prompt": pair["prompt"].replace("p", "q")} for pair in pairs])):
        data.write_jsonl(tmp_path / "ood.jsonl", other + [{**other[0], "prompt": "p1"}])   # one that D has too
        out = tmp_path / name
        assert data.main(["split", "--source", str(tmp_path / "pairs.jsonl"), "--ood", str(tmp_path / "ood.jsonl"),
                          "--test", "8", "--out", str(out)]) == 0
        sets = [data.read_prompts(out / f"prompts-{part}.jsonl") for part in ("ood", "ood-meta", "ood-ppo")]
        assert [len(some) for some in sets] == [8, 10, 22]
        assert sorted(sum(sets, [])) == sorted(f"q{i}" for i in range(40))
        assert all("q" not in (out / f"{part}.jsonl").read_text() for part in ("sft", "train", "valid", "judge", "prompts-meta"))


def test_as_a_process(tmp_path):
    argv = ["label", "--samples", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "x")]
    done = subprocess.run([sys.executable, str(ROOT / "data.py"), *argv], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"data.py: error: {tmp_path / 'no.jsonl'}: no such file\n"
