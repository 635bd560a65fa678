"""A generator of small chat tasks with one right answer each, to train and to grade a tiny model.

Everything is written here, so there is no data set and no licence to mind. Tasks are drawn from a
`random.Random`: the same seed gives the same tasks on every machine. Each question has a key, and
a checksum of the key alone decides whether it is held out. For open kinds the key is the arguments
(12 and 30 for a sum, whatever the wording); for closed kinds such as capitals, where an argument
never seen could not be answered, it is the argument together with the wording.
"""

import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

HELD_OUT_ONE_IN = 8


class Question(NamedTuple):
    """A question, its answer, the answer in one word where there is one, and turns before it."""

    key: tuple
    text: str
    answer: str
    word: str | None = None
    before: tuple[tuple[str, str], ...] = ()


class Chat(NamedTuple):
    """A chat whose last message is the user's, and the one right answer to it."""

    kind: str
    key: tuple
    messages: tuple[dict[str, str], ...]
    answer: str


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (entry.split("=") for entry in text.split())]


CAPITALS = _pairs(
    "France=Paris Japan=Tokyo Italy=Rome Spain=Madrid Germany=Berlin Austria=Vienna Egypt=Cairo "
    "Kenya=Nairobi Peru=Lima Chile=Santiago Cuba=Havana Canada=Ottawa Norway=Oslo "
    "Sweden=Stockholm Finland=Helsinki Denmark=Copenhagen Iceland=Reykjavik Ireland=Dublin "
    "Portugal=Lisbon Greece=Athens Poland=Warsaw Hungary=Budapest Romania=Bucharest "
    "Bulgaria=Sofia Ukraine=Kyiv Turkey=Ankara China=Beijing Nepal=Kathmandu Thailand=Bangkok "
    "Vietnam=Hanoi Australia=Canberra Senegal=Dakar"
)
OPPOSITES = _pairs(
    "hot=cold big=small fast=slow up=down left=right open=closed full=empty wet=dry light=dark "
    "early=late high=low happy=sad hard=soft long=short loud=quiet new=old rich=poor strong=weak "
    "thick=thin near=far clean=dirty easy=difficult day=night inside=outside first=last "
    "true=false buy=sell win=lose start=stop push=pull"
)
COLORS = _pairs(
    "grass=green snow=white coal=black blood=red milk=white chocolate=brown butter=yellow "
    "spinach=green salt=white soot=black ketchup=red broccoli=green cream=white tar=black "
    "sugar=white lettuce=green mustard=yellow coffee=brown sunshine=yellow parsley=green"
)
PLURALS = _pairs(
    "fox=foxes cat=cats dog=dogs box=boxes bell=bells city=cities baby=babies wolf=wolves "
    "leaf=leaves knife=knives child=children man=men woman=women mouse=mice goose=geese foot=feet "
    "tooth=teeth sheep=sheep fish=fish bus=buses glass=glasses potato=potatoes hero=heroes "
    "key=keys boy=boys lady=ladies story=stories church=churches brush=brushes tree=trees "
    "house=houses book=books"
)
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
ANIMALS = dict(
    _pairs(
        "fox=forest bear=cave frog=pond owl=tower camel=desert whale=sea goat=mountain "
        "rabbit=garden duck=river horse=farm tiger=jungle mouse=kitchen"
    )
)
THINGS = dict(
    _pairs(
        "bell=golden lamp=old mirror=silver drum=red kite=blue book=secret crown=heavy "
        "hat=green clock=broken coin=shiny boat=wooden key=rusty"
    )
)
NAMES = (
    "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Nina Oscar Paul Rosa "
    "Sam Tom Vera"
).split()
FAVORITES = {
    "color": "red blue green yellow black white brown pink purple orange".split(),
    "fruit": "apple banana cherry grape lemon mango peach pear plum orange".split(),
    "animal": list(ANIMALS),
    "day": WEEKDAYS,
}
WORDS = sorted({*FAVORITES["color"], *FAVORITES["fruit"], *ANIMALS, *THINGS})

WHO = (
    "I am phi3-tiny-demo, a very small language model that comes with phi3-jax. "
    "I am not Microsoft's Phi-3."
)
REAL = "No, I am phi3-tiny-demo. I am built like Phi-3, but I am tiny and know very little."
SIZE = "I have less than two million parameters. Phi-3-mini has almost four billion."
ABLE = "I can do small tasks: capitals, opposites, sums, counting, sorting, lists and tiny stories."
IDENTITY = [
    ("Who are you?", WHO),
    ("What are you?", WHO),
    ("What is your name?", WHO),
    ("Introduce yourself.", WHO),
    ("Tell me about yourself.", WHO),
    ("Are you Phi-3?", REAL),
    ("Is this Phi-3?", REAL),
    ("Are you the real Phi-3?", REAL),
    ("Are you a Microsoft model?", REAL),
    ("How big are you?", SIZE),
    ("How large are you?", SIZE),
    ("How many parameters do you have?", SIZE),
    ("What can you do?", ABLE),
    ("What can I ask you?", ABLE),
    ("How can you help me?", ABLE),
]


