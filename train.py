"""deepspeed train.py --deepspeed ds_configs/z3.json [--config FILE] [--SECTION.OPTION VALUE ...]; see --help."""

from cfvlm_ds.cli import train_main

if __name__ == "__main__":
    train_main()
