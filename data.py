"""The toy world, whose true reward is known, and what all commands share: files, folders, options.

THE WORLD  help-desk dialogue in the form of HH-RLHF. gold_reward() is the truth: plain rules on
           the text. To try another truth, change the table GOLD.
D          pairs of responses of the SFT policy, labelled by Bradley-Terry from the gold reward.
OOD        (out of domain) five problems of a travel desk. They are in the SFT text, which stands in
           for pre-training, but not in D.

Beside the paper, read GOLD, gold_reward() and label_pairs(). The rest is a toy language, the
formats of preference files, and what a command does about folders and errors.

python data.py toy --out runs/toy/data --seed 0
    writes sft.jsonl {"prompt", "response"}; prompts-X.jsonl {"prompt"} for X = pairs, meta, ppo,
    valid, test, ood, ood-meta, ood-ppo; and model/, an untrained tiny Llama with its tokenizer.
python data.py label --samples runs/toy/pairs-samples/samples.jsonl --out runs/toy/pairs --noise 1.0
    writes train.jsonl and valid.jsonl {"prompt", "chosen", "rejected"}.
python data.py split --source Anthropic/hh-rlhf/harmless-base/train.jsonl.gz --out runs/hh/data
    writes such files from real preferences. Any input file may be on the hub, as here.
"""

import argparse
import contextlib
import gzip
import itertools
import json
import math
import random
import re
import sys
import time
import zlib
from pathlib import Path
from resource import RUSAGE_SELF, getrusage


class Mistake(ValueError):
    """A user's mistake: `command` prints it in one line. Other errors keep their traceback."""


# ----------------------------------------------------------------------------------- the gold rules
GOLD = {  # points
    "names the thing": 1.0,  # says "camera" to a customer who wrote about a camera
    "remedy that fits": 2.0,  # the ONE remedy of this customer's problem
    "other remedy": -1.0,  # each other kind of remedy on offer
    "courtesy": (1.5, 0.5),  # the first and the second courteous phrase ...
    "grovelling": -1.0,  # ... and each one after these
    "time": 1.0,  # says when
    "empty promise": -1.5,  # each
    "repeated sentence": -1.0,  # each
    "broken sentence": -0.5,  # each that nobody at this desk would say, as random words
    "word too many": -0.1,  # each beyond LONGEST
    "word too few": -0.3,  # each short of SHORTEST
}
SHORTEST, LONGEST = 8, 45  # words


def gold_reward(prompt: str, response: str) -> float:
    """Returns the true reward: the sum of gold_parts(), rounded so that equal sums are equal."""
    return round(float(sum(gold_parts(prompt, response).values())), 6)


def gold_parts(prompt: str, response: str) -> dict[str, float]:
    """Returns {rule of GOLD: points}. Words and phrases count, so broken text can be judged."""
    problem, thing = read_customer(prompt)
    text = response.lower()
    sentences = sentences_of(text)
    # A word that belongs to a remedy counts as an offer of it, in a whole sentence or not.
    offered = {name for name, (_, [sign], _, _) in PROBLEMS.items() if re.search(sign, text)}
    courtesies = len(re.findall(COURTEOUS, text))
    # "this is about your lamp today" -> "this is about your {thing}"
    templates = [re.sub(ANY_THING, "{thing}", re.sub(ANY_TIME, "", s)).strip() for s in sentences]
    return {
        "names the thing": GOLD["names the thing"] * bool(re.search(rf"\b{thing}\b", text)),
        "remedy that fits": GOLD["remedy that fits"] * (problem in offered),
        "other remedy": GOLD["other remedy"] * len(offered - {problem}),
        "courtesy": sum(GOLD["courtesy"][:courtesies]),
        "grovelling": GOLD["grovelling"] * max(0, courtesies - len(GOLD["courtesy"])),
        "time": GOLD["time"] * bool(re.search(ANY_TIME, text)),
        "empty promise": GOLD["empty promise"] * len(re.findall(PROMISED, text)),
        "repeated sentence": GOLD["repeated sentence"] * (len(sentences) - len(set(sentences))),
        "broken sentence": GOLD["broken sentence"] * sum(t not in KNOWN for t in templates),
        "word too many": GOLD["word too many"] * max(0, len(text.split()) - LONGEST),
        "word too few": GOLD["word too few"] * max(0, SHORTEST - len(text.split())),
    }


def read_customer(prompt: str) -> tuple[str, str]:
    """Returns (problem, thing) of a prompt of the toy world. Raises: Mistake for any other."""
    thing = re.search(ANY_THING, prompt)
    for problem, (wordings, *_) in PROBLEMS.items():
        if thing and any(wording.format(thing=thing[0]) in prompt for wording in wordings):
            return problem, thing[0]
    raise Mistake(f"only prompts of the toy world have a gold reward, and not {prompt[-80:]!r}")


