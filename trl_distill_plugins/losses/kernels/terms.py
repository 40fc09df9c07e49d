"""What the native tile kernels are told about a term of an objective."""

from dataclasses import dataclass
from typing import Literal

KernelKind = Literal["cross_entropy", "forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class KernelTerm:
    """One loss, as a native kernel knows it.

    Args:
        kind: which loss.
        weight: factor of the term in the objective, T^2 multiplied in.
        temperature: T, for the divergences.
        beta: share of the teacher in the mixture, strictly between 0 and 1; `jsd` only.
        label_smoothing: `cross_entropy` only.
    """

    kind: KernelKind
    weight: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5
    label_smoothing: float = 0.0
