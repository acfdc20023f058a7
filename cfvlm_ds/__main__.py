"""``python -m cfvlm_ds COMMAND``, and what a launcher starts: ``deepspeed --module cfvlm_ds train ...``."""

from cfvlm_ds.cli.main import main

if __name__ == "__main__":
    main()
