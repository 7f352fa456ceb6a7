"""The report: one page that needs nothing else."""

import html.parser
import multiprocessing
import os
import re

import numpy as np
import pytest

import oobpickle
from oobpickle._cli.failure import CommandError
from oobpickle._cli.report import Recorder, page


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.urls = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.urls += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def recorded(n_messages):
    with oobpickle.enabled() as arena:
        recorder = Recorder(arena)
        one, other = multiprocessing.Pipe()
        with recorder:
            for _ in range(n_messages):
                one.send(np.ones(100_000))
                other.recv()
        one.close(), other.close()
    return recorder


def test_what_was_sent_is_in_it():
    recorder = recorded(3)
    text = page(recorder.points, ["a <script>.py", "x"])
    found = Page(text)

    assert found.open == found.urls == []
    assert "script" not in found.seen
    assert found.seen.count("polyline") == found.seen.count("svg") == 3
    assert "all 3 large messages out of band" in text
    assert "a &lt;script&gt;.py x" in text
    assert recorder.points[-1][1].n_messages_out_of_band == 3


def rows_of(recorder):
    text = page(recorder.points, ["a.py"], recorder.processes)
    table = text.partition("<h2>messages by process</h2>")[2].partition("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table)[1:]
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows]


def test_who_has_sent_it():
    with oobpickle.enabled() as arena, Recorder(arena) as recorder:
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:
            (pid,) = [process.pid for process in multiprocessing.active_children()]
            for _ in range(3):
                pool.apply(np.ones, (100_000,))
            pool.apply(len, (np.ones(50_000),))
            recorder._look()

    assert rows_of(recorder) == [
        [str(pid), "3", "2.3 MiB", "0", "0 bytes", "1"],
        [str(os.getpid()), "1", "391 KiB", "0", "0 bytes", "3"],
    ]


def test_who_has_ended_before_a_look_is_in_the_sums():
    recorder = recorded(2)
    assert rows_of(recorder) == [[str(os.getpid()), "2", "1.5 MiB", "0", "0 bytes", "2"]]
    ((incarnation, (pid, _)),) = recorder.processes.items()
    recorder.processes[incarnation] = pid, [1, 800_000, 0, 0, 1]

    assert rows_of(recorder)[-1] == ["ended before a look", "1", "781 KiB", "0", "0 bytes", "1"]


def test_many_processes_are_some_rows():
    recorder = recorded(1)
    ((_, (_, sent)),) = recorder.processes.items()
    recorder.processes = {n: (n, sent) for n in range(100)}
    rows = rows_of(recorder)

    assert len(rows) == 41
    assert rows[-1][:2] == ["60 others", "60"]


def test_a_program_that_closes_all_descriptors(monkeypatch):
    with oobpickle.enabled() as arena:
        recorder = Recorder(arena)
        monkeypatch.setattr(os, "pread", lambda *_: b"")
        with recorder:
            pass

    assert recorder.processes == {}
    assert rows_of(recorder) == []


def test_nothing_was_sent():
    text = page(recorded(0).points, ["a.py"])

    assert Page(text).seen.count("svg") <= 1
    assert "no message was large enough" in text


def test_a_long_run_has_not_more_points():
    recorder = recorded(0)
    recorder.points *= 600
    recorder._ended.clear()
    n_looks = []
    recorder._ended.wait = lambda pause_s: n_looks.append(pause_s) or len(n_looks) > 2
    recorder._look_again()

    assert len(recorder.points) < 700
    assert n_looks == [0.1, 0.2, 0.2]


def test_it_is_never_in_a_look_while_the_process_forks():
    recorder = recorded(0)
    assert not recorder._looking.locked()
    pid = os.fork()
    if pid == 0:
        os._exit(int(recorder._looking.locked()))

    assert os.waitpid(pid, 0)[1] == 0
    assert not recorder._looking.locked()


def test_where_it_cannot_be_written(tmp_path):
    with pytest.raises(CommandError, match="cannot write"):
        recorded(0).write(tmp_path, ["a.py"])