def sentences_of(text: str) -> list[str]:
    """Returns the sentences of a text: 'One.  Two!' -> ['one', 'two']."""
    return [" ".join(part.split()) for part in re.split(r"[.!?]", text.lower()) if part.strip()]


# -------------------------------------------------------- everything that can be said in this world
def table(text: str) -> dict[str, list[list[str]]]:
    """Returns {first column: [the alternatives in each further column]}; _ stands for {thing}."""
    # A row begins at the left margin; indented lines continue it.
    rows = re.split(r"\n(?=\S)", text.strip().replace("_", "{thing}"))
    cells = (" ".join(row.split()).split(" | ") for row in rows)
    return {name: [column.split(" / ") for column in columns] for name, *columns in cells}


SHOP = """phone laptop tablet camera radio speaker watch headset lamp clock scooter drill shaver
torch keyboard mouse printer scanner tracker fan doorbell robot drone monitor""".split()
# problem | how customers put it | what gives away the remedy that fits, a regular expression
#     | how the desk puts the remedy | out of domain also: the things it happens to
SHOP_PROBLEMS = table("""
late | My _ has not arrived yet. / I am still waiting for my _. / Where is the _ that I ordered?
  | courier | ask the courier where it is / trace it with the courier / call the courier
broken | My _ came broken. / There is a crack in my _. / The _ was in pieces when I opened the box.
  | replace|brand new | send a replacement / replace it for free / send a brand new one
wrong item | I ordered a _ and got something else. / This is not the _ I chose.
  / My _ has the wrong colour.
  | swap|return label | swap it / send a prepaid return label / collect it and swap it
charged twice | I was charged twice for my _. / You took too much money for my _.
  / My bank shows the price of the _ two times.
  | refund|pay back | refund the second charge / pay back the money / refund your card
forgotten password | I forgot the password of my _. / I do not know the login of my _ any more.
  / My _ asks for a code that I cannot remember.
  | reset|new password | send a reset link / reset it for you / set a new password
locked | I am locked out of my _. / My _ says access denied. / The _ shuts me out after three tries.
  | unlock|lift the block | unlock your account / lift the block / unlock it from here
missing part | My _ came without its cable. / The _ has no screws in the box.
  / I cannot find the cover of my _.
  | missing|spare | post the missing part / send a spare part / post the spare piece
slow | My _ has become very slow. / It takes my _ ages to start. / The _ freezes all the time.
  | update|software | install the update / send the latest software / update it from here
weak | My _ is flat after one hour. / The _ runs out of power by lunch.
  / I have to charge my _ all day.
  | batter | send a fresh battery / fit a stronger battery / change both batteries
cancelled by mistake | You cancelled my _ by mistake. / I still want the _ that you cancelled.
  / Why is my _ not on your list any more?
  | reinstate|order again | reinstate your order / place the order again / reinstate it
wrong address | My _ is going to my old home. / I gave you the wrong street for my _.
  / I have moved and my _ is on its way.
  | redirect|new address | redirect the parcel / use your new address / redirect it
no invoice | My tax office asks about the _. / There was no paper with my _.
  / My boss wants proof that I paid the _.
  | invoice|receipt | mail the invoice / print the receipt / mail a copy of the receipt""")
OOD_PROBLEMS = table(r"""
delayed | My _ is delayed. / I will miss my _. / The _ leaves too late for me. | rebook|later one
  | rebook you / put you on the later one / rebook the trip | flight / train / ferry / coach
noisy | My _ is so noisy. / I cannot sleep in my _. / There is music under my _. | quiet|upper floor
  | move you to a quiet one / find a quiet place / use the upper floor | room / suite / cabin / flat
lost | My _ did not land with me. / I have lost my _. / Nobody can find my _. | hotel
  | send it to your hotel / bring it to the hotel / have it at your hotel
  | suitcase / rucksack / trunk / bag
wrong seat | I am not next to my wife on the _. / I sit at the wrong end of the _.
  / I asked for a window on the _. | seat|\brow\b | change your seat / give you another row
  / find a better seat | flight / train / ferry / coach
double | I have booked my _ twice. / My _ is on my list two times. / I only need one _ and have two.
  | second booking|double | cancel the second booking / drop the double / remove the second booking
  | flight / train / ferry / coach / room / suite / cabin / flat""")
# {problem: [its wordings, [regular expression of its remedy], the desk's remedies, things]}
SHOP_PROBLEMS = {problem: [*columns, SHOP] for problem, columns in SHOP_PROBLEMS.items()}
PROBLEMS = SHOP_PROBLEMS | OOD_PROBLEMS

