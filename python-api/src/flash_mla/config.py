"""What is installed, and which kernel serves which operator on this machine."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from flash_mla._ops import __version__, build_info, ops


@dataclass(frozen=True)
class Variant:
    """A kernel of the native library, and whether it runs on a device."""

    operator: str
    name: str
    row: str
    reason: str  # why its row does not run on the device; empty when it does


def variants(device: torch.device | str = "cpu") -> list[Variant]:
    """The variant table, in order of preference within an operator."""
    device = torch.device(device)
    index = device.index or 0
    return [Variant(*line.split(",", 3)) for line in ops.variants(device.type == "cuda", index)]


def serves(operator: str, device: torch.device | str) -> bool:
    """Whether some kernel of the operator ("mla_decode_dense", ...) runs on the device."""
    return any(v.operator == operator and not v.reason for v in variants(device))


def config_text() -> str:
    """The text that `show_config` prints."""
    devices: list[torch.device] = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    lines = [
        f"flash_mla           {__version__}",
        f"libflash_mla        {build_info['version']}",
        f"torch               {torch.__version__}",
        f"python              {platform.python_version()} {platform.machine()}",
        f"CUDA architectures  {build_info['cuda_architectures'].replace(';', ' ') or 'none'}",
        f"CPU instructions    {build_info['cpu_isa']}, {torch.get_num_threads()} threads",
    ]
    for device in devices:
        name = "" if device.type == "cpu" else f" ({torch.cuda.get_device_name(device)})"
        lines += ["", f"{device}{name}"]
        operator = ""
        for variant in variants(device):
            shown = variant.operator if variant.operator != operator else ""
            operator = variant.operator
            lines.append(f"  {shown:27}{variant.name:18}{variant.reason or 'yes'}")
    return "\n".join(lines)


def show_config() -> None:
    """Prints versions, devices, and for each operator which kernels run where, or why not."""
    print(config_text())
