"""Several trainings in one process family, so that start-up is paid once: each line of the file is one's options, a JSON list."""

import json
import sys
from pathlib import Path

from cfvlm_ds.cli import run

for line in Path(sys.argv[-1]).read_text().splitlines():
    run(json.loads(line))
