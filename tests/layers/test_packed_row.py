"""The documents of a packed row: set, nested and forgotten."""

import pytest

from halfbyte.layers.packed_row import current_row, packed_row


def test_a_row_is_known_within_its_context_only():
    assert current_row() is None
    with packed_row([3, 0, 2]) as row:
        assert current_row() is row
        assert row.lengths == (3, 2)  # an empty document is none
    with pytest.raises(ZeroDivisionError), packed_row([1]):
        _ = 1 / 0
    assert current_row() is None


def test_what_is_asked_for_within_counts_outside_as_well():
    with packed_row(()) as outer:
        for window in (None, 9, 7, 8):
            with packed_row([4]) as row:
                row.attention_calls, row.scans, row.window = 2, 3, window
            assert current_row() is outer
    assert (outer.attention_calls, outer.scans, outer.window) == (8, 12, 7)
