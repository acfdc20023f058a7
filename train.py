"""deepspeed train.py --deepspeed ds_configs/z3.json [--config FILE] [--SECTION.OPTION VALUE ...]; see --help."""

import os
import signal
import sys

# Held back while packages are imported; cfvlm_ds.cluster.signals answers them from then on. Ctrl-C has nothing to save so far.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
signal.signal(signal.SIGINT, signal.SIG_DFL)

from cfvlm_ds.cli.train import train_main  # noqa: E402

if __name__ == "__main__":
    try:
        train_main()
    except SystemExit as left:
        if not left.code:
            raise
        # At once: torch takes seconds to tear down, and the TERM that launchers send when the first rank has left would change the code.
        sys.stdout.flush()
        os._exit(int(left.code))
