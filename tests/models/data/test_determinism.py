"""The drawn data are the same in every process, so that an interrupted study goes on with its own images."""

import os
import subprocess
import sys

PROGRAM = """
import hashlib
from moe_kernels.models.data import digits, letters
sha = hashlib.sha256()
for dataset in digits.load(2).evaluation:
    for i in range(len(dataset)):
        sha.update(dataset[i][0].numpy().tobytes())
    sha.update(dataset.labels.numpy().tobytes())
for tensor in letters.load(100, seed=2):
    sha.update(tensor.numpy().tobytes())
found = sha.hexdigest()
"""


def test_another_process_draws_the_same():
    here: dict[str, str] = {}
    exec(PROGRAM, here)
    subprocess.run(
        [sys.executable, "-c", f"{PROGRAM}\nassert found == {here['found']!r}, found"],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        check=True,
    )