# All other sentences: first the customers' (hello, more), then the desk's.
SAID = table("""
hello | Hello there. / Hi. / Good morning. / Good evening. / Hello again. / Excuse me.
more | It is a gift for my sister. / I need it for work. / This is the second time. / It cost a lot.
  / I wrote to you before. / Can you help me? / What can you do? / I am quite upset.
offer | I will / We will / I can
time | today / tomorrow / by Friday / within two days / within an hour
time without an offer | You will hear from us / We will call you
names the thing | I have read your note about the _. / I can see the _ in our books.
  / This is about your _. / Let us talk about the _.
greeting | I am sorry to hear that. / I am very sorry about this. / Thank you for writing to us.
  / Thanks for telling us. / We apologise for the trouble.
farewell | I am happy to help with anything else. / Please write again at any time.
  / Thank you for your patience. / We appreciate your trust. / It is a pleasure to help you.
empty promise | This will never happen again. / Everything will be perfect. / We guarantee it.
filler | Let me look into this for you. / Our team is on it. / I have made a note of it.
  / We read every message. / These things happen now and then.""").values()
HELLOS, ASIDES, STEMS, TIMES, HEAR, NAMING, GREETINGS, FAREWELLS, PROMISES, FILLERS = sum(SAID, [])

# What the gold rules look for. KNOWN: what the desk says, in lower case and without a time.
COURTEOUS = r"\b(sorry|apologise|please|happy to help|appreciate|pleasure)\b|\bthank"
PROMISED = r"never happen again|will be perfect|guarantee"
ANY_TIME = r"\b(" + "|".join(TIMES).lower() + r")\b"
ANY_THING = r"\b(" + "|".join({t for *_, things in PROBLEMS.values() for t in things}) + r")\b"
KNOWN = set(sentences_of(". ".join(NAMING + GREETINGS + FAREWELLS + PROMISES + FILLERS + HEAR)))
# ... and "i will swap it", "we will swap it", "i can swap it", for each remedy
KNOWN |= {f"{stem} {x}".lower() for p in PROBLEMS.values() for stem in STEMS for x in p[2]}

# ------------------------------------------------------------------------------ how text is written
# Most SFT text is neither courteous nor long enough for the gold reward to fall again. In it, more
# courtesy is better, and a reward model learns that from D. PPO then goes on to where it is wrong.
# A mix is {choice: its share of the responses}; each P_ is the share of those that name the thing,
# say when, make an empty promise, repeat a sentence.
REMEDY_MIX = {"fits": 0.40, "fits, and another": 0.10, "another": 0.30, "none": 0.20}
COURTESY_MIX = {0: 0.35, 1: 0.35, 2: 0.22, 3: 0.06, 4: 0.02}  # how many courteous sentences
FILLER_MIX = {0: 0.35, 1: 0.45, 2: 0.20}  # how many sentences that say nothing
P_NAMES, P_TIME, P_PROMISE, P_REPEAT = 0.60, 0.35, 0.15, 0.02
OOD_SHARE = 0.15  # of the SFT rows
ANSWER = "\n\nAssistant:"  # where a prompt ends and a response begins


def all_prompts(problems: dict) -> list[str]:
    """Returns every prompt about these problems. A customer may leave out opening and aside."""
    prompts = []
    for wordings, _, _, things in problems.values():
        notes = [wording.format(thing=thing) for wording in wordings for thing in things]
        for said in itertools.product(["", *HELLOS], notes, ["", *ASIDES]):
            prompts.append("\n\nHuman: " + " ".join(filter(None, said)) + ANSWER)
    return prompts


def pick_weighted(rng: random.Random, mix: dict):
    """Returns one key of mix, drawn with its value as the weight."""
    return rng.choices(list(mix), weights=list(mix.values()))[0]


def write_response(rng: random.Random, prompt: str) -> str:
    """Returns one answer to the prompt, of the mixed quality that the rates above describe."""
    problem, thing = read_customer(prompt)
    # A wrong remedy is one for another problem of the same desk.
    domain = SHOP_PROBLEMS if problem in SHOP_PROBLEMS else OOD_PROBLEMS
    other = rng.choice([name for name in domain if name != problem])
    mix = {"fits": [problem], "fits, and another": [problem, other], "another": [other], "none": []}
    offers = mix[pick_weighted(rng, REMEDY_MIX)]
    middle = [f"{rng.choice(STEMS)} {rng.choice(PROBLEMS[name][2])}." for name in offers]
    if rng.random() < P_TIME:  # "I will swap it today.", or "We will call you today."
        offer = middle[0][:-1] if middle else rng.choice(HEAR)
        middle[:1] = [f"{offer} {rng.choice(TIMES)}."]
    # Promises and fillers stand anywhere among the offers; the thing is named before them.
    middle += rng.sample(FILLERS, pick_weighted(rng, FILLER_MIX))
    if rng.random() < P_PROMISE:
        middle.append(rng.choice(PROMISES))
    rng.shuffle(middle)
    if rng.random() < P_NAMES:
        middle.insert(0, rng.choice(NAMING).format(thing=thing))
    # Courtesy comes first as a greeting, last as a farewell.
    courteous = rng.sample(GREETINGS + FAREWELLS, pick_weighted(rng, COURTESY_MIX))
    greetings = [sentence for sentence in courteous if sentence in GREETINGS]
    said = greetings + middle + [sentence for sentence in courteous if sentence in FAREWELLS]
    while len(said) < 2:  # at least two sentences: a single one would stand out
        said.append(rng.choice([filler for filler in FILLERS if filler not in said]))
    if rng.random() < P_REPEAT:
        said.append(rng.choice(said))
    return " " + " ".join(said)