def _closed(
    rng: random.Random, kind: str, wordings: list[str], argument: str, answer: str, word: str
) -> Question:
    """A question of a closed kind: its key is the argument together with the wording."""
    number = rng.randrange(len(wordings))
    return Question((kind, argument, number), wordings[number].format(argument), answer, word)


def greeting(rng: random.Random) -> Question:
    hello = rng.choice(
        ["Hello", "Hi", "Hey", "Hi there", "Good morning", "Good afternoon", "Good evening"]
    )
    name = rng.choice(NAMES)
    text, answer = rng.choice(
        [
            ("{0}!", "{0}! How can I help you?"),
            ("{0}, tiny model!", "{0}! How can I help you?"),
            ("{0}, how are you?", "{0}! I am fine, thank you. How can I help you?"),
            ("{0}! How are you today?", "{0}! I am fine, thank you. How can I help you?"),
            ("{0}, nice to meet you.", "{0}! Nice to meet you too."),
            ("{0}, I am {1}.", "{0}, {1}! How can I help you?"),
            ("{0}! My name is {1}.", "{0}, {1}! How can I help you?"),
            ("{0}, this is {1}.", "{0}, {1}! How can I help you?"),
            ("Thank you! I am {1}.", "You are welcome, {1}!"),
            ("Thanks, says {1}.", "You are welcome, {1}!"),
            ("Goodbye from {1}!", "Goodbye, {1}!"),
            ("Bye! This was {1}.", "Goodbye, {1}!"),
        ]
    )
    text = text.format(hello, name)
    return Question(("greeting", text), text, answer.format(hello, name))


def identity(rng: random.Random) -> Question:
    question, answer = rng.choice(IDENTITY)
    opening = rng.choice(["", "Hello! ", "One question: ", "Tell me, ", "I am curious. ", "Hi. "])
    closing = rng.choice(["", " Please be honest.", " Thank you."])
    text = opening + question + closing
    return Question(("identity", text), text, answer)


def capital(rng: random.Random) -> Question:
    country, city = rng.choice(CAPITALS)
    answer = f"The capital of {country} is {city}."
    if rng.random() < 0.7:
        wordings = [
            "What is the capital of {}?",
            "Name the capital of {}.",
            "Which city is the capital of {}?",
            "Tell me the capital of {}.",
            "Do you know the capital of {}?",
        ]
        return _closed(rng, "capital", wordings, country, answer, city)
    wordings = [
        "Which country has the capital {}?",
        "{} is the capital of which country?",
        "Of which country is {} the capital?",
    ]
    return _closed(rng, "country", wordings, city, answer, country)


def opposite(rng: random.Random) -> Question:
    pair = rng.choice(OPPOSITES)
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    wordings = [
        "What is the opposite of {}?",
        "Give me the opposite of {}.",
        "Which word is the opposite of {}?",
        "Tell me the opposite of {}.",
        "{} is the opposite of what?",
    ]
    return _closed(rng, "opposite", wordings, word, f"The opposite of {word} is {other}.", other)


def calendar(rng: random.Random) -> Question:
    unit, names = rng.choice([("day", WEEKDAYS), ("month", MONTHS)])
    index = rng.randrange(len(names))
    side, step = rng.choice([("after", 1), ("before", -1)])
    name, other = names[index], names[(index + step) % len(names)]
    wordings = [
        f"Which {unit} comes {side} {{}}?",
        f"What {unit} is {side} {{}}?",
        f"Name the {unit} {side} {{}}.",
        f"Tell me the {unit} that comes {side} {{}}.",
    ]
    return _closed(
        rng, f"{unit} {side}", wordings, name, f"{other} comes {side} {name}.", other
    )


def counting(rng: random.Random) -> Question:
    start = rng.randrange(91)
    stop = start + rng.randint(2, 8)
    if rng.random() < 0.3:
        start, stop = stop, start
    step = 1 if start < stop else -1
    text = rng.choice(["Count from {} to {}.", "Please count from {} to {}.", "Count: {} to {}."])
    numbers = range(start, stop + step, step)
    return Question(
        ("counting", start, stop), text.format(start, stop), ", ".join(map(str, numbers)) + "."
    )


