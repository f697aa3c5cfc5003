"""Stand for a preprocessing, in processes that decode. Its pixels say which process made them."""

import os
import signal
from pathlib import Path

import numpy as np

from featcli.errors import MachineError

# Widths of pictures that kill the process, always or as long as there is no file DIED, or that the machine cannot take.
DEADLY, DEADLY_ONCE, FAULTY = 13, 14, 15


class OwnNumber:
    """Gives (3, 4, 4) pixels, each the number of the process."""

    channels, dtype, is_native = 3, "int32", False

    def fit_for(self, decode):
        return fit


def fit(picture):
    died = Path(os.environ.get("DIED", ""))
    if picture.width == DEADLY or (picture.width == DEADLY_ONCE and not died.exists()):
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if picture.width == FAULTY:
        raise MachineError("the machine cannot", "mend it")
    return np.full((3, 4, 4), os.getpid(), np.int32)