# A world: (function domain -> prompts, domain of D, OOD domain, function writing a response).
DIALOGUE = (all_prompts, SHOP_PROBLEMS, OOD_PROBLEMS, write_response)


def make_world(seed: int, sizes: dict[str, int], world=DIALOGUE) -> dict[str, list[dict]]:
    """Returns {file name: rows}; no prompt is in two files. Raises: Mistake if prompts run out.

    sizes: rows of "sft" (from both domains) and of each set of prompts (from OOD if its name starts
    with "ood").
    """
    prompts_of, *domains, respond = world
    rng = random.Random(seed)
    drawn: dict[str, list[str]] = {name: [] for name in sizes}  # {set: its prompts}
    for ood, domain in enumerate(domains):
        # How many prompts of this domain each set takes; "sft" takes OOD_SHARE of its own from OOD.
        # (ood is 0 or 1, and so is a comparison: the sets named "ood.." for 1, the others for 0.)
        share = {"sft": 0} | {name: n for name, n in sizes.items() if name.startswith("ood") == ood}
        share["sft"] += round(OOD_SHARE * sizes["sft"]) * (1 if ood else -1)
        pool = prompts_of(domain)
        if min(sizes.values()) < 1 or sum(share.values()) > len(pool):
            raise Mistake(f"{len(pool)} prompts cannot be shared as {share}: 1 each at least")
        rng.shuffle(pool)  # then pop(): each prompt goes to one set only
        for name, size in share.items():
            drawn[name] += [pool.pop() for _ in range(size)]
    sft = drawn.pop("sft")
    rng.shuffle(sft)
    files = {f"prompts-{name}": [{"prompt": p} for p in some] for name, some in drawn.items()}
    return files | {"sft": [{"prompt": p, "response": respond(rng, p)} for p in sft]}


# ------------------------------------------------------------------------- tokenizer and tiny model
def train_tokenizer(texts: list[str]):
    """Returns a tokenizer with one token per word of the texts. It spells other words in bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    turns = ["\n\nHuman:", ANSWER]  # each is one token
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    symbols = sorted(byte_level.alphabet())  # one for each of the 256 bytes
    plain = [re.sub("|".join(turns), "", text) for text in texts]
    words = {word for text in plain for word, _ in byte_level.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate(symbols + sorted(words - set(symbols)))}
    # Byte-pair encoding without merges looks a known word up whole and spells any other in bytes.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(turn, normalized=False) for turn in turns])
    # EOS and padding are two tokens: the reward head reads the last token before the padding, EOS.
    ends = {"eos_token": "<|eos|>", "pad_token": "<|pad|>", "model_max_length": 256}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def make_model(tokenizer, hidden_size: int, layers: int, seed: int):
    """Returns an untrained tiny Llama: the policy and, with another head, the reward model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": hidden_size, "intermediate_size": 5 * hidden_size // 2}
    # Tied: otherwise half of the weights would be a second table of words.
    shape |= {"num_hidden_layers": layers, "num_attention_heads": 4, "tie_word_embeddings": True}
    reads = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(bos_token_id=None, **shape, **reads, **ends))


# ------------------------------------------------------------------------------------------- labels
def label_pairs(samples: list[dict], noise: float, seed: int) -> tuple[list[dict], float]:
    """Returns (preference pairs, share of flipped labels) of [{"prompt", "responses"}].

    Each prompt gives k // 2 disjoint pairs, less those of equal responses. Labels are Bradley-Terry
    draws, P(a over b) = sigmoid((gold(a) - gold(b)) / noise), or gold's own if noise = 0. A tie of
    gold counts as half a flip. The accuracy of gold itself, a ceiling for RMs, is then 1 - share.
    Raises: Mistake if no pair is left.
    """
    rng = random.Random(seed)
    pairs = []
    flips = 0.0
    for prompt, responses in ((sample["prompt"], sample["responses"]) for sample in samples):
        # Disjoint pairs: the first and the second, the third and the fourth; an odd one has none.
        for a, b in zip(responses[::2], responses[1::2], strict=False):
            coin = rng.random()  # also for pairs that are left out: the others keep their coins
            if a != b:
                gap = gold_reward(prompt, a) - gold_reward(prompt, b)
                # sigmoid(x) = (1 + tanh(x / 2)) / 2, without overflow. At noise 0: the gap's sign.
                a_wins = coin < 0.5 * (1 + math.tanh(gap / (noise or 1e-300) / 2))
                flips += 0.5 if gap == 0 else a_wins != (gap > 0)
                chosen, rejected = (a, b) if a_wins else (b, a)
                pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if not pairs:
        raise Mistake("no pair left: the two responses of each pair are equal; sample hotter ones")
    return pairs, flips / len(pairs)


