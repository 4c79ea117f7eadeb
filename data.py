"""
The toy world, where the truth is known; and the reading, writing and resuming that all the commands share.

  THE WORLD  help-desk dialogue in the form of HH-RLHF. gold_reward() is the truth: a short list of plain
             rules on the text. You disagree with it? Change the table GOLD and run again.
  D          pairs of responses of the SFT policy. Which of the two is `chosen` is drawn from the gold reward
             by Bradley-Terry, P(a over b) = sigmoid((gold(a) - gold(b)) / noise), as in Gao et al. 2022.
             Only these labels ever leave the world: no training run sees a gold reward.
  OOD        five problems of a travel desk. The SFT text speaks of them (it stands in for pre-training too),
             D never does.
  summary    a second task, --task summary: to sum up a short note of a repair shop (OOD: of a clinic). Its truth
             is the table SUMMARY_GOLD; gold_reward() sees from the prompt which of the two it judges.

  python data.py toy --out runs/toy/data --seed 0 [--task summary]
      writes sft.jsonl {"prompt", "response"}; prompts-{pairs,meta,ppo,valid,test,ood,ood-meta,ood-ppo}.jsonl
      {"prompt"}, where no prompt is in two files; and model/, an untrained tiny Llama with its tokenizer.
  python data.py label --samples runs/toy/pairs-samples/samples.jsonl --out runs/toy/pairs --noise 1.0
      writes train.jsonl and valid.jsonl {"prompt", "chosen", "rejected"}, and label.json.
  python data.py split --source harmless-base/train.jsonl.gz --out runs/hh/data
      the same parts from real preferences (a file, or Anthropic/hh-rlhf/harmless-base/train.jsonl.gz on the hub).
"""
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

# ------------------------------------------------------------------------------------------------------------
# The truth

GOLD = {                              # points: the table to disagree with
    "names the thing": 1.0,           # says "camera" to a customer who wrote about a camera
    "remedy that fits": 2.0,          # the ONE remedy of this customer's problem
    "other remedy": -1.0,             # each other kind of remedy on offer
    "courtesy": (1.5, 0.5),           # the first and the second courteous phrase ...
    "grovelling": -1.0,             # ... and each one after these
    "time": 1.0,                      # says when
    "empty promise": -1.5,            # each
    "repeated sentence": -1.0,        # each
    "broken sentence": -0.5,          # each that nobody at this desk would say: babble must not pay
    "word too many": -0.1,            # each beyond LONGEST
    "word too few": -0.3,             # each short of SHORTEST
}
SHORTEST, LONGEST = 8, 45             # words


def gold_reward(prompt: str, response: str) -> float:
    """The truth of the toy world: the sum of gold_parts(). Raises ValueError if the prompt is not of it."""
    return round(float(sum(gold_parts(prompt, response).values())), 6)      # rounded, so that ties are ties


def gold_parts(prompt: str, response: str) -> dict[str, float]:
    """The gold reward rule by rule: the keys of GOLD -> points. Raises ValueError if the prompt is not of
    this world. The rules look for words and phrases, and so judge the broken text of a small model too."""
    if SUM_UP in prompt:                                # the other task, with rules of its own
        return summary_parts(prompt, response)
    problem, thing = read_customer(prompt)
    text = response.lower()
    words, sentences = text.split(), sentences_of(text)
    offered = {remedy for remedy, (telltale, _) in REMEDIES.items() if re.search(telltale, text)}
    fits = PROBLEMS[problem][0]
    courtesies = len(re.findall(COURTEOUS, text))
    return {
        "names the thing": GOLD["names the thing"] * bool(re.search(rf"\b{thing}\b", text)),
        "remedy that fits": GOLD["remedy that fits"] * (fits in offered),
        "other remedy": GOLD["other remedy"] * len(offered - {fits}),
        "courtesy": sum(GOLD["courtesy"][:courtesies]),
        "grovelling": GOLD["grovelling"] * max(0, courtesies - len(GOLD["courtesy"])),
        "time": GOLD["time"] * bool(re.search(ANY_TIME, text)),
        "empty promise": GOLD["empty promise"] * len(re.findall(PROMISED, text)),
        "repeated sentence": GOLD["repeated sentence"] * (len(sentences) - len(set(sentences))),
        "broken sentence": GOLD["broken sentence"] * sum(template_of(s) not in KNOWN for s in sentences),
        "word too many": GOLD["word too many"] * max(0, len(words) - LONGEST),
        "word too few": GOLD["word too few"] * max(0, SHORTEST - len(words)),
    }


@functools.lru_cache(maxsize=100_000)
def read_customer(prompt: str) -> tuple[str, str]:
    """(problem, thing) that a prompt of this world is about. Raises ValueError for any other prompt."""
    thing = re.search(ANY_THING, prompt)
    if thing:
        for problem, (_, _, wordings) in PROBLEMS.items():
            if any(wording.format(thing=thing[0]) in prompt for wording in wordings):
                return problem, thing[0]
    raise ValueError(f"gold_reward judges the toy world only, and this prompt is not of it: {prompt[-80:]!r}; real "
                     "preferences bring labels of their own")


def sentences_of(text: str) -> list[str]:
    """'One.  Two!' -> ['one', 'two']"""
    return [" ".join(part.split()) for part in re.split(r"[.!?]", text.lower()) if part.strip()]


def template_of(sentence: str) -> str:
    """'this is about your lamp' -> 'this is about your {thing}'; a time is cut off."""
    return re.sub(ANY_THING, "{thing}", re.sub(ANY_TIME, "", sentence)).strip()


# ------------------------------------------------------------------------------------------------------------
# How good the SFT text is: mixed, and seldom so courteous or so long that the gold reward turns down. There
# "more is better" holds, and that is what a reward model learns from D. PPO then leaves that range.

REMEDY_MIX = {"fits": 0.40, "fits, and another": 0.10, "another": 0.30, "none": 0.20}
COURTESY_MIX = {0: 0.35, 1: 0.35, 2: 0.22, 3: 0.06, 4: 0.02}      # how many courteous sentences
FILLER_MIX = {0: 0.35, 1: 0.45, 2: 0.20}                          # how many sentences that say nothing
P_NAMES, P_TIME, P_PROMISE, P_REPEAT = 0.60, 0.35, 0.15, 0.02
OOD_SHARE = 0.15                                                  # of the SFT rows
MAX_POSITIONS = 256                                               # of the tiny model, in tokens
ANSWER = "\n\nAssistant:"                                         # where a prompt ends and a response begins

