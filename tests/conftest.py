import os

# As `recast` itself does: torch's threads must not spin while they wait for one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
