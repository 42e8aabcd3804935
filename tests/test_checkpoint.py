"""The one error for checkpoints."""

import pickle

from lumina_rt import CheckpointError


def test_one_problem_is_one_line():
    assert str(CheckpointError("a/b", ["x is missing"])) == "cannot load a/b: x is missing"


def test_several_problems_stand_below_each_other_and_many_are_counted():
    lines = str(CheckpointError("a", [f"problem {i}" for i in range(23)])).split("\n")
    assert lines[0] == "cannot load a:"
    assert lines[1] == "  problem 0"
    assert lines[20:] == ["  problem 19", "  ... and 3 more"]


def test_it_is_a_value_error_that_survives_a_process_border():
    error = pickle.loads(pickle.dumps(CheckpointError("a", ["b", "c"])))
    assert isinstance(error, ValueError)
    assert (error.path, error.problems) == ("a", ["b", "c"])
