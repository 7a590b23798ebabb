"""What users may give for a path."""

import os

AnyPath = str | os.PathLike[str]
