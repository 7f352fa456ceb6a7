"""``oobpickle explain``: files and names."""

import pickle

import numpy as np


def test_a_pickle(command, tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"weights": np.ones(100_000)}))
    child = command("explain", "model.pkl")

    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.startswith("$: dict of 1\n")
    assert "['weights']: ndarray float64 100000" in child.stdout


def test_a_name_of_a_module_and_what_a_function_returns(command, tmp_path):
    (tmp_path / "model.py").write_text(
        "import numpy as np\nclass Net:\n    weights = np.ones(50_000)\n"
        "def build():\n    return [Net.weights]\n"
    )
    child = command("explain", "model:Net.weights")
    assert child.stdout.startswith("Net.weights: ndarray float64 50000\n")
    child = command("explain", "model:build")
    assert child.stdout.startswith("build(): list of 1\n")
    assert (child.returncode, child.stderr) == (0, "")
