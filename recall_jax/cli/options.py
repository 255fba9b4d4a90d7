"""Define the options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no output; warnings stay.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Rows of text: .jsonl, .json, .csv, .txt (also .gz) or .parquet."),
]
TypicalFile = Annotated[
    Path | None,
    typer.Option("--typical", help="Typical samples chosen before: use all rows of this file."),
]
Field = Annotated[
    str | None,
    typer.Option(
        "--field", help="The rows' text field, if not text, prompt + completion or messages."
    ),
]
PromptField = Annotated[
    str | None, typer.Option("--prompt-field", help="The rows' prompt field, if not prompt.")
]
CompletionField = Annotated[
    str | None,
    typer.Option("--completion-field", help="The rows' completion field, if not completion."),
]
Count = Annotated[int, typer.Option("--count", min=1, help="Number of typical samples.")]
Pool = Annotated[
    int, typer.Option("--pool", min=1, help="Choose among at most this many rows, drawn by seed.")
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, help="Truncate rows to this length.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows in a forward pass.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the draw and of k-means.")
]
Unit = Annotated[
    str, typer.Option("--unit", help="Unit to cluster: last, all, a unit's name or index.")
]
ComputeDtype = Annotated[
    str | None,
    typer.Option(
        "--compute-dtype",
        help="float32 or bfloat16 in the forward; by default bfloat16 on GPU and TPU only, for "
        "bfloat16 models.",
    ),
]
ShardSize = Annotated[
    str, typer.Option("--shard-size", help="Largest weight file, such as 5GB or 500MB.")
]
IgnoreConfig = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config",
        metavar="NAME",
        help="Allow a config attribute that recall does not know. Repeatable.",
    ),
]
IgnoreTokenizers = Annotated[
    bool,
    typer.Option(
        "--ignore-tokenizers",
        help="Allow models whose tokenizers read the samples differently.",
    ),
]
Plugin = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        help="Python file that defines merge methods. This runs its code. Repeatable.",
    ),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-compilation-cache", help="Neither use nor keep compiled programs."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Memory budget, such as 8GiB; by default 60 % of free memory.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, gpu or tpu; by default the best that JAX finds."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run of this command.")
]
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        help="Shard all tensors over devices, such as data=2,fsdp=4,tensor=1, or auto.",
    ),
]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Merge together with other processes, as configured by the cluster or by "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
    ),
]
WriteParts = Annotated[
    bool,
    typer.Option(
        "--parts",
        help="With --distributed: each process writes its part in OUT on a local disk; recall "
        "gather joins them.",
    ),
]
MergedTo = Annotated[
    str,
    typer.Option(
        "--to", help="huggingface (safetensors), or orbax: the Flax tree, for known families."
    ),
]
