from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from thresher.cli import options as o
from thresher.cli.planned import planned_shape
from thresher.cli.scale_frontier import frontier
from thresher.cli.scale_report import report
from thresher.cli.terminal import progress_bar, say, stderr, write_json
from thresher.errors import UsageError

scale = typer.Typer(help="Test-time scaling: sample answers, verify them, and see what accuracy costs.")


@scale.command()
@o.with_options
def run(
    out: Annotated[
        Path, typer.Option(help="A folder for the traces: one file for each method, which is gone on with.")
    ],
    model: o.Model = "smollm2-135m-instruct",
    weights: o.Weights = "bf16",
    task: Annotated[
        str,
        typer.Option(
            help="sums (arithmetic) or countdown (make a number), or a file: GSM8K, MATH or AIME as JSON or JSON lines."
        ),
    ] = "sums",
    difficulty: Annotated[int, typer.Option(help="Operations of a generated problem.", min=1, max=10)] = 2,
    questions: Annotated[int, typer.Option(help="Problems: as many are generated, or read of a file.", min=1)] = 30,
    samples: Annotated[int, typer.Option(help="Answers to each.", min=1, max=1024)] = 16,
    attention: Annotated[
        list[str] | None,
        typer.Option(help="Methods, separated by ; or given several times. Default: dense."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option(help="Of sampling; top-p is 0.95 and top-k 20, as Kinetics has it.")
    ] = 0.6,
    ask: Annotated[
        str, typer.Option(help="What is said behind each problem.")
    ] = "Think step by step, briefly, and put the final answer in \\boxed{}.",
    seed: Annotated[int, typer.Option(help="Of the problems, and of the samples.", min=0)] = 0,
    stop: Annotated[
        str,
        typer.Option(
            help="Take no more samples of a question when one is right (verifier), or when answers agree (majority)."
        ),
    ] = "none",
    confidence: Annotated[float, typer.Option(help="Of the majority, where --stop majority.")] = 0.95,
    processes: Annotated[int, typer.Option(help="Processes that share the work, each with the model.", min=1)] = 1,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster that does the work, or local: Ray is started here."),
    ] = None,
    threads: o.Threads = None,
    json: o.Json = None,
) -> None:
    """Sample answers to problems, verify them, and keep them as traces.

    thresher scale run --out traces --task sums --difficulty 2 --samples 16 --attention "dense;topk:budget=64"

    Interrupted, the same command goes on where it was: no sample is lost or taken twice.
    """
    from dataclasses import asdict

    import torch

    from thresher.attention.registry import parse_method
    from thresher.engine.llm import LLM
    from thresher.kinetics.adaptive import Stopping
    from thresher.kinetics.analysis import coverage
    from thresher.kinetics.experiment import Experiment
    from thresher.kinetics.experiment import run as run_experiment
    from thresher.kinetics.spread import here, on_ray
    from thresher.kinetics.spread import processes as in_processes
    from thresher.kinetics.tasks import GENERATED, generate, read_problems, verifier
    from thresher.machine.cores import available_cores

    methods = list(dict.fromkeys(map(parse_method, o.listed("attention", attention, "dense"))))
    stopping = Stopping(stop, confidence)
    if ray and processes > 1:
        raise UsageError("--processes and --ray: give one of them")
    if task in GENERATED:
        problems, name = generate(task, questions, difficulty, seed, ask), f"{task}{difficulty}"
    else:
        problems, name = read_problems(Path(task), questions, ask), Path(task).stem
    verifier()  # whether it is there, before anything takes long
    each = threads or max(1, available_cores() // processes)
    torch.set_num_threads(each)
    out.mkdir(parents=True, exist_ok=True)
    llm = None if ray or processes > 1 else LLM(model, weights=weights, progress=say)
    shape = asdict(planned_shape(model, weights))
    label = _label(model)
    rows = []
    for method in methods:
        experiment = Experiment(
            label,
            name,
            str(method),
            weights,
            max_tokens,
            temperature,
            seed=seed,
            ask=ask,
            stopping=stopping,
            shape=shape,
        )
        path = out / f"{_slug(f'{name}_{label}_{method}')}.jsonl"
        with ExitStack() as spread, progress_bar(str(method), "samples") as bar:
            if ray:
                answered = on_ray(model, experiment, None if ray == "local" else ray, each)
            elif llm is None:
                answered = spread.enter_context(in_processes(model, experiment, processes, each))
            else:
                answered = here(llm, experiment)
            kept = run_experiment(experiment, problems, samples, path, answered, bar)
        of = [kept.samples[p.key] for p in problems]
        right = [sum(s.score for s in found.values()) for found in of]
        row: dict[str, Any] = {
            "path": str(path),
            "method": str(method),
            "samples": sum(map(len, of)),
            "of": samples * len(problems),
            "pass@1": sum(r / len(f) for r, f in zip(right, of, strict=True)) / len(of),
            "best": sum(coverage(len(f), r, len(f)) for r, f in zip(right, of, strict=True)) / len(of),
            "tokens": sum(s.length for f in of for s in f.values()) / max(1, sum(map(len, of))),
            "unended": sum(not s.ended for f in of for s in f.values()) / max(1, sum(map(len, of))),
        }
        rows.append(row)
        say(
            f"{method}: pass@1 {row['pass@1']:.3f}, best of {samples} {row['best']:.3f}, {row['samples']} of "
            f"{row['of']} samples, {row['tokens']:.0f} tokens each, {100 * row['unended']:.0f} % at the cap: {path}"
        )
    stderr.print(f"next: thresher scale report {out} --out report.html", style="dim")
    write_json(json, {"model": label, "task": name, "runs": rows})


scale.command()(o.with_options(frontier))
scale.command()(o.with_options(report))


def _label(model: str) -> str:
    """The name of a model in traces: without the folders and the ending of a file."""
    path = Path(model)
    return path.name.removesuffix(".gguf").lower() if path.exists() else model


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)
