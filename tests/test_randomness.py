import numpy as np

from resnest_imagenet.randomness import Purpose, stream, uniform_rows


def test_rows_are_the_streams_of_their_numbers():
    numbers = [0, 5, 1_281_166, 5]
    rows = uniform_rows(2**62, Purpose.CROP, 269, numbers, 7)
    expected = [stream(2**62, Purpose.CROP, 269, number).random(7) for number in numbers]
    np.testing.assert_array_equal(rows, expected)


def test_streams_differ_in_each_part_of_their_name():
    names = [(1, Purpose.CROP, 2, 3), (2, Purpose.CROP, 2, 3), (1, Purpose.APPEARANCE, 2, 3), (1, Purpose.CROP, 3, 3)]
    names.append((1, Purpose.CROP, 2, 4))
    first = [stream(*name).random() for name in names]
    assert len(set(first)) == len(names)
