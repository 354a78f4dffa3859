"""The attention patterns of one layer: `output_attentions` with eager everywhere, and insitu.

make bench
"""

from _one_layer import Comparison

PATTERNS = Comparison(
    name="plain, eager everywhere",
    plain="patterns_plain.py",
    insitu="patterns_insitu.py",
    lengths=(128, 1024),
    # The other layers keep their kernel, which rounds otherwise.
    atol=1e-3,
)

if __name__ == "__main__":
    PATTERNS.print(__doc__)
