"""question → SQL over a table whose columns stand in the prompt.

Disjoint by construction: the nouns that name tables are split, so a held-out question is always about a table that
training never saw, with columns drawn and ordered anew.
"""

# ruff: noqa: S608 - these queries are text to learn from; none is ever run

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .task import Split, Task, owned, words

T = TypeVar("T")


@dataclass(frozen=True)
class Topic:
    """Nouns that name a table, the columns such tables may have, and the values that text columns hold."""

    nouns: tuple[str, ...]
    numbers: tuple[str, ...]
    texts: dict[str, tuple[str, ...]]


CITIES = words("Paris Berlin Madrid Rome Oslo Vienna Lisbon Prague Dublin Athens Boston Denver Tokyo Lima Cairo Delhi")
NAMES = words(
    "Ada Boris Carla Elena Farid Greta Hugo Ines Jonas Kavya Lena Marco Nadia Omar Petra Rosa Samir Tara Vera"
)
COUNTRIES = words(
    "France Spain Italy Norway Peru Chile Kenya Japan India Brazil Canada Egypt Ghana Poland Greece Turkey"
)

TOPICS = (
    Topic(
        words("employees workers managers teachers nurses engineers drivers cooks clerks interns pilots"),
        words("salary age bonus overtime experience vacation_days hire_year shifts"),
        {
            "name": NAMES,
            "department": words("Sales Marketing Finance Support Legal Research Logistics Security"),
            "city": CITIES,
            "contract": words("permanent temporary seasonal freelance"),
        },
    ),
    Topic(
        words("products articles goods toys tools shoes lamps books games instruments gadgets"),
        words("price weight stock rating discount sales returns warranty_months"),
        {
            "name": words("Alpha Bolt Comet Delta Ember Falcon Gamma Helix Iris Jade Karma Lotus Nova Orbit Pulse"),
            "category": words("kitchen garden outdoor office school travel sports music"),
            "brand": words("Acme Borealis Corvo Dynex Evora Fjord Globex Hanoko Initech Jansen"),
            "color": words("red blue green black white yellow silver brown"),
        },
    ),
    Topic(
        words("orders invoices shipments deliveries payments refunds bookings tickets purchases"),
        words("amount quantity tax shipping_cost year items discount days_late"),
        {
            "customer": NAMES,
            "status": words("open paid cancelled pending shipped returned"),
            "country": COUNTRIES,
            "method": words("card cash transfer cheque voucher"),
        },
    ),
    Topic(
        words("cities towns villages regions islands provinces districts harbors resorts"),
        words("population area elevation schools hospitals tourists rainfall hotels"),
        {
            "name": CITIES,
            "country": COUNTRIES,
            "climate": words("dry humid mild tropical polar temperate"),
            "mayor": NAMES,
        },
    ),
    Topic(
        words("students pupils players runners swimmers climbers singers dancers musicians authors actors"),
        words("score age points height grade wins absences rank"),
        {
            "name": NAMES,
            "country": COUNTRIES,
            "club": words("Eagles Lions Sharks Wolves Bears Tigers Hawks Ravens"),
            "level": words("beginner advanced expert junior senior"),
        },
    ),
    Topic(
        words("cars trucks buses ships boats planes trains bicycles scooters ferries vans"),
        words("speed seats price mileage length fuel_use build_year doors"),
        {
            "model": words("Arrow Breeze Cobra Dart Eclipse Fiesta Gallop Hunter Impala Jet Kestrel"),
            "maker": words("Volta Norden Astra Zenith Orion Vega Titan Apex"),
            "color": words("red blue green black white yellow silver brown"),
            "fuel": words("diesel petrol electric hybrid hydrogen"),
        },
    ),
    Topic(
        words("films movies albums songs concerts paintings podcasts plays operas shows"),
        words("length rating budget release_year views awards copies tickets_sold"),
        {
            "title": words("Horizon Mirage Solstice Ember Cascade Voyage Thunder Harvest Eclipse Monsoon Reverie"),
            "genre": words("drama comedy thriller jazz rock opera folk horror"),
            "language": words("English French Spanish German Hindi Japanese Arabic Italian"),
            "studio": words("Lumen Parallax Keystone Northlight Bluebird Sirocco"),
        },
    ),
    Topic(
        words("farms fields gardens trees forests lakes rivers parks mines wells vineyards"),
        words("area depth age yield length visitors cost water_use"),
        {
            "name": words(
                "Rosewood Millbrook Ashford Greenhill Stonegate Fairview Oakdale Redfern Silverton Larkfield"
            ),
            "region": words("north south east west central coastal"),
            "owner": NAMES,
            "soil": words("clay sand loam peat chalk"),
        },
    ),
    Topic(
        words("patients animals horses dogs cats birds cows sheep goats rabbits"),
        words("weight age height temperature visits dose heart_rate siblings"),
        {
            "name": NAMES,
            "ward": words("A1 B2 C3 D4 E5 F6"),
            "doctor": words("Weber Novak Rossi Khan Silva Chen Patel Murphy Sato"),
            "condition": words("stable critical good fair serious"),
        },
    ),
    Topic(
        words("servers routers sensors printers phones laptops cameras satellites robots drones"),
        words("memory cpu_load uptime temperature power_use errors battery latency"),
        {
            "name": words("atlas borg cygnus draco ether fenix gaia hydra io juno kepler lyra"),
            "location": CITIES,
            "vendor": words("Volta Norden Astra Zenith Orion Vega Titan Apex"),
            "state": words("active idle offline failed standby"),
        },
    ),
)

