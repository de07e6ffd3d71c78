"""Alters valid KV files, with every kind of index and with recurrent state, and makes checksums that match again; opens
each and asks one step.

python tests/fuzz/kv_fuzz.py --count 100000

Anything but an answer or a ThresherError is a fault: another exception, the end of the process, more than two seconds,
or more memory than twice the file and a constant. The step runs in a process of its own, so that whatever ends it is
seen; `--first NUMBER --count 1` with the same seed makes one file again.
"""

import argparse
import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MOST_SECONDS = 2.0  # of processor time, for a file
STUCK_SECONDS = 120  # without a new file, however busy the machine is
MOST_EXTRA = 96 << 20  # bytes beyond twice the file: first uses of torch, and what building clusters of all rows takes
SETTINGS = "dense_below=0,window=8,dense_layers=0"
LONG, SHORT = 1250, 300  # tokens: enough for sorted tables, and not
METHODS = {
    f"lsh:K=4,L=8,{SETTINGS}": LONG,
    f"lsh:K=3,L=5,certify=0.1,{SETTINGS}": SHORT,
    "auto:dense_below=0,tail=6,window=8,budget=24,dense_layers=0": LONG,
    f"sign:tail=4,budget=16,{SETTINGS}": SHORT,
    f"sign:bits=32,budget=16,{SETTINGS}": LONG,
    f"verified:heavy=8,{SETTINGS}": SHORT,
    f"clusters:tokens=4,budget=16,{SETTINGS}": SHORT,
    f"quest:page=16,budget=32,tail=4,{SETTINGS}": LONG,
    f"block_topk:budget=32,tail=4,{SETTINGS}": SHORT,
    f"snapkv:budget=16,tail=4,{SETTINGS}": SHORT,
    f"streaming:tail=4,{SETTINGS}": SHORT,
    f"topk:budget=16,tail=4,{SETTINGS}": SHORT,
    "dense": SHORT,
}
SNAPSHOTS = 2100  # tokens: a snapshot of the recurrent state at a checkpoint, and one at the end
METHODS_WITH_STATE = {
    "auto:dense_below=0,tail=6,window=8,budget=24,dense_layers=0": SNAPSHOTS,
    f"quest:page=16,budget=32,tail=4,{SETTINGS}": SHORT,
    f"snapkv:budget=16,tail=4,{SETTINGS}": SHORT,
    "dense": SNAPSHOTS,
}
INTS = [
    0,
    1,
    -1,
    2,
    3,
    63,
    64,
    65,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    -(2**31),
    2**31,
    2**32,
    2**53,
    2**63,
    2**64,
    10**30,
]
VALUES = [*INTS, None, True, False, 1.5, math.nan, math.inf, "", "x", "x" * 5000, [], [1], {}, {"a": 1}, [[[]]]]
STATES = [*([n, m] for n in (-1, 0, 1, 2, 2**14, 2**24, 2**32, 10**30) for m in (0, 1, 256, 2**14)), [2.0, 256], [2]]
FLOATS = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, -1e-45, 0.0, -0.0, 1.0, -1.0, 1e20, 1e-20]
NUMPY = {"bfloat16": np.uint16, "uint16": np.uint16, "uint8": np.uint8}


@dataclass
class Array:
    """bfloat16 is kept as its bits."""

    dtype: str
    numbers: np.ndarray


@dataclass
class File:
    """What a KV file is made of, and how it is spoilt once it is written."""

    model: tuple  # its kind and dtype
    method: str
    fields: dict
    ids: np.ndarray
    states: Array | None  # snapshots `[n, layers, size]`
    rows: Array
    meta: dict | None
    arrays: dict
    entries: dict  # of the index: what stands there in place of what is true
    spoil: list


# Mutations -----------------------------------------------------------------------------------------------------------


