"""date → ISO 8601: a date written in one of many ways, inside a sentence.

Disjoint by construction: every tenth day of the calendar is held out, whatever the way it is written, so no held-out
answer occurs in training.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import date, timedelta

from .task import Split, Task, words

FIRST, LAST = date(1950, 1, 1), date(2049, 12, 31)
"""The hundred years that two-digit years mean."""

MONTHS = words("January February March April May June July August September October November December")
WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
UNITS = words(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
)
ORDINALS = [*UNITS, *(f"twenty-{unit}" for unit in UNITS[:9]), "thirtieth", "thirty-first"]


def nth(day: int) -> str:
    """21 → 21st."""
    suffix = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def month(d: date) -> str:
    return MONTHS[d.month - 1]


def short(d: date) -> str:
    return month(d)[:3]


FORMS: tuple[Callable[[date], str], ...] = (
    lambda d: f"{d.day} {month(d)} {d.year}",
    lambda d: f"{month(d)} {d.day}, {d.year}",
    lambda d: f"{month(d)} {nth(d.day)}, {d.year}",
    lambda d: f"the {nth(d.day)} of {month(d)}, {d.year}",
    lambda d: f"the {nth(d.day)} of {month(d)} {d.year}",
    lambda d: f"the {ORDINALS[d.day - 1]} of {month(d)} {d.year}",
    lambda d: f"{month(d)} the {ORDINALS[d.day - 1]}, {d.year}",
    lambda d: f"{short(d)} {d.day} '{d:%y}",
    lambda d: f"{d.day} {short(d)} '{d:%y}",
    lambda d: f"{short(d)}. {nth(d.day)}, {d.year}",
    lambda d: f"{d.day:02}-{short(d)}-{d.year}",
    lambda d: f"{d.day}-{short(d).upper()}-{d:%y}",
    lambda d: f"{WEEKDAYS[d.weekday()]}, {d.day} {month(d)} {d.year}",
    lambda d: f"{WEEKDAYS[d.weekday()][:3]} {short(d)} {d.day} {d.year}",
    lambda d: f"{d.month}/{d.day}/{d.year} (US)",
    lambda d: f"{d.day}/{d.month}/{d.year} (UK)",
    lambda d: f"{d.month:02}/{d.day:02}/{d:%y} (US)",
    lambda d: f"{d.day:02}/{d.month:02}/{d:%y} (UK)",
    lambda d: f"{d.day:02}.{d.month:02}.{d.year}",
    lambda d: f"{d.day}.{d.month}.{d.year}",
    lambda d: f"{d:%Y%m%d}",
)

SENTENCES = (
    "The contract was signed on {}.",
    "{}",
    "Invoice {n} is dated {}.",
    "Please deliver the {n} parcels by {}.",
    "She was born on {} in a small town.",
    "Our meeting has been moved to {}, room {n}.",
    "Date of issue: {}",
    "The passport with number {n} expires on {}.",
    "We flew home on {} after {n} days.",
    "On {} the shop sold {n} lamps.",
    "The lease runs until {}.",
    "Last seen: {}, {n} points",
    "Flight {n} leaves on {} at noon.",
    "They married on {} and moved north.",
    "Your order no. {n} of {} has been shipped.",
    "The museum opened its doors on {}.",
)


def draw(rng: random.Random, split: Split) -> tuple[str, str]:
    days = rng.randrange((LAST - FIRST).days + 1)
    days -= days % 10
    if split == "train":
        days += rng.randrange(1, 10)
    day = min(FIRST + timedelta(days), LAST)
    text = rng.choice(SENTENCES).format(rng.choice(FORMS)(day), n=rng.randrange(2, 9000))
    return text[0].upper() + text[1:], day.isoformat()


TASK = Task(
    name="date",
    title="date → ISO 8601",
    instruction="Write the date in this text as an ISO 8601 date (YYYY-MM-DD). Reply with the date only.",
    draw=draw,
    max_new_tokens=16,
)
