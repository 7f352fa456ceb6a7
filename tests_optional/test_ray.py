"""merge on Ray, with two nodes on this machine. Needs an environment of its own."""

from pathlib import Path

import pytest

from process.harness import run_program
from project.test_docs import PROJECT, blocks_of

pytest.importorskip("ray")
FOLDER = Path(__file__).parent / "programs"
CASES = (
    "same_as_here",
    "both_nodes_work",
    "one_object_for_all_calls",
    "references_are_pieces_and_stay_as_they_are",
    "a_worker_dies_in_func",
    "a_worker_dies_in_op",
    "a_node_goes",
    "errors_where_other_tasks_end_just_then",
    "the_rest_is_called_off_and_nothing_is_left",
    "rays_own_pool_is_refused",
)


@pytest.mark.parametrize("case", CASES)
def test_ray(case):
    run_program("ray_clusters", case, folder=FOLDER, flags=(), stderr="...", within_s=120)


def test_the_block_of_the_document(tmp_path):
    path = PROJECT / "docs" / "how-to" / "more-than-one-machine.md"
    blocks = blocks_of(path, path.read_text())
    (block,) = (b for b in blocks if b.language == "python no-run" and "ray" in b.lines[0])
    program = tmp_path / "document_ray.py"
    program.write_text("\n".join([*blocks[0].lines, *block.lines]))

    output = run_program("document_ray", folder=tmp_path, flags=(), stderr="...", within_s=120)
    assert output.splitlines() == ["20000", "20000"]