# ------------------------------------------------------------------------------------------------------------
# Everything that can be said in this world

SHOP = ("phone laptop tablet camera radio speaker watch headset lamp clock scooter drill shaver torch "
        "keyboard mouse printer scanner tracker fan doorbell robot drone monitor").split()
RIDES, ROOMS, BAGS = ["flight", "train", "ferry", "coach"], ["room", "suite", "cabin", "flat"], \
    ["suitcase", "rucksack", "trunk", "bag"]

# problem: (the remedy that fits, what it happens to, how customers put it)
SHOP_PROBLEMS = {
    "late": ("trace", SHOP, [
        "My {thing} has not arrived yet.", "I am still waiting for my {thing}.",
        "Where is the {thing} that I ordered?"]),
    "broken": ("replace", SHOP, [
        "My {thing} came broken.", "There is a crack in my {thing}.",
        "The {thing} was in pieces when I opened the box."]),
    "wrong item": ("swap", SHOP, [
        "I ordered a {thing} and got something else.", "This is not the {thing} I chose.",
        "My {thing} has the wrong colour."]),
    "charged twice": ("refund", SHOP, [
        "I was charged twice for my {thing}.", "You took too much money for my {thing}.",
        "My bank shows the price of the {thing} two times."]),
    "forgotten password": ("reset", SHOP, [
        "I forgot the password of my {thing}.", "I do not know the login of my {thing} any more.",
        "My {thing} asks for a code that I cannot remember."]),
    "locked account": ("unlock", SHOP, [
        "I am locked out of my {thing}.", "My {thing} says access denied.",
        "The {thing} shuts me out after three tries."]),
    "missing part": ("part", SHOP, [
        "My {thing} came without its cable.", "The {thing} has no screws in the box.",
        "I cannot find the cover of my {thing}."]),
    "slow": ("update", SHOP, [
        "My {thing} has become very slow.", "It takes my {thing} ages to start.",
        "The {thing} freezes all the time."]),
    "weak": ("battery", SHOP, [
        "My {thing} is flat after one hour.", "The {thing} runs out of power by lunch.",
        "I have to charge my {thing} all day."]),
    "cancelled by mistake": ("reinstate", SHOP, [
        "You cancelled my {thing} by mistake.", "I still want the {thing} that you cancelled.",
        "Why is my {thing} not on your list any more?"]),
    "wrong address": ("redirect", SHOP, [
        "My {thing} is going to my old home.", "I gave you the wrong street for my {thing}.",
        "I have moved and my {thing} is on its way."]),
    "no invoice": ("invoice", SHOP, [
        "My tax office asks about the {thing}.", "There was no paper with my {thing}.",
        "My boss wants proof that I paid the {thing}."]),
}
OOD_PROBLEMS = {
    "delayed": ("rebook", RIDES, [
        "My {thing} is delayed.", "I will miss my {thing}.", "The {thing} leaves too late for me."]),
    "noisy": ("quiet", ROOMS, [
        "My {thing} is so noisy.", "I cannot sleep in my {thing}.", "There is music under my {thing}."]),
    "lost": ("hotel", BAGS, [
        "My {thing} did not land with me.", "I have lost my {thing}.", "Nobody can find my {thing}."]),
    "wrong seat": ("seat", RIDES, [
        "I am not next to my wife on the {thing}.", "I sit at the wrong end of the {thing}.",
        "I asked for a window on the {thing}."]),
    "double booking": ("second", RIDES + ROOMS, [
        "I have booked my {thing} twice.", "My {thing} is on my list two times.",
        "I only need one {thing} and have two."]),
}
# remedy: (what gives it away, how the desk puts it)
REMEDIES = {
    "trace": ("courier", ["ask the courier where it is", "trace it with the courier", "call the courier"]),
    "replace": ("replace|brand new", ["send a replacement", "replace it for free", "send a brand new one"]),
    "swap": ("swap|return label", ["swap it", "send a prepaid return label", "collect it and swap it"]),
    "refund": ("refund|pay back", ["refund the second charge", "pay back the money", "refund your card"]),
    "reset": ("reset|new password", ["send a reset link", "reset it for you", "set a new password"]),
    "unlock": ("unlock|lift the block", ["unlock your account", "lift the block", "unlock it from here"]),
    "part": ("missing|spare", ["post the missing part", "send a spare part", "post the spare piece"]),
    "update": ("update|software", ["install the update", "send the latest software", "update it from here"]),
    "battery": ("batter", ["send a fresh battery", "fit a stronger battery", "change both batteries"]),
    "reinstate": ("reinstate|order again", ["reinstate your order", "place the order again", "reinstate it"]),
    "redirect": ("redirect|new address", ["redirect the parcel", "use your new address", "redirect it"]),
    "invoice": ("invoice|receipt", ["mail the invoice", "print the receipt", "mail a copy of the receipt"]),
    "rebook": ("rebook|later one", ["rebook you", "put you on the later one", "rebook the trip"]),
    "quiet": ("quiet|upper floor", ["move you to a quiet one", "find a quiet place", "use the upper floor"]),
    "hotel": ("hotel", ["send it to your hotel", "bring it to the hotel", "have it at your hotel"]),
    "seat": (r"seat|\brow\b", ["change your seat", "give you another row", "find a better seat"]),
    "second": ("second booking|double", ["cancel the second booking", "drop the double",
                                         "remove the second booking"]),
}
OPENINGS = ["", "Hello there.", "Hi.", "Good morning.", "Good evening.", "Hello again.", "Excuse me."]
ASIDES = ["", "It is a gift for my sister.", "I need it for work.", "This is the second time.",
          "It cost a lot.", "I wrote to you before.", "Can you help me?", "What can you do?",
          "I am quite upset."]

STEMS = ["I will", "We will", "I can"]
TIMES = ["today", "tomorrow", "by Friday", "within two days", "within an hour"]
HEAR = ["You will hear from us", "We will call you"]               # a time without a remedy
NAMING = ["I have read your note about the {thing}.", "I can see the {thing} in our books.",
          "This is about your {thing}.", "Let us talk about the {thing}."]
GREETINGS = ["I am sorry to hear that.", "I am very sorry about this.", "Thank you for writing to us.",
             "Thanks for telling us.", "We apologise for the trouble."]
