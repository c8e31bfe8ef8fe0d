"""How many bytes adapters may take, and who has them. Imports no torch."""

from __future__ import annotations

from loramux.errors import Overloaded


class ByteBudget:
    """Bytes by owner (an adapter's uid): reserved while a load runs, used once it is loaded.

    `limit` is the most of both together; None is no bound. Owners are named, so that giving back twice is harmless.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._reserved: dict[str, int] = {}
        self._used: dict[str, int] = {}

    @property
    def used(self) -> int:
        """Bytes of loaded adapters, draining ones included."""
        return sum(self._used.values())

    @property
    def reserved(self) -> int:
        """Bytes set aside for loads that run."""
        return sum(self._reserved.values())

    def reserved_by(self, owner: str) -> int:
        """Bytes that `owner` has set aside."""
        return self._reserved.get(owner, 0)

    def reserve(self, owner: str, nbytes: int, *, what: str) -> None:
        """Set bytes aside, instead of what the owner had set aside before.

        Raises Overloaded (ADAPTER_BUDGET_EXCEEDED) with the figures, and then changes nothing.
        """
        self._check_room(owner, nbytes, what)
        self._reserved[owner] = nbytes

    def unreserve(self, owner: str) -> None:
        """Give set-aside bytes back."""
        self._reserved.pop(owner, None)

    def take(self, owner: str, nbytes: int, *, what: str) -> None:
        """Turn the owner's reservation into `nbytes` used. Raises as reserve does."""
        assert owner not in self._used
        self._check_room(owner, nbytes, what)
        self._reserved.pop(owner, None)
        self._used[owner] = nbytes

    def give_back(self, owner: str) -> None:
        """The owner's memory is free."""
        self._used.pop(owner, None)

    def check(self) -> None:
        """Assert what always holds."""
        assert all(n >= 0 for n in (*self._used.values(), *self._reserved.values()))
        assert not self._used.keys() & self._reserved.keys()
        assert self.limit is None or self.used + self.reserved <= self.limit

    def _check_room(self, owner: str, nbytes: int, what: str) -> None:
        assert nbytes >= 0
        taken = self.used + self.reserved - self._reserved.get(owner, 0)
        if self.limit is not None and taken + nbytes > self.limit:
            raise self.exceeded(nbytes, taken, what=what)

    def exceeded(self, nbytes: int, taken: int, *, what: str) -> Overloaded:
        """The error for `what`, which needs `nbytes` beside `taken` bytes that are not to be had."""
        assert self.limit is not None
        return Overloaded(
            f"adapter memory is full: {what} needs {_mib(nbytes)}, and {_mib(taken)} of {_mib(self.limit)} are "
            "taken; unload an adapter or raise --adapter-memory",
            retry_after=5.0 if nbytes <= self.limit else None,  # larger than all of it: never
            reason="ADAPTER_BUDGET_EXCEEDED",
            metadata={"needed_bytes": nbytes, "used_bytes": taken, "budget_bytes": self.limit},
        )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
