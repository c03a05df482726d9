"""Where packs train. `sweep.py` decides what trains together; an executor, where and when.

This process is the default and lives in `sweep.py`; `on_ray.py` has a cluster's devices.
"""