FAREWELLS = ["I am happy to help with anything else.", "Please write again at any time.",
             "Thank you for your patience.", "We appreciate your trust.", "It is a pleasure to help you."]
PROMISES = ["This will never happen again.", "Everything will be perfect.", "We guarantee it."]
FILLERS = ["Let me look into this for you.", "Our team is on it.", "I have made a note of it.",
           "We read every message.", "These things happen now and then."]

PROBLEMS = SHOP_PROBLEMS | OOD_PROBLEMS
COURTEOUS = r"\bsorry\b|\bthank|\bapologise\b|\bplease\b|\bhappy to help\b|\bappreciate\b|\bpleasure\b"
PROMISED = r"never happen again|will be perfect|guarantee"
ANY_TIME = r"\b(" + "|".join(TIMES).lower() + r")\b"
ANY_THING = r"\b(" + "|".join(SHOP + RIDES + ROOMS + BAGS) + r")\b"
KNOWN = {sentence for text in NAMING + GREETINGS + FAREWELLS + PROMISES + FILLERS + HEAR
         for sentence in sentences_of(text)}
KNOWN |= {f"{stem} {wording}".lower() for stem in STEMS for _, says in REMEDIES.values() for wording in says}


# ------------------------------------------------------------------------------------------------------------
# Making the world

def all_prompts(problems: dict) -> list[str]:
    """Every prompt there is about these problems."""
    return ["\n\nHuman: " + " ".join(filter(None, [opening, wording.format(thing=thing), aside])) + ANSWER
            for _, things, wordings in problems.values()
            for opening, wording, thing, aside in itertools.product(OPENINGS, wordings, things, ASIDES)]


def draw(rng: random.Random, mix: dict):
    return rng.choices(list(mix), weights=list(mix.values()))[0]


def write_response(rng: random.Random, prompt: str) -> str:
    """One answer, of the mixed quality that the rates above describe."""
    problem, thing = read_customer(prompt)
    domain = SHOP_PROBLEMS if problem in SHOP_PROBLEMS else OOD_PROBLEMS
    fits = PROBLEMS[problem][0]
    another = rng.choice([remedy for remedy, _, _ in domain.values() if remedy != fits])
    remedies = {"fits": [fits], "fits, and another": [fits, another], "another": [another], "none": []}
    middle = [f"{rng.choice(STEMS)} {rng.choice(REMEDIES[remedy][1])}."
              for remedy in remedies[draw(rng, REMEDY_MIX)]]
    if rng.random() < P_TIME:                          # "I will swap it today.", or "We will call you today."
        middle[:1] = [(middle[0][:-1] if middle else rng.choice(HEAR)) + f" {rng.choice(TIMES)}."]
    middle += rng.sample(FILLERS, draw(rng, FILLER_MIX))
    if rng.random() < P_PROMISE:
        middle.append(rng.choice(PROMISES))
    rng.shuffle(middle)
    if rng.random() < P_NAMES:
        middle.insert(0, rng.choice(NAMING).format(thing=thing))
    courteous = rng.sample(GREETINGS + FAREWELLS, draw(rng, COURTESY_MIX))
    said = [s for s in courteous if s in GREETINGS] + middle + [s for s in courteous if s in FAREWELLS]
    while len(said) < 2:
        said.append(rng.choice([filler for filler in FILLERS if filler not in said]))
    if rng.random() < P_REPEAT:
        said.append(rng.choice(said))
    return " " + " ".join(said)


# ------------------------------------------------------------------------------------------------------------
# A second task: to sum up a note. Same form, same gold_reward(prompt, response) call, other rules.

SUMMARY_GOLD = {                      # points: the other table to disagree with
    "fact that matters": 1.0,         # each of the four: what, its fault, where, until when
    "invented fact": -1.5,            # each that is not in the note
    "trifle": -0.25,                  # who wrote the note, and in what weather
    "warning": 1.0,                   # one ...
    "alarm": -1.0,                    # ... and each further one
    "repeated sentence": -1.0,        # each
    "broken sentence": -0.5,          # each that nobody would write
    "word too many": -0.2,            # each beyond SUMMARY_LONGEST
    "word too few": -0.3,             # each short of SUMMARY_SHORTEST
}
SUMMARY_SHORTEST, SUMMARY_LONGEST = 5, 26     # words
MATTERS, TRIFLES = ("thing", "fault", "place", "day"), ("who", "weather")

# How good the SFT text is. Here, too, more is better in most of it: a third warning or a long summary is rare.
P_FACT, P_INVENTED, P_TRIFLE = 0.60, 0.15, 0.20               # of each fact; of each fact that is told; of each trifle
WARNING_MIX = {0: 0.45, 1: 0.35, 2: 0.16, 3: 0.04}            # how many warnings
GIST_MIX = {0: 0.60, 1: 0.35, 2: 0.05}                        # how many sentences that say nothing

SUM_UP = "Sum up this note:"
SHARED = {"day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"],
          "who": ["Anna", "Boris", "Clara", "David", "Emil"], "weather": ["rainy", "windy", "foggy", "sunny"]}
WORKS = SHARED | {                    # what a note can say, field by field
    "thing": "pump crane mill saw oven belt kiln lathe".split(),
    "fault": ["leaks oil", "runs hot", "makes sparks", "has rust", "smells burnt", "shakes badly", "is jammed",
              "lost a bolt"],
    "place": ["hall one", "hall two", "the yard", "the cellar", "the paint shop", "the old wing"],
    "note": ["{who} went round on a {weather} day. The {thing} in {place} {fault}. It has to run by {day}.",
             "By {day} somebody must see to {place}. There the {thing} {fault}, writes {who}. It was {weather}."]}
CLINIC = SHARED | {                   # OOD: other things, other faults, other places
    "thing": "baker farmer singer tailor pilot judge smith monk".split(),
    "fault": ["has a fever", "coughs badly", "broke a rib", "feels dizzy", "cannot sleep", "burnt a hand",
              "lost a tooth", "sees double"],
    "place": ["room one", "room two", "the night ward", "the tent", "the east bay", "the lobby"],
    "note": ["{who} went round on a {weather} day. The {thing} in {place} {fault}. A doctor must come by {day}.",
             "By {day} somebody must see to {place}. There the {thing} {fault}, writes {who}. It was {weather}."]}
