"""What optional libraries are called on the package index, for messages that say how to get one.

Penstock itself is not on the index, so its extras are no remedy there.
"""

# As in pyproject.toml, which a test compares.
_PACKAGES: dict[str, tuple[str, ...]] = {
    "azure": ("adlfs>=2024.12",),
    "dgl": ("dgl>=1.1.3,<2", "packaging"),
    "gcs": ("gcsfs>=2024.12",),
    "mlflow": ("mlflow-skinny>=2.14",),
    "pyg": ("torch_geometric>=2.5",),
    "ray": ("ray[default]>=2.40",),
    "s3": ("s3fs>=2024.12", "aiobotocore>=2.16"),
    "tensorboard": ("tensorboardX>=2.6.2",),
    "wandb": ("wandb>=0.17",),
}


def install_command(extra: str) -> str:
    """The command that brings the libraries of an extra."""
    return "pip install " + " ".join(f"'{package}'" for package in _PACKAGES[extra])
