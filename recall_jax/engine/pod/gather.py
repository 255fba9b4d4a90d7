"""Join the parts of a model that processes have written to separate disks."""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from recall_jax.checkpoint.writer import INDEX_NAME, write_checksums, write_index
from recall_jax.engine.pod.part import ProcessPart, read_part
from recall_jax.errors import InputError, storage_faults
from recall_jax.files.checksums import ChecksummedFile, FileChecksum
from recall_jax.files.output import output_folder
from recall_jax.files.progress import Progress, silent

_BLOCK = 1 << 24
_SHOWN = 8


def gather(
    folders: Sequence[Path], out: Path, *, force: bool = False, progress: Progress = silent
) -> None:
    """Copy the files of all parts of one run into `out`, and write their index and checksums.

    Every byte is checked against its checksum. Raises InputError if the parts are not those of one
    run, if one is missing or damaged, or if `out` cannot be written.
    """
    parts = [read_part(folder) for folder in folders]
    _check_complete(parts)
    parts.sort(key=lambda part: part.index)
    weight_map = {tensor: file for part in parts for tensor, file in part.weight_map.items()}
    if len(weight_map) < sum(len(part.weight_map) for part in parts):
        raise InputError(f"a tensor is in two of the parts {', '.join(map(str, folders))}")
    total = sum(len(part.files) for part in parts)
    with output_folder(out, force=force, inputs=folders) as target:
        known: dict[str, FileChecksum] = {}
        copied = 0
        for part in parts:
            for name, expected in part.files.items():
                progress(name, len(known), total, read=copied, written=copied)
                if (target / name).exists():
                    raise InputError(f"{part.folder} holds {name} as another part does: name one")
                known[name] = _copy(part, name, target / name, expected)
                copied += expected["bytes"]
        by_file = dict(sorted(weight_map.items(), key=lambda item: item[1]))
        known[INDEX_NAME] = write_index(target, parts[0].total_size, by_file)
        write_checksums(target, known)
        progress("", total, total, read=copied, written=copied)


def _check_complete(parts: Sequence[ProcessPart]) -> None:
    """Raise InputError unless these are all parts of one run."""
    first = parts[0]
    by_index: dict[int, ProcessPart] = {}
    for part in parts:
        if (part.run, part.count, part.total_size) != (first.run, first.count, first.total_size):
            raise InputError(
                f"{part.folder} is part of a different run than {first.folder}: name the parts of "
                "one run"
            )
        if part.index in by_index:
            twin = by_index[part.index].folder
            raise InputError(f"{twin} and {part.folder} are both part {part.index}: name one")
        by_index[part.index] = part
    if missing := first.count - len(parts):
        absent = (str(index) for index in range(first.count) if index not in by_index)
        some = ", ".join(islice(absent, _SHOWN)) + f" and {missing - _SHOWN} more" * (
            missing > _SHOWN
        )
        raise InputError(
            f"{'part' if missing == 1 else 'parts'} {some} of {first.count} (numbered from 0) not "
            "given: name the folders that all processes have written"
        )


def _copy(part: ProcessPart, name: str, target: Path, expected: FileChecksum) -> FileChecksum:
    source = part.folder / name
    with storage_faults(f"write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
    with storage_faults(f"read {source}"), source.open("rb") as data:
        if (
            os.fstat(data.fileno()).st_size != expected["bytes"]
        ):  # the copy is allocated at this size
            raise _damaged(part, source)
        file = ChecksummedFile(target, expected["bytes"])
        try:
            while block := data.read(_BLOCK):
                file.write(block)
        finally:
            found = file.close()
    if found != expected:
        raise _damaged(part, source)
    return found


def _damaged(part: ProcessPart, source: Path) -> InputError:
    return InputError(
        f"{source} is damaged: it does not hold the bytes that process {part.index} wrote: copy it "
        "again from its machine"
    )
