"""A small part of each entry of the fault test: `make fault-test` does them in full."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from faults.__main__ import CATALOGUE, make_place
from faults.harness import Place

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def find_figures(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[[int], Any]]:
    """Do the entries that are asked for, two at a time, and return what waits for one's figures."""
    folder = tmp_path_factory.mktemp("faults")
    _ = Place(folder / "first", fast=True).data  # made once, before two entries want it
    calls = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    places = {call.params["number"]: make_place(call.params["number"], True, folder) for call in calls if call}
    pool = ThreadPoolExecutor(2)
    entries = {number: pool.submit(CATALOGUE[number], place) for number, place in places.items()}
    yield lambda number: entries[number].result()
    pool.shutdown(wait=False, cancel_futures=True)
    for place in places.values():
        place.end_children()


@pytest.mark.parametrize("number", CATALOGUE)
def test_a_claim_holds(number: int, find_figures: Callable[[int], Any]) -> None:
    assert find_figures(number)
