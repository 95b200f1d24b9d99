"""Runs pytest as other processors would compute: `python tests/processors.py ARGUMENTS OF PYTEST`.

Thread counts, instruction sets and code paths change the order of sums, so the last bits of every number. Each run
says what oneDNN and torch chose: where a processor lacks an instruction set, the cap that names it does nothing.
ATEN_CPU_CAPABILITY is left alone: torch's own packing of bfloat16 breaks with it on processors with AMX.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
RUNS = (
    dict.fromkeys(THREADS, "1"),
    dict.fromkeys(THREADS, "2"),
    dict.fromkeys(THREADS, "1") | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    dict.fromkeys(THREADS, "1") | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    dict.fromkeys(THREADS, "1") | {"MKL_CBWR": "COMPATIBLE"},
)
CHOSEN = """
import torch
convolution, pictures = torch.nn.Conv2d(16, 16, 3), torch.randn(32, 16, 32, 32)
with torch.no_grad():
    convolution(pictures)
print("torch", torch.backends.cpu.get_cpu_capability(), "threads", torch.get_num_threads())
"""


def chosen(environment: dict[str, str]) -> str:
    """What oneDNN and torch use under these variables, in one line."""
    done = subprocess.run(
        [sys.executable, "-c", CHOSEN], env=environment | {"ONEDNN_VERBOSE": "1"}, capture_output=True, text=True
    )
    used = re.findall(r"onednn_verbose.*?,cpu,isa:([^\n,]+)", done.stdout)
    kernels = sorted(set(re.findall(r",primitive,exec,cpu,\w+,([\w:+]+),", done.stdout)))
    ours = next((line for line in done.stdout.splitlines() if line.startswith("torch ")), done.stderr[-300:])
    return f"oneDNN {used[0] if used else 'said nothing'} ({', '.join(kernels) or 'no kernel'}); {ours}"


def main(arguments: list[str]) -> int:
    """Runs pytest under each setting; returns 1 if a run failed."""
    results = []
    for variables in RUNS:
        environment = {**os.environ, **variables}
        said = " ".join(f"{name}={value}" for name, value in variables.items())
        line = f"{said}: {chosen(environment)}"
        print(f"\n{line}", flush=True)
        done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment)
        results.append((done.returncode, line))
    print()
    for status, line in results:
        print("passed" if status == 0 else f"FAILED ({status})", line)
    return int(any(status for status, _ in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
