"""A decoding process ends with the process that started it."""

import subprocess
import sys

WAIT = """
import threading, time
from vglann_fast.clips.decode_child import end_with_parent
threading.Thread(target=end_with_parent, args=(1,), daemon=True).start()
print("ready", flush=True)
time.sleep(600)
"""


def test_a_decoder_at_work_ends_when_nobody_reads_its_answers():
    with subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.stdout.close()
        assert process.wait(timeout=120) == 1
