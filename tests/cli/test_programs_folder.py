"""Compiled programs are kept apart for each kind of processor."""

import jax
import pytest

from recall_jax.cli import console, programs_folder
from recall_jax.cli.programs_folder import processor_kind

X86 = """\
processor\t: {number}
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: {name}
cpu MHz\t\t: {clock}
flags\t\t: fpu sse2 avx2{flags}
"""
ARM = """\
processor\t: 0
Features\t: fp asimd{features}
CPU implementer\t: 0x41
CPU part\t: {part}
"""


@pytest.fixture
def kind(tmp_path):
    """The kind of processor that has a description of Linux's."""

    def kind(text: str) -> str:
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        return processor_kind(path)

    return kind


def x86(*, number=0, name="EPYC", clock=2400.0, flags="") -> str:
    return X86.format(number=number, name=name, clock=clock, flags=flags)


def test_other_instructions_or_another_model_are_another_kind(kind):
    found = [
        kind(x86()),
        kind(x86(flags=" avx512f")),
        kind(x86(name="Xeon")),
        kind(x86() + "\n" + x86(number=1, flags=" avx512f")),
        kind(ARM.format(features="", part="0xd0c")),
        kind(ARM.format(features=" sve", part="0xd0c")),
        kind(ARM.format(features="", part="0xd40")),
    ]
    assert len(set(found)) == len(found)


def test_the_number_of_processors_and_their_clock_are_no_kind(kind):
    assert kind(x86()) == kind(x86(clock=3100.5) + "\n" + x86(number=1, clock=1200.0))


def test_another_compiler_is_another_kind(kind, monkeypatch):
    before = kind(x86())
    monkeypatch.setattr(programs_folder, "version", lambda name: f"another {name}")
    assert kind(x86()) != before


def test_a_system_that_describes_no_processor_has_a_kind(tmp_path):
    assert processor_kind(tmp_path / "none").isalnum()


def test_a_command_takes_no_program_of_another_kind(recall, monkeypatch, tmp_path):
    """It looks where only processors of its kind look; `recall` restores what is set here."""
    folders = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kind in ("one", "another"):
        monkeypatch.setattr(programs_folder, "processor_kind", lambda kind=kind: kind)
        console.prepare_jax()
        folders.append(jax.config.jax_compilation_cache_dir)
    assert folders == [str(tmp_path / "recall_jax" / "xla" / kind) for kind in ("one", "another")]