# ----------------------------------------------------------- reading preference files, writing rows
def read_lines(path) -> list[tuple[str, dict]]:
    """Returns [("FILE, line N", row)] of .jsonl or .jsonl.gz, here or on the hub; or Mistake.

    A row is the JSON object of one line.
    """
    file = where = path
    owner, *rest = str(path).split("/", 2)
    if len(rest) == 2 and not Path(owner).exists():  # owner/name/file, and no such folder is here
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(f"{owner}/{rest[0]}", rest[1], repo_type="dataset")
        except Exception as e:  # of a dozen types
            raise Mistake(f"{path}: found neither here nor on the hub: {e!r:.80}") from e
    rows = []
    try:
        raw = Path(file).read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw  # whatever its name
        for number, line in enumerate(raw.split(b"\n"), 1):  # bytes: \u2028 does not end a line
            where = f"{path}, line {number}"
            if line.strip():  # dict.__or__ fails unless it is an object
                rows.append((where, dict.__or__(json.loads(line.decode("utf-8-sig")), {})))
    except (OSError, EOFError, zlib.error, ValueError, TypeError, RecursionError) as e:
        raise Mistake(f"{where}: {e}; give a whole UTF-8 file: one JSON object per line") from None
    if not rows:
        raise Mistake(f"{path}: empty, it has no row")
    return rows


def read_jsonl(path) -> list[dict]:
    """Returns the rows of a .jsonl or .jsonl.gz file (UTF-8). Raises: Mistake with the line."""
    return [row for _, row in read_lines(path)]


def checked(text, key: str, where: str) -> str:
    """Returns text, the value of a row's key. Raises: Mistake if no tokenizer would accept it."""
    # JSON can hold half of a surrogate pair, which is not a character: tokenizers refuse it.
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
        raise Mistake(f'{where}: key "{key}" is missing or not text in Unicode: {text!r:.60}')
    return text


def turns_of(messages: list, key: str, where: str) -> list[str]:
    """Returns TRL's messages [{"role", "content"}, ...] as turns in the form of HH-RLHF."""
    roles = {"system": "System", "user": "Human", "assistant": "Assistant"}
    try:
        said = [(roles[turn["role"]], checked(turn["content"], key, where)) for turn in messages]
    except (KeyError, TypeError):
        raise Mistake(f'{where}: key "{key}" needs messages of {", ".join(roles)}') from None
    return [f"\n\n{role}: {text}" if text.strip() else f"\n\n{role}:" for role, text in said]


def prompt_of(prompt, where: str) -> str:
    """Returns a row's prompt as text; a message list becomes one, with ANSWER at its end."""
    if isinstance(prompt, list) and prompt:
        return "".join(turns_of(prompt, "prompt", where)) + ANSWER
    return checked(prompt, "prompt", where)


def split_row(row: dict, key: str, where: str) -> tuple[str, str]:
    """Returns (prompt, response) of row[key], "chosen" or "rejected", with or without "prompt"."""
    prompt = row.get("prompt")
    if isinstance(row.get(key), list):  # messages: the answer alone, or all turns
        turns = turns_of(row[key], key, where)
        asked = turns_of(prompt, "prompt", where) if isinstance(prompt, list) else []
        if turns[: len(asked)] != asked:  # then it must be the answer alone
            turns = asked + turns if turns and turns[0].startswith(ANSWER) else []
    else:
        text = checked(row.get(key), key, where)
        # A text "\n\nHuman: hi\n\nAssistant: a" with the prompt "hi" is the whole conversation. Any
        # other text with a prompt is the response, perhaps with the prompt in front of it.
        whole = ANSWER in text and re.match(r"\s*(Human|System):", text)
        if "prompt" in row and (ANSWER in checked(prompt, "prompt", where) or not whole):
            return prompt, without(prompt, text) if ANSWER in prompt else text
        turns = re.split(f"(?={ANSWER})", text)  # HH-RLHF: the last answer is the response
    asked = "".join(turns[:-1])
    if not asked or not turns[-1].startswith(ANSWER):
        raise Mistake(f'{where}: key "{key}" must end with an answer of Assistant after a prompt')
    if isinstance(prompt, str) and prompt.strip() not in asked + ANSWER:
        raise Mistake(f'{where}: key "{key}" is a conversation that does not hold the "prompt"')
    return asked + ANSWER, turns[-1].removeprefix(ANSWER)