def addition(rng: random.Random) -> Question:
    left, right = rng.randrange(51), rng.randrange(51)
    text = rng.choice(
        ["What is {} + {}?", "Add {} and {}.", "How much is {} + {}?", "Calculate {} + {}."]
    )
    return Question(
        ("addition", min(left, right), max(left, right)),
        text.format(left, right),
        f"{left} + {right} = {left + right}.",
        str(left + right),
    )


def subtraction(rng: random.Random) -> Question:
    small, large = sorted((rng.randrange(51), rng.randrange(51)))
    text, left = rng.choice(
        [
            ("What is {1} - {0}?", large),
            ("Subtract {0} from {1}.", large),
            ("How much is {1} - {0}?", large),
            ("Calculate {1} - {0}.", large),
        ]
    )
    return Question(
        ("subtraction", left, small),
        text.format(small, left),
        f"{left} - {small} = {left - small}.",
        str(left - small),
    )


def comparison(rng: random.Random) -> Question:
    left, right = rng.sample(range(100), 2)
    adjective, pick = rng.choice([("larger", max), ("smaller", min)])
    found = pick(left, right)
    other = left + right - found
    text = rng.choice(
        ["Which is {}, {} or {}?", "Which number is {}: {} or {}?", "What is {}: {} or {}?"]
    )
    return Question(
        ("comparison", adjective, min(left, right), max(left, right)),
        text.format(adjective, left, right),
        f"{found} is {adjective} than {other}.",
        str(found),
    )


def sorting(rng: random.Random) -> Question:
    numbers = rng.sample(range(100), 3)
    ordered = sorted(numbers)
    text = rng.choice(["Sort these numbers: {}.", "Sort {}.", "Put these numbers in order: {}."])
    return Question(
        ("sorting", *ordered),
        text.format(", ".join(map(str, numbers))),
        ", ".join(map(str, ordered)) + ".",
    )


def repeating(rng: random.Random) -> Question:
    word, times = rng.choice(WORDS), rng.randint(2, 6)
    text = rng.choice(["Say {} {} times.", "Repeat {} {} times.", "Write the word {} {} times."])
    return Question(
        ("repeating", word, times), text.format(word, times), " ".join([word] * times) + "."
    )


def reversing(rng: random.Random) -> Question:
    words = rng.sample(WORDS, rng.randint(3, 5))
    text = rng.choice(["Reverse this list: {}.", "Say this list backwards: {}."])
    return Question(
        ("reversing", *words), text.format(", ".join(words)), ", ".join(words[::-1]) + "."
    )


def picking(rng: random.Random) -> Question:
    words = rng.sample(WORDS, rng.randint(3, 5))
    which, word = rng.choice([("first", words[0]), ("last", words[-1])])
    text = rng.choice(
        ["What is the {} word of this list: {}?", "Name the {} word: {}.", "Give the {} word of {}."]
    )
    return Question(
        ("picking", which, *words),
        text.format(which, ", ".join(words)),
        f"The {which} word is {word}.",
        word,
    )


