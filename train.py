"""deepspeed train.py --deepspeed ds_configs/z3.json [--config FILE] [--SECTION.OPTION VALUE ...]; see --help."""

import signal

# These signals are blocked during the imports, and cfvlm_ds.cluster.signals handles them afterwards. Ctrl-C ends the process at once,
# because there is nothing to save yet.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
signal.signal(signal.SIGINT, signal.SIG_DFL)

from cfvlm_ds.cli.exits import leave_at_once  # noqa: E402
from cfvlm_ds.cli.train import train_main  # noqa: E402

if __name__ == "__main__":
    leave_at_once(train_main)
