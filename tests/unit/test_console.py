"""How many rows are done is said now and then, not for each."""

from minisft.console import row_progress


def test_a_line_now_and_then_where_there_is_no_terminal(capsys):
    seconds = iter([0.0, 1.0, 10.5, 11.0, 21.0])
    with row_progress(clock=lambda: next(seconds)) as show:
        for done in (10, 1000, 2000, 123456):
            show(done)
    assert capsys.readouterr().err == "1,000 rows prepared\n123,456 rows prepared\n"