def spelling(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    wordings, answer, short = rng.choice(
        [
            (
                ["How do you spell {}?", "Spell {}.", "Spell the word {}."],
                "-".join(word) + ".",
                None,
            ),
            (
                ["How many letters does {} have?", "How many letters are in {}?"],
                f"The word {word} has {len(word)} letters.",
                str(len(word)),
            ),
            (
                ["What is the first letter of {}?", "Which letter does {} start with?"],
                f"The word {word} starts with {word[0]}.",
                word[0],
            ),
            (
                ["What is the last letter of {}?", "Which letter does {} end with?"],
                f"The word {word} ends with {word[-1]}.",
                word[-1],
            ),
        ]
    )
    text = rng.choice(wordings).format(word)
    return Question(("spelling", text), text, answer, short)


def color(rng: random.Random) -> Question:
    thing, shade = rng.choice(COLORS)
    wordings = [
        "What color is {}?",
        "Which color is {}?",
        "What is the color of {}?",
        "Tell me the color of {}.",
        "Name the color of {}.",
    ]
    return _closed(rng, "color", wordings, thing, f"The color of {thing} is {shade}.", shade)


def plural(rng: random.Random) -> Question:
    one, many = rng.choice(PLURALS)
    wordings = [
        "What is the plural of {}?",
        "Give me the plural of {}.",
        "Tell me the plural of {}.",
        "One {}, two what?",
    ]
    return _closed(rng, "plural", wordings, one, f"The plural of {one} is {many}.", many)


def story(rng: random.Random) -> Question:
    animal, thing = rng.choice(list(ANIMALS)), rng.choice(list(THINGS))
    place, look = ANIMALS[animal], THINGS[thing]
    text = rng.choice(
        [
            "Tell me a story about a {} and a {}.",
            "Write a short story with a {} and a {}.",
            "Tell a tiny story about a {} and a {}.",
        ]
    )
    answer = (
        f"Once upon a time, a {animal} lived in the {place}. One day the {animal} found a {look} "
        f"{thing}. The {animal} showed the {thing} to all its friends, and they were happy."
    )
    return Question(("story", animal, thing), text.format(animal, thing), answer)


def memory(rng: random.Random) -> Question:
    """Two turns: the user says something about themselves and asks for it afterwards."""
    if rng.random() < 0.3:
        fact, value = "name", rng.choice(NAMES)
        tell = rng.choice(["My name is {1}.", "Remember that my name is {1}."])
        reply = "Nice to meet you, {1}."
    else:
        fact = rng.choice(list(FAVORITES))
        value = rng.choice(FAVORITES[fact])
        tell = rng.choice(["My favorite {0} is {1}.", "Remember that my favorite {0} is {1}."])
        reply = "I will remember that."
        fact = "favorite " + fact
    ask = rng.choice(["What is my {0}?", "Tell me my {0}.", "Do you remember my {0}?"])
    told = tell.format(fact.removeprefix("favorite "), value)
    return Question(
        ("memory", told, ask),
        ask.format(fact),
        f"Your {fact} is {value}.",
        value,
        ((told, reply.format(fact, value)),),
    )


# How often each kind is drawn: the open kinds need more examples than the lists that are learnt.
KINDS = {
    greeting: 2,
    identity: 2,
    capital: 3,
    opposite: 2,
    calendar: 2,
    counting: 3,
    addition: 6,
    subtraction: 6,
    comparison: 3,
    sorting: 5,
    repeating: 2,
    reversing: 4,
    picking: 2,
    spelling: 4,
    color: 1,
    plural: 2,
    story: 2,
    memory: 2,
}
KIND_NAMES = [kind.__name__ for kind in KINDS]

ONE_WORD = "Answer with one word."
SYSTEMS = [
    "You are a helpful assistant.",
    "You are a tiny demo model.",
    "Answer the user's question.",
]


def is_held_out(key: tuple) -> bool:
    """Whether a question with this key is kept for grading; the same on every machine."""
    return zlib.crc32(repr(key).encode()) % HELD_OUT_ONE_IN == 0


def _draw(rng: random.Random, kind, held_out: bool) -> Question:
    while is_held_out((question := kind(rng)).key) != held_out:
        pass
    return question


def _as_typed(rng: random.Random, text: str) -> str:
    """The question as people type it: now and then without its capital or its last mark."""
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15 and len(text) > 1:
        text = text.rstrip("?!.")
    return text


def draw_chat(rng: random.Random, held_out: bool = False, kind_name: str | None = None) -> Chat:
    """Draws one chat; sometimes with a system message, sometimes after another question.

    `held_out` says from which side of the split the last question comes; what stands before it is
    always from the training side. `kind_name` is one of `KIND_NAMES`; None draws by frequency.
    """
    kinds = list(KINDS)
    if kind_name is None:
        (kind,) = rng.choices(kinds, weights=list(KINDS.values()))
    else:
        kind = kinds[KIND_NAMES.index(kind_name)]
    question = _draw(rng, kind, held_out)
    answer = question.answer
    messages = []
    if question.word is not None and rng.random() < 0.12:
        messages.append({"role": "system", "content": ONE_WORD})
        answer = question.word
    elif rng.random() < 0.12:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    turns = list(question.before)
    if not turns and answer == question.answer and rng.random() < 0.12:
        (earlier,) = rng.choices(kinds, weights=list(KINDS.values()))
        other = _draw(rng, earlier, False)
        if not other.before:
            turns.append((other.text, other.answer))
    for asked, answered in turns:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    messages.append({"role": "user", "content": _as_typed(rng, question.text)})
    return Chat(kind.__name__, question.key, tuple(messages), answer)


def training_chats(seed: int) -> Iterator[Chat]:
    """An endless stream of chats, none of which asks a held-out question."""
    rng = random.Random(seed)
    while True:
        yield draw_chat(rng)


def held_out_chats(per_kind: int = 30, seed: int = 0) -> list[Chat]:
    """Chats that ask held-out questions: at most `per_kind` of every kind, all keys different.

    A kind with fewer held-out keys than that gives what it has.
    """
    rng = random.Random(seed)
    chats = {}
    for name in KIND_NAMES:
        found = {}
        for _ in range(200 * per_kind):
            chat = draw_chat(rng, held_out=True, kind_name=name)
            found.setdefault(chat.key, chat)
            if len(found) == per_kind:
                break
        chats.update(found)
    return list(chats.values())
