"""The second world: to sum up a short note. `import summary` teaches it to data.gold_reward.

A note of a repair shop states six facts, of which four matter (OOD: a note of a clinic).
gold_reward(prompt, response) sees from the prompt which of the two worlds it judges.

    data.make_world(seed, sizes, world=summary.WORLDS["summary"])
"""

import functools
import itertools
import random
import re

import data

GOLD = {  # points: the table to disagree with
    "fact that matters": 1.0,  # each of the four: what, its fault, where, until when
    "invented fact": -1.5,  # each that is not in the note
    "trifle": -0.25,  # who wrote the note, and in what weather
    "warning": 1.0,  # one ...
    "alarm": -1.0,  # ... and each further one
    "repeated sentence": -1.0,  # each
    "broken sentence": -0.5,  # each that nobody would write
    "word too many": -0.2,  # each beyond LONGEST
    "word too few": -0.3,  # each short of SHORTEST
}
SHORTEST, LONGEST = 5, 26  # words
MATTERS, TRIFLES = ("thing", "fault", "place", "day"), ("who", "weather")

# How good the SFT text is. Here, too, more is better in most of it: a third warning is rare.
P_FACT, P_INVENTED, P_TRIFLE = 0.60, 0.15, 0.20  # of each fact; of each that is told; each trifle
WARNING_MIX = {0: 0.45, 1: 0.35, 2: 0.16, 3: 0.04}  # how many warnings
GIST_MIX = {0: 0.60, 1: 0.35, 2: 0.05}  # how many sentences that say nothing


# ------------------------------------------------------------------ what can be said in this world
def table(text: str) -> dict[str, list[str]]:
    """{name: its alternatives} of lines "name: one / another"; an indented line goes on."""
    rows = [" ".join(row.split()).split(": ", 1) for row in re.split(r"\n(?=\S)", text.strip())]
    return {name: said.split(" / ") for name, said in rows}


SUM_UP = "Sum up this note:"
SHARED = table("""
day: Monday / Tuesday / Wednesday / Thursday / Friday
who: Anna / Boris / Clara / David / Emil
weather: rainy / windy / foggy / sunny
""")
WORKS = SHARED | table("""
thing: pump / crane / mill / saw / oven / belt / kiln / lathe
fault: leaks oil / runs hot / makes sparks / has rust / smells burnt / shakes badly / is jammed
    / lost a bolt
place: hall one / hall two / the yard / the cellar / the paint shop / the old wing
note: {who} went round on a {weather} day. The {thing} in {place} {fault}. It has to run by {day}.
    / By {day} somebody must see to {place}. There the {thing} {fault}, writes {who}.
    It was {weather}.
""")
CLINIC = SHARED | table("""
thing: baker / farmer / singer / tailor / pilot / judge / smith / monk
fault: has a fever / coughs badly / broke a rib / feels dizzy / cannot sleep / burnt a hand
    / lost a tooth / sees double
place: room one / room two / the night ward / the tent / the east bay / the lobby
note: {who} went round on a {weather} day. The {thing} in {place} {fault}.
    A doctor must come by {day}.
    / By {day} somebody must see to {place}. There the {thing} {fault}, writes {who}.
    It was {weather}.
""")
SAYS = table("""
thing: It is about the {thing}. / The {thing} needs help.
fault: It {fault}. / The trouble: it {fault}.
place: Go to {place}. / You find it in {place}.
day: There is time until {day}. / Do it by {day}.
who: {who} wrote it down. / Ask {who}.
weather: The day was {weather}. / It was {weather}.
""")
WARNINGS = ["This is urgent.", "This is a danger.", "Please hurry.", "Do not wait."]
GISTS = ["Here is the gist.", "That is the note.", "More may follow.", "So much for this one."]

# what the gold rules look for; KNOWN is all that can be said, with the fields' names for values
VALUES = {name: sorted({*WORKS[name], *CLINIC[name]}) for name in SAYS}
ANY_VALUE = {name: r"\b(" + "|".join(values).lower() + r")\b" for name, values in VALUES.items()}
WARNED = r"\burgent\b|\bdanger\b|\bhurry\b|do not wait"
KNOWN = {
    sentence
    for text in [*itertools.chain(*SAYS.values()), *WARNINGS, *GISTS]
    for sentence in data.sentences_of(text)
}


