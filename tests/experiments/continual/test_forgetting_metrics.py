"""The formulas, against matrices worked out by hand."""

import math

import numpy as np
import pytest

from recall_jax.experiments.continual.metrics import (
    METRICS,
    backward_transfer,
    final_average,
    forgetting,
    forward_transfer,
    measure,
    summarise_runs,
    unseen_average,
)

# three tasks and an unseen one
R = np.asarray(
    [
        [10.0, 20.0, 30.0, 40.0],
        [90.0, 25.0, 20.0, 35.0],
        [70.0, 80.0, 50.0, 30.0],
        [60.0, 85.0, 95.0, 20.0],
    ]
)


def test_metrics_of_a_hand_computed_matrix():
    assert final_average(R, 3) == (60 + 85 + 95) / 3
    assert backward_transfer(R, 3) == ((60 - 90) + (85 - 80)) / 2
    assert forward_transfer(R, 3) == ((25 - 20) + (50 - 30)) / 2
    assert forgetting(R, 3) == ((90 - 60) + (80 - 85)) / 2
    assert unseen_average(R, 3) == 20


def test_forgetting_is_from_the_best_earlier_stage_whenever_it_was():
    risen = R.copy()
    risen[2, 0] = 97.0  # the first task at its best after the second
    risen[1, 1] = 99.0  # the second before it was learnt
    assert forgetting(risen, 3) == ((97 - 60) + (99 - 85)) / 2
    assert backward_transfer(risen, 3) == backward_transfer(R, 3)
    of_base = R.copy()
    of_base[0] = 100.0  # the base is no stage of learning
    assert forgetting(of_base, 3) == forgetting(R, 3)


def test_two_tasks_and_none_unseen():
    two = np.asarray([[0.5, 0.1], [0.9, 0.3], [0.6, 0.8]])
    assert measure(two, 2) == {
        "final_average": pytest.approx(0.7),
        "unseen_average": None,
        "backward_transfer": pytest.approx(-0.3),
        "forgetting": pytest.approx(0.3),
        "forward_transfer": pytest.approx(0.2),
    }


def test_what_was_not_measured_leaves_metrics_out():
    only_last = R.copy()
    only_last[1:3] = math.nan
    found = measure(only_last, 3)
    assert (found["final_average"], found["unseen_average"]) == (80, 20)
    assert {found[name] for name in METRICS.keys() - {"final_average", "unseen_average"}} == {None}
    assert measure(R[[0, 1]], 1)["backward_transfer"] is None


def test_summaries_have_the_sample_standard_deviation():
    runs = [dict.fromkeys(METRICS, value) for value in (1.0, 2.0, 6.0)]
    runs[0] = runs[0] | {"forgetting": None}
    found = summarise_runs(runs)
    assert found["final_average"] == (3.0, pytest.approx(math.sqrt(7)), 3)
    assert found["forgetting"] == (4.0, pytest.approx(math.sqrt(8)), 2)
    assert summarise_runs(runs[:1])["final_average"] == (1.0, None, 1)
    assert summarise_runs(runs[:1])["forgetting"] is None