def without(prompt: str, response: str) -> str:
    """Returns the response, without the prompt if it begins with that."""
    head, body = prompt.lstrip(), response.lstrip()
    return body.removeprefix(head) if head and body.startswith(head) else response


def read_preferences(path) -> list[dict]:
    r"""Returns preference pairs [{"prompt", "chosen", "rejected"}], all strings, of a file.

    A row has these keys as strings or TRL's message lists, or its two answers are whole
    conversations: message lists, or HH-RLHF transcripts, cut at the last "\n\nAssistant:". Rows of
    two prompts or equal answers are dropped, with a note on stderr. Raises: Mistake with the line.
    """
    lines = read_lines(path)
    pairs = []
    for where, row in lines:
        prompt, chosen = split_row(row, "chosen", where)
        other_prompt, rejected = split_row(row, "rejected", where)
        if prompt == other_prompt and chosen != rejected:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if dropped := len(lines) - len(pairs):
        print(f"{path}: dropped {dropped} rows of two prompts or equal answers", file=sys.stderr)
    if not pairs:
        raise Mistake(f"{path}: no usable pair is left")
    # A response may begin with its prompt by chance ("Hi", "Hi there"). Cut only if all of them do.
    sides = ("chosen", "rejected")
    cut = [pair | {side: without(pair["prompt"], pair[side]) for side in sides} for pair in pairs]
    both = [(x[side], y[side]) for x, y in zip(pairs, cut, strict=True) for side in sides]
    return cut if all(whole != rest for whole, rest in both) else pairs


def read_meta(path) -> list[dict]:
    """Returns the meta set S, [{"prompt", "responses": [k strings]}], one k >= 2 for all rows.

    Preference pairs give k = 2: both responses, without the label. Identical responses get a
    warning on stderr: J has no gradient there. Raises: Mistake naming file, line and key.
    """
    lines = read_lines(path)
    rows = []
    same = 0  # responses that are identical to another of their prompt
    if "responses" not in lines[0][1] and "chosen" in lines[0][1]:
        rng = random.Random(0)  # the order of the two must not tell the label
        pairs = [pair.values() for pair in read_preferences(path)]
        return [{"prompt": prompt, "responses": rng.sample(both, 2)} for prompt, *both in pairs]
    for where, row in lines:
        texts = row.get("responses")
        if not isinstance(texts, list) or not 2 <= len(texts) == len(lines[0][1]["responses"]):
            raise Mistake(f'{where}: key "responses" needs k >= 2 texts, the same k in all rows')
        for i, text in enumerate(texts):
            if isinstance(text, list):  # TRL's messages, read as those of a pair
                texts[i] = split_row(row | {"responses": text}, "responses", where)[1]
        same += len(texts) - len({checked(text, "responses", where) for text in texts})
        rows.append({"prompt": prompt_of(row.get("prompt"), where), "responses": texts})
    if same:
        what = f"{same / len(rows) / len(texts):.1%} of the responses are identical to another"
        print(f"{path}: warning: {what} of their prompt; sample hotter ones", file=sys.stderr)
    return rows


def read_sft(path) -> list[dict]:
    """Returns [{"prompt", "response"}] of such rows, or of pairs: their chosen responses."""
    lines = read_lines(path)
    if "response" not in lines[0][1] and "chosen" in lines[0][1]:
        return [{"prompt": p["prompt"], "response": p["chosen"]} for p in read_preferences(path)]
    texts = (split_row(row, "response", where) for where, row in lines)
    return [{"prompt": prompt, "response": response} for prompt, response in texts]


def read_prompts(path) -> list[str]:
    """Returns the key "prompt" of each row. Raises: Mistake naming file and line."""
    return [prompt_of(row.get("prompt"), where) for where, row in read_lines(path)]


def write_text(path, text: str) -> None:
    """Writes a file whole or not at all."""
    Path(f"{path}.tmp").write_bytes(text.encode())  # UTF-8, and no \r\n, wherever this runs
    Path(f"{path}.tmp").replace(path)


def write_jsonl(path, rows) -> None:
    """Writes the rows, one JSON object per line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path, row: dict) -> None:
    """Appends one row to a file, as a log grows."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------ folders and options
