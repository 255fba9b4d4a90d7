"""A part of a run that was interrupted when its part.json was written, but not its OUT."""

from types import SimpleNamespace

from recall_jax.engine.pod.part import read_part, write_part
from recall_jax.files.checksums import file_checksum
from recall_jax.parallel.processes import ALONE


def test_a_part_written_again_does_not_vouch_for_its_old_self(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    writer = SimpleNamespace(total_size=0, weight_map={}, checksums={})
    for _ in range(2):
        write_part(tmp_path, ALONE, writer)
        files = read_part(tmp_path).files
        assert files == {"config.json": file_checksum(tmp_path / "config.json")}
