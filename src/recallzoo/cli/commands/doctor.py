"""Print versions and devices, and try every fast path: which work, and why others do not.

examples:
  recallzoo doctor
  recallzoo doctor --json
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recallzoo.cli._options import parse


@dataclass(frozen=True)
class DoctorOptions:
    """How to print."""

    json: bool = False
    """Print JSON, for programs."""


def main(argv: list[str]) -> int:
    """`recallzoo doctor`: exit code 0 unless not even a tiny CPU run trains."""
    options = parse(DoctorOptions, argv, "doctor", __doc__)
    from rich.console import Console

    from recallzoo.cli._probes import all_probes, probe

    machine = _machine()
    findings = []
    if not options.json:
        _print_machine(machine)
    terminal = Console(stderr=True)
    for name, function in all_probes():
        with terminal.status(f"trying {name}"):  # a compiler may take a minute
            finding = probe(name, function)
        findings.append(finding)
        if not options.json:
            mark = "yes" if finding.works else "no"
            print(f"{mark:<4} {finding.name}: {finding.detail}", flush=True)
    if options.json:
        content = {**machine, "fast_paths": [finding.as_json() for finding in findings]}
        json.dump(content, sys.stdout, indent=2)
        print()
    core = findings[0]
    if not core.works:
        print(f"error: not even a tiny model trains: {core.detail}", file=sys.stderr)
        return 1
    return 0


def _machine() -> dict[str, Any]:
    import torch

    from recallzoo.cli._probes import free_gigabytes
    from recallzoo.provenance import environment

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_gb": round(properties.total_memory / 1e9, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {
        "versions": environment(),
        "cuda_of_torch": torch.version.cuda,
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "devices": devices,
        "free_disk_gb": round(free_gigabytes(Path.cwd()), 1),
    }


def _print_machine(machine: dict[str, Any]) -> None:
    for name, version in machine["versions"].items():
        print(f"{name}: {version or 'not installed' if name != 'commit' else version or 'unknown'}")
    print(f"CUDA that PyTorch was built for: {machine['cuda_of_torch'] or 'none'}")
    print(f"CPU: {machine['cpu_cores']} cores, {machine['torch_threads']} threads in PyTorch")
    for device in machine["devices"]:
        print(
            f"{device['device']}: {device['name']}, {device['memory_gb']} GB, compute capability "
            f"{device['compute_capability']}"
        )
    if not machine["devices"]:
        print("GPU: none")
    print(f"free disk here: {machine['free_disk_gb']} GB")
    print()
