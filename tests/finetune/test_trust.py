"""How far updates may go: on made-up courses of what a regression explains."""

from __future__ import annotations

import math
import random

import pytest

from tiltune.finetune.learning.trust import Trust


def after(explained, noise=0.0, asked=1.0, seed=0):
    """The trust after updates that explain so much of ``asked``, each but for Gaussian noise."""
    trust, draw = Trust(), random.Random(seed)
    for nats in explained:
        trust.observe(asked, asked - nats - noise * draw.gauss(0, 1))
    return trust


def test_updates_that_explain_more_and_more_may_move_all_that_is_asked_for():
    """Through noise of 16 times what an update adds, too. Without the rise .01 is left after 100 (next test)."""
    trust = after([0.005 * update for update in range(100)], noise=0.08, asked=3.0)
    assert trust.share > 0.4
    assert trust.nats == pytest.approx(3.0 * trust.share)


@pytest.mark.parametrize("slope", [0.0, -0.02])
def test_updates_that_do_not_gain_are_shortened(slope):
    course = [slope * update for update in range(150)]
    assert after(course[:60], noise=0.05).share < 0.1
    assert after(course, noise=0.05).share == 0.01  # the least


def test_a_policy_that_is_better_than_the_prior_but_worse_than_it_was_loses_trust():
    """The prior is no measure: .3 nats below its best, at .6 of 1 nat explained."""
    course = [0.01 * update for update in range(90)]
    assert after(course, noise=0.02).share > 0.8
    assert after([*course, *[0.6] * 150], noise=0.02).share < 0.05


def test_a_course_that_has_risen_is_shortened_once_it_is_level():
    """Through the noise of an update; what is left of the trust falls for as long as it stays there."""
    rise, level = [0.01 * update for update in range(90)], [0.9] * 180
    shares = [after([*rise, *level[:count]], noise=0.1).share for count in (0, 120, 180)]
    assert shares[0] > 0.4 and shares[1] < 0.4 * shares[0] and shares[2] < 0.4 * shares[1]


@pytest.mark.parametrize(("factor", "share"), [(1.04, 0.04), (0.6, 0.4), (0.0, 1.0), (3.0, 1.0)])
def test_new_targets_allow_updates_as_long_as_the_way_to_them(factor, share):
    trust = after([0.0] * 200, noise=0.05)
    assert trust.share == 0.01
    trust.rescale(factor)
    assert trust.share == pytest.approx(share)


def test_what_was_explained_of_old_targets_is_no_measure_for_new_ones():
    """Of targets that ask for a tenth, the policy explains less than nothing at first; it must unlearn, and may."""
    old, new = [min(0.9, 0.05 * update) for update in range(300)], [-0.5 + 0.01 * update for update in range(40)]
    kept, rescaled = after(old, noise=0.05), after(old, noise=0.05)
    rescaled.rescale(0.1)
    for trust in (kept, rescaled):
        for nats in new:
            trust.observe(0.1, 0.1 - nats)
    assert rescaled.share > 0.8 and kept.share < 0.1
    assert rescaled.nats == pytest.approx(rescaled.share * (300 + 4) / 340)  # the mean over both kinds of targets


def test_what_is_no_number_says_nothing():
    trust = after([0.1, 0.2])
    state = trust.state_dict()
    trust.observe(math.nan, 1.0)
    trust.observe(1.0, math.inf)
    assert trust.state_dict() == state
    assert Trust().nats == 0.0  # nothing was seen


def test_its_state_is_kept():
    trust, other = after([0.1, 0.5, 0.2], noise=0.1), Trust()
    other.load_state_dict(trust.state_dict())
    for each in (trust, other):
        each.observe(1.0, 2.0)
    assert other.state_dict() == trust.state_dict() and other.nats == trust.nats
