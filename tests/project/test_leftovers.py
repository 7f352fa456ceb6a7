"""What the comparison against peers removes, and what it must leave alone."""

import importlib
import mmap
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_only_what_came_later_and_nobody_maps_is_removed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    _leftovers = importlib.import_module("_leftovers")
    monkeypatch.setattr(_leftovers, "SHM", tmp_path)

    def make(name):
        path = tmp_path / name
        path.write_bytes(b"content")
        return path

    earlier = make("psm_earlier")
    leftovers = _leftovers.Leftovers()
    forgotten, others, in_use, linked = map(make, ["psm_1", "ours", "sem.1", "created"])
    renamed = tmp_path / "sem.mp-1"
    renamed.hardlink_to(linked)
    (tmp_path / "ray_1").mkdir()
    make("ray_1/part")
    with open(in_use) as file, open(linked) as first:
        maps = [mmap.mmap(one.fileno(), 0, prot=mmap.PROT_READ) for one in (file, first)]
        linked.unlink()
        leftovers.remove()
        assert sorted(tmp_path.iterdir()) == sorted([earlier, others, in_use, renamed])
        for one in maps:
            one.close()
    leftovers.remove()

    assert not forgotten.exists()
    assert sorted(tmp_path.iterdir()) == sorted([earlier, others])
