import numpy as np
import pytest

from vitreous.prove.statistics import Interval, bootstrap_mean, mcnemar, median_ratio, paired_difference, wilson


def test_wilson_by_hand():
    # z = 1.959964: centre (0.9 + z²/200) / (1 + z²/100), half-width z·sqrt(0.9·0.1/100 + z²/40000) / (1 + z²/100)
    z = 1.959964
    centre = (0.9 + z**2 / 200) / (1 + z**2 / 100)
    half = z * np.sqrt(0.9 * 0.1 / 100 + z**2 / 40000) / (1 + z**2 / 100)
    got = wilson(90, 100)
    assert (got.value, got.low, got.high) == pytest.approx((0.9, centre - half, centre + half), abs=1e-6)
    assert (got.low, got.high) == pytest.approx((0.8256, 0.9448), abs=1e-4)


def test_wilson_at_the_ends_stays_inside():
    assert wilson(50, 50).high == pytest.approx(1) and 0.9 < wilson(50, 50).low < 1
    assert wilson(0, 50).low == 0 and wilson(0, 50).high > 0


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 2**5)
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)
    assert mcnemar(3, 9) == mcnemar(9, 3)


@pytest.mark.parametrize(("lose", "gain"), [(0.08, 0.03), (0.01, 0.005)])
def test_paired_difference_covers_the_truth(lose, gain):
    rng = np.random.default_rng(1)
    n, covered = 300, 0
    for trial in range(300):
        lost, _, gained = rng.multinomial(n, [lose, 1 - lose - gain, gain])
        got = paired_difference(int(lost), int(gained), n, seed=trial)
        covered += got.low <= gain - lose <= got.high
    assert 0.92 <= covered / 300 <= 0.995


def test_paired_difference_is_paired_and_seeded():
    few, many = paired_difference(10, 10, 1000), paired_difference(200, 200, 1000)
    assert few.value == many.value == 0
    assert few.high - few.low < (many.high - many.low) / 3
    assert paired_difference(10, 4, 1000, seed=3) == paired_difference(10, 4, 1000, seed=3)


def test_no_changed_answer_is_not_certainty():
    got = paired_difference(0, 0, 1000)
    assert got.value == 0 and got.low < 0 < got.high
    assert got.high < 0.005


def test_bootstrap_mean_matches_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 1, 400)
    got = bootstrap_mean(values)
    error = values.std() / 20
    assert got.value == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx((got.value - 1.96 * error, got.value + 1.96 * error), abs=0.01)


def test_ratio_is_taken_inside_each_round():
    rng = np.random.default_rng(0)
    slow_machine = np.exp(rng.normal(0, 1, 50))  # the whole machine speeds up and slows down, wildly
    got = median_ratio(4 * slow_machine, 2 * slow_machine)
    assert (got.value, got.low, got.high) == pytest.approx((2, 2, 2))


def test_interval_of_a_median_is_that_of_order_statistics():
    assert median_ratio(np.arange(1.0, 6), np.ones(5)) == Interval(3.0, 1.0, 5.0), "five rounds: all there is"
    assert median_ratio(np.arange(1.0, 11), np.ones(10)) == Interval(5.5, 2.0, 9.0), "the textbook's second and ninth of ten"
    rng = np.random.default_rng(0)
    for n in (6, 9, 25):
        draws = rng.standard_cauchy((2000, n)) + 10  # no variance at all
        found = [median_ratio(d, np.ones(n)) for d in draws]
        assert np.mean([f.low <= 10 <= f.high for f in found]) >= 0.945
