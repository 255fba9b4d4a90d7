"""Write the model card of a fine-tuned folder, `README.md`."""

import json
from collections.abc import Mapping
from typing import Any

from recall_jax.report import wording
from recall_jax.report.markdown import code, plain


def training_card(record: Mapping[str, Any], out_name: str) -> str:
    """Return the Markdown of the card of folder `out_name`, for the record in `training.json`."""
    losses, best = record["losses"], record["best_step"]
    facts = [
        f"{record['steps']} steps, {record['tokens']:,} tokens",
        f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last",
    ]
    if best is not None:
        loss = dict(map(tuple, record["validation_losses"]))[best]
        facts.append(f"validation loss {loss:.4f} after step {best}, whose weights these are")
    settings = "\n".join(
        f"- {code(name)}: {code(json.dumps(value))}" for name, value in record["settings"].items()
    )
    parts = [
        "---\nlibrary_name: transformers\ntags:\n- recall_jax\n---",
        f"# {plain(out_name)}",
        f"{code(record['model'])} fine-tuned on {code(record['data']['path'])} "
        f"({record['data']['rows']:,} rows) by the method {code(record['method'])}, made with "
        "recall_jax. `training.json` holds every number.",
        "\n".join(f"- {fact}" for fact in facts),
        "## Settings",
        settings,
    ]
    return wording.printable("\n\n".join(parts) + "\n")
