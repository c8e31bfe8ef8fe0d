"""Every task by its name."""

from . import dates, opinions, queries, records
from .task import Task

TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (records, queries, opinions, dates)}
