"""The cases whose result depends on no clock, against a real server on the embedded model. `make cases` runs all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cases.cases import HERE, cases, environment, folders, run

# They measure a latency, or sleep until a scan must have passed: `make cases` is for a machine with nothing beside it.
TIMED = {
    "aborted_requests_uncounted",
    "adapters_file_watch_dies",
    "big_prompt_blocks_tokenizing",
    "changed_folder_takes_the_old_down",
    "chat_flood",
    "cli_markup",
    "folder_swapped_while_read",
    "folders_with_other_names_are_skipped_in_silence",
    "header_many_dims",
    "mix_weight_1e39",
    "prefill_stalls_streams",
    "repeated_fields_flood",
    "rsync_serves_a_mixture",
}
UNTIMED = [case for folder in folders() for case in cases(folder) if case.stem not in TIMED]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    pytest.importorskip("torch")
    with environment(tmp_path_factory.mktemp("server")) as variables:
        yield variables


@pytest.mark.parametrize("case", UNTIMED, ids=lambda case: str(case.relative_to(HERE).with_suffix("")))
def test_case(case: Path, server: dict[str, str]) -> None:
    outcome = run(case, server)
    assert outcome.code == 0, outcome.said


def test_each_timed_case_exists() -> None:
    assert {case.stem for folder in folders() for case in cases(folder)} >= TIMED
