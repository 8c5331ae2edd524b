import numpy as np
import pytest

from resnest_imagenet.evaluation.accuracy import Evaluation
from resnest_imagenet.evaluation.class_table import format_classes, list_classes
from resnest_imagenet.evaluation.mistakes import count_confusions, measure_classes


def evaluation_of(labels, predicted):
    sure = np.ones(len(labels))
    return Evaluation(np.array(labels), np.array(predicted), sure > 0, sure, sure)


def test_figures_of_classes_by_hand():
    # Class 2 is never predicted; class 3 has no images, but is predicted; class 4 has neither.
    labels, predicted = [0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 3, 0]
    figures = measure_classes(count_confusions(evaluation_of(labels, predicted), 5))
    nan = np.nan
    np.testing.assert_allclose(figures.precision, [75, 50, 0, nan, nan])
    np.testing.assert_allclose(figures.recall, [75, 50, 0, nan, nan])
    np.testing.assert_allclose(figures.f1, [75, 50, 0, nan, nan])
    assert figures.images.tolist() == [4, 2, 1, 0, 0] and figures.predicted.tolist() == [4, 2, 0, 1, 0]
    assert figures.is_absent.tolist() == [False, False, False, True, True]
    assert figures.is_never_predicted.tolist() == [False, False, True, False, False]
    assert figures.macro_precision == figures.macro_recall == figures.macro_f1 == pytest.approx(125 / 3)


@pytest.mark.parametrize("seed", range(4))
def test_figures_of_classes_are_those_of_naive_counts(seed):
    rng = np.random.default_rng(seed)
    classes = 6 + seed
    # Some classes have no images, some are never predicted.
    labels, predicted = rng.integers(0, classes - 1, 40), rng.integers(seed % 3, classes, 40)
    labels[rng.random(40) < 0.3] = predicted[0]
    figures = measure_classes(count_confusions(evaluation_of(labels, predicted), classes))
    expected = []
    for k in range(classes):
        hits = misses = false_alarms = 0
        for true, answer in zip(labels.tolist(), predicted.tolist(), strict=True):
            hits += true == answer == k
            misses += true == k != answer
            false_alarms += true != k == answer
        if hits + misses == 0:
            assert np.isnan([figures.precision[k], figures.recall[k], figures.f1[k]]).all()
            continue
        precision = hits / (hits + false_alarms) if hits + false_alarms else 0.0
        recall = hits / (hits + misses)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        got = figures.precision[k], figures.recall[k], figures.f1[k]
        np.testing.assert_allclose(got, [100 * precision, 100 * recall, 100 * f1])
        expected.append(got)
    macro = figures.macro_precision, figures.macro_recall, figures.macro_f1
    np.testing.assert_allclose(macro, np.mean(expected, axis=0))


def test_without_images_there_are_no_figures():
    figures = measure_classes(np.zeros((3, 3), dtype=np.int64))
    assert figures.is_absent.all() and not figures.is_never_predicted.any()
    assert np.isnan([figures.macro_precision, figures.macro_recall, figures.macro_f1]).all()


def test_a_table_names_what_was_never_predicted_and_what_is_absent():
    labels, predicted = [0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 3, 0]
    figures = measure_classes(count_confusions(evaluation_of(labels, predicted), 5))
    listed = list_classes(figures, ["a", "n01443537", "c", "d\n", "e"])
    assert list(listed) == ["a", "n01443537", "c", "d\\n", "e"]
    assert (listed["c"].precision, listed["d\\n"].precision) == (0, None)
    assert format_classes(listed).splitlines() == [
        "class      images precision % recall %   F1 %",
        "a               4       75.00    75.00  75.00",
        "goldfish        2       50.00    50.00  50.00",
        "c               1        0.00     0.00   0.00",
        "mean of 3       7       41.67    41.67  41.67",
        "never predicted, so precision is 0: c",
        "without images, so not in the means: d\\n, e",
    ]


def test_a_table_of_many_classes_has_those_with_the_lowest_f1():
    labels = np.repeat(np.arange(30), 10)
    predicted = np.where(np.arange(300) % 10 < labels // 3, labels, 30)  # class k: k // 3 of 10 images are right
    names = [f"class {k:02}" for k in range(1000)]
    figures = measure_classes(count_confusions(evaluation_of(labels, predicted), 1000))
    head, *rows, mean, never, absent = format_classes(list_classes(figures, names)).splitlines()
    assert head.startswith("the 10 lowest F1 ") and [row[:8] for row in rows] == names[:10]
    assert mean.split() == ["mean", "of", "30", "300", "90.00", "45.00", f"{figures.macro_f1:.2f}"]
    assert never == "never predicted, so precision is 0: class 00, class 01, class 02"
    assert absent.startswith("without images, so not in the means: class 30, ") and absent.endswith(" and 962 more")