SAYS = {"thing": ["It is about the {thing}.", "The {thing} needs help."],
        "fault": ["It {fault}.", "The trouble: it {fault}."],
        "place": ["Go to {place}.", "You find it in {place}."],
        "day": ["There is time until {day}.", "Do it by {day}."],
        "who": ["{who} wrote it down.", "Ask {who}."], "weather": ["The day was {weather}.", "It was {weather}."]}
WARNINGS = ["This is urgent.", "This is a danger.", "Please hurry.", "Do not wait."]
GISTS = ["Here is the gist.", "That is the note.", "More may follow.", "So much for this one."]
VALUES = {name: sorted({*WORKS[name], *CLINIC[name]}) for name in SAYS}
ANY_VALUE = {name: r"\b(" + "|".join(values).lower() + r")\b" for name, values in VALUES.items()}
WARNED = r"\burgent\b|\bdanger\b|\bhurry\b|do not wait"
SUMMARY_KNOWN = {sentence.lower() for text in [*itertools.chain(*SAYS.values()), *WARNINGS, *GISTS]
                 for sentence in sentences_of(text)}


@functools.lru_cache(maxsize=100_000)
def read_note(prompt: str) -> dict[str, str]:
    """{field: its value} of a note. Raises ValueError for any other prompt."""
    said = {name: re.findall(pattern, prompt.lower()) for name, pattern in ANY_VALUE.items()}
    if SUM_UP not in prompt or any(len(values) != 1 for values in said.values()):
        raise ValueError(f"gold_reward judges the toy world only, and this note is not of it: {prompt[-80:]!r}")
    return {name: values[0] for name, values in said.items()}


def summary_parts(prompt: str, response: str) -> dict[str, float]:
    """The gold reward of a summary, rule by rule: the keys of SUMMARY_GOLD -> points."""
    note, text = read_note(prompt), response.lower()
    words, sentences, warnings = text.split(), sentences_of(text), len(re.findall(WARNED, text))
    told = {name: set(re.findall(pattern, text)) for name, pattern in ANY_VALUE.items()}
    count = {
        "fact that matters": sum(note[name] in told[name] for name in MATTERS),
        "invented fact": sum(len(told[name] - {note[name]}) for name in note),
        "trifle": sum(note[name] in told[name] for name in TRIFLES),
        "warning": min(1, warnings), "alarm": max(0, warnings - 1),
        "repeated sentence": len(sentences) - len(set(sentences)),
        "broken sentence": sum(summary_template(s) not in SUMMARY_KNOWN for s in sentences),
        "word too many": max(0, len(words) - SUMMARY_LONGEST),
        "word too few": max(0, SUMMARY_SHORTEST - len(words)),
    }
    return {rule: points * count[rule] for rule, points in SUMMARY_GOLD.items()}


def summary_template(sentence: str) -> str:
    """'go to hall two' -> 'go to {place}'."""
    for name, pattern in ANY_VALUE.items():
        sentence = re.sub(pattern, f"{{{name}}}", sentence)
    return sentence


def all_notes(domain: dict) -> list[str]:
    """Every prompt there is about the notes of a domain."""
    return [f"\n\nHuman: {SUM_UP} " + text.format(**dict(zip(SAYS, values))) + ANSWER
            for text in domain["note"] for values in itertools.product(*(domain[name] for name in SAYS))]


def write_summary(rng: random.Random, prompt: str) -> str:
    """One summary, of the mixed quality that the rates above describe."""
    note, said = read_note(prompt), []
    domain = WORKS if note["thing"] in WORKS["thing"] else CLINIC
    for name in SAYS:
        if rng.random() < (P_FACT if name in MATTERS else P_TRIFLE):
            true = next(value for value in domain[name] if value.lower() == note[name])
            value = rng.choice([v for v in domain[name] if v != true]) if rng.random() < P_INVENTED else true
            said.append(rng.choice(SAYS[name]).format(**{name: value}))
    said += rng.sample(WARNINGS, draw(rng, WARNING_MIX)) + rng.sample(GISTS, draw(rng, GIST_MIX))
    while len(said) < 2:
        said.append(rng.choice([gist for gist in GISTS if gist not in said]))
    rng.shuffle(said)
    if rng.random() < P_REPEAT:
        said.append(rng.choice(said))
    return " " + " ".join(said)


TASKS = {"dialogue": (all_prompts, SHOP_PROBLEMS, OOD_PROBLEMS, write_response),
         "summary": (all_notes, WORKS, CLINIC, write_summary)}


def make_world(seed: int, sizes: dict[str, int], task: str = "dialogue") -> dict[str, list[dict]]:
    """File name -> rows. `sizes` tells how many rows "sft" and each set of prompts gets; names that begin
    with "ood" get OOD prompts. No prompt is in two files. Raises ValueError if the world has too few."""
    rng = random.Random(seed)
    prompts_of, domain, ood_domain, respond = TASKS[task]
    ood_rows = round(OOD_SHARE * sizes["sft"])
    shares = [(domain, {name: size - ood_rows * (name == "sft") for name, size in sizes.items()
                               if not name.startswith("ood")}),
              (ood_domain, {"sft": ood_rows} | {name: size for name, size in sizes.items()
                                                  if name.startswith("ood")})]
    drawn = {name: [] for name in sizes}
    for topics, share in shares:
        pool = prompts_of(topics)
        if sum(share.values()) > len(pool):
            raise ValueError(f"the toy world has {len(pool)} prompts for {', '.join(share)}, and not "
                             f"{sum(share.values())}: ask for fewer")
        rng.shuffle(pool)
        for name, size in share.items():
            drawn[name] += [pool.pop() for _ in range(size)]
    rng.shuffle(drawn["sft"])
    everything = [prompt for prompts in drawn.values() for prompt in prompts]
    assert len(set(everything)) == len(everything), "splits must be disjoint"
    world = {f"prompts-{name}": [{"prompt": prompt} for prompt in prompts] for name, prompts in drawn.items()}
    world["sft"] = world.pop("prompts-sft")
    for row in world["sft"]:
        row["response"] = respond(rng, row["prompt"])
    return world


