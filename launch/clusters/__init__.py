"""What a scheduler is given: one module per kind of cluster, a `Job` in, a script or a manifest out.

All of them run the same entry point with the same arguments and restart it when it exits with 75 (it was
preempted and saved everything) or 4 (a checkpoint could not be written), or a signal ended it; any other exit
code is final, a wrong configuration (2) above all. The table of exit codes is in launch/cli.py.
"""
from launch.clusters import gke, local, slurm, tpu_vm
from launch.clusters.job import Job, Script

CLUSTERS = {"local": local.script, "slurm": slurm.script, "tpu_vm": tpu_vm.script, "gke": gke.script}

__all__ = ("CLUSTERS", "Job", "Script")
