"""A small part of most entries of the fault test: `make fault-test` does all of them, in full."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.__main__ import CATALOGUE, FULL_ONLY, make_place
from faults.harness import Place

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    _ = Place(folder / "first", fast=True).data  # made once
    return folder


@pytest.fixture
def place(folder: Path, number: int) -> Iterator[Place]:
    place = make_place(number, True, folder)
    yield place
    place.end_children()


@pytest.mark.parametrize("number", sorted(CATALOGUE.keys() - FULL_ONLY))
def test_a_claim_holds(number: int, place: Place) -> None:
    assert CATALOGUE[number](place)