MORE = ("more than {}", "above {}", "greater than {}", "over {}")
LESS = ("less than {}", "below {}", "smaller than {}", "under {}")
MOST = {"AVG": "average", "MAX": "maximum", "MIN": "minimum", "SUM": "total"}


def plain(column: str) -> str:
    """The column as a question says it."""
    return column.replace("_", " ")


@dataclass
class Scene:
    """One table and the random source that asks about it."""

    rng: random.Random
    noun: str
    numbers: list[str]
    texts: list[str]
    values: dict[str, tuple[str, ...]]

    def number(self) -> str:
        return self.rng.choice(self.numbers)

    def text(self) -> str:
        return self.rng.choice(self.texts)

    def some(self, *options: T) -> T:
        return self.rng.choice(options)

    def equals(self) -> tuple[str, str]:
        """A condition on a text column, in words and in SQL."""
        column = self.text()
        value = self.rng.choice(self.values[column])
        said = self.some("with {} {}", "whose {} is {}", "where the {} is {}").format(plain(column), value)
        return said, f"{column} = '{value}'"

    def compares(self) -> tuple[str, str]:
        """A condition on a number column, in words and in SQL."""
        column = self.number()
        value = self.some(str(self.rng.randint(1, 99)), str(self.rng.randint(1, 50) * 100))
        bound, sign = self.some(*((phrase, ">") for phrase in MORE), *((phrase, "<") for phrase in LESS))
        said = self.some("with {} {}", "whose {} is {}").format(plain(column), bound.format(value))
        return said, f"{column} {sign} {value}"

    def condition(self) -> tuple[str, str]:
        return self.rng.choice((self.equals, self.compares))()

    def columns(self) -> tuple[str, str]:
        """One or two columns to show, in words and in SQL."""
        picked = self.rng.sample([*self.texts, *self.numbers], self.rng.choice((1, 1, 2)))
        return " and ".join(plain(column) for column in picked), ", ".join(picked)


Shape = Callable[[Scene], tuple[str, str]]


def count_all(s: Scene) -> tuple[str, str]:
    question = s.some("How many {} are there?", "Count all {}.", "What is the number of {}?")
    return question.format(s.noun), f"SELECT COUNT(*) FROM {s.noun};"


def count_where(s: Scene) -> tuple[str, str]:
    where, sql = s.condition()
    question = s.some("How many {} are there {}?", "Count the {} {}.", "What is the number of {} {}?")
    return question.format(s.noun, where), f"SELECT COUNT(*) FROM {s.noun} WHERE {sql};"


def show_where(s: Scene) -> tuple[str, str]:
    where, sql = s.condition()
    said, shown = s.columns()
    question = s.some("Show the {} of all {} {}.", "List the {} of the {} {}.", "What is the {} of the {} {}?")
    return question.format(said, s.noun, where), f"SELECT {shown} FROM {s.noun} WHERE {sql};"


def show_where_both(s: Scene) -> tuple[str, str]:
    first, second = s.equals(), s.compares()
    said, shown = s.columns()
    question = s.some("Show the {} of all {} {} and {}.", "List the {} of the {} {} and {}.")
    sql = f"SELECT {shown} FROM {s.noun} WHERE {first[1]} AND {second[1]};"
    return question.format(said, s.noun, first[0], second[0]), sql


