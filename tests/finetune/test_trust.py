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
    """Through noise of 16 times what an update adds, too."""
    trust = after([0.005 * update for update in range(100)], noise=0.08, asked=3.0)
    assert trust.share > 0.6
    assert trust.nats == pytest.approx(3.0 * trust.share)


def test_updates_that_lose_are_shortened_until_they_win_again():
    lost = after([-0.02 * update for update in range(60)], noise=0.05)
    assert lost.share == 0.01  # the least
    shares = []
    for update in range(60):
        lost.observe(1.0, 1.0 - 0.02 * update)
        shares.append(lost.share)
    assert shares[-1] > 1.5 * min(shares)


def test_a_policy_that_is_better_than_the_prior_but_worse_than_it_was_loses_trust():
    """The prior is no measure: .3 nats below its best, at .6 of 1 nat explained."""
    course = [min(0.9, 0.05 * update) for update in range(60)]
    assert after(course).share == 1.0
    assert after([*course, *[0.6] * 40]).share < 0.1


def test_new_targets_are_measured_on_their_own():
    """Of targets that ask for a tenth, the policy explains less than nothing at first; it must unlearn, and may."""
    old, new = [min(0.9, 0.05 * update) for update in range(60)], [-0.5 + 0.01 * update for update in range(40)]
    kept, renewed = after(old), after(old)
    renewed.renew()
    for trust in (kept, renewed):
        for nats in new:
            trust.observe(0.1, 0.1 - nats)
    assert renewed.share == 1.0 and kept.share < 0.1
    assert renewed.nats == pytest.approx((60 + 4) / 100)  # the mean over both kinds of targets


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