def extreme(array, draw):
    """A number that the dtype holds."""
    kind = array.numbers.dtype
    if array.dtype == "bfloat16":
        return np.float32(draw.choice(FLOATS)).view(np.uint32) >> np.uint32(16)
    if kind.kind == "f":
        return draw.choice(FLOATS)
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    near = array.numbers.shape[-1] if array.numbers.ndim else 0
    chosen = draw.choice([low, low + 1, high, high - 1, 0, 1, -1, near - 1, near, near + 1, draw.randint(low, high)])
    return min(max(chosen, low), high)


def alter_numbers(array, draw):
    if not array.numbers.size:
        return
    array.numbers = array.numbers.copy()
    flat = array.numbers.reshape(-1)
    how = draw.randrange(6)
    if how == 0:
        flat[:] = extreme(array, draw)
    elif how == 1:
        begin = draw.randrange(flat.size)
        flat[begin : begin + draw.choice([1, 2, 16, 64, 1000])] = extreme(array, draw)
    elif how == 2:
        for _ in range(draw.choice([1, 3, 30])):
            flat[draw.randrange(flat.size)] = extreme(array, draw)
    elif how == 3:
        as_bytes = flat.view(np.uint8)  # the same memory
        for _ in range(draw.choice([1, 8, 100])):
            as_bytes[draw.randrange(as_bytes.size)] ^= 1 << draw.randrange(8)
    elif how == 4:
        order = list(range(flat.size)) if flat.size < 5000 else None
        if order:
            draw.shuffle(order)
            flat[:] = flat[order]
        else:
            flat[:] = flat[::-1].copy()
    else:
        flat[:] = np.roll(flat, draw.choice([1, -1, 7, flat.size // 2]))


def alter_header(file, draw):
    name = draw.choice([*file.fields, "checksums"])
    how = draw.randrange(7)
    if how == 0:
        file.fields.pop(name, None)
    elif how == 1:
        name = draw.choice(["layers", "kv_heads", "head_dim", "length"])
        file.fields[name] = draw.choice([*INTS, file.rows.numbers.shape[0] + 1, file.ids.size - 1, file.ids.size + 64])
    elif how == 2:
        file.spoil.append(("header", draw.choice([0, 1, 23, 4096, 2**20, 2**31, 2**32 - 1])))
    elif how == 3:
        nested = draw.choice(["[", '{"a":']) * draw.choice([100, 5000, 100000])
        file.spoil.append(("body", nested))
    elif how == 4:
        file.fields["framing"] = draw.choice(["chat", "plain", "nonsense", ""])
    elif how == 5:
        file.spoil.append(("version", draw.choice([0, 1, 2, 2, 3, 3, 4, 2**32 - 1])))
    else:
        file.fields[name] = draw.choice(VALUES)


def alter_ids(file, draw):
    file.ids = file.ids.copy()
    for _ in range(draw.choice([1, 5])):
        file.ids[draw.randrange(file.ids.size)] = draw.choice([-1, -(2**31), 2**31 - 1, 299, 300, 0])


def alter_rows(file, draw):
    alter_numbers(file.rows, draw)


def alter_states(file, draw):
    how = draw.randrange(6) if file.states else 5
    if how < 3:
        alter_numbers(file.states, draw)
    elif how == 3:
        chosen = draw.choice([[], [0], [-1], [-1, 0], [0, 0, -1], list(range(len(file.states.numbers))) * 9])
        file.states.numbers = file.states.numbers[chosen]
    elif how == 4:  # as many numbers, or a few less that take as many pages
        layers, size = file.states.numbers.shape[1:]
        file.fields["state"] = draw.choice([[size, layers], [layers * size, 1], [1, layers * size], [layers, size - 1]])
    else:
        file.fields["state"] = draw.choice([*VALUES, *STATES, *STATES, *STATES])


def alter_method(file, draw):
    if file.meta is None or not isinstance(file.meta["method"], str):
        return
    name, _, rest = file.meta["method"].partition(":")
    parts = [p for p in rest.split(",") if p]
    how = draw.randrange(4)
    if how == 0:
        file.meta["method"] = draw.choice([*METHODS, "lsh", "auto", "x", "lsh:K", "a" * draw.choice([900, 60000])])
    elif how == 1:
        parameter = draw.choice(
            ["K", "L", "seed", "sinks", "window", "bits", "tail", "tokens", "page", "block", "budget"]
        )
        file.meta["method"] = f"{name}:{','.join([*parts, f'{parameter}={draw.choice(INTS)}'])}"
    elif how == 2 and parts:
        at = draw.randrange(len(parts))
        parts[at] = f"{parts[at].partition('=')[0]}={draw.choice([*INTS, 0.5, 'none', '0+1+2+3', '1', 'nan', ''])}"
        file.meta["method"] = f"{name}:{','.join(parts)}"
    else:
        file.meta["method"] = draw.choice(VALUES)


def alter_blocks(file, draw):
    blocks = file.meta["blocks"] if file.meta else None
    if not isinstance(blocks, list) or not all(isinstance(b, list) and len(b) == 2 for b in blocks):
        return
    if not all(isinstance(n, int | float) for block in blocks for n in block):
        return
    how = draw.randrange(5)
    if how == 0 and blocks:
        block = draw.choice(blocks)
        at = draw.randrange(2)
        block[at] = draw.choice([*INTS, block[at] + 64, block[at] - 64, block[at] + 1, 1.0 * block[at]])
    elif how == 1 and blocks:
        blocks.pop(draw.randrange(len(blocks)))
    elif how == 2:
        last = blocks[-1][1] if blocks else 4
        blocks.extend([last + 64 * i, last + 64 * i + 64] for i in range(draw.choice([1, 10, 300])))
    elif how == 3 and blocks:
        begin, end = blocks.pop()
        middle = begin + (end - begin) // 128 * 64
        blocks.extend([[begin, middle], [middle, end]])
    else:
        file.meta["blocks"] = draw.choice([*VALUES, [[]], [[4]], [[4, 68, 132]], [["4", "68"]], [None]])


def alter_array(file, draw):
    if file.arrays:
        alter_numbers(file.arrays[draw.choice(list(file.arrays))], draw)


def alter_shape(file, draw):
    if not file.arrays:
        return
    array = file.arrays[draw.choice(list(file.arrays))]
    how = draw.randrange(5)
    if how == 0:
        array.numbers = array.numbers.reshape(-1)
    elif how == 1 and array.numbers.ndim:
        array.numbers = array.numbers[: draw.choice([0, 1, array.numbers.shape[0] - 1])].copy()
    elif how == 2 and array.numbers.ndim > 1:
        array.numbers = np.ascontiguousarray(array.numbers.swapaxes(0, -1))
    elif how == 3 and array.numbers.ndim:
        array.numbers = np.repeat(array.numbers, draw.choice([2, 3]), axis=draw.randrange(array.numbers.ndim))
    else:
        array.dtype = draw.choice(["uint8", "uint16", "int32", "int64", "bfloat16", "float32", "float64", "bool"])


def alter_names(file, draw):
    if not file.arrays:
        return
    first, second = (draw.choice(list(file.arrays)) for _ in range(2))
    how = draw.randrange(4)
    if how == 0:
        file.arrays.pop(first)
    elif how == 1:
        file.arrays[first], file.arrays[second] = file.arrays[second], file.arrays[first]
    elif how == 2:
        new = draw.choice(
            ["frozen/x", "7/ids", "0/x", "0/", "/", "", "frozen", first + "/x", "0/ids", "0/codes", "frozen/mean"]
        )
        file.arrays[new] = deepcopy(file.arrays[first])
    else:
        for i in range(draw.choice([20, 300])):
            file.arrays[f"{i}/x"] = Array("uint8", np.zeros(1, np.uint8))


def alter_entries(file, draw):
    if not file.arrays:
        return
    name = draw.choice(list(file.arrays))
    value = draw.choice([*VALUES, [2**20, 2**20, 2**20, 2**20], [0, 2**62], [0] * 70, [1] * 200, [4, -1], [4, 4.0]])
    file.entries.setdefault(name, {})[draw.choice(["dtype", "shape", "offset", "xxh3"])] = value


def spoil_bytes(file, draw):
    file.spoil.append((draw.choice(["cut", "flip", "append", "index size"]), draw.random(), draw.randrange(1, 256)))


ALTER = {
    alter_array: 10,
    alter_rows: 3,
    alter_states: 2,
    alter_method: 3,
    alter_blocks: 3,
    alter_shape: 3,
    alter_names: 2,
    alter_entries: 2,
    alter_header: 3,
    alter_ids: 1,
    spoil_bytes: 1,
}


# Writing -------------------------------------------------------------------------------------------------------------


def written(file):
    """The bytes of the file, with the checksums of what is in it."""
    from thresher.cache.format import BLOCK, INDEX_MAGIC, MAGIC, STATEFUL_VERSION, VERSION, pages
    from thresher.cache.sequence import STATE_EVERY

    def digest(data):
        return xxhash.xxh3_64_intdigest(data)

    import xxhash

    rows, n = file.rows.numbers, file.ids.size
    states = file.states.numbers if file.states else []
    snapshots = dict(zip([*range(STATE_EVERY, n, STATE_EVERY), n], states, strict=False))
    checksums = ""
    for begin in range(0, n, BLOCK):
        block = np.ascontiguousarray(rows[:, :, :, begin : begin + BLOCK]).tobytes()
        if (snapshot := snapshots.get(min(begin + BLOCK, n))) is not None:
            block += snapshot.tobytes()
        checksums += f"{digest(file.ids[begin : begin + BLOCK].tobytes() + block):016x}"
    body = json.dumps({"checksums": checksums} | file.fields).encode()
    size, version = None, STATEFUL_VERSION if file.states else VERSION
    for what, *how in file.spoil:
        body = how[0].encode() if what == "body" else body
        size = how[0] if what == "header" else size
        version = how[0] if what == "version" else version
    head = MAGIC + struct.pack("<II", version, len(body) if size is None else size) + body
    head += struct.pack("<Q", digest(head))
    out = bytearray(head.ljust(pages(len(head)), b"\0"))
    out += file.ids.tobytes().ljust(pages(4 * n), b"\0")
    if file.states:
        out += states.tobytes().ljust(pages(states.nbytes), b"\0")
    out += rows.tobytes()
    index_at = len(out)
    if file.meta is not None:
        entries, data = {}, bytearray()
        for name, array in file.arrays.items():
            numbers = array.numbers.tobytes()
            entries[name] = {
                "dtype": array.dtype,
                "shape": list(array.numbers.shape),
                "offset": len(data),
                "xxh3": f"{digest(numbers):016x}",
            } | file.entries.get(name, {})
            data += numbers.ljust(-(-len(numbers) // 64) * 64, b"\0")
        body = json.dumps({"meta": file.meta, "arrays": entries}).encode()
        head = INDEX_MAGIC + struct.pack("<I", len(body)) + body
        head += struct.pack("<Q", digest(head))
        out += head.ljust(pages(len(head)), b"\0") + data
    for what, *how in file.spoil:
        if what == "cut":
            del out[int(len(out) * how[0]) :]
        elif what == "flip":
            out[int(len(out) * how[0])] ^= how[1]
        elif what == "append":
            out += bytes([how[1]]) * (1 + int(100 * how[0]))
        elif what == "index size" and len(out) > index_at:
            struct.pack_into("<I", out, index_at + 8, int(2**32 * how[0]))
    return out


# The process that opens them -----------------------------------------------------------------------------------------


def originals(folder):
    """The models, by kind and dtype, and a file of each with every method's index."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import byte_tokenizer, tiny_module
    from thresher import LLM
    from thresher.attention.registry import parse_method
    from thresher.cache.format import KVFileInfo, describe, state_positions

    modules = {
        ("llama", "float32"): tiny_module("llama"),
        ("llama", "bfloat16"): tiny_module("llama"),
        ("mosaic", "float32"): tiny_mosaic(1),
        ("mosaic", "bfloat16"): tiny_mosaic(2),
    }
    models, files = {}, []
    for model, module in modules.items():
        place = folder / "-".join(model)
        module.save_pretrained(place)
        byte_tokenizer().save_pretrained(place)
        weights = {"float32": "float32", "bfloat16": "bf16"}[model[1]]
        llm = models[model] = LLM(place, weights=weights, attention="dense", allow_extrapolation=True)
        for text, length in (METHODS if model[0] == "llama" else METHODS_WITH_STATE).items():
            sequence = llm.read("word " * (length // 5), framing="plain").sequence
            index = llm.runner.prepare(sequence, parse_method(text))
            meta, arrays = (
                json.loads(json.dumps(index.state()[0])) if index else None,
                index.state()[1] if index else {},
            )
            info = KVFileInfo(llm.identity, sequence.layout, sequence.length, weights, "plain", None)
            snapshots = [sequence.states[p].numpy() for p in state_positions(info)]
            files.append(
                File(
                    model,
                    text,
                    describe(info),
                    np.asarray(sequence.token_ids, dtype="<i4"),
                    Array("float32", np.stack(snapshots)) if snapshots else None,
                    as_array(sequence.rows(0, sequence.length)),
                    meta,
                    {name: as_array(t) for name, t in arrays.items()},
                    {},
                    [],
                )
            )
    assert sum(len(f.states.numbers) for f in files if f.states) == 12
    return models, files


def tiny_mosaic(version):
    import torch

    from conftest import VOCAB
    from thresher.models.mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0}
    if version == 1:
        config = MemoryMosaicConfig(**sizes)
    else:
        config = MemoryMosaicConfig.v2(**sizes, short_window=40, long_delay=12)
    return MemoryMosaicForCausalLM(config).eval()


def as_array(tensor):
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    return Array(name, (tensor.view(torch.uint16) if name == "bfloat16" else tensor).contiguous().numpy().copy())


def altered(files, seed, number):
    draw = random.Random(f"{seed} {number}")
    file = draw.choice(files)
    file = File(
        file.model,
        file.method,
        dict(file.fields),
        file.ids,
        Array(file.states.dtype, file.states.numbers) if file.states else None,
        Array(file.rows.dtype, file.rows.numbers),
        deepcopy(file.meta),
        {name: Array(a.dtype, a.numbers) for name, a in file.arrays.items()},
        {},
        [],
    )
    for alter in draw.choices(list(ALTER), list(ALTER.values()), k=draw.choice([1, 1, 1, 2, 3])):
        alter(file, draw)
    return file, draw


def ask(llm, path, draw, method, other):
    """Open the file and read it with its method, and sometimes with one that has to look at all rows; sometimes from
    where no snapshot is."""
    import torch

    from thresher.attention.registry import parse_method
    from thresher.decoding.runner import Work
    from thresher.errors import ThresherError

    try:
        sequence = llm.open(path, verify=draw.random() < 0.7).sequence
        if sequence.states and draw.random() < 0.3:
            sequence.crop(sequence.length - draw.choice([1, 5, 40]))
        for text in [method, other] if draw.random() < 0.1 else [method]:
            logits = llm.runner.run([Work(sequence, [5], 1, parse_method(text))])
        return "answered" if bool(torch.isfinite(logits).all()) else "not numbers"
    except ThresherError as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            raise AssertionError(f"not a line: {str(error)!r:.200}") from error
        return type(error).__name__


def work(options):
    """Open files number by number; the number is kept in the file `state`, for whoever looks on."""
    outcomes, faults = Counter(), []
    worst_seconds, worst_bytes = 0.0, 0
    sanitized = "ASAN_OPTIONS" in os.environ  # its own memory and time would count
    with tempfile.TemporaryDirectory() as folder:
        models, files = originals(Path(folder) / "model")
        for file in files:  # all that is used for the first time, and that the unaltered ones are right
            path = Path(folder) / "x.kv"
            path.write_bytes(written(file))
            for seed in (0, 1):  # without and with checksums
                assert ask(models[file.model], path, random.Random(seed), file.method, METHOD_OF_ROWS) == "answered"
        end = time.monotonic() + options.seconds
        number = options.first
        while number < options.first + options.count and time.monotonic() < end:
            Path(options.state).write_text(str(number))
            file, draw = altered(files, options.seed, number)
            content = written(file)
            path = Path(folder) / f"{number % 2}.kv"
            path.unlink(missing_ok=True)  # the one before may still be mapped
            path.write_bytes(content)
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak
            other = draw.choice(list(METHODS_WITH_STATE if file.states else METHODS))
            begin = time.process_time()
            try:
                outcome = ask(models[file.model], path, draw, file.method, other)
            except Exception:
                outcome = "fault"
                faults.append((number, traceback.format_exc()))
            seconds = time.process_time() - begin
            extra = resident("VmHWM") - before
            outcomes[f"{outcome} with state" if file.states else outcome] += 1
            if not sanitized:
                worst_seconds, worst_bytes = max(worst_seconds, seconds), max(worst_bytes, extra - 2 * len(content))
                if seconds > MOST_SECONDS:
                    faults.append((number, f"{seconds:.1f} s"))
                if extra > 2 * len(content) + MOST_EXTRA:
                    faults.append((number, f"{extra / 2**20:.0f} MiB for a file of {len(content) / 2**20:.1f}"))
            number += 1
    report = {"done": number - options.first, "outcomes": outcomes, "faults": faults}
    Path(options.report).write_text(json.dumps(report | {"seconds": worst_seconds, "bytes": worst_bytes}))


METHOD_OF_ROWS = f"sign:tail=4,budget=16,{SETTINGS}"


def resident(name):
    """Bytes of memory that the process has or, at its peak, had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise ValueError(name)


# The one that looks on -----------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for opening files, the start not counted")
    parser.add_argument("--state", help=argparse.SUPPRESS)
    parser.add_argument("--report", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.state:
        work(options)
        return
    outcomes, faults = Counter(), []
    done, worst_seconds, worst_bytes = 0, 0.0, 0
    first, end = options.first, options.first + options.count
    begin = time.monotonic()
    while first < end and time.monotonic() - begin < options.seconds + 600:
        report, number = run_worker(options, first, end - first)
        if report is None:
            faults.append([first if number is None else number, "the process ended or did not go on; see above"])
            if number is None:
                break
            done += number + 1 - first
            first = number + 1
            continue
        outcomes.update(report["outcomes"])
        faults += report["faults"]
        worst_seconds, worst_bytes = max(worst_seconds, report["seconds"]), max(worst_bytes, report["bytes"])
        done += report["done"]
        break
    for number, what in faults:
        print(f"fault: --seed {options.seed} --first {number} --count 1\n{what}")
    print(
        f"{done} files, {len(faults)} faults; "
        + ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
        + f"; worst {worst_seconds:.2f} s, {worst_bytes / 2**20:.0f} MiB beyond twice the file"
    )
    sys.exit(1 if faults or not done else 0)


def run_worker(options, first, count):
    """The report of a process that opens files, or None, and the number of its last file."""
    with tempfile.TemporaryDirectory() as folder:
        state, report = Path(folder) / "state", Path(folder) / "report"
        command = [sys.executable, __file__, "--first", first, "--count", count, "--seed", options.seed]
        command += ["--seconds", options.seconds, "--state", state, "--report", report]
        child = subprocess.Popen([str(part) for part in command])
        last, since = None, time.monotonic()
        while child.poll() is None:
            time.sleep(0.1)
            text = state.read_text() if state.exists() else ""
            if text != last:
                last, since = text, time.monotonic()
            elif time.monotonic() - since > STUCK_SECONDS:
                child.kill()
        if report.exists():
            return json.loads(report.read_text()), None
        print(f"the process ended with {child.returncode}")
        return None, int(last) if last else None


if __name__ == "__main__":
    main()