@contextlib.contextmanager
def output_folder(out):
    """Yields a folder to write to, OUT.partial, which is renamed to OUT if all goes well.

    After a failure OUT.partial stays, and the same command resumes from it. Raises: Mistake if OUT
    is not empty or cannot be written.
    """
    whole = Path(out).resolve()
    work = whole.with_name(whole.name + ".partial")
    try:
        if whole.is_file() or whole.is_dir() and any(whole.iterdir()):
            raise Mistake(f"{out} exists; name another --out or delete it")
        if whole.is_dir():  # a mount point (docker -v) cannot be renamed: fail now, not at the end
            whole.rename(f"{whole}.tmp").rename(whole)
        work.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Mistake(f"{out} cannot be written ({e.strerror}); name another, or {out}/x") from None
    try:
        yield work
        for left in work.glob("*.tmp"):  # half-written files of a killed run
            left.unlink()
        work.replace(whole)
        # Only after the rename: if that fails, the same command resumes from the checkpoint.
        (whole / "checkpoint.pt").unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):
            work.rmdir()  # removes an empty folder only


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Makes --help keep the line breaks of a file's docstring and show each option's default."""


def new_parser(prog: str, doc: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser of command lines. It takes no abbreviated options."""
    return argparse.ArgumentParser(prog, None, doc, formatter_class=Help, allow_abbrev=False)


def modes(parser: argparse.ArgumentParser, names: str):
    """Returns add("mode mode", "--option", ...), which adds an option to these modes."""
    choices = parser.add_subparsers(dest="mode", required=True, parser_class=new_parser)
    parsers = {name: choices.add_parser(name) for name in names.split()}

    def add(takers: str, option: str, **settings) -> None:
        for name in takers.split():
            parsers[name].add_argument(option, **settings)

    return add


# All numbers on command lines must be above 0, but these options may be 0. (workers: of the study
# in docs/study.)
ZERO = "seed eta noise max_length valid_share kl_coef gamma lam".split()
ZERO += ["missing_eos_penalty", "checkpoint_minutes", "workers"]
# What an error says if memory has run out: in Python and numpy, torch and CUDA, the allocator of
# the CPU, cuBLAS and cuDNN. A Mistake is excluded: it may quote somebody's text.
NO_MEMORY = "^(?!Mistake).*(MemoryError|out of memory|allocate memory|ALLOC_FAILED)"
# What it says if the disk is full: the system's words, a quota's, torch.save's (the last two).
DISK_FULL = "No space left|Disk quota|File too large|unexpected pos|iostream error"
TOLD = [  # (pattern of an error, message to the user); the first match counts
    ("^Mistake", "{error}"),
    (DISK_FULL, "the disk of {out} is full ({error:.120}); make space: the same command goes on"),
    ("PytorchStreamReader failed", "{out}.partial/checkpoint.pt is damaged; delete it"),
    ("not compiled with CUDA|Expected one of cpu", "METARM_DEVICE: {error:.70}; leave it out"),
    (NO_MEMORY, "{mode} --out {out}: out of memory ({error:.120}); lower {sizes}"),
    ("^(FloatingPointError|NotFinite)", "{mode} --out {out}: {error}"),  # training has diverged
]


def out_of_memory(error: Exception) -> bool:
    """Returns whether an error, or its cause, says that the GPU or CPU has run out of memory."""
    return any(re.search(NO_MEMORY, repr(e)) for e in (error, error.__cause__))


def command(parser: argparse.ArgumentParser, run, argv: list[str] | None = None) -> int:
    """Runs run(args); returns the exit status. The errors of TOLD: one line on stderr, status 2."""
    start = time.monotonic()
    if hasattr(sys.stdout, "reconfigure"):  # ? for characters that the terminal lacks
        sys.stdout.reconfigure(errors="replace")
    try:
        args = parser.parse_args(argv)
        for key, x in vars(args).items():
            # PyTorch takes 64 bits, and epochs are added to a seed.
            high = {"seed": 2**63, "valid_share": 1}.get(key, math.inf)
            low = "0 or above 0" if key in ZERO else "above 0"
            if type(x) in (int, float) and not (0 < x < high or x == 0 and key in ZERO):
                raise Mistake(f"--{key} {x}: it must be {low}, and below {high}")
        run(args)
    except Exception as error:
        if not (told := next((x for words, x in TOLD if re.search(words, repr(error))), "")):
            raise  # a bug: its traceback is wanted
        given = {"mode": "", "run": ""} | vars(args)
        given["out"] = given.get("out") or given["run"]
        sizes = [f"--{x} {given[x]}" for x in ("micro_batch_size", "batch_size") if x in given]
        told = told.format(**given, error=str(error), sizes=", then ".join(sizes) or "its sizes")
        print(f"{parser.prog}: error: {' '.join(told.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted; give the same command to go on", file=sys.stderr)
        return 130
    except SystemExit as leave:  # argparse: --help, or an option that it refuses
        return leave.code or 0
    # What it took: seconds, and the peak of the process's memory (and of the GPU's).
    # ru_maxrss is in bytes on macOS, in kilobytes elsewhere.
    memory = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    taken = f"{time.monotonic() - start:.0f} s, {memory / 1e9:.1f} GB"
    if "torch" in sys.modules and (peak := sys.modules["torch"].cuda.max_memory_allocated()):
        taken += f", GPU {peak / 1e9:.1f} GB"
    print(f"{parser.prog}: {taken}", file=sys.stderr)
    return 0


