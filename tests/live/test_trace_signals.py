# SPDX-License-Identifier: GPL-2.0-only
"""`kvirt trace` that is interrupted while it is still attaching, when nobody has its session yet."""

import json
import signal

# A guest without KVM on a busy host.
PATIENCE = 120

# In the guest: from outside nobody would be quick enough to hit the moment.
INTERRUPT = """
import json, subprocess, sys, time
from pathlib import Path

def probes():
    return len(Path("/sys/kernel/tracing/enabled_functions").read_text().splitlines())

before = probes()
tracer = subprocess.Popen(["kvirt", "trace"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
while tracer.poll() is None and probes() < before + 3:
    time.sleep(0.01)
# The second comes while what was attached is taken away: any later, and it would end what is ending anyway.
for number in sys.argv[1:]:
    tracer.send_signal(int(number))
    attached = probes()
out, err = tracer.communicate()
print(json.dumps([tracer.returncode, out, err, before, attached, probes()]))
"""


def test_interrupted_while_attaching(guest73):
    argv = ["python3", "-c", INTERRUPT, str(int(signal.SIGINT)), str(int(signal.SIGTERM))]
    done = guest73.run(argv, timeout=PATIENCE, check=True)
    status, out, err, before, attached, left = json.loads(done.stdout)
    assert status == 128 + signal.SIGINT
    assert (out, err.strip()) == ("", "kvirt: interrupted, and nothing is known of what was not printed.")
    assert attached > before
    assert left == before
