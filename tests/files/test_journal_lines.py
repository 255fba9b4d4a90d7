"""A journal holds whole lines alone, whatever the disk does."""

import pytest

from recall_jax.errors import StorageError
from recall_jax.files.journal_lines import append_record, repair_journal

HEADER, RECORD = {"identity": 1}, {"unit": "embed"}


def test_the_header_comes_first_and_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    for _ in range(2):
        append_record(path, RECORD, HEADER)
    assert len(path.read_text().splitlines()) == 3
    assert repair_journal(path) == [HEADER, RECORD, RECORD]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_what_a_full_disk_did_not_take_is_not_in_it(before, disk):
    path = disk("size=8k") / "journal.jsonl"
    for _ in range(before):
        append_record(path, RECORD, HEADER)
    content = path.read_bytes() if before else b""
    with pytest.raises(StorageError, match="No space left"):
        append_record(path, {"long": "x" * 20_000}, HEADER)
    assert path.read_bytes() == content  # an empty one is nothing to be resumed
    assert len(repair_journal(path)) == (before and before + 1)
    append_record(path, RECORD, HEADER)
    assert len(repair_journal(path)) == before + 2
