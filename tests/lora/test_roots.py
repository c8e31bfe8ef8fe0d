"""Sources resolve under the roots or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from loramux.errors import InvalidAdapter, InvalidRequest, LoramuxError, PathNotAllowed, StartupError
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE, AdapterRoots, check_name


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two roots with an adapter each, and a secret outside."""
    for folder in ("one/a", "two/b/deep", "secret"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / CONFIG_FILE).write_text("{}")
    return tmp_path


@pytest.fixture
def roots(tree: Path) -> AdapterRoots:
    return AdapterRoots([tree / "one", tree / "two"])


def test_finds_names_relative_and_absolute_paths(tree: Path, roots: AdapterRoots) -> None:
    assert roots.resolve("a").path == tree / "one/a"
    assert roots.resolve("b/deep").path == tree / "two/b/deep"
    assert roots.resolve("b/../b/./deep").path == tree / "two/b/deep"
    assert roots.resolve(str(tree / "one/a")).path == tree / "one/a"


def test_a_root_reached_through_a_link_is_the_same_root(tree: Path) -> None:
    (tree / "link").symlink_to(tree / "one")
    roots = AdapterRoots([tree / "link"])
    assert roots.resolve("a").path == tree / "one/a"
    assert roots.resolve(str(tree / "link/a")).path == tree / "one/a"


@pytest.mark.parametrize(
    "source", ["../secret", "a/../../secret", "../nowhere", "/etc", "/nowhere", "link", "b/up/secret"]
)
def test_leaving_the_roots_is_denied_whether_or_not_it_exists(tree: Path, source: str) -> None:
    """Path traversal (CVE-2026-24208, CVE-2026-27905); and no oracle for what exists elsewhere."""
    (tree / "two/link").symlink_to(tree / "secret")
    (tree / "two/b/up").symlink_to(tree)
    with pytest.raises(PathNotAllowed, match="outside the adapter roots"):
        AdapterRoots([tree / "two"]).resolve(source)


def test_a_sibling_whose_name_starts_like_the_root_is_outside(tree: Path) -> None:
    """A prefix comparison of strings would let /roots/one-private in under /roots/one."""
    (tree / "one-private").mkdir()
    with pytest.raises(PathNotAllowed):
        AdapterRoots([tree / "one"]).resolve("../one-private")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_files_may_be_links_within_the_roots_only(tree: Path, roots: AdapterRoots, name: str) -> None:
    """The layout of the Hugging Face cache is links within one root; a link out would read any file of the host."""
    inside, outside = tree / "one/blob", tree / "secret/blob"
    for target in (inside, outside):
        target.write_text("{}")
    path = tree / "one/a" / name
    path.unlink(missing_ok=True)
    path.symlink_to(inside)
    assert roots.resolve("a").path == tree / "one/a"
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(PathNotAllowed):
        roots.resolve("a")


def test_a_link_loop_is_missing_and_does_not_hang(tree: Path, roots: AdapterRoots) -> None:
    (tree / "one/loop").symlink_to(tree / "one/loop")
    with pytest.raises(InvalidAdapter) as caught:
        roots.resolve("loop")
    assert caught.value.reason == "ADAPTER_FILES_MISSING"


@pytest.mark.parametrize("source", ["missing", "a/missing", f"a/{CONFIG_FILE}"])
def test_missing_folder_tells_where_it_searched(tree: Path, roots: AdapterRoots, source: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        roots.resolve(source)
    assert caught.value.reason == "ADAPTER_FILES_MISSING"
    assert str(tree / "one") in caught.value.message
    assert str(tree / "two") in caught.value.message


@pytest.mark.parametrize("source", ["", "a\0b", "x" * 5000, "\ud800"])
def test_text_that_is_no_path(roots: AdapterRoots, source: str) -> None:
    """os.path.realpath raises a bare ValueError for a NUL, which would end as INTERNAL."""
    with pytest.raises(InvalidRequest):
        roots.resolve(source)


def test_without_roots_nothing_is_found() -> None:
    for source in ("a", os.getcwd()):
        with pytest.raises(LoramuxError):
            AdapterRoots([]).resolve(source)


@pytest.mark.parametrize("separator", [":", ";", ","])
def test_roots_that_were_separated_like_a_search_path(separator: str, tree: Path) -> None:
    AdapterRoots([tree / "one", tree / "two"]).check()
    with pytest.raises(StartupError, match=r"No such file or directory; of several roots .* a comma between them in"):
        AdapterRoots([f"{tree / 'one'}{separator}{tree / 'two'}"]).check()
    with pytest.raises(StartupError, match="; name a folder that is there"):
        AdapterRoots([tree / "none"]).check()


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "7", "x" * 128])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a b", "a/b", "a\n", "é", "x" * 129, "a\0", "٣"])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidRequest, match="not an adapter name"):
        check_name(name)
