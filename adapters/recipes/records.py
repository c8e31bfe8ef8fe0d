"""record → JSON: a record in labels or in prose, to one line of JSON with the keys that the prompt asks for.

Keys come in any order and need not follow the text; values are strings, integers, decimals, booleans, and null for
what the record does not say. Disjoint by construction: surnames, cities, goods and titles are split, so every held-out
record names someone or something that training never saw.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .task import Split, Task, owned, words

Value = str | int | float | bool
FIRST_NAMES = words(
    "Ada Boris Carla Dmitri Elena Farid Greta Hugo Ines Jonas Kavya Lena Marco Nadia Omar Petra Quentin Rosa "
    "Samir Tara Ulrich Vera Wanda Xavier Yuki Zoe José Chloé Björn Aisha Liam Mei Noah Olga Pablo Ravi Sofia Tom "
    "Ursula Viktor"
)
SURNAMES = words(
    "Lovelace Novak Rossi Petrov Fischer Haddad Lindqvist Martin Costa Weber Sharma Schulz Bianchi Karim Nassar "
    "Horvat Dubois Alvarez Khan Reddy Bauer Sokolova Kowalska Leroy Tanaka Müller García Lefèvre Andersson Okafor "
    "Murphy Chen Jensen Ivanova Ortega Patel Greco Walker Braun Orlov Baker Moreau Silva Nguyen Yilmaz Kimura "
    "Adeyemi Larsen Hughes Papadakis Wójcik Takahashi Fernandes Byrne Eriksen Popescu Santos Mwangi Clarke Demir "
    "Vogel Marin Olsen Quinn Sato"
)
CITIES = words(
    "Paris Lyon Berlin Munich Zürich Vienna Prague Warsaw Gdansk Madrid Seville Lisbon Porto Rome Milan Naples "
    "Athens Oslo Bergen Stockholm Malmö Helsinki Tallinn Riga Dublin Cork London Leeds Glasgow Boston Denver "
    "Austin Toronto Montreal Lima Bogotá Santiago Nairobi Lagos Accra Cairo Tunis Mumbai Delhi Hanoi Osaka Kyoto "
    "Seoul Sydney Perth"
)
GOODS = [
    f"{a} {b}"
    for a in words(
        "oak steel glass red folding garden travel pocket kitchen antique woollen leather bamboo yellow rubber"
    )
    for b in words("table lamp chair kettle blanket mirror clock basket vase stool tray bench brush ladder cushion jug")
]
TITLES = [
    f"The {a} {b}"
    for a in words("Silent Last Hidden Golden Broken Paper Winter Northern Crooked Distant Burning Blue Forgotten")
    for b in words("River Garden Letter Harbor Mountain Clockmaker Bridge Orchard Lantern Island Mirror Witness")
]
NUMERALS = words("zero one two three four five six seven eight nine ten eleven twelve")


@dataclass(frozen=True)
class Field:
    """One key: how its value is drawn, and how a record says it, as a labelled entry or as a clause about the subject.

    A clause has one `{}`. Those of a boolean have none: the first half of them says true, the second half false.
    """

    key: str
    labels: tuple[str, ...]
    clauses: tuple[str, ...]
    value: Callable[[random.Random, Split], Value]

    def entry(self, rng: random.Random, value: Value) -> str:
        if isinstance(value, bool):
            text = rng.choice(("yes", "true") if value else ("no", "false"))
        else:
            text = spelt(value)
        return f"{rng.choice(self.labels)}: {text}"

    def clause(self, rng: random.Random, value: Value) -> str:
        if isinstance(value, bool):
            half = len(self.clauses) // 2
            return rng.choice(self.clauses[:half] if value else self.clauses[half:])
        if isinstance(value, int) and value < len(NUMERALS) and rng.random() < 0.5:
            return rng.choice(self.clauses).format(NUMERALS[value])
        return rng.choice(self.clauses).format(spelt(value))


def spelt(value: Value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def person(rng: random.Random, split: Split) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(owned(SURNAMES, split))}"


def one_of(values: Sequence[str]) -> Callable[[random.Random, Split], str]:
    return lambda rng, split: rng.choice(owned(values, split))


def whole(low: int, high: int) -> Callable[[random.Random, Split], int]:
    return lambda rng, _: rng.randint(low, high)


def decimal(low: int, high: int) -> Callable[[random.Random, Split], float]:
    """A number with one or two decimals; the text writes two, JSON drops the trailing zero."""
    return lambda rng, _: rng.randint(low * 20, high * 20) / 20


def coin(rng: random.Random, _: Split) -> bool:
    return rng.random() < 0.5


# The first field of a kind is its subject: a record always names it, and prose begins with it.
KINDS: tuple[tuple[Field, ...], ...] = (
    (
        Field("name", ("Name", "Full name", "Person"), ("{}",), person),
        Field("age", ("Age", "Age in years"), ("is {} years old", "is aged {}", "has turned {}"), whole(1, 95)),
        Field("city", ("City", "Town", "Residence"), ("lives in {}", "comes from {}", "moved to {}"), one_of(CITIES)),
        Field("height", ("Height", "Height (m)"), ("is {} m tall", "measures {} metres"), decimal(1, 2)),
        Field(
            "member",
            ("Member", "Club member", "Membership"),
            ("is a member", "has joined the club", "is not a member", "has not joined the club"),
            coin,
        ),
    ),
    (
        Field("customer", ("Customer", "Buyer", "Ordered by"), ("{}",), person),
        Field(
            "item", ("Item", "Product", "Article"), ("ordered the {}", "chose the {}", "bought the {}"), one_of(GOODS)
        ),
        Field("quantity", ("Quantity", "Qty", "Pieces"), ("takes {} of them", "wants {} pieces"), whole(1, 40)),
        Field("price", ("Price", "Unit price", "Price each"), ("pays ${} each", "was quoted ${}"), decimal(1, 400)),
        Field(
            "paid",
            ("Paid", "Payment received"),
            ("has already paid", "settled the bill", "has not paid yet", "still owes the money"),
            coin,
        ),
    ),
    (
        Field("title", ("Title", "Book"), ("{}",), one_of(TITLES)),
        Field("author", ("Author", "Written by"), ("was written by {}", "is a novel by {}"), person),
        Field("year", ("Year", "Published", "First edition"), ("came out in {}", "appeared in {}"), whole(1890, 2024)),
        Field("pages", ("Pages", "Page count", "Length"), ("has {} pages", "is {} pages long"), whole(80, 900)),
        Field(
            "available",
            ("Available", "On the shelf", "In stock"),
            ("is on the shelf", "can be borrowed", "is out on loan", "cannot be borrowed"),
            coin,
        ),
    ),
    (
        Field("guest", ("Guest", "Name of guest", "Booked by"), ("{}",), person),
        Field(
            "hotel_city", ("City", "Hotel in", "Place"), ("is staying in {}", "booked a hotel in {}"), one_of(CITIES)
        ),
        Field("nights", ("Nights", "Number of nights"), ("stays {} nights", "needs {} nights"), whole(2, 30)),
        Field("room", ("Room", "Room number"), ("has room {}", "was given room {}"), whole(101, 999)),
        Field(
            "breakfast",
            ("Breakfast", "With breakfast"),
            ("wants breakfast", "has booked breakfast", "does not want breakfast", "declined breakfast"),
            coin,
        ),
    ),
)


def draw(rng: random.Random, split: Split) -> tuple[str, str]:
    subject, *rest = rng.choice(KINDS)
    fields = [subject, *rng.sample(rest, rng.randint(2, 4))]
    values: dict[str, Value] = {field.key: field.value(rng, split) for field in fields}
    left_out = rng.choice(fields[1:]) if len(fields) > 3 and rng.random() < 0.3 else None
    told = [field for field in fields if field is not left_out]
    record = labelled(rng, told, values) if rng.random() < 0.5 else prose(rng, told, values)
    keys = rng.sample(list(values), len(values))
    answer = {key: None if left_out and key == left_out.key else values[key] for key in keys}
    return f"Keys: {', '.join(keys)}\nRecord: {record}", json.dumps(answer, ensure_ascii=False)


def labelled(rng: random.Random, fields: list[Field], values: dict[str, Value]) -> str:
    entries = [field.entry(rng, values[field.key]) for field in rng.sample(fields, len(fields))]
    return rng.choice(("; ", " | ", ", ")).join(entries)


def prose(rng: random.Random, fields: list[Field], values: dict[str, Value]) -> str:
    subject, *rest = fields
    clauses = [field.clause(rng, values[field.key]) for field in rng.sample(rest, len(rest))]
    listed = f"{', '.join(clauses[:-1])} and {clauses[-1]}" if len(clauses) > 1 else clauses[0]
    return f"{values[subject.key]} {listed}."


TASK = Task(
    name="json",
    title="record → JSON",
    instruction=(
        "Turn the record into one line of JSON with the given keys, in the given order. "
        "Use null for a key that the record does not mention."
    ),
    draw=draw,
    max_new_tokens=80,
)
