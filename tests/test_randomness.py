import numpy as np

from resnest_imagenet.randomness import Purpose, stream, streams, uniform_rows


def test_rows_are_the_streams_of_their_numbers():
    numbers = [0, 5, 1_281_166, 5]
    rows = uniform_rows(2**62, Purpose.CROP, 269, numbers, 7)
    expected = [stream(2**62, Purpose.CROP, 269, number).random(7) for number in numbers]
    np.testing.assert_array_equal(rows, expected)


def test_streams_are_the_stream_of_each_number():
    """Whatever was drawn from the one before: half a word of 64 bits, or normal numbers, which take any count."""

    def draw(generator):
        return generator.integers(9, dtype=np.uint32), generator.random(5), generator.standard_normal(3)

    numbers = [3, 3, 0, 1_281_166]
    for number, generator in zip(numbers, streams(7, Purpose.APPEARANCE, 2, numbers), strict=True):
        for value, expected in zip(draw(generator), draw(stream(7, Purpose.APPEARANCE, 2, number)), strict=True):
            np.testing.assert_array_equal(value, expected)


def test_streams_differ_in_each_part_of_their_name():
    names = [(1, Purpose.CROP, 2, 3), (2, Purpose.CROP, 2, 3), (1, Purpose.APPEARANCE, 2, 3), (1, Purpose.CROP, 3, 3)]
    names.append((1, Purpose.CROP, 2, 4))
    first = [stream(*name).random() for name in names]
    assert len(set(first)) == len(names)
