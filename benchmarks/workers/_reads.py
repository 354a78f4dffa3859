"""How many decoder layers are read, over how many tokens: `MODEL [COUNTS [TOKENS]]`.

Needs nothing but the standard library.
"""

import sys

COUNTS = [int(count) for count in (sys.argv[2] if len(sys.argv) > 2 else "0,1,12").split(",")]
_NUM_TOKENS = int(sys.argv[3]) if len(sys.argv) > 3 else 8
TOKEN_IDS = [(5 + 37 * place) % 251 for place in range(_NUM_TOKENS)]