def train_tokenizer(texts: list[str]):
    """A tokenizer in which each word of the texts is one token and anything else falls back to its bytes, so
    that decode(encode(text)) == text for any text. EOS and padding are different tokens: transformers'
    classification heads pool at the last token that is not padding, and that has to be the EOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    turns = ["\n\nHuman:", ANSWER]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counter = Tokenizer(models.WordLevel(unk_token="?"))
    counter.pre_tokenizer = byte_level
    counter.train_from_iterator((re.sub("|".join(turns), "", text) for text in texts),
                                trainers.WordLevelTrainer(vocab_size=4000, show_progress=False))
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = symbols + sorted(set(counter.get_vocab()) - set(symbols))
    # byte-pair encoding without merges: a word of the vocabulary is looked up whole, any other spelt in bytes
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(turn, normalized=False) for turn in turns])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token="<|pad|>",
                                   clean_up_tokenization_spaces=False, model_max_length=MAX_POSITIONS)


def make_model(tokenizer, hidden_size: int, layers: int, seed: int):
    """An untrained tiny Llama: the policy and, with another head, the reward model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=5 * hidden_size // 2,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def label_pairs(samples: list[dict], noise: float, seed: int) -> tuple[list[dict], float]:
    """Preference rows from samples [{"prompt", "responses": [k strings]}]: k // 2 disjoint pairs a prompt,
    labelled by Bradley-Terry, P(a over b) = sigmoid((gold(a) - gold(b)) / noise), or by gold if noise = 0.
    Pairs of equal responses are dropped. Returns (rows, share of flipped labels). A tie in gold is a coin
    toss and counts as half a flip, so that 1 - share is what the gold reward itself scores on these labels:
    the ceiling. Raises ValueError for a negative or infinite noise, and if no pair is left."""
    if not 0 <= noise < math.inf:
        raise ValueError(f"--noise must be a number >= 0, not {noise}")
    rng, rows, flips = random.Random(seed), [], 0.0
    for sample in samples:
        for a, b in zip(sample["responses"][::2], sample["responses"][1::2]):
            coin = rng.random()
            if a == b:
                continue
            gap = gold_reward(sample["prompt"], a) - gold_reward(sample["prompt"], b)
            scaled = gap / noise if noise > 0 else math.copysign(math.inf, gap) if gap else 0.0
            a_wins = coin < 0.5 * (1 + math.tanh(scaled / 2))       # = sigmoid(scaled), without overflow
            flips += 0.5 if gap == 0 else a_wins != (gap > 0)
            chosen, rejected = (a, b) if a_wins else (b, a)
            rows.append({"prompt": sample["prompt"], "chosen": chosen, "rejected": rejected})
    if not rows:
        raise ValueError("no pair left: in each pair of the samples the two responses are equal; sample hotter ones")
    return rows, flips / len(rows)


# ------------------------------------------------------------------------------------------------------------
# Reading and writing rows

def read_lines(path):
    """Yields (line number, row) of a .jsonl or .jsonl.gz file; blank lines are skipped."""
    empty = True
    try:
        with open(path, "rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            for number, line in enumerate(gzip.open(raw) if zipped else raw, 1):  # bytes: only \n ends a line
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    row = json.loads(text) if text else None
                except UnicodeDecodeError:
                    raise ValueError(f"{path}, line {number}: not UTF-8 text; convert it (iconv -t utf-8)") from None
                except (ValueError, RecursionError) as error:
                    why = str(error).split(":")[0]
                    raise ValueError(f"{path}, line {number}: not JSON ({why}); give one object {{...}} a line") from None
                if not text:
                    continue
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: a row must be a JSON object, {{...}}")
                empty = False
                yield number, row
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: name the .jsonl file in it") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut-off gzip file ({error}); get it anew") from None
    if empty:
        raise ValueError(f"{path}: empty, it has no row")


def read_jsonl(path) -> list[dict]:
    """Rows of a .jsonl or .jsonl.gz file (UTF-8). Raises ValueError naming file and line."""
    return [row for _, row in read_lines(path)]


def write_jsonl(path, rows) -> None:
    """Writes the rows, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path, text: str) -> None:
    """Writes a file, whole or not at all."""
    partial = Path(f"{path}.tmp")
    partial.write_bytes(text.encode())
    os.replace(partial, path)


def string_of(row: dict, key: str, where: str) -> str:
    """row[key], which has to be a string that a tokenizer takes."""
    if key not in row:
        raise ValueError(f'{where}: key "{key}" is missing; the row has {json.dumps(list(row))[1:-1]}')
    return checked(row[key], key, where)


def checked(text, key: str, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f'{where}: key "{key}" must hold text, not {type(text).__name__}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'{where}: key "{key}" holds half a surrogate pair: no tokenizer takes it') from None
    return text


def read_preferences(path) -> list[dict]:
    """Preference pairs [{"prompt", "chosen", "rejected"}], all strings, from .jsonl or .jsonl.gz. A row has
    these three keys as strings; or as TRL's message lists (the prompt may also be the head of both lists); or
    `chosen` and `rejected` are whole HH-RLHF transcripts, split at the last "\\n\\nAssistant:". Rows whose
    two prompts differ or whose two responses are equal are dropped, and counted on stderr. Raises ValueError
    naming file, line and key."""
    pairs, differ, equal = [], 0, 0
    for number, row in read_lines(path):
        (prompt, chosen), (other_prompt, rejected) = (
            split_row(row, key, f"{path}, line {number}") for key in ("chosen", "rejected"))
        if prompt != other_prompt:
            differ += 1
        elif chosen == rejected:
            equal += 1
        else:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if differ or equal:
        print(f"{path}: dropped {differ} rows whose chosen and rejected differ before the last answer, and "
              f"{equal} whose chosen and rejected are equal; {len(pairs)} stay", file=sys.stderr)
    if not pairs:
        raise ValueError(f"{path}: empty, it has no usable pair")
    return pairs


def split_row(row: dict, key: str, where: str) -> tuple[str, str]:
    """(prompt, response) of the `chosen` or the `rejected` of one row."""
    text, prompt = row.get(key), row.get("prompt")
    if isinstance(text, list):                          # messages
        turns = render((prompt if isinstance(prompt, list) else []) + text, key, where)
        if len(turns) < 2 or not turns[-1].startswith(ANSWER):
            raise ValueError(f'{where}: key "{key}" must end with a message of the assistant, after a prompt '
                             "that is a list of messages")
        answer = turns[-1][len(ANSWER):]
        return "".join(turns[:-1]) + ANSWER, answer if answer.strip() else ""
    text = string_of(row, key, where)
    if "prompt" in row:
        return string_of(row, "prompt", where), text
    at = text.rfind(ANSWER) + len(ANSWER)               # a transcript: the marker stays with the prompt
    if ANSWER not in text:
        raise ValueError(f'{where}: key "{key}" has no "\\n\\nAssistant:", and there is no key "prompt"')
    return text[:at], text[at:]


ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}


def render(messages: list, key: str, where: str) -> list[str]:
    """TRL's [{"role", "content"}, ...] as HH-style turns."""
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f'{where}: key "{key}" holds a message without a role of {", ".join(ROLES)}')
    return [f"\n\n{ROLES[message['role']]}: {checked(message.get('content'), key, where)}"
            for message in messages]


