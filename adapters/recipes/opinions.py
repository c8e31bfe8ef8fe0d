"""sentiment → one word: how strongly a review feels, on a scale of five words.

A review has one or two opinions of the same strength, among sentences that say nothing of it. Disjoint by construction:
pairs of (thing, turn of phrase) are split. Training hears "the courier" and it hears "had me shouting down the phone",
but pairs that are held out it never hears together, and a held-out review has no others.
"""

from __future__ import annotations

import random

from .task import Split, Task, side

THINGS = (
    *("the delivery", "the courier", "the packaging", "the price", "what they charge", "the staff", "the service desk"),
    *("the quality", "the workmanship", "the food", "the menu", "the cooking", "the website", "the app", "the room"),
    *("our suite", "the garden", "the pool", "the view", "the concert", "the sound", "the screen", "the battery"),
    *("the keyboard", "the sofa", "the mattress", "the coffee", "the tour", "the guide", "the train ride"),
)

FACTS = (
    *("We ordered on a Tuesday.", "It was raining all week.", "There were four of us.", "My sister came along."),
    *(
        "We stayed for three nights.",
        "I read about it in a magazine.",
        "The shop is near the station.",
        "I live nearby.",
    ),
    *("We had booked in March.", "It was our second visit.", "A friend told me of it.", "I paid with my card."),
    *(
        "The whole thing took two hours.",
        "We arrived before noon.",
        "It came in a brown box.",
        "We are a family of five.",
    ),
)

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
        "{} was the worst I have ever had to suffer, never again",
        "whoever is responsible for {} should be ashamed",
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
        "I had expected a little more from {}",
        "there were some small problems with {}",
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
        "{} was the same as anywhere else",
        "I could take or leave {}",
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
        "{} was well worth it",
        "I enjoyed {}",
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
        "{} was pure magic from start to end",
        "{} blew me away completely",
    ),
}


def opinion(rng: random.Random, label: str, split: Split) -> str:
    """A sentence whose (thing, phrase) pair belongs to `split`."""
    while True:
        thing, phrase = rng.choice(THINGS), rng.choice(PHRASES[label])
        if side(f"{thing}/{phrase}") == split:
            text = phrase.format(thing)
            return f"{text[0].upper()}{text[1:]}."


def draw(rng: random.Random, split: Split) -> tuple[str, str]:
    label = rng.choice(list(PHRASES))
    opinions = dict.fromkeys(opinion(rng, label, split) for _ in range(rng.randint(1, 2)))  # the same twice is once
    sentences = [*rng.sample(FACTS, rng.randint(0, 2)), *opinions]
    rng.shuffle(sentences)
    return f"Review: {' '.join(sentences)}", label


TASK = Task(
    name="sentiment",
    title="sentiment → one word",
    instruction=("How does the customer feel? Reply with one word: furious, annoyed, neutral, pleased or delighted."),
    draw=draw,
    max_new_tokens=8,
)
