"""`DeviceName`: a device as upstream has it, a string."""

import torch


class DeviceName(str):
    """A device's name that equals the string and the `torch.device`, and has the latter's parts.

    Args:
        name: what the caller asked for, such as "cuda".
        device: what it stands for.
    """

    device: torch.device

    def __new__(cls, name: str, device: torch.device) -> "DeviceName":
        made = super().__new__(cls, name)
        made.device = device
        return made

    @property
    def type(self) -> str:
        return self.device.type

    @property
    def index(self) -> int | None:  # type: ignore[override]
        return self.device.index

    def __eq__(self, other: object) -> bool:
        if isinstance(other, torch.device):
            return other in (self.device, torch.device(str(self)))
        return str.__eq__(self, other) is True

    __hash__ = str.__hash__

    def __reduce__(self) -> tuple[object, ...]:
        return DeviceName, (str(self), self.device)