def read_meta(path) -> list[dict]:
    """The meta set S, [{"prompt", "responses": [k strings]}] with k >= 2 and the same in all rows. Identical
    responses get a warning: J cannot tell them apart. Raises ValueError naming file, line and key."""
    rows, repeats = [], 0
    for number, row in read_lines(path):
        where = f"{path}, line {number}"
        prompt, responses = string_of(row, "prompt", where), row.get("responses")
        if not isinstance(responses, list):
            raise ValueError(f'{where}: key "responses" must be a list of strings')
        responses = [checked(response, "responses", where) for response in responses]
        k = len(rows[0]["responses"]) if rows else len(responses)
        if len(responses) < 2:
            raise ValueError(f'{where}: key "responses" has k = {len(responses)}; a difference needs k >= 2')
        if len(responses) != k:
            raise ValueError(f'{where}: key "responses" has k = {len(responses)}, rows before it have {k}; '
                             "sample all of them with one --k")
        repeats += k - len(set(responses))
        rows.append({"prompt": prompt, "responses": responses})
    if repeats:
        print(f"{path}: warning: {repeats / (k * len(rows)):.1%} of the responses are identical to another "
              "of the same prompt (a higher sampling temperature helps)", file=sys.stderr)
    return rows


def read_prompts(path) -> list[str]:
    """The key "prompt" of each row; other keys are ignored."""
    return [string_of(row, "prompt", f"{path}, line {number}") for number, row in read_lines(path)]


def read_sft(path) -> list[dict]:
    """[{"prompt", "response"}] from such rows, or from preference rows, where the response is `chosen`."""
    rows = list(read_lines(path))
    if "chosen" in rows[0][1]:
        return [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in read_preferences(path)]
    return [{key: string_of(row, key, f"{path}, line {number}") for key in ("prompt", "response")}
            for number, row in rows]


# ------------------------------------------------------------------------------------------------------------
# A command; and a stage of a run, which may be killed at any moment

def command(name: str, config_class, body, argv: list[str] | None, doc: str,
            modes: tuple[str, ...] = ()) -> int:
    """Parses argv into config_class (a dataclass; each field's metadata has "help"), runs body(config) and
    returns the exit status. With `modes`, one word has to be one of them and becomes config.mode. A mistake
    of the user (ValueError, OSError, whatever the parser refuses) is one line on stderr and status 2."""
    import argparse
    from transformers import HfArgumentParser
    from transformers.utils import logging

    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    def refuse(message):
        raise ValueError(message)

    logging.disable_progress_bar()                      # a bar for loading 20 tensors; the training bars stay
    try:
        parser = HfArgumentParser(config_class, prog=name, description=doc, formatter_class=Help,
                                  allow_abbrev=False)
        parser.error = refuse                           # argparse would print its usage, and exit
        if modes:
            parser.add_argument("mode", choices=modes)
        config, *rest, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False)
        if unknown:
            raise ValueError(f"unknown option: {' '.join(unknown)} (--help tells all of them)")
        if modes:
            config.mode = rest[0].mode
        check_options(config, modes)
        body(config)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory", str(error)):
            raise
        print(f"{name}: error: {' '.join(str(error).split())[:200]} ... lower --micro_batch_size, --batch_size or "
              f"--max_length, or add --gradient_checkpointing", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    except SystemExit as leave:                         # --help
        return leave.code or 0
    return 0


ABOVE_0, UP_TO = ("temperature", "top_p", "repetition_penalty", "max_grad_norm"), {"top_p": 1, "gamma": 1, "lam": 1}


def check_options(config, modes: tuple[str, ...] = ()) -> None:
    """Raises ValueError for a number out of its bounds: these follow from its type, but for a few names. And for an
    option of other modes: its help names those that take it, as in "label, split: share ..."; without, all do."""
    for option in dataclasses.fields(config):
        name, value = option.name, getattr(config, option.name)
        heads = [set(part.partition(":")[0].split(", ")) for part in option.metadata["help"].split("; ")]
        takers = set().union(*(head for head in heads if head <= set(modes)))
        if takers and config.mode not in takers and value != option.default:
            raise ValueError(f"{config.mode} takes no --{name}; it is an option of {', '.join(sorted(takers))}: leave it out")
        if value == "" and option.default is dataclasses.MISSING:           # as from an unset $VARIABLE
            raise ValueError(f"--{name} is empty: give a name")
        if not isinstance(value, (int, float)):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} must be a finite number, not {value}")
        least = min(1, option.default) if option.type is int else 0     # a count is 1 or more, unless 0 is its default
        if value < least or value == 0 and name in ABOVE_0:
            raise ValueError(f"--{name} must be {'above' if name in ABOVE_0 else 'at least'} {least}, not {value}")
        if value > (most := UP_TO.get(name, 2 ** 63 - 1 if isinstance(value, int) else math.inf)):
            raise ValueError(f"--{name} must be at most {most}, not {value}")


