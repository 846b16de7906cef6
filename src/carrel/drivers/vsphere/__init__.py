"""The vsphere driver: guests as virtual machines of a vCenter, each a Slurm node of its own.

Needs ``carrel[vsphere]`` (pyVmomi); nothing else of Carrel imports this package, so a node that does not use it never
loads it.
"""
