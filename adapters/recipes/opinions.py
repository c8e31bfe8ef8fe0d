"""sentiment → one word: how a review feels about one aspect, on a scale of five words, or that it does not say.

A review speaks of several aspects and feels differently about each, so the right word needs the right sentence.
Disjoint by construction: pairs of (thing, turn of phrase) are split. Training hears "the courier" and it hears "had me
shouting down the phone", but those that are held out it never hears together, and every held-out case turns on one.
"""

from __future__ import annotations

import random

from .task import Split, Task, side

ASPECTS: dict[str, tuple[str, ...]] = {
    "delivery": ("the delivery", "the courier", "the shipping"),
    "price": ("the price", "the cost", "what they charge"),
    "staff": ("the staff", "the team", "the service desk"),
    "quality": ("the quality", "the workmanship", "the finish"),
    "food": ("the food", "the menu", "the cooking"),
    "website": ("the website", "the online shop", "the app"),
    "packaging": ("the packaging", "the box", "the wrapping"),
    "room": ("the room", "the bedroom", "our suite"),
}

PHRASES: dict[str, tuple[str, ...]] = {
    "furious": (
        "{} made my blood boil",
        "{} was an absolute disgrace and I want my money back",
        "I am outraged by {}",
        "{} had me shouting down the phone",
        "I have never been so angry as about {}",
        "{} was a complete and utter scandal",
        "I was livid about {}",
        "{} is an insult to every customer",
        "{} drove me up the wall with rage",
        "I will be taking legal action over {}",
    ),
    "annoyed": (
        "{} was a bit of a letdown",
        "{} could have been better",
        "I was somewhat disappointed by {}",
        "{} left a little to be desired",
        "{} was slightly irritating",
        "I had a few complaints about {}",
        "{} was not quite what I had hoped for",
        "I was not too happy with {}",
        "{} got on my nerves a little",
        "{} was rather below par",
    ),
    "neutral": (
        "{} was about average",
        "{} was neither good nor bad",
        "I have no strong feelings about {}",
        "{} was just what one would expect",
        "{} was okay, nothing more",
        "{} did the job and that is all",
        "there is nothing special to say about {}",
        "{} was perfectly ordinary",
        "{} was so-so",
        "I was indifferent to {}",
    ),
    "pleased": (
        "{} was good",
        "I was happy with {}",
        "{} was nice enough to come back for",
        "I liked {}",
        "{} was better than I expected",
        "I have only good things to say about {}",
        "{} was quite pleasant",
        "{} left me satisfied",
        "{} met all my wishes",
        "I was content with {}",
    ),
    "delighted": (
        "{} was beyond my wildest dreams",
        "I could not stop smiling about {}",
        "I am absolutely in love with {}",
        "{} was the best I have ever seen",
        "{} was simply phenomenal",
        "I am over the moon about {}",
        "{} took my breath away",
        "words cannot describe how wonderful {} was",
        "{} was perfect in every way, ten out of ten",
        "I was thrilled to bits by {}",
    ),
}

LABELS = (*PHRASES, "unmentioned")


def sentence(rng: random.Random, aspect: str, label: str, split: Split) -> str:
    """A sentence whose (thing, phrase) pair belongs to `split`."""
    while True:
        thing, phrase = rng.choice(ASPECTS[aspect]), rng.choice(PHRASES[label])
        if side(f"{thing}/{phrase}") == split:
            text = phrase.format(thing)
            return f"{text[0].upper()}{text[1:]}."


def draw(rng: random.Random, split: Split) -> tuple[str, str]:
    label = rng.choice(LABELS)
    asked, *others = rng.sample(list(ASPECTS), rng.randint(2, 4))
    sentences = [sentence(rng, aspect, rng.choice(list(PHRASES)), split) for aspect in others]
    if label != "unmentioned":
        sentences.append(sentence(rng, asked, label, split))
    rng.shuffle(sentences)
    return f"Review: {' '.join(sentences)}\nAspect: {asked}", label


TASK = Task(
    name="sentiment",
    title="sentiment of an aspect → one word",
    instruction=(
        "How does the reviewer feel about the aspect? "
        "Reply with one word: furious, annoyed, neutral, pleased, delighted or unmentioned."
    ),
    draw=draw,
    max_new_tokens=8,
)
