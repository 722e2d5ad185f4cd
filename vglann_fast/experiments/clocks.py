"""Clocks, power and throttle reasons of the GPU while it is timed, from NVML (nvidia-ml-py, optional)."""

from typing import Any

import torch


class Clocks:
    """Sampled beside the timing; it never changes a setting of the card.

    `why_not` says why nothing can be sampled: no GPU, no nvidia-ml-py, or no answer of the driver.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[int, int, int, int]] = []
        self.why_not: str | None = None
        if not torch.cuda.is_available():
            self.why_not = "no GPU"
            return
        try:
            import pynvml
        except ImportError:
            self.why_not = "nvidia-ml-py is not installed"
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            self._card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self.sample()
        except (pynvml.NVMLError, AttributeError) as error:  # a part of a GPU has no clocks of its own
            self.why_not = f"NVML: {error}"

    def sample(self) -> None:
        """One look: SM and memory clock in MHz, power in mW, the bits of the throttle reasons."""
        if self.why_not:
            return
        nvml, card = self._nvml, self._card
        # the same call, renamed in a newer driver interface
        reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        self.samples.append(
            (
                nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM),
                nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM),
                nvml.nvmlDeviceGetPowerUsage(card),
                reasons(card),
            )
        )

    def taken(self) -> dict[str, Any]:
        """Return what was sampled since the last call: ranges, and the throttle reasons seen in any sample."""
        if self.why_not:
            return {"not_sampled": self.why_not}
        samples, self.samples = self.samples, []
        if not samples:
            return {"not_sampled": "nothing was timed"}
        sm, memory, power, bits = zip(*samples, strict=True)
        return {
            "sm_mhz": [min(sm), max(sm)],
            "memory_mhz": [min(memory), max(memory)],
            "power_w": [min(power) / 1000, max(power) / 1000],
            "throttle_reasons": reason_names(*bits),
        }


# Bits of NVML's clocks event reasons, as nvml.h names them.
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
    0x100: "display clocks",
}


def reason_names(*bits: int) -> list[str]:
    """The reasons that are set in any of `bits`."""
    return [name for bit, name in REASONS.items() if any(b & bit for b in bits)]
