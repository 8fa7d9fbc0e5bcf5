"""How many rows are done is said now and then, not for each."""

from minisft import console


def test_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 10.5, 11.0, 21.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.row_progress() as show:
        for done in (10, 1000, 2000, 123456):
            show(done)
    assert capsys.readouterr().err == "1,000 rows prepared\n123,456 rows prepared\n"