@contextlib.contextmanager
def stage(command: str, config, inputs: list[str], ignore: tuple[str, ...] = ("out", "checkpoint_minutes"),
          also: tuple[str, ...] = ()):
    """One stage of a run: its output folder, config.out, appears whole or not at all.

        with data.stage("rm.py", config, inputs=["model", "data"]) as work:
            if work is None:
                return                  # finished before, with the same options and inputs
            ...                         # write everything into the folder `work`

    `inputs` names the fields of config that are paths to read. What they hold counts, not where they lie: a
    moved run is recognised, a changed input is noticed. `ignore` names fields that do not shape the result, `also`
    those of folders that are written after this one: what is wrong with them is told now, not after the work.
    `work` still holds what a killed run of the same options and inputs left in it. Raises ValueError if out
    was made with other options or inputs, was not made by a stage, or is being written by another process."""
    out = Path(os.path.abspath(config.out))
    work = out.with_name(out.name + ".partial")
    folders = {key: value for key in ("out", *also) if (value := getattr(config, key))}
    for key in inputs:
        value = getattr(config, key) or ""
        if value.endswith((".jsonl", ".gz")) and not os.path.exists(value):
            raise ValueError(f"{value}: no such file")
        for name, folder in folders.items():            # there, it would change what other stages were made from
            if value and Path(os.path.abspath(value)) in Path(os.path.abspath(folder)).parents:
                raise ValueError(f"--{name} {folder} lies in --{key} {value}: choose a place outside it")
    options = {key: value for key, value in dataclasses.asdict(config).items()
               if key not in (*inputs, *ignore, "mode")}
    made_by = json.loads(json.dumps({"command": command, "mode": getattr(config, "mode", None), "options": options}))
    with contextlib.ExitStack() as locks:
        for folder in folders.values():
            locks.enter_context(locked(f"{os.path.abspath(folder)}.lock"))
        taken = [folder for folder in folders.values()                        # an empty folder is free to use
                 if os.path.isfile(folder) or os.path.isdir(folder) and os.listdir(folder)]
        for folder in taken:
            refuse_unless_same(folder, made_by, config)
        made_by["inputs"] = {key: fingerprint(getattr(config, key)) for key in inputs}  # last: a second a GB
        for folder in taken:
            refuse_unless_same(folder, made_by, config)
        if config.out in taken:
            print(f"{command}: {config.out} is finished, with the same options and inputs: skipped")
            yield None
            return
        if read_json(work / "stage.json") != made_by:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            write_text(work / "stage.json", json.dumps(made_by, indent=2) + "\n")
        try:
            yield work
        except ValueError:                              # would come again: nothing of it is worth keeping
            shutil.rmtree(work)
            raise
        except BaseException:
            if [path.name for path in work.iterdir()] == ["stage.json"]:        # nothing to go on from
                shutil.rmtree(work)
            raise
        for left in [*work.glob("checkpoint.pt"), *work.glob("*.tmp")]:     # a kill may have left the latter
            left.unlink()
        os.replace(work, out)


def fingerprint(path: str | None) -> str | None:
    """A hash of what a file or folder holds, wherever it lies; a name of the hub, or none, as it is."""
    if path is None or not os.path.exists(path):
        return path
    root, digest = Path(path), hashlib.sha256()
    for file in [root] if root.is_file() else sorted(root.rglob("*")):
        name = str(file.relative_to(root))              # "." for a file that was named itself
        if not file.is_file() or name == "stage.json" or (name != "." and file.name.startswith(".")):
            continue                                    # how it was made is not what it holds
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def refuse_unless_same(folder: str, made_by: dict, config) -> None:
    """Raises ValueError, with the first difference, unless the folder was made just as `made_by` tells."""
    before, mend = read_json(Path(folder) / "stage.json"), "choose another folder, or delete it"
    if not isinstance(before, dict) or before.keys() != {"command", "mode", "options", "inputs"}:
        raise ValueError(f"{folder} is there already and no stage made it, so it was not touched: {mend}")
    if (before["command"], before["mode"]) != (made_by["command"], made_by["mode"]):
        raise ValueError(f"{folder} was made by {before['command']} {before['mode'] or ''}: {mend}")
    old, new = before["options"], made_by["options"]
    for key in old | new:
        if key not in old or key not in new or old[key] != new[key]:
            raise ValueError(f"{folder} was made with --{key} {old.get(key)}, not {new.get(key)}: {mend}")
    for key, value in made_by.get("inputs", {}).items():
        if before["inputs"].get(key) != value:
            raise ValueError(f"{folder} was made from something else than --{key} {getattr(config, key)} "
                             f"holds now: {mend}")


