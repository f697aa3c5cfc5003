"""Stand for a preprocessing, in processes that decode. Its pixels say which process made them."""

import os
import signal

import numpy as np

from featcli.errors import MachineError

DEADLY, FAULTY = 13, 14  # widths of pictures that kill the process, or that the machine cannot take


class OwnNumber:
    """Gives (3, 4, 4) pixels, each the number of the process."""

    channels, dtype, is_native = 3, "int32", False

    def fit_for(self, decode):
        return fit


def fit(picture):
    if picture.width == DEADLY:
        os.kill(os.getpid(), signal.SIGKILL)
    if picture.width == FAULTY:
        raise MachineError("the machine cannot", "mend it")
    return np.full((3, 4, 4), os.getpid(), np.int32)
