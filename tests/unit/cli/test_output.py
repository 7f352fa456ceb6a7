"""Output: columns."""

import sys

from oobpickle._cli.output import Progress, print_table, table_lines


def test_columns():
    lines = table_lines(("what", "n"), [("a", "1"), ("longer", "23")])

    assert lines == ["what     n", "a        1", "longer  23"]


def test_without_a_terminal_it_is_plain_text(capsys):
    print_table(("what", "n"), [("a", "1")])
    with Progress() as progress:
        progress.say("something")
    printed = capsys.readouterr()

    assert (printed.out, printed.err) == ("what  n\na     1\n", "")


def test_a_terminal_sees_progress_after_a_while(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress() as progress:
        progress.say("early")
        progress._start -= 3
        progress.say("late")
    printed = capsys.readouterr().err

    assert "early" not in printed
    assert "late ..." in printed
