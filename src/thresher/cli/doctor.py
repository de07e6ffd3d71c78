from thresher.cli import options as o
from thresher.cli.terminal import one_line, say, stderr, write_json


def doctor(model: o.Model = "smollm2-135m-instruct", threads: o.Threads = None, json: o.Json = None) -> None:
    """Show what this machine can do and which parts are used.

    Instruction set, threads, measured read bandwidth and matrix product rate, versions, where the model lies.
    """
    import platform
    from importlib.metadata import version

    import psutil
    import torch
    from rich.console import Console
    from rich.table import Table

    from thresher.evaluation.machine import matmul_rate, measure_machine
    from thresher.kernels.native import isas, kernel_set
    from thresher.models.resolve import resolve

    if threads:
        torch.set_num_threads(threads)
    with stderr.status("measuring the machine"):
        machine = measure_machine()
        float32 = matmul_rate(torch.float32)
    source = resolve(model, say)
    memory = psutil.virtual_memory()
    found = {
        "kernels": f"{kernel_set().name} (available: {', '.join(isas())})",
        "threads": f"{machine.threads} of {psutil.cpu_count()} logical cores",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
        "read bandwidth": f"{machine.read / 1e9:.1f} GB/s",
        "matrix product, bf16": f"{machine.matmul / 1e9:.0f} GFLOP/s",
        "matrix product, float32": f"{float32 / 1e9:.0f} GFLOP/s",
        "model": f"{source.name} in {source.folder}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("thresher", "torch", "transformers")),
        "python": f"{platform.python_version()} on {platform.platform()}",
    }
    if str(json) != "-":
        table = Table(show_header=False, box=None)
        for name, value in found.items():
            table.add_row(name, one_line(value))
        Console().print(table)
    write_json(
        json,
        found
        | {
            "isa": kernel_set().name,
            "thread_count": machine.threads,
            "read_bytes_per_second": machine.read,
            "bf16_flops": machine.matmul,
            "float32_flops": float32,
        },
    )