# ------------------------------------------------------------------------------------- the commands
def toy(args, work: Path) -> None:
    """Writes the toy world, its tokenizer and its untrained model."""
    sizes = {name: getattr(args, name) for name in ("sft", "pairs", "meta", "ppo", "valid", "test")}
    sizes |= {"ood": args.test, "ood-meta": args.meta, "ood-ppo": args.ood_ppo}
    world = make_world(args.seed, sizes)
    for name, rows in world.items():
        write_jsonl(work / f"{name}.jsonl", rows)
    tokenizer = train_tokenizer(["".join(row.values()) for rows in world.values() for row in rows])
    tokenizer.save_pretrained(work / "model")
    make_model(tokenizer, hidden_size=64, layers=2, seed=args.seed).save_pretrained(work / "model")


def label(args, work: Path) -> None:
    """Writes D: labelled pairs of a policy's samples, with some prompts held out for validation."""
    pairs, flipped = label_pairs(read_meta(args.samples), args.noise, args.seed)
    prompts = sorted({pair["prompt"] for pair in pairs})
    random.Random(args.seed).shuffle(prompts)
    held_out = set(prompts[: math.ceil(args.valid_share * len(prompts))])
    write_jsonl(work / "train.jsonl", [x for x in pairs if x["prompt"] not in held_out])
    write_jsonl(work / "valid.jsonl", [x for x in pairs if x["prompt"] in held_out])
    print(f"data.py: {args.out}: {len(pairs)} pairs, {flipped:.1%} of their labels flipped")


def split(args, work: Path) -> None:
    """Writes real preferences as the parts that a run needs, split by prompt."""
    by_prompt: dict[str, list[dict]] = {}  # pairs of one prompt stay in one part
    for pair in read_preferences(args.source):
        by_prompt.setdefault(pair["prompt"], []).append(pair)
    prompts = sorted(by_prompt)
    random.Random(args.seed).shuffle(prompts)
    quarter = len(prompts) // 4
    held = math.ceil(args.valid_share * len(prompts))
    # judge: pairs for the RM that only judges. loop: prompts for S and PPO. rest: pairs of D, whose
    # chosen responses are SFT's, too.
    judge, loop, rest = prompts[:quarter], prompts[quarter : 2 * quarter], prompts[2 * quarter :]
    parts = {"judge": judge, "valid": rest[:held], "train": rest[held:]}
    if not (loop and all(parts.values())):
        raise Mistake(f"{args.source}: {len(prompts)} prompts are too few to split")
    third = max(1, len(loop) // 3)
    sets = {"meta": loop[:third], "ppo": loop[third:], "test": parts["valid"][: args.test]}
    if args.ood:
        pairs = "chosen" in read_jsonl(args.ood)[0] and read_preferences(args.ood)
        other = [pair["prompt"] for pair in pairs] if pairs else read_prompts(args.ood)
        other = sorted(set(other) - set(prompts))
        if len(other) < 4:
            raise Mistake(f"{args.ood}: needs at least 4 prompts that {args.source} does not have")
        random.Random(args.seed).shuffle(other)
        cut = min(args.test, len(other) // 4)
        third = cut + (len(other) - cut) // 3
        sets |= {"ood": other[:cut], "ood-meta": other[cut:third], "ood-ppo": other[third:]}
    for name, part in parts.items():
        write_jsonl(work / f"{name}.jsonl", [pair for prompt in part for pair in by_prompt[prompt]])
    write_jsonl(work / "sft.jsonl", read_sft(work / "train.jsonl"))
    for name, some in sets.items():
        write_jsonl(work / f"prompts-{name}.jsonl", [{"prompt": prompt} for prompt in some])
    print(f"data.py: {args.out}:", {name: len(some) for name, some in (parts | sets).items()})


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("data.py", __doc__)
    add = modes(parser, "toy label split")
    add("toy label split", "--out", required=True, help="folder to write")
    add("toy label split", "--seed", type=int, default=0, help="of everything that is drawn")
    sizes = {"sft": 8000, "pairs": 6000, "meta": 256, "ppo": 1024, "ood_ppo": 256, "valid": 128}
    for name, rows in sizes.items():
        add("toy", f"--{name}", type=int, default=rows, help="rows of the file of this name")
    add("toy split", "--test", type=int, default=128, help="prompts for the test")
    add("label", "--samples", required=True, help="samples.jsonl of a policy")
    add("label", "--noise", type=float, default=1.0, help="Bradley-Terry temperature, gold points")
    add("label split", "--valid_share", type=float, default=0.1, help="share of prompts held out")
    add("split", "--source", required=True, help="file of preference rows")
    add("split", "--ood", help="rows of another domain, for prompts-ood*.jsonl")

    def run(args) -> None:
        with output_folder(args.out) as work:
            {"toy": toy, "label": label, "split": split}[args.mode](args, work)

    return command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
