"""One thread for every library, set before any of them is imported."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
    os.environ[name] = "1" if name != "TOKENIZERS_PARALLELISM" else "false"