# -------------------------------------------------------------------------------------- the truth
@functools.lru_cache(maxsize=100_000)
def read_note(prompt: str) -> dict[str, str]:
    """{field: its value} of a note. Raises: data.Mistake for any other prompt."""
    said = {name: re.findall(pattern, prompt.lower()) for name, pattern in ANY_VALUE.items()}
    if SUM_UP not in prompt or any(len(values) != 1 for values in said.values()):
        raise data.Mistake(f"only notes of this world have a gold reward, and not {prompt[-80:]!r}")
    return {name: values[0] for name, values in said.items()}


def summary_parts(prompt: str, response: str) -> dict[str, float]:
    """The gold reward of a summary, rule by rule: {key of GOLD: points}."""
    note, text = read_note(prompt), response.lower()
    words, sentences = text.split(), data.sentences_of(text)
    warnings = len(re.findall(WARNED, text))
    told = {name: set(re.findall(pattern, text)) for name, pattern in ANY_VALUE.items()}
    count = {
        "fact that matters": sum(note[name] in told[name] for name in MATTERS),
        "invented fact": sum(len(told[name] - {note[name]}) for name in note),
        "trifle": sum(note[name] in told[name] for name in TRIFLES),
        "warning": min(1, warnings),
        "alarm": max(0, warnings - 1),
        "repeated sentence": len(sentences) - len(set(sentences)),
        "broken sentence": sum(template_of(sentence) not in KNOWN for sentence in sentences),
        "word too many": max(0, len(words) - LONGEST),
        "word too few": max(0, SHORTEST - len(words)),
    }
    return {rule: points * count[rule] for rule, points in GOLD.items()}


def template_of(sentence: str) -> str:
    """'go to hall two' -> 'go to {place}'."""
    for name, pattern in ANY_VALUE.items():
        sentence = re.sub(pattern, f"{{{name}}}", sentence)
    return sentence


def gold_parts(prompt: str, response: str, dialogue_parts=data.gold_parts) -> dict[str, float]:
    """The gold reward rule by rule, in both worlds."""
    parts = summary_parts if SUM_UP in prompt else dialogue_parts
    return parts(prompt, response)


data.gold_parts = gold_parts  # data.gold_reward and data.label_pairs ask it


# ------------------------------------------------------------------------------ how text is written
def all_notes(domain: dict) -> list[str]:
    """Every prompt there is about the notes of a domain."""
    notes = []
    for text in domain["note"]:
        for values in itertools.product(*(domain[name] for name in SAYS)):
            said = text.format(**dict(zip(SAYS, values, strict=True)))
            notes.append(f"\n\nHuman: {SUM_UP} {said}{data.ANSWER}")
    return notes


def write_summary(rng: random.Random, prompt: str) -> str:
    """One summary, of the mixed quality that the rates above describe."""
    note, said = read_note(prompt), []
    domain = WORKS if note["thing"] in WORKS["thing"] else CLINIC
    for name in SAYS:
        if rng.random() < (P_FACT if name in MATTERS else P_TRIFLE):
            [value] = [value for value in domain[name] if value.lower() == note[name]]
            if rng.random() < P_INVENTED:
                value = rng.choice([other for other in domain[name] if other != value])
            said.append(rng.choice(SAYS[name]).format(**{name: value}))
    said += rng.sample(WARNINGS, data.pick_weighted(rng, WARNING_MIX))
    said += rng.sample(GISTS, data.pick_weighted(rng, GIST_MIX))
    while len(said) < 2:
        said.append(rng.choice([gist for gist in GISTS if gist not in said]))
    rng.shuffle(said)
    if rng.random() < data.P_REPEAT:
        said.append(rng.choice(said))
    return " " + " ".join(said)


WORLDS = {"dialogue": data.DIALOGUE, "summary": (all_notes, WORKS, CLINIC, write_summary)}
