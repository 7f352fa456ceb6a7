"""pandarallel: parallel_apply of a frame of 16 MB, through pipes."""

import numpy as np
import pandas as pd
from library import show
from pandarallel import pandarallel

FRAME = pd.DataFrame(np.arange(2_000_000.0).reshape(-1, 100))


def use(_method):
    pandarallel.initialize(nb_workers=2, progress_bar=False, verbose=0, use_memory_fs=False)
    return [FRAME.parallel_apply(np.cumsum, axis=1).to_numpy()]


if __name__ == "__main__":
    show("pandarallel", use, [FRAME.apply(np.cumsum, axis=1).to_numpy()])
