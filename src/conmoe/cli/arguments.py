"""What several verbs take: arguments and options, explained once. :mod:`conmoe.cli.read` reads their text."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or a name on the Hugging Face hub.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="Text: a .txt, .jsonl, .parquet file (also .gz, .xz) or hub:name[:config][:split], with a weight "
        "if wanted: wiki.txt@0.3. Repeatable. Without it a small built-in text is used.",
    ),
]
Tokens = Annotated[int, typer.Option(metavar="N", min=1, help="How many tokens of text to use.")]
SeqLen = Annotated[
    int | None, typer.Option(metavar="N", min=2, help="Length of a sequence; by default 512, or what the model allows.")
]
Seed = Annotated[int, typer.Option(help="Chooses the documents and the token sample.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), bfloat16, float16 or float32.")]
Sample = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Tokens of each layer's sample, which functional distances are measured on."),
]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Share (0.5, 50%) or, without point or percent sign, count of experts to keep, of the layers that are "
        "planned. Needed unless --fit is given, or --budget lists counts."
    ),
]
Fit = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="In place of --keep: as many experts as fit into 24GB, 500MB, 20GiB or 60% of the source's bytes. All "
        "tensors of the result are counted, file headers and the tokenizer are not.",
    ),
]
Sequential = Annotated[
    bool,
    typer.Option(
        "--sequential",
        help="Plan each layer on inputs that passed through the compressed layers before it. Runs every layer twice.",
    ),
]
Refine = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="Afterwards fit the plan to what each layer's own experts added on the token sample: gains (a multiplier "
        "for each expert's gate), refit (the down projections, in closed form), reconstruct (all weights of the "
        "experts that stay, by gradient) or none. With --sequential on inputs from the compressed layers.",
    ),
]
RefineOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--refine-option", metavar="NAME=VALUE", help="An option of the refinement: see conmoe refinements. Repeatable."
    ),
]
SequentialSample = Annotated[
    int,
    typer.Option(
        "--sample", metavar="N", min=0, help="With --sequential: tokens of each layer's sample; 0: as in STATS."
    ),
]
Layers = Annotated[
    str, typer.Option(metavar="LIST", help="Decoder layers to plan: 10-23,26. The others stay as they are.")
]
BudgetName = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="NAME",
        help="How experts are shared out over the layers: see conmoe budgets. Or a count for each layer or scope that "
        "is planned: 12,16,16. By default the method's own.",
    ),
]
BudgetOptions = Annotated[
    list[str] | None,
    typer.Option("--budget-option", metavar="NAME=VALUE", help="An option of the budget. Repeatable."),
]
MethodName = Annotated[str, typer.Option("--method", help="See conmoe methods.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="An option of the method. Repeatable.")
]
Protect = Annotated[
    list[str] | None,
    typer.Option(
        metavar="EXPERTS", help="Experts that must stay: super (the default), none, or LAYER:EXPERT. Repeatable."
    ),
]
Scope = Annotated[
    int, typer.Option(metavar="N", min=1, help="Neighbouring layers that share one pool of prototypes: 1, 2, 4 ...")
]
FormName = Annotated[
    str | None, typer.Option("--form", help="shared, sliced or expanded; by default what suits the method.")
]
ServeEngine = Annotated[
    str,
    typer.Option(
        "--serve",
        metavar="ENGINE",
        help="Ask before any work whether an engine takes the result: vllm, sglang, llama.cpp, mlx or transformers.",
    ),
]
TensorParallel = Annotated[int, typer.Option("--tp", metavar="N", min=1, help="With --serve: tensor-parallel ranks.")]
ExpertParallel = Annotated[int, typer.Option("--ep", metavar="N", min=1, help="With --serve: expert-parallel ranks.")]
Mtp = Annotated[
    str,
    typer.Option(
        "--mtp",
        metavar="POLICY",
        help="What becomes of a head that predicts further tokens: keep (as it is), prune (its experts, by their "
        "weights alone), drop, or auto (the first of these that can be).",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with the checkpoint.")]
