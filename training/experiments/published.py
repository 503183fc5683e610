"""What the paper reports: mean average precision in percent (Qiu et al., AAAI 2024, Tables 1 and 2).

Measured at 1,000 (CIFAR-10) and 5,000 results with a fine-tuned VGG16, on all 60,000 images of CIFAR-10. Methods have the
names of :mod:`training.experiments.tables`.
"""

from __future__ import annotations

__all__ = ["SOURCE", "published_map"]

SOURCE = "Qiu et al., HiHPQ, AAAI 2024, Tables 1 and 2 (fine-tuned VGG16)"

# protocol -> method -> MAP at 16, 32 and 64 bits
_BITS = (16, 32, 64)
_MAP: dict[str, dict[str, tuple[float, float, float]]] = {
    "flickr25k": {
        "pq": (62.75, 66.63, 69.40),
        "opq": (63.27, 68.01, 69.86),
        "spq": (77.35, 78.74, 79.98),
        "mecoq": (81.31, 81.71, 82.68),
        "hihpq": (80.74, 82.55, 82.95),
    },
    "cifar10-i": {
        "pq": (27.14, 33.30, 37.67),
        "opq": (27.29, 35.17, 38.48),
        "spq": (63.17, 66.88, 68.02),
        "mecoq": (68.20, 69.74, 71.06),
        "hihpq": (70.56, 73.22, 73.71),
    },
    "cifar10-ii": {
        "pq": (28.16, 30.24, 30.61),
        "opq": (32.17, 33.50, 34.46),
        "spq": (56.56, 61.45, 63.30),
        "mecoq": (62.88, 64.09, 65.07),
        "vanilla-euclidean": (59.26, 62.52, 62.72),
        "vanilla-hyperbolic": (58.40, 61.86, 62.17),
        "instance-euclidean": (61.56, 64.70, 65.40),
        "instance-hyperbolic": (61.80, 63.84, 63.98),
        "prototype-euclidean": (60.84, 64.36, 65.10),
        "prototype-hyperbolic": (62.65, 65.54, 66.85),
        "hihpq": (63.31, 65.81, 67.11),
    },
    "nus-wide": {
        "pq": (65.39, 67.41, 68.56),
        "opq": (65.74, 68.38, 69.12),
        "spq": (78.51, 80.41, 81.70),
        "mecoq": (78.31, 81.59, 81.80),
        "hihpq": (79.86, 82.05, 82.63),
    },
}


def published_map(protocol: str, method: str, bits: int) -> float | None:
    """MAP in percent, or None where the paper gives none."""
    found = _MAP.get(protocol, {}).get(method)
    return found[_BITS.index(bits)] if found and bits in _BITS else None
