"""Several trainings in one process family: each argument is one training's options as a JSON list. Import and start-up are paid once."""

import json
import sys

from cfvlm_ds.cli import run

for arguments in sys.argv[1:]:
    if not arguments.startswith("--local_rank"):
        run(json.loads(arguments))
