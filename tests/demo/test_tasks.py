"""The five tasks by their algebra, and the two splits."""

from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.demo.tasks import (
    ALPHABET,
    LENGTHS,
    TASKS,
    draw,
    draw_distinct,
    is_held_out,
    reverse,
    rotate,
    shift,
    sort,
    swap,
)

TEXTS = st.text(ALPHABET, max_size=12)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("reverse", "ofgzaz"),
        ("sort", "afgozz"),
        ("shift", "abahgp"),
        ("swap", "azgzof"),
        ("rotate", "azgfoz"),
    ],
)
def test_an_answer_worked_out_by_hand(task, answer):
    assert TASKS[task]("zazgfo") == answer


def test_the_odd_letter_out_stays():
    assert swap("abcde") == "badce"


@given(TEXTS)
def test_reverse_and_swap_undo_themselves(text):
    assert reverse(reverse(text)) == text
    assert swap(swap(text)) == text


@given(TEXTS)
def test_as_many_rotations_as_letters_and_shifts_as_the_alphabet_lead_back(text):
    rotated = shifted = text
    for _ in text:
        rotated = rotate(rotated)
    for _ in ALPHABET:
        shifted = shift(shifted)
    assert rotated == text
    assert shifted == text


@given(TEXTS)
def test_sort_orders_and_all_but_shift_keep_the_letters(text):
    ordered = sort(text)
    assert all(left <= right for left, right in pairwise(ordered))
    for task in (reverse, sort, swap, rotate):
        assert Counter(task(text)) == Counter(text)


@given(TEXTS, TEXTS)
def test_reverse_turns_a_sum_around_and_shift_passes_through_it(left, right):
    assert reverse(left + right) == reverse(right) + reverse(left)
    assert shift(left + right) == shift(left) + shift(right)


def text_of(row):
    return row["prompt"].removesuffix("=").split(" ")[1]


def test_training_and_held_out_rows_have_no_string_in_common():
    train = {text_of(row) for row in islice(draw(tuple(TASKS), 0), 5000)}
    test = {text_of(row) for row in islice(draw(tuple(TASKS), 1, held_out=True), 2000)}
    assert not train & test
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, test))


def test_drawing_follows_its_seed_and_covers_tasks_and_lengths_evenly():
    rows = list(islice(draw(("sort", "swap"), 7), 2000))
    assert rows == list(islice(draw(("sort", "swap"), 7), 2000))
    assert rows != list(islice(draw(("sort", "swap"), 8), 2000))
    tasks = Counter(row["prompt"].split(" ")[0] for row in rows)
    lengths = Counter(len(text_of(row)) for row in rows)
    assert set(lengths) == set(LENGTHS)
    assert all(900 < count < 1100 for count in tasks.values())
    assert all(300 < count < 500 for count in lengths.values())


def test_distinct_rows_are_distinct_and_right():
    rows = draw_distinct("shift", 500, 3)
    assert len({row["prompt"] for row in rows}) == len(rows) == 500
    for row in rows:
        assert row["prompt"] == f"shift {text_of(row)}="
        assert row["completion"] == shift(text_of(row))
