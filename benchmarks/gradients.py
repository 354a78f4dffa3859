"""The gradient of one hidden state: plain autograd with a hook, and insitu.

make bench
"""

from _one_layer import Comparison

GRADIENTS = Comparison(
    name="plain autograd",
    plain="gradient_plain.py",
    insitu="gradient_insitu.py",
    lengths=(16, 128, 512),
    atol=1e-4,
)

if __name__ == "__main__":
    GRADIENTS.print(__doc__)
