"""One run of the whole demo for every test that looks at what it leaves."""

import pytest


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """(the folder that the demo wrote, the table it returned)"""
    from recall_jax.experiments.demo.run import run_demo

    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(out)
