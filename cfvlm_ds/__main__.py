"""Entry point for ``python -m cfvlm_ds COMMAND``, also used by launchers: ``deepspeed --module cfvlm_ds train ...``."""

from cfvlm_ds.cli.main import main

if __name__ == "__main__":
    main()
