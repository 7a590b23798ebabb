"""Graph stores, checkpoints and results at any fsspec URI (`s3://`, `gs://`, `az://`, `file://`, ...).

Hot data is always local: `stage` copies a store to local disk, checked and resumable, shared by the processes of a
host; `mirror` keeps a remote copy of a run folder while it grows, and brings it back. Credentials come from the
environment or the machine's role, never from us.
"""
