"""The server under test, through `loramux.client`: the few calls that runs and soaks make of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import NamedTuple, Self

from loramux.client import AdapterList, AsyncAdminClient, AsyncClient, Delta, Started

REQUEST_TIMEOUT = 600.0
ADMIN_TIMEOUT = 120.0


class Progress(NamedTuple):
    """One message of a stream: its new tokens. `uid` is set in the first: the adapter's uid, "" for the base."""

    tokens: int
    uid: str | None = None


class Target:
    """A server's public and admin ports; an async context manager. Raises what the clients raise.

    Every call has a timeout, so that a server that hangs ends a run as a failure and not as a hang.
    """

    def __init__(self, target: str, admin: str, *, api_key: str | None = None, admin_key: str | None = None) -> None:
        self._public = AsyncClient(target, api_key=api_key, timeout=REQUEST_TIMEOUT)
        self._admin = AsyncAdminClient(admin, api_key=admin_key, timeout=ADMIN_TIMEOUT)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._public.close()
        await self._admin.close()

    async def vocab_size(self) -> int:
        """Return the size of the base's vocabulary: ids are below it."""
        return (await self._public.model()).vocab_size

    async def stream(
        self,
        prompt_ids: Sequence[int],
        adapter: str,
        output_len: int,
        *,
        temperature: float = 0.0,
        ignore_eos: bool = True,
        seed: int = 0,
    ) -> AsyncGenerator[Progress, None]:
        """Send a request and yield its messages. Closing the generator cancels the request."""
        events = self._public.stream(
            token_ids=prompt_ids,
            adapter=adapter,
            max_new_tokens=output_len,
            temperature=temperature,
            ignore_eos=ignore_eos,
            seed=seed,
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Delta):
                    yield Progress(len(event.token_ids))
                elif isinstance(event, Started):
                    yield Progress(0, event.adapters[0].uid if event.adapters else "")

    async def load(self, name: str, source: str) -> str:
        """Load the adapter folder `source` under a name, in place of what has it; return its uid."""
        return (await self._admin.load(name, source, replace=True)).uid

    async def unload(self, name: str) -> None:
        """Unload an adapter; returns when the requests that use it have ended and its memory is free."""
        await self._admin.unload(name)

    async def adapters(self) -> AdapterList:
        """Return every adapter that the server knows, and the bytes that they take on the device."""
        return await self._admin.list()