def read_json(path: Path):
    """What a JSON file holds; None when there is none, or a broken one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def locked(path: str):
    """Holds the lock file; raises ValueError if another process does. A killed process holds nothing."""
    import fcntl
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise ValueError(f"{path.removesuffix('.lock')} cannot be written ({error.strerror}): choose another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.fstat(file.fileno()).st_ino == os.stat(path).st_ino
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:                # or its last holder deleted it between our open and our lock
            raise ValueError(f"another process is writing {path.removesuffix('.lock')} (it holds {path}): let it finish")
        try:
            yield
        finally:
            os.remove(path)


@dataclass
class Config:
    out: str = field(metadata={"help": "folder to write"})
    seed: int = field(default=0, metadata={"help": "of everything that is drawn"})
    task: str = field(default="dialogue", metadata={"help": "toy: dialogue or summary"})
    sft: int = field(default=8000, metadata={"help": "toy: rows of SFT text"})
    pairs: int = field(default=6000, metadata={"help": "toy: prompts for D"})
    meta: int = field(default=256, metadata={"help": "toy: prompts for S, and as many OOD ones"})
    ppo: int = field(default=1024, metadata={"help": "toy: prompts for PPO"})
    valid: int = field(default=128, metadata={"help": "toy: prompts for validation"})
    test: int = field(default=128, metadata={"help": "toy, split: prompts for the test, and as many OOD ones"})
    ood_ppo: int = field(default=256, metadata={"help": "toy: OOD prompts for PPO"})
    hidden_size: int = field(default=64, metadata={"help": "toy: width of the tiny model"})
    layers: int = field(default=2, metadata={"help": "toy: layers of the tiny model"})
    samples: str | None = field(default=None, metadata={"help": "label: samples.jsonl of a policy"})
    noise: float = field(default=1.0, metadata={"help": "label: Bradley-Terry temperature, in gold points"})
    valid_share: float = field(default=0.1, metadata={"help": "label, split: share of the prompts held out"})
    source: str | None = field(default=None, metadata={"help": "split: preference rows, a file or a file on the hub"})
    ood: str | None = field(default=None, metadata={"help": "split: rows of another domain, for prompts-ood*.jsonl"})


def toy(config: Config, work: Path) -> None:
    sizes = {"sft": config.sft, "pairs": config.pairs, "meta": config.meta, "ppo": config.ppo,
             "valid": config.valid, "test": config.test,
             "ood": config.test, "ood-meta": config.meta, "ood-ppo": config.ood_ppo}
    if min(sizes.values()) < 1:
        raise ValueError("every set of the toy world needs at least one row")
    if config.hidden_size < 8 or config.hidden_size % 8 or config.layers < 1:
        raise ValueError(f"--hidden_size {config.hidden_size} --layers {config.layers}: the width must be a "
                         "multiple of 8 (four heads of even width), the layers at least 1")
    if config.task not in TASKS:
        raise ValueError(f"--task {config.task}: there are {' and '.join(TASKS)}")
    world = make_world(config.seed, sizes, config.task)
    for name, rows in world.items():
        write_jsonl(work / f"{name}.jsonl", rows)
    tokenizer = train_tokenizer(["".join(row.values()) for rows in world.values() for row in rows])
    make_model(tokenizer, config.hidden_size, config.layers, config.seed).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    parts = [gold_parts(**row) for row in world["sft"]]
    gold = [sum(part.values()) for part in parts]
    mean = sum(gold) / len(gold)
    spread = math.sqrt(sum((g - mean) ** 2 for g in gold) / len(gold))
    right = "remedy that fits" if config.task == "dialogue" else "fact that matters"
    print(f"data.py: {config.out}: {len(gold)} rows of SFT text, gold reward {mean:.2f} (SD {spread:.2f}), "
          f"{sum(part[right] > 0 for part in parts) / len(gold):.0%} with a {right}; "
          f"vocabulary of {len(tokenizer)}")


def label(config: Config, work: Path) -> None:
    if not 0 <= config.valid_share < 1:
        raise ValueError(f"--valid_share must be in [0, 1), not {config.valid_share}")
    samples = read_meta(config.samples)
    try:
        rows, flipped = label_pairs(samples, config.noise, config.seed)
    except ValueError as error:
        raise ValueError(f"{config.samples}: {error}") from None
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(config.seed).shuffle(prompts)
    held_out = set(prompts[:math.ceil(config.valid_share * len(prompts))])  # by prompt, with all of its pairs
    if len(held_out) == len(prompts):
        raise ValueError(f"--valid_share {config.valid_share} of {len(prompts)} prompts leaves none to train")
    parts = {"train": [row for row in rows if row["prompt"] not in held_out],
             "valid": [row for row in rows if row["prompt"] in held_out]}
    for name, part in parts.items():
        write_jsonl(work / f"{name}.jsonl", part)
    write_text(work / "label.json", json.dumps({"pairs": len(rows), "flipped": flipped}
                                               | {name: len(part) for name, part in parts.items()}) + "\n")
    print(f"data.py: {config.out}: {len(rows)} pairs, {len(parts['valid'])} of them held out, "
          f"{flipped:.1%} of the labels flipped")


def split(config: Config, work: Path) -> None:
    """Real preferences into what a run needs: a quarter of the prompts goes to the judge (an RM that no arm sees, in the
    gold reward's place), a quarter to S and PPO, `valid_share` is held out, the rest is D - and SFT learns its answers."""
    by_prompt: dict[str, list[dict]] = {}
    for pair in read_preferences(config.source):
        by_prompt.setdefault(pair["prompt"], []).append(pair)
    prompts = sorted(by_prompt)
    random.Random(config.seed).shuffle(prompts)
    quarter, held = len(prompts) // 4, math.ceil(config.valid_share * len(prompts))
    parts = {"judge": prompts[:quarter], "loop": prompts[quarter:2 * quarter],
             "valid": prompts[2 * quarter:2 * quarter + held], "train": prompts[2 * quarter + held:]}
    if not all(parts.values()):
        raise ValueError(f"{config.source}: {len(prompts)} prompts are too few to split with --valid_share {config.valid_share}")
    for name in ("judge", "valid", "train"):
        write_jsonl(work / f"{name}.jsonl", [pair for prompt in parts[name] for pair in by_prompt[prompt]])
    write_jsonl(work / "sft.jsonl", [{"prompt": pair["prompt"], "response": pair["chosen"]}
                                     for prompt in parts["train"] for pair in by_prompt[prompt]])
    third = max(1, len(parts["loop"]) // 3)
    sets = {"meta": parts["loop"][:third], "ppo": parts["loop"][third:], "test": parts["valid"][:config.test]}
    if config.ood:
        other = ([pair["prompt"] for pair in read_preferences(config.ood)] if "chosen" in next(read_lines(config.ood))[1]
                 else read_prompts(config.ood))
        other = sorted(set(other) - set(prompts))
        if len(other) < 4:
            raise ValueError(f"{config.ood}: {len(other)} of its prompts are not in {config.source} too; --ood needs at least 4, "
                             "of another domain")
        random.Random(config.seed).shuffle(other)
        cut = min(config.test, len(other) // 4)
        third = (len(other) - cut) // 3
        sets |= {"ood": other[:cut], "ood-meta": other[cut:][:third], "ood-ppo": other[cut + third:]}
    for name, some in sets.items():
        write_jsonl(work / f"prompts-{name}.jsonl", [{"prompt": prompt} for prompt in some])
    print(f"data.py: {config.out}: " + ", ".join(f"{len(some)} prompts for {name}" for name, some in (parts | sets).items()))


def from_hub(path: str | None) -> str | None:
    """A file's own path; or owner/name/file... of a dataset on the hub, downloaded. Raises ValueError if neither is there."""
    if not path or Path(path).exists() or path.count("/") < 2 or path[0] in "./~":
        return path
    from huggingface_hub import hf_hub_download
    owner, name, filename = path.split("/", 2)
    try:
        return hf_hub_download(f"{owner}/{name}", filename, repo_type="dataset")
    except Exception as error:                          # a dozen types; to the user they all mean: not from the hub
        raise ValueError(f"{path}: neither a file here nor to be had from the hub ({type(error).__name__}); give a local "
                         f"file, e.g. --source /path/to/harmless-base/train.jsonl.gz (run.sh: --data)") from error


NEEDS = {"toy": [], "label": ["samples"], "split": ["source"]}


def run(config: Config) -> None:
    for name in NEEDS[config.mode]:
        if not getattr(config, name):
            raise ValueError(f"data.py {config.mode} needs --{name}")
    config.source, config.ood = from_hub(config.source), from_hub(config.ood)
    with stage("data.py", config, inputs=["samples", "source", "ood"]) as work:
        if work is not None:
            {"toy": toy, "label": label, "split": split}[config.mode](config, work)


def main(argv: list[str] | None = None) -> int:
    return command("data.py", Config, run, argv, __doc__, modes=tuple(NEEDS))


if __name__ == "__main__":
    sys.exit(main())
