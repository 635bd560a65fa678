"""The kinds of small tasks: each function draws one question that has one right answer."""

import random
from typing import NamedTuple

from train.tiny_demo.facts import (
    ANIMALS,
    CAPITALS,
    COLORS,
    FAVORITES,
    IDENTITY,
    MONTHS,
    NAMES,
    OPPOSITES,
    PLURALS,
    THINGS,
    WEEKDAYS,
    WORDS,
)


class Question(NamedTuple):
    """A question and its answer; also in one word, where there is one, and any turns before it.

    The key says what the question asks: for an open kind its arguments (12 and 30 for a sum,
    whatever the wording), for a closed kind such as capitals the argument and the wording.
    """

    key: tuple
    text: str
    answer: str
    word: str | None = None
    before: tuple[tuple[str, str], ...] = ()


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
    opening = rng.choice(["", "Hello! ", "One question: ", "Tell me, ", "I am curious. "])
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
        "Name the country whose capital is {}.",
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
    return _closed(rng, f"{unit} {side}", wordings, name, f"{other} comes {side} {name}.", other)


def counting(rng: random.Random) -> Question:
    start = rng.randrange(94)
    stop = start + rng.randint(2, 6)
    if rng.random() < 0.3:
        start, stop = stop, start
    step = 1 if start < stop else -1
    text = rng.choice(["Count from {} to {}.", "Please count from {} to {}.", "Count: {} to {}."])
    numbers = range(start, stop + step, step)
    return Question(
        ("counting", start, stop), text.format(start, stop), ", ".join(map(str, numbers)) + "."
    )


def addition(rng: random.Random) -> Question:
    left, right = rng.randrange(91), rng.randrange(10)
    if rng.random() < 0.3:
        left, right = right, left
    text = rng.choice(
        ["What is {} + {}?", "How much is {} + {}?", "Calculate {} + {}.", "Add {} and {}."]
    )
    return Question(
        ("addition", min(left, right), max(left, right)),
        text.format(left, right),
        f"{left} + {right} = {left + right}.",
        str(left + right),
    )


def subtraction(rng: random.Random) -> Question:
    right = rng.randrange(10)
    left = rng.randint(right, 90)
    text = rng.choice(["What is {} - {}?", "How much is {} - {}?", "Calculate {} - {}."])
    return Question(
        ("subtraction", left, right),
        text.format(left, right),
        f"{left} - {right} = {left - right}.",
        str(left - right),
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
    numbers = rng.sample(range(50), 3)
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
    words = rng.sample(WORDS, rng.randint(3, 4))
    text = rng.choice(["Reverse this list: {}.", "Say this list backwards: {}."])
    return Question(
        ("reversing", *words), text.format(", ".join(words)), ", ".join(words[::-1]) + "."
    )


def picking(rng: random.Random) -> Question:
    words = rng.sample(WORDS, rng.randint(3, 4))
    which, word = rng.choice([("first", words[0]), ("last", words[-1])])
    text = rng.choice(
        [
            "What is the {} word of this list: {}?",
            "Name the {} word: {}.",
            "Give the {} word of {}.",
        ]
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
        f"Once upon a time, a {animal} lived in the {place}. One day it found a {look} {thing} "
        f"and showed the {thing} to its friends."
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
