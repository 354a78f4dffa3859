"""The sweep that every subject of sweep.py runs: what to patch where, and what is asked.

Needs nothing but the standard library.
"""

import os

CLEAN = "When Mary and John went to the store, John gave a drink to"
# Two prompts that begin alike are the common case: what is patched there changes nothing.
CORRUPTED = {
    "alike": "When Mary and John went to the store, Mary gave a drink to",
    "different": "After Mary and John went to the store, Mary gave a drink to",
}[os.environ.get("SWEEP_PROMPTS", "alike")]
ANSWERS = (" Mary", " John")
NUM_POSITIONS = 14
LAYERS = range(0, 30, int(os.environ.get("SWEEP_LAYER_STEP", "1")))
CELLS = [(layer, position) for layer in LAYERS for position in range(NUM_POSITIONS)]


def sample(num_cells):
    """Gives cells that are spread evenly over the sweep."""
    count = min(num_cells, len(CELLS))
    return [CELLS[number * len(CELLS) // count] for number in range(count)]


def batches(cells, size):
    """Cuts cells into batches."""
    return [cells[start : start + size] for start in range(0, len(cells), size)]
