"""Scoring of answers: what counts as right, near misses, intervals."""

import pytest

scoring = pytest.importorskip("videoxl.evaluation.scoring")


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("red", "red", True),
        (" Red. ", "red", True),
        ("“RED”", "red", True),
        ("the red", "red", True),
        ("a  red\tstar", "red star", True),
        ("red star", "red", False),
        ("it is red", "red", False),
        ("red or blue", "red", False),
        ("reds", "red", False),
        ("", "red", False),
        ("The", "the", True),  # an article alone is an answer
        ("three", "3", True),
        ("3", "three", True),
        ("3.", "3", True),
        ("13", "3", False),
        ("3 cards", "3", False),
        ("-3", "3", False),
        ("12 seconds", "12 seconds", True),
        ("12 s", "12 seconds", True),
        ("12.0 seconds", "12 seconds", True),
        ("at 12 seconds", "12 seconds", True),
        ("0:12", "12 seconds", True),
        ("1:02:05", "3725 seconds", True),
        ("twelve seconds", "12 seconds", True),
        ("12", "12 seconds", False),
        ("13 seconds", "12 seconds", False),
        ("12 minutes", "12 seconds", False),
        ("between 12 and 13 seconds", "12 seconds", False),
    ],
)
def test_open_answers(answer, expected, right):
    assert scoring.is_correct(answer, expected) is right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B) blue", "B"),
        ("(B) blue", "B"),
        ("B. Blue.", "B"),
        ("B, blue", "B"),
        ("blue", "B"),
        ("a red", "A"),  # an article, not option A
        ("the blue", "B"),
        ("B. red", None),  # the letter of one option, the text of another
        ("E", None),
        ("Blue or red", None),
        ("B because it is blue", None),
        ("", None),
        ("A and B", None),
    ],
)
def test_options(answer, letter):
    choices = ("red", "blue", "green", "cat")
    assert scoring.chosen_letter(answer, choices) == letter
    assert scoring.is_correct(answer, "B", choices) is (letter == "B")


def test_an_expected_letter_outside_the_options_is_an_error():
    with pytest.raises(ValueError, match="not one of the options A, B"):
        scoring.is_correct("C", "C", ("red", "blue"))


def test_errors_in_seconds():
    assert scoring.seconds_off("13 seconds", "12 seconds") == 1
    assert scoring.seconds_off("12", "12.5 seconds") == 0.5
    assert scoring.seconds_off("soon", "12 seconds") == float("inf")
    with pytest.raises(ValueError, match="expected a time"):
        scoring.seconds_off("1", "red")


def test_wilson_interval():
    # Reference values: R's prop.test(correct, total, correct=FALSE).
    for correct, total, low, high in ((19, 20, 0.7639, 0.9911), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)):
        assert scoring.wilson(correct, total) == pytest.approx((low, high), abs=1e-4)
    assert scoring.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="0 <= correct <= total"):
        scoring.wilson(3, 2)


def test_accuracy_of_nothing_is_none():
    assert scoring.accuracy([])["accuracy"] is None
    assert scoring.accuracy([True, False])["accuracy"] == 0.5
    assert scoring.mean([None, 1.0, 2.0]) == 1.5
    assert scoring.mean([None]) is None
