"""deepspeed train.py --deepspeed ds_configs/z3.json [--config FILE] [--SECTION.OPTION VALUE ...]; see --help."""

import signal

# Held back while packages are imported; cfvlm_ds.stopping answers them from then on.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})

from cfvlm_ds.cli import train_main  # noqa: E402

if __name__ == "__main__":
    train_main()
