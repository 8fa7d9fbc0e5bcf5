"""The file of row losses: written, read, cut to a step, refused where it is none."""

import numpy as np
import pytest

from minisft.errors import UserError
from minisft.row_losses import append_row_losses, make_records, read_row_losses, truncate_row_losses


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "row_losses.bin"
    for step in (1, 2, 3):
        append_row_losses(path, make_records(step, np.array([step, 9]), np.array([0.5, 1.5])))
    return path


def test_records_are_read_in_order_and_take_12_bytes(path):
    records = read_row_losses(path)
    assert records["step"].tolist() == [1, 1, 2, 2, 3, 3]
    assert records["row"].tolist() == [1, 9, 2, 9, 3, 9]
    assert records["loss"].tolist() == [0.5, 1.5] * 3
    assert path.stat().st_size == 12 + 6 * 12


def test_a_killed_write_is_left_out_and_removed_on_resume(path):
    with path.open("ab") as file:
        file.write(b"12345")
    assert len(read_row_losses(path)) == 6
    truncate_row_losses(path, 3)
    assert path.stat().st_size == 12 + 6 * 12


@pytest.mark.parametrize(("step", "left"), [(0, 0), (1, 2), (2, 4), (7, 6)])
def test_the_steps_after_a_checkpoint_are_dropped(path, step, left):
    truncate_row_losses(path, step)
    assert len(read_row_losses(path)) == left


def test_what_is_no_file_of_row_losses_is_refused(path):
    with pytest.raises(UserError, match="there are no losses of rows"):
        read_row_losses(path.with_name("none.bin"))
    path.write_bytes(b"something else, which is long enough")
    with pytest.raises(UserError, match="not a file of row losses"):
        read_row_losses(path)
    truncate_row_losses(path, 1)
    assert not path.exists()


def test_steps_out_of_order_are_refused(path):
    append_row_losses(path, make_records(1, np.array([1]), np.array([1.0])))
    with pytest.raises(UserError, match="out of order"):
        read_row_losses(path)
