"""A small part of each entry of the fault test: `make fault-test` does them in full."""

import pytest

from faults.__main__ import CATALOGUE
from faults.harness import Place

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("number", CATALOGUE)
def test_a_claim_holds(number, folder, request):
    place = Place(folder / str(number), fast=True)
    place.folder.mkdir()
    request.addfinalizer(place.end_children)
    assert CATALOGUE[number](place)