def all_where(s: Scene) -> tuple[str, str]:
    where, sql = s.condition()
    question = s.some("Show all {} {}.", "List the {} {}.", "Which {} are there {}?")
    return question.format(s.noun, where), f"SELECT * FROM {s.noun} WHERE {sql};"


def top(s: Scene) -> tuple[str, str]:
    column, limit = s.number(), s.rng.randint(1, 10)
    said, shown = s.columns()
    end, order = s.some(("highest", "DESC"), ("largest", "DESC"), ("lowest", "ASC"), ("smallest", "ASC"))
    question = s.some("Show the {} of the {} {} with the {} {}.", "What is the {} of the {} {} with the {} {}?")
    sql = f"SELECT {shown} FROM {s.noun} ORDER BY {column} {order} LIMIT {limit};"
    return question.format(said, limit, s.noun, end, plain(column)), sql


def ordered(s: Scene) -> tuple[str, str]:
    column = s.rng.choice([*s.numbers, *s.texts])
    said, shown = s.columns()
    way, order = s.some(("ascending", "ASC"), ("descending", "DESC"))
    question = s.some("Show the {} of all {} in {} order of {}.", "List the {} of the {} in {} order of {}.")
    return question.format(said, s.noun, way, plain(column)), f"SELECT {shown} FROM {s.noun} ORDER BY {column} {order};"


def aggregate(s: Scene) -> tuple[str, str]:
    column, function = s.number(), s.some(*MOST)
    question = s.some("What is the {} {} of the {}?", "Give the {} {} of all {}.")
    return question.format(MOST[function], plain(column), s.noun), f"SELECT {function}({column}) FROM {s.noun};"


def aggregate_where(s: Scene) -> tuple[str, str]:
    column, function = s.number(), s.some(*MOST)
    where, sql = s.equals()
    question = s.some("What is the {} {} of the {} {}?", "Give the {} {} of all {} {}.")
    said = question.format(MOST[function], plain(column), s.noun, where)
    return said, f"SELECT {function}({column}) FROM {s.noun} WHERE {sql};"


def count_by(s: Scene) -> tuple[str, str]:
    column = s.text()
    question = s.some("How many {} are there for each {}?", "Count the {} per {}.")
    return question.format(s.noun, plain(column)), f"SELECT {column}, COUNT(*) FROM {s.noun} GROUP BY {column};"


def aggregate_by(s: Scene) -> tuple[str, str]:
    group, column, function = s.text(), s.number(), s.some(*MOST)
    question = s.some("What is the {} {} of the {} for each {}?", "Give the {} {} of the {} per {}.")
    said = question.format(MOST[function], plain(column), s.noun, plain(group))
    return said, f"SELECT {group}, {function}({column}) FROM {s.noun} GROUP BY {group};"


def distinct(s: Scene) -> tuple[str, str]:
    column = s.text()
    question = s.some("List every different {} of the {}.", "Show each distinct {} of the {} once.")
    return question.format(plain(column), s.noun), f"SELECT DISTINCT {column} FROM {s.noun};"


SHAPES: tuple[Shape, ...] = (
    count_all,
    count_where,
    show_where,
    show_where_both,
    all_where,
    top,
    ordered,
    aggregate,
    aggregate_where,
    count_by,
    aggregate_by,
    distinct,
)


def draw(rng: random.Random, split: Split) -> tuple[str, str]:
    topic = rng.choice(TOPICS)
    numbers = rng.sample(topic.numbers, rng.randint(2, 3))
    texts = rng.sample(list(topic.texts), rng.randint(1, 2))
    noun = rng.choice(owned(topic.nouns, split))
    scene = Scene(rng, noun, numbers, texts, topic.texts)
    question, sql = rng.choice(SHAPES)(scene)
    columns = [f"{c} text" for c in texts] + [f"{c} int" for c in numbers]
    return f"Table: {noun}({', '.join(rng.sample(columns, len(columns)))})\nQuestion: {question}", sql


TASK = Task(
    name="sql",
    title="question → SQL",
    instruction="Write one SQL query that answers the question about the table. Reply with the query only.",
    draw=draw,
    max_new_tokens=64,
)
