# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for Hopper without a GPU and counts what the main loop costs.

    python experiments/benchmarks/offline_compile.py [--json FILE]

Per kernel and tile: registers, spilled bytes, shared memory, and instructions per element of the loop with the most
arithmetic, from the disassembly that Triton's own tools give. Needs Triton, not CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dplip.kernels.triton import largest, top_k
from dplip.kernels.triton.launch import TILES, options

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {"x": "*fp32", "x2": "*fp32", "w": "*fp32", "c": "*fp32", "low": "*i32", "high": "*i32", "keys": "*i32"}


def compiled(function: Any, types: dict[str, str], constants: dict[str, Any], settings: dict[str, int]) -> Any:
    """``function`` for sm_90, its pointers and sizes multiples of 16."""
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    odd = {"units", "share", "total", "tiles_m", "B", "N", "zero", "I", "x_row", "w_row"}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and n not in odd}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=settings)


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def measure(kernel: Any, elements: int) -> dict[str, Any]:
    """Resources and the main loop's instructions per element; ``elements``: of one thread and iteration."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    loop = main_loop(sass)
    kinds = {k: sum(line.startswith(k) for line in loop) for k in ("FADD", "FMNMX", "VIMNMX", "HADD2", "VHMNMX", "LDS")}
    kinds["VIMNMX3"] = sum(line.startswith("VIMNMX3") for line in loop)
    copies = [line.split()[0] for line in loop if line.startswith(("LDGSTS", "LDG"))]
    return {
        "registers": registers,
        "spill_bytes": stack,
        "shared": kernel.metadata.shared,
        "loop": len(loop),
        "per_element": round(len(loop) / elements, 3),
        "copies": sorted(set(copies)),
        **kinds,
    }


def main_loop(sass: str) -> list[str]:
    """The shortest loop, from a label to the branch back to it, that holds most of the arithmetic."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, list[str]]] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        if label:
            labels[label[1]] = len(lines)
            continue
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S.*?);", line)
        if not found:
            continue
        lines.append(found[1])
        back = re.search(r"BRA.*?(\.L\w+)", found[1])
        if back and back[1] in labels:
            body = lines[labels[back[1]] :]
            loops.append((sum(x.startswith(("FADD", "HADD2", "FMNMX", "FMUL", "FFMA")) for x in body), body))
    most = max(count for count, _ in loops)
    return min((body for count, body in loops if count >= 0.8 * most), key=len)


def rows() -> list[dict[str, Any]]:
    """One row per kernel and tile of the launch table."""
    found = []
    for name, tiles in TILES.items():
        for tile in dict.fromkeys(tiles.values()):
            settings = options(tile)
            constants = {k: v for k, v in settings.items() if k.isupper()} | {"KIND": 0}
            types, function = dict(TYPES), largest._largest_kernel
            half, index = name.startswith("half"), name.endswith("index")
            constants |= {"VEC": 4, "BRACKET": index, "HALF": half, "SHORT": False}
            types["out"] = "*i64" if index else "*i32"
            if half:
                types |= {"x": "*i32", "x2": "*i32", "w": "*i32"}
            if name == "interval":
                function = largest._interval_kernel
                constants = {k: v for k, v in constants.items() if k not in ("KIND", "BRACKET", "HALF")}
            if name.startswith("keys"):
                function = top_k._keys_kernel
                constants = {k: v for k, v in constants.items() if k not in ("BRACKET", "HALF", "SHORT")}
                constants["MASK"] = False
            kernel = compiled(function, types, constants, {k: v for k, v in settings.items() if k.islower()})
            elements = tile.RM * tile.RN * tile.depth * (2 if half else 1)
            found.append({"kernel": name, "tile": str(tuple(tile)), **measure(kernel, elements)})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    result = {"triton": triton.__version__, "rows": rows()}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
