"""The tasks on strings by their algebra, brackets by a parser of their own, and the two splits."""

from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.errors import InputError
from recall_jax.evaluation.examples import make_examples
from recall_jax.evaluation.generators import GENERATORS
from recall_jax.evaluation.rows import TaskRows, load_rows
from recall_jax.evaluation.strings import (
    ALPHABET,
    LENGTHS,
    TASKS,
    draw_distinct,
    draw_exercises,
    is_held_out_string,
    nest,
    reverse,
    rotate,
    shift,
    sort,
    swap,
    tree,
)
from recall_jax.evaluation.task import find_task

TEXTS = st.text(ALPHABET, max_size=12)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("reverse", "ofgzaz"),
        ("sort", "afgozz"),
        ("shift", "abahgp"),
        ("swap", "azgzof"),
        ("rotate", "azgfoz"),
        ("tree", "((z(az))(g(fo)))"),
        ("nest", "(z)(a(z)(g)(f(o)))"),
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


def parse(text):
    """A text of brackets as nested lists of letters and lists."""
    stack = [[]]
    for character in text:
        if character == "(":
            stack.append([])
        elif character == ")":
            closed = stack.pop()
            stack[-1].append(closed)
        else:
            stack[-1].append(character)
    (whole,) = stack
    return whole


def leaves(parsed):
    return "".join(part if isinstance(part, str) else leaves(part) for part in parsed)


@given(TEXTS.filter(len))
def test_a_tree_splits_its_letters_into_halves(text):
    def check(node):
        if isinstance(node, str):
            return 1
        left, right = map(check, node)
        assert right - left in (0, 1)
        return left + right

    (root,) = parse(tree(text))
    assert check(root) == len(text)
    assert leaves(root) == text


@given(TEXTS)
def test_a_nest_hangs_every_letter_below_the_nearest_smaller_one_before_it(text):
    found = []

    def walk(node, parent):
        letter, *children = node
        place = len(found)
        found.append((letter, parent))
        for child in children:
            walk(child, place)

    for node in parse(nest(text)):
        walk(node, None)
    assert "".join(letter for letter, _ in found) == text
    for place, (letter, parent) in enumerate(found):
        smaller = [before for before in range(place) if text[before] < letter]
        assert parent == max(smaller, default=None)


def text_of(row):
    return row["prompt"].removesuffix("=").split(" ")[1]


def test_training_and_held_out_rows_have_no_string_in_common():
    train = {text_of(row) for row in islice(draw_exercises(tuple(TASKS), 0), 5000)}
    test = {text_of(row) for row in islice(draw_exercises(tuple(TASKS), 1, held_out=True), 2000)}
    assert not train & test
    assert not any(map(is_held_out_string, train))
    assert all(map(is_held_out_string, test))


def test_drawing_follows_its_seed_and_covers_tasks_and_lengths_evenly():
    rows = list(islice(draw_exercises(("sort", "swap"), 7), 2000))
    assert rows == list(islice(draw_exercises(("sort", "swap"), 7), 2000))
    assert rows != list(islice(draw_exercises(("sort", "swap"), 8), 2000))
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


def test_tasks_of_the_package_ask_held_out_rows_of_their_kind():
    for task in TASKS:
        asked = find_task(f"strings_{task}")
        rows = load_rows(asked, None).rows
        assert len({row["prompt"] for row in rows}) == len(rows) == 256
        assert all(row["prompt"].startswith(f"{task} ") for row in rows)
        assert all(is_held_out_string(text_of(row)) for row in rows)
        # an answer that does not end in time is a token longer than any that is right
        assert asked.scoring.max_new_tokens > max(len(row["completion"]) for row in rows)
        assert find_example(asked, rows[0]) == (rows[0]["prompt"], (rows[0]["completion"],))


def find_example(task, row):
    (example,) = make_examples(task, TaskRows((row,), (0,), ("row 0",), "here"))
    return example.prompt, example.references


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match="no task 'count' on strings: choose from reverse, sort"):
        GENERATORS["strings"]("count", 1, 0)
